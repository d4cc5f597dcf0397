"""KVStore: the cache of one layer. Sealed pages are only ever added; recent tokens and sinks are raw.

Tokens have positions from 0 to ``tokens``, the same for all rows of the batch; row b's first real token is at ``starts[b]`` (left
padding before it is never sealed). From there on a row's tokens lie in the sinks, then in its pages, then, from ``tail_begin[b]``, in the
tail, a raw buffer that all rows share. A row's pages depend on its own tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.calibration.transform import Transform
from kvcomp.codec import codebook
from kvcomp.codec.block import check_channels, scales_size
from kvcomp.codec.codebook import TRAINING_TOKENS, Codebook
from kvcomp.codec.dtypes import FIXED, RAW
from kvcomp.codec.page import Layout, directory_of
from kvcomp.errors import BackendUnavailable, InvalidInput
from kvcomp.kernels import Books, Steps, load_backend
from kvcomp.spec import KINDS, PAGE_TOKENS, CodecSpec
from kvcomp.store.memory import Memory
from kvcomp.store.tensors import NAMES, as_array
from kvcomp.store.training import check_books, counted, default_book, kept_counts


class KVStore:
    """The K and V of one layer, compressed as they grow.

    spec: a spec of one layer (``CodecSpec.layer``). backend: ``cpu``, or ``reference`` to check against it.
    books: for K and for V the default book and the one that every row has for its own, as a calibration has them for the unit ``head``; rows then
        train none. Without, default books follow from relative scales; the unit ``head`` has none, so that its blocks have a fixed
        width until a row has trained its own book.
    transform: what K and V pass before they are held, all of them: pages, sinks and tail hold K' and V'.

    Attributes: ``tokens``, positions held, left padding included; ``batch``, ``heads``, ``channels``, ``dtype``, known after the first append.
    """

    layout: Layout
    starts: npt.NDArray[np.int64]
    tail_begin: npt.NDArray[np.int64]
    sink_count: npt.NDArray[np.int64]
    pages: npt.NDArray[np.int64]  # (rows, capacity) addresses, the first count[row] of them used
    valid: npt.NDArray[np.int32]  # (rows, capacity) how many of a page's tokens count
    count: npt.NDArray[np.int64]
    tail_base: int  # position of the tail's first token
    tail_k: Tensor  # (rows, KV heads, room, head_dim), as tail_v
    tail_v: Tensor
    sinks_k: Tensor  # (rows, KV heads, sinks, head_dim), as sinks_v
    sinks_v: Tensor

    def __init__(
        self,
        spec: CodecSpec,
        backend: str = "cpu",
        books: tuple[Books, Books] | None = None,
        transform: Transform | None = None,
    ) -> None:
        self.spec = spec
        self.transform = transform
        self.kernels = load_backend(backend)
        self.units = spec.key.unit, spec.value.unit
        self.steps: Steps = spec.key.heads, spec.value.heads
        self.given_books = books
        if books is None:
            self.default_books = default_book(spec.key), default_book(spec.value)
        else:
            check_books(spec, books)
            self.default_books = books[0][0], books[1][0]
        self.tokens = self.batch = self.heads = self.channels = 0
        self.dtype, self.device = torch.float32, torch.device("cpu")
        # For each row: the buffer behind each page, the codebooks of K and V, and the pair counts until there are such books.
        self.owners: list[list[npt.NDArray[np.uint8]]] = []
        self.own_books: list[list[Codebook | None]] = []
        self.pair_counts: list[list[npt.NDArray[np.uint32] | None]] = []

    # What one append or seal changes

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens at the end, raw until ``seal``.

        k, v: (batch, KV heads, new tokens, head_dim), float32, float16 or bfloat16, on the CPU.
        Raises InvalidInput or BackendUnavailable and leaves the store as it was.
        """
        self._check(k, v)
        if self.transform is not None:
            k, v = self.transform.key.apply(k), self.transform.value.apply(v)
        if not self.batch:
            self.begin(k)
        new = k.shape[2]
        if self.tokens - self.tail_base + new > self.tail_k.shape[2]:
            self._make_room(k, v)
        else:
            at = self.tokens - self.tail_base
            self.tail_k[:, :, at : at + new] = k.detach()
            self.tail_v[:, :, at : at + new] = v.detach()
        self.tokens += new

    def set_starts(self, starts: Sequence[int]) -> None:
        """Say at which position each row's real tokens begin. Raises InvalidInput for a row that is sealed from another position."""
        if len(starts) != self.batch or not all(0 <= start <= self.tokens for start in starts):
            raise InvalidInput(f"starts must be {self.batch} positions from 0 to {self.tokens}, not {list(starts)}")
        new = np.asarray(starts, np.int64)
        moved = new != self.starts
        if (moved & ((self.tail_begin > self.starts) | (new < self.tail_base))).any():
            raise InvalidInput("the padding of a row cannot change once its tokens are compressed")
        self.starts[moved] = self.tail_begin[moved] = new[moved]

    def seal(self) -> None:
        """Compress every whole page of tokens beyond the window. What is sealed never changes."""
        if not self.batch:
            return
        sealed = [self._seal_row(row) for row in range(self.batch)]
        if any(sealed):
            self._trim_tail()

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` positions. Raises InvalidInput if there are fewer."""
        if not 0 <= tokens <= self.tokens:
            raise InvalidInput(f"cannot crop a cache of {self.tokens} tokens to {tokens}")
        if tokens == self.tokens:
            return
        for row in np.flatnonzero(self.tail_begin > tokens):
            self.starts[row] = min(self.starts[row], tokens)
            self.sink_count[row] = min(self.sink_count[row], tokens - self.starts[row])
            in_pages = tokens - self.starts[row] - self.sink_count[row]
            before = np.concatenate([[0], np.cumsum(self.valid[row, : self.count[row]])])
            keep = int(np.searchsorted(before, in_pages))
            if keep:
                self.valid[row, keep - 1] = in_pages - before[keep - 1]
            self.count[row] = keep
            del self.owners[row][keep:]
            self.tail_begin[row] = tokens
        self.tokens = tokens
        self.tail_base = min(self.tail_base, tokens)

    @torch.inference_mode(False)
    def select(self, rows: Tensor) -> None:
        """Make the batch of these rows, which may repeat; sealed pages are shared. Raises InvalidInput for rows that do not exist."""
        if rows.is_floating_point() or rows.dtype == torch.bool:
            raise InvalidInput(f"rows must be whole numbers, not {rows.dtype}")
        index = rows.detach().cpu().numpy().astype(np.int64).ravel()
        if index.size == 0 or index.min() < -self.batch or index.max() >= self.batch:
            raise InvalidInput(f"rows must be some of the {self.batch} that the cache holds, not {index.tolist()}")
        chosen = torch.from_numpy(index % self.batch)
        self.tail_k, self.tail_v, self.sinks_k, self.sinks_v = (
            x.index_select(0, chosen) for x in (self.tail_k, self.tail_v, self.sinks_k, self.sinks_v)
        )
        for name in ("starts", "tail_begin", "sink_count", "pages", "valid", "count"):
            setattr(self, name, getattr(self, name)[index])
        self.owners = [list(self.owners[row]) for row in index]
        self.own_books = [list(self.own_books[row]) for row in index]
        self.pair_counts = [list(self.pair_counts[row]) for row in index]
        self.batch = index.size

    def __deepcopy__(self, memo: dict[int, Any]) -> KVStore:
        """An independent store; sealed pages, which never change, are shared."""
        twin = object.__new__(KVStore)
        twin.__dict__.update(self.__dict__)
        if self.batch:
            twin.select(torch.arange(self.batch))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled: pages are known by their addresses in this process."""
        raise InvalidInput("a KVStore cannot be pickled: save the cache in a .kvc file")

    # What readers need

    @property
    def compressed(self) -> bool:
        """Whether any row has a sealed page."""
        return bool(self.batch and self.count.any())

    def books(self, row: int) -> tuple[Books, Books]:
        """The default and own codebooks of K and of V of a row."""
        (key, value), (own_key, own_value) = self.default_books, self.own_books[row]
        return (key, own_key), (value, own_value)

    def tile(self, row: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """What the pages ``first`` to ``last`` of a row hold, K' and V' where there is a transform: (KV heads, tokens, head_dim) in the dtype."""
        k = torch.empty((self.heads, (last - first) * PAGE_TOKENS, self.channels), dtype=self.dtype)
        v = torch.empty_like(k)
        self.kernels.decompress(
            self.pages[row, first:last].copy(), self.units, *self.books(row), as_array(k), as_array(v), self.steps
        )
        valid = torch.from_numpy(self.valid[row, first:last])
        if int(valid.sum()) == k.shape[1]:
            return k, v
        used = (torch.arange(PAGE_TOKENS)[None] < valid[:, None]).ravel()
        return k[:, used], v[:, used]

    def dense(self) -> tuple[Tensor, Tensor]:
        """K and V as attention sees them, (batch, KV heads, tokens, head_dim) in the dtype; padding is 0 once a row is sealed."""
        k, v = self.held()
        if self.transform is None:
            return k, v
        k, v = self.transform.key.undo(k), self.transform.value.undo(v)
        for row, start in enumerate(np.where(self.tail_begin > self.starts, self.starts, 0).tolist()):
            k[row, :, :start] = v[row, :, :start] = 0
        return k, v

    def held(self) -> tuple[Tensor, Tensor]:
        """The same as it is held: K' and V' where there is a transform."""
        k = torch.zeros((self.batch, self.heads, self.tokens, self.channels), dtype=self.dtype)
        v = torch.zeros_like(k)
        for row in range(self.batch):
            start, sinks, begin = int(self.starts[row]), int(self.sink_count[row]), int(self.tail_begin[row])
            begin = self.tail_base if begin == start else begin  # nothing sealed: give the padding as it came
            pages = self.tile(row, 0, int(self.count[row])) if self.count[row] else None
            for i, (out, first, tail) in enumerate(((k, self.sinks_k, self.tail_k), (v, self.sinks_v, self.tail_v))):
                out[row, :, start : start + sinks] = first[row, :, :sinks]
                if pages is not None:
                    out[row, :, start + sinks : begin] = pages[i]
                out[row, :, begin:] = tail[row, :, begin - self.tail_base : self.tokens - self.tail_base]
        return k, v

    def memory(self) -> Memory:
        """Bytes by part; a test holds them against what is allocated."""
        if not self.batch:
            return Memory()
        parts = dict.fromkeys(("codes", "lengths", "scales", "directories", "raw_blocks"), 0)
        buffers, seen = {}, set()
        for owners, addresses in zip(self.owners, self.pages, strict=True):
            for buffer, address in zip(owners, addresses.tolist(), strict=False):
                buffers[id(buffer)] = buffer
                if address not in seen:
                    seen.add(address)
                    self._measure_page(buffer, address, parts)
        allocated = sum(buffer.nbytes for buffer in buffers.values())
        books = {
            id(book): book.lengths.nbytes for pair in [*self.own_books, self.default_books] for book in pair if book
        }
        waiting = {id(counts): counts.nbytes for pair in self.pair_counts for counts in pair if counts is not None}
        entries = self.pages.itemsize + self.valid.itemsize
        token_values = 2 * self.heads * self.channels
        held = int((self.tokens - self.starts).sum())
        sealed = int((self.tail_begin - self.starts - self.sink_count).sum())
        return Memory(
            **parts,
            spare=allocated - sum(parts.values()),
            table=sum(
                x.nbytes for x in (self.pages, self.valid, self.count, self.starts, self.tail_begin, self.sink_count)
            ),
            table_entries=int(self.count.sum()) * entries,
            books=sum(books.values()) + sum(waiting.values()),
            window=sum(x.untyped_storage().nbytes() for x in (self.tail_k, self.tail_v)),
            sinks=sum(x.untyped_storage().nbytes() for x in (self.sinks_k, self.sinks_v)),
            sealed_values=sealed * token_values,
            values=held * token_values,
            dense=held * token_values * self.dtype.itemsize,
        )

    def check_shape(self, heads: int, channels: int) -> None:
        """Raise InvalidInput unless spec and calibration are for so many KV heads and channels."""
        check_channels(channels)
        for of_kind in self.steps:
            if of_kind is not None and len(of_kind) != heads:
                raise InvalidInput(f"the spec has steps for {len(of_kind)} KV heads, not {heads}")
        if self.transform is not None and (self.transform.heads, self.transform.channels) != (heads, channels):
            raise InvalidInput(
                f"the calibration is for {self.transform.heads} KV heads of {self.transform.channels} channels, "
                f"not {heads} of {channels}"
            )

    # Steps

    def _check(self, k: Tensor, v: Tensor) -> None:
        if k.ndim != 4 or k.shape != v.shape:
            raise InvalidInput(
                f"K and V must both be (batch, KV heads, tokens, head_dim), not {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if k.dtype != v.dtype or k.dtype not in NAMES:
            raise InvalidInput(f"K and V must both be float32, float16 or bfloat16, not {k.dtype} and {v.dtype}")
        if k.device.type != "cpu" or v.device.type != "cpu":
            raise BackendUnavailable(f"the kernels run on the CPU, K and V are on {k.device} and {v.device}")
        if 0 in k.shape:
            raise InvalidInput(f"K and V are empty: {tuple(k.shape)}; give at least one token")
        self.check_shape(k.shape[1], k.shape[3])
        if self.batch:
            have = self.batch, self.heads, self.channels
            if (k.shape[0], k.shape[1], k.shape[3]) != have or k.dtype != self.dtype:
                raise InvalidInput(
                    f"this cache holds (batch, KV heads, head_dim) = {have} of {self.dtype}, "
                    f"not {(k.shape[0], k.shape[1], k.shape[3])} of {k.dtype}: use a cache for one model and batch"
                )

    @torch.inference_mode(False)  # the buffers outlive the mode they were filled in
    def begin(self, k: Tensor) -> None:
        """Take batch, heads, channels and dtype from the first K, (batch, KV heads, tokens, head_dim)."""
        self.batch, self.heads, _, self.channels = k.shape
        self.dtype = k.dtype
        self.layout = Layout(self.heads, self.channels, self.units, k.dtype.itemsize)
        self.tail_base = 0
        self.tail_k = torch.empty((self.batch, self.heads, 0, self.channels), dtype=k.dtype)
        self.tail_v = torch.empty_like(self.tail_k)
        self.sinks_k = torch.empty((self.batch, self.heads, self.spec.sinks, self.channels), dtype=k.dtype)
        self.sinks_v = torch.empty_like(self.sinks_k)
        self.starts, self.tail_begin, self.sink_count, self.count = np.zeros((4, self.batch), np.int64)
        self.pages = np.zeros((self.batch, 0), np.int64)
        self.valid = np.zeros((self.batch, 0), np.int32)
        self.owners = [[] for _ in range(self.batch)]
        own = [None, None] if self.given_books is None else [of_kind[1] for of_kind in self.given_books]
        self.own_books = [list(own) for _ in range(self.batch)]
        self.pair_counts = [[None, None] for _ in range(self.batch)]

    def _tail_room(self) -> int:
        """Tokens the tail holds between two seals: the window, a page, and what rows that seal at other times need."""
        ragged = PAGE_TOKENS - 1 if self.batch > 1 else 0
        page = max(PAGE_TOKENS, self.spec.window // 4)  # a wide window is not moved at every page
        return self.spec.window + page + ragged + (0 if self.compressed else self.spec.sinks)

    @torch.inference_mode(False)
    def _make_room(self, k: Tensor, v: Tensor) -> None:
        """Move the tail to a buffer with room for the new tokens, and put them there."""
        base = min(int(self.tail_begin.min()), self.tokens) if self.compressed else self.tail_base
        kept = self.tokens - base
        need, steady = kept + k.shape[2], self._tail_room()
        room = min(2 * need, steady) if need <= steady else need * 5 // 4 if kept else need
        for name, new in (("tail_k", k), ("tail_v", v)):
            old = getattr(self, name)
            buffer = old.new_empty((self.batch, self.heads, room, self.channels))
            buffer[:, :, :kept] = old[:, :, base - self.tail_base : self.tokens - self.tail_base]
            buffer[:, :, kept : kept + k.shape[2]] = new.detach()
            setattr(self, name, buffer)
        self.tail_base = base

    @torch.inference_mode(False)
    def _trim_tail(self) -> None:
        """Give back what a prefill took for tokens that are now sealed."""
        base = int(self.tail_begin.min())
        kept = self.tokens - base
        if self.tail_k.shape[2] > self._tail_room() >= kept and self.compressed:
            for name in ("tail_k", "tail_v"):
                old = getattr(self, name)
                buffer = old.new_empty((self.batch, self.heads, kept, self.channels))
                buffer[:] = old[:, :, base - self.tail_base : self.tokens - self.tail_base]
                setattr(self, name, buffer)
            self.tail_base = base

    def _seal_row(self, row: int) -> bool:
        """Compress what is ready of a row; says whether anything was."""
        missing_sinks = self.spec.sinks - int(self.sink_count[row]) if not self.count[row] else 0
        begin = int(self.tail_begin[row]) + missing_sinks
        pages = (self.tokens - self.spec.window - begin) // PAGE_TOKENS
        if pages < 1:
            return False
        at = begin - self.tail_base
        k, v = (as_array(x[row, :, at : at + pages * PAGE_TOKENS]) for x in (self.tail_k, self.tail_v))
        kq = self.kernels.quantise(k, self.spec.key.unit, self.spec.key.scale)
        vq = self.kernels.quantise(v, self.spec.value.unit, self.spec.value.scale)
        for index, (tensor, q) in enumerate(((self.spec.key, kq), (self.spec.value, vq))):
            if tensor.coding == "huffman" and self.given_books is None and self.own_books[row][index] is None:
                self._learn(row, index, self.kernels.count_pairs(q, KINDS[index], tensor.classes), pages)
        k_books, v_books = self.books(row)
        coding = self.spec.key.coding, self.spec.value.coding
        buffer, offsets = self.kernels.encode_pages(k, v, kq, vq, coding, self.units, k_books, v_books)
        if missing_sinks:
            for sinks, tail in ((self.sinks_k, self.tail_k), (self.sinks_v, self.tail_v)):
                sinks[row, :, self.sink_count[row] :] = tail[row, :, at - missing_sinks : at]
            self.sink_count[row] = self.spec.sinks
        self.enter(row, buffer, offsets[:-1])
        self.tail_begin[row] = begin + pages * PAGE_TOKENS
        return True

    def _learn(self, row: int, index: int, counts: npt.NDArray[np.uint64], pages: int) -> None:
        """Gather pair counts until the row has sealed enough tokens to train its own book."""
        tensor = (self.spec.key, self.spec.value)[index]
        earlier = self.pair_counts[row][index]
        if earlier is not None:
            some = counted(tensor, earlier.shape[1])
            counts[:, some, some] += earlier
        if (int(self.count[row]) + pages) * PAGE_TOKENS >= TRAINING_TOKENS and counts.any():
            self.own_books[row][index] = codebook.train(counts, tensor.limit)
            self.pair_counts[row][index] = None
        else:
            self.pair_counts[row][index] = kept_counts(tensor, counts)

    def enter(self, row: int, buffer: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> None:
        """Add the pages at these offsets of a buffer to a row's table."""
        first, last = int(self.count[row]), int(self.count[row]) + offsets.size
        if last > self.pages.shape[1]:
            more = max(last, self.pages.shape[1] * 5 // 4) - self.pages.shape[1]
            self.pages = np.pad(self.pages, ((0, 0), (0, more)))
            self.valid = np.pad(self.valid, ((0, 0), (0, more)))
        self.pages[row, first:last] = buffer.ctypes.data + offsets
        self.valid[row, first:last] = PAGE_TOKENS
        self.owners[row] += [buffer] * offsets.size
        self.count[row] = last

    def _measure_page(self, buffer: npt.NDArray[np.uint8], address: int, parts: dict[str, int]) -> None:
        """Add the bytes of a page to its parts."""
        at = address - buffer.ctypes.data
        modes, offsets = directory_of(buffer, at, self.heads)
        parts["directories"] += self.layout.directory_bytes
        parts["scales"] += self.layout.first_block - self.layout.directory_bytes
        sizes = np.diff(offsets).tolist()
        for index, (mode, size) in enumerate(zip(modes.tolist(), sizes, strict=False)):
            count = self.layout.block_scales(index // self.heads)
            scales = scales_size(count) if count and mode != RAW else 0
            lengths = 0
            if RAW < mode < FIXED:
                begin = at + int(offsets[index]) + scales
                lengths = 4 + 8 * int(buffer[begin] & 15)
            parts["scales"] += scales
            parts["lengths"] += lengths
            parts["raw_blocks" if mode == RAW else "codes"] += size - scales - lengths
