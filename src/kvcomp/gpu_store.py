"""GPUStore: the cache of one layer in the memory of a GPU. What ``KVStore`` is on the CPU, with the same bytes in its pages.

Everything the attention kernel reads lies on the device. How many tokens each row holds where depends on the number of tokens alone, so
the host knows it without asking; what depends on the data - sizes and places of pages - stays on the device. The host waits for the
device where a prompt is sealed, once to train a row's own codebooks and once to learn how much memory its pages take; not while decoding.

Pages go into chunks of memory that are never moved (gpu_arena.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp import codebook
from kvcomp.codebook import TRAINING_TOKENS, Codebook
from kvcomp.errors import BackendUnavailable, InvalidInput, LimitExceeded
from kvcomp.gpu_arena import Arena, Chunk
from kvcomp.kernels import Books, gpu_launch
from kvcomp.kernels.gpu import Gpu
from kvcomp.kernels.gpu_layout import (
    BFLOAT16_128,
    BOOKS,
    AttendArguments,
    AttendBuild,
    Book,
    DecompressArguments,
    EncodeArguments,
    Encoder,
    attend_build,
    describe_book,
    describe_encoder,
    encoder_words,
    index_bits,
    page_build,
    table_entries,
)
from kvcomp.page import Layout, ceil16
from kvcomp.quantise import MAX_CODES
from kvcomp.spec import PAGE_TOKENS, CodecSpec
from kvcomp.store import KVStore, Memory, default_book, kept_counts
from kvcomp.transform import Affine, Transform

VALUES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
CHUNK_PAGES = 4  # pages of the largest size that a chunk for decoding has room for


@dataclass
class Row:
    """What the host knows of a sequence. books: of K and of V the row's own; counts: pair counts until there is one."""

    start: int = 0
    sinks: int = 0
    tail_begin: int = 0
    valid: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    books: list[Codebook | None] = field(default_factory=lambda: [None, None])
    counts: list[npt.NDArray[np.uint64] | None] = field(default_factory=lambda: [None, None])


class GPUStore:
    """The K and V of one layer on one device, compressed as they grow.

    spec, books, transform: as ``KVStore`` takes them. launcher: gives the kernels of a device; called with the first tokens' device.
    """

    tail_base: int  # position of the tail's first token
    tail_k: Tensor  # (rows, KV heads, room, head_dim), as tail_v
    tail_v: Tensor
    sinks_k: Tensor  # (rows, KV heads, sinks, head_dim), as sinks_v
    sinks_v: Tensor
    _tables: list[list[Tensor | None]]  # what the descriptions of a row's books point to
    _sealing: torch.cuda.Event | None  # after which the pages that were sealed last may be read

    def __init__(
        self,
        spec: CodecSpec,
        books: tuple[Books, Books] | None = None,
        transform: Transform | None = None,
        launcher: Callable[[torch.device], gpu_launch.Launcher] | None = None,
    ) -> None:
        self.spec = spec
        self.transform = self._given_transform = transform
        self._launcher = launcher or gpu_of
        self._given = books
        self.units = spec.key.unit, spec.value.unit
        self.tokens = self.batch = self.heads = self.channels = 0
        self.rows: list[Row] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> GPUStore:
        """An independent store; sealed pages, which never change, are shared."""
        twin = object.__new__(GPUStore)
        twin.__dict__.update(self.__dict__)
        if self.batch:
            self._join()
            twin._arena = Arena(CHUNK_PAGES * self._largest_page, self.channels, self.device)
            twin._tail_tokens = self._tail_tokens.clone()
            twin.select(torch.arange(self.batch))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled: pages are known by their addresses."""
        raise InvalidInput("a GPUStore cannot be pickled")

    # What one append or seal changes

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens at the end, raw until ``seal``: k, v (batch, KV heads, new tokens, head_dim), on one device. Raises InvalidInput."""
        self._check(k, v)
        if not self.batch:
            self._begin(k)
        if self.transform is not None:
            k, v = self.transform.key.apply(k), self.transform.value.apply(v)
        self._join()
        new, held = k.shape[2], self.tokens - self.tail_base
        if held + new > self.tail_k.shape[2]:
            self._make_room(new)
            held = self.tokens - self.tail_base
        self.tail_k[:, :, held : held + new] = k.detach()
        self.tail_v[:, :, held : held + new] = v.detach()
        self.tokens += new
        self._tail_tokens.fill_(held + new)

    def set_starts(self, starts: Sequence[int]) -> None:
        """Say at which position each row's real tokens begin. Raises InvalidInput for a row that is sealed from another position."""
        if len(starts) != self.batch or not all(0 <= start <= self.tokens for start in starts):
            raise InvalidInput(f"starts must be {self.batch} positions from 0 to {self.tokens}, not {list(starts)}")
        for row, start in zip(self.rows, starts, strict=True):
            if start != row.start and (row.tail_begin > row.start or start < self.tail_base):
                raise InvalidInput("the padding of a row cannot change once its tokens are compressed")
        for row, start in zip(self.rows, starts, strict=True):
            if start != row.start:
                row.start = row.tail_begin = int(start)
        self._publish()

    def seal(self) -> None:
        """Compress every whole page of tokens beyond the window, beside what the device does next. What is sealed never changes."""
        if not self.batch:
            return
        self._join()
        before = self.count.sum()
        try:
            with enough_memory():
                for index in range(self.batch):
                    self._seal_row(index)
        finally:  # what was sealed is sealed, if memory ends in the middle
            if self.count.sum() > before:
                self._publish()
                if self._side is not None:
                    self._sealing = torch.cuda.Event()
                    self._sealing.record(self._side)

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` positions. Raises InvalidInput if there are fewer."""
        if not 0 <= tokens <= self.tokens:
            raise InvalidInput(f"cannot crop a cache of {self.tokens} tokens to {tokens}")
        self._join()
        for row in self.rows:
            if row.tail_begin > tokens:
                row.start = min(row.start, tokens)
                row.sinks = min(row.sinks, tokens - row.start)
                left, kept = tokens - row.start - row.sinks, []
                for valid in row.valid:
                    if left <= 0:
                        break
                    kept.append(min(valid, left))
                    left -= valid
                row.valid, row.tail_begin = kept, tokens
        self.tokens = tokens
        self.tail_base = min(self.tail_base, tokens)
        if self.batch:
            self._publish()

    def select(self, rows: Tensor) -> None:
        """Make the batch of these rows, which may repeat; sealed pages are shared. Raises InvalidInput for rows that do not exist."""
        index = [int(row) for row in rows.detach().cpu().flatten().tolist()]
        if not index or min(index) < -self.batch or max(index) >= self.batch:
            raise InvalidInput(f"rows must be some of the {self.batch} that the cache holds, not {index}")
        self._join()
        chosen = torch.tensor(index, device=self.device) % self.batch
        for name in ("tail_k", "tail_v", "sinks_k", "sinks_v", "_pages", "_books", "_encoders"):
            setattr(self, name, getattr(self, name).index_select(0, chosen))
        self._tables = [list(self._tables[i]) for i in index]
        self.rows = [
            Row(
                row.start,
                row.sinks,
                row.tail_begin,
                list(row.valid),
                list(row.chunks),
                list(row.books),
                list(row.counts),
            )
            for row in (self.rows[i] for i in index)
        ]
        self.batch = len(index)
        self._publish()

    # What readers need

    @property
    def compressed(self) -> bool:
        """Whether any row has a sealed page."""
        return any(row.valid for row in self.rows)

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Position of each row's first real token."""
        return np.array([row.start for row in self.rows], np.int64)

    @property
    def sink_count(self) -> npt.NDArray[np.int64]:
        """Sinks of each row."""
        return np.array([row.sinks for row in self.rows], np.int64)

    @property
    def count(self) -> npt.NDArray[np.int64]:
        """Pages of each row."""
        return np.array([len(row.valid) for row in self.rows], np.int64)

    def can_attend(self, queries: int) -> bool:
        """Whether all of the last ``queries`` tokens lie in the tail, as ``attend`` needs: a crop may have left some in pages."""
        return queries <= self.tokens - max(row.tail_begin for row in self.rows) + 1

    def attend(self, q: Tensor, scaling: float, softcap: float = 0.0) -> Tensor:
        """Fused attention of the last tokens, decoding the sealed pages on the fly.

        q: (batch, heads, queries, head_dim), on the device; query i is at position ``tokens - queries + i`` and sees what is not after it.
        Returns (batch, heads, queries, head_dim) in q's type. Raises InvalidInput if q does not fit the store.
        """
        rows, heads, new, channels = q.shape
        if rows != self.batch or channels != self.channels or heads % self.heads or not self.can_attend(new):
            raise InvalidInput(
                f"queries {tuple(q.shape)} do not fit a cache of {self.batch} rows and {self.heads} KV heads"
            )
        self._join()
        inner = (q.detach() if self.transform is None else self.transform.queries(q)).contiguous()
        if inner.dtype not in VALUES or inner.device != self.device:
            raise InvalidInput(
                f"queries must be float32, float16 or bfloat16 on {self.device}, not {q.dtype} on {q.device}"
            )
        build = self._attend_build(VALUES[inner.dtype], bool(softcap))
        queries = heads // self.heads * new
        splits = gpu_launch.splits_for(self._on, build, rows, self.heads, queries, self.tokens)
        out = torch.empty_like(inner)
        lse = torch.empty((rows, self.heads, queries), dtype=torch.float32, device=self.device)
        parts = splits if splits > 1 else 0
        partial = torch.empty((parts, *lse.shape, channels), dtype=torch.float32, device=self.device)
        peaks = torch.empty((2, parts, *lse.shape), dtype=torch.float32, device=self.device)
        a = AttendArguments(rows=rows, heads=self.heads, queries=queries, new_tokens=new, capacity=self._pages.shape[1])
        a.scaling, a.softcap, a.ones = scaling, softcap, BFLOAT16_128
        a.q, a.out, a.lse, a.partial_out = inner.data_ptr(), out.data_ptr(), lse.data_ptr(), partial.data_ptr()
        if parts:
            a.partial_peak, a.partial_total = peaks[0].data_ptr(), peaks[1].data_ptr()
        a.pages, a.books = self._pages.data_ptr(), self._books.data_ptr()
        a.valid, a.count, a.sink_count, a.tail_begin = self._places
        a.tail_tokens = self._tail_tokens.data_ptr()
        a.k_steps, a.v_steps = (0 if steps is None else steps.data_ptr() for steps in self._steps)
        for name in ("sinks_k", "sinks_v", "tail_k", "tail_v"):
            x, described = getattr(self, name), getattr(a, name)
            described.values = x.data_ptr()
            described.row, described.head, described.token = x.stride()[:3]
        gpu_launch.attend(self._on, build, a, splits)
        return (out if self.transform is None else self.transform.outputs(out)).to(q.dtype).view(q.shape)

    def tile(self, row: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """What the pages ``first`` to ``last`` of a row hold, K' and V' where there is a transform: (KV heads, tokens, head_dim)."""
        self._join()
        k = torch.empty((self.heads, (last - first) * PAGE_TOKENS, self.channels), dtype=self.dtype, device=self.device)
        v = torch.empty_like(k)
        a = DecompressArguments(page_count=last - first, heads=self.heads, ones=BFLOAT16_128)
        a.pages = self._pages[row, first:last].data_ptr()
        a.books = self._books[row].data_ptr()
        a.k_steps, a.v_steps = (0 if steps is None else steps.data_ptr() for steps in self._steps)
        a.out_k, a.out_v = k.data_ptr(), v.data_ptr()
        a.k_head, a.k_token, a.v_head, a.v_token = (*k.stride()[:2], *v.stride()[:2])
        gpu_launch.decompress(self._on, self._page_build, a)
        valid = self.rows[row].valid[first:last]
        if all(tokens == PAGE_TOKENS for tokens in valid):
            return k, v
        used = torch.tensor([t < tokens for tokens in valid for t in range(PAGE_TOKENS)], device=self.device)
        return k[:, used], v[:, used]

    def dense(self) -> tuple[Tensor, Tensor]:
        """K and V as attention sees them, (batch, KV heads, tokens, head_dim) in the dtype; padding is 0 once a row is sealed."""
        shape = self.batch, self.heads, self.tokens, self.channels
        k, v = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "KV")
        for index, row in enumerate(self.rows):
            begin = self.tail_base if row.tail_begin == row.start else row.tail_begin
            pages = self.tile(index, 0, len(row.valid)) if row.valid else None
            first = row.start + row.sinks
            for i, (out, sinks, tail) in enumerate(((k, self.sinks_k, self.tail_k), (v, self.sinks_v, self.tail_v))):
                out[index, :, row.start : first] = sinks[index, :, : row.sinks]
                if pages is not None:
                    out[index, :, first : row.tail_begin] = pages[i]
                out[index, :, begin:] = tail[index, :, begin - self.tail_base : self.tokens - self.tail_base]
        if self.transform is None:
            return k, v
        k, v = self.transform.key.undo(k), self.transform.value.undo(v)
        for index, row in enumerate(self.rows):
            if row.tail_begin > row.start:
                k[index, :, : row.start] = v[index, :, : row.start] = 0
        return k, v

    def on_cpu(self) -> KVStore:
        """The same cache in main memory, for files; waits for the device. The pages are copied as they are."""
        store = KVStore(self.spec, "reference", self._given, self._given_transform)
        if not self.batch:
            return store
        self._join()
        store.begin(self.tail_k.cpu()[:, :, :0])
        store.tokens, store.tail_base = self.tokens, self.tail_base
        held = self.tokens - self.tail_base
        store.tail_k, store.tail_v = (x[:, :, :held].cpu() for x in (self.tail_k, self.tail_v))
        store.sinks_k, store.sinks_v = self.sinks_k.cpu(), self.sinks_v.cpu()
        copies: dict[int, tuple[int, npt.NDArray[np.uint8]]] = {}
        for row in self.rows:
            for chunk in row.chunks:
                if id(chunk) not in copies:
                    content = chunk.memory[: int(chunk.cursor) + self.channels].cpu().numpy()
                    content[-self.channels :] = 0
                    copies[id(chunk)] = chunk.memory.data_ptr(), content
        for index, (row, addresses) in enumerate(zip(self.rows, self._pages.tolist(), strict=True)):
            store.starts[index], store.tail_begin[index], store.sink_count[index] = row.start, row.tail_begin, row.sinks
            for address, valid in zip(addresses, row.valid, strict=False):
                begin, content = next(x for x in copies.values() if x[0] <= address < x[0] + x[1].size)
                store.enter(index, content, np.array([address - begin]))
                store.valid[index, store.count[index] - 1] = valid
            store.own_books[index] = list(row.books)
            store.pair_counts[index] = [
                None if counts is None else kept_counts(tensor, counts)
                for tensor, counts in zip((self.spec.key, self.spec.value), row.counts, strict=True)
            ]
        return store

    def memory(self) -> Memory:
        """Bytes by part, pages as one (``codes``); waits for the device."""
        if not self.batch:
            return Memory()
        self._join()
        chunks = {id(chunk): chunk for row in self.rows for chunk in row.chunks}
        used = sum(int(chunk.cursor) for chunk in chunks.values())
        books = {id(table): table.nbytes for of_row in self._tables for table in of_row if table is not None}
        values = 2 * self.heads * self.channels
        held = sum(self.tokens - row.start for row in self.rows)
        pages = sum(len(row.valid) for row in self.rows)
        return Memory(
            codes=used,
            spare=sum(chunk.memory.nbytes for chunk in chunks.values()) - used,
            table=self._pages.nbytes + self._valid.nbytes,
            table_entries=12 * pages,
            books=sum(books.values()) + self._books.nbytes + self._encoders.nbytes,
            window=self.tail_k.nbytes + self.tail_v.nbytes,
            sinks=self.sinks_k.nbytes + self.sinks_v.nbytes,
            sealed_values=sum(row.tail_begin - row.start - row.sinks for row in self.rows) * values,
            values=held * values,
            dense=held * values * self.dtype.itemsize,
        )

    # Steps

    def _check(self, k: Tensor, v: Tensor) -> None:
        if k.ndim != 4 or k.shape != v.shape or 0 in k.shape:
            raise InvalidInput(
                f"K and V must both be (batch, KV heads, tokens, head_dim), not {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if k.dtype != v.dtype or k.dtype not in VALUES or k.device != v.device:
            raise InvalidInput(
                f"K and V must both be float32, float16 or bfloat16 on one device, not {k.dtype} and {v.dtype}"
            )
        have = self.batch, self.heads, self.channels
        if self.batch and (
            (k.shape[0], k.shape[1], k.shape[3]) != have or k.dtype != self.dtype or k.device != self.device
        ):
            raise InvalidInput(
                f"this cache holds (batch, KV heads, head_dim) = {have} of {self.dtype} on {self.device}, "
                f"not {(k.shape[0], k.shape[1], k.shape[3])} of {k.dtype} on {k.device}"
            )

    @torch.inference_mode(False)
    def _begin(self, k: Tensor) -> None:
        on = self._launcher(k.device)
        page = page_build(self.spec, k.shape[3], VALUES[k.dtype])
        self._on, self._page_build, self._builds = on, page, dict[tuple[str, bool], AttendBuild]()
        self.batch, self.heads, _, self.channels = k.shape
        self.dtype, self.device = k.dtype, k.device
        self._side = torch.cuda.Stream(k.device) if k.is_cuda else None
        self._sealing = None
        self.layout = Layout(self.heads, self.channels, self.units, k.dtype.itemsize)
        self.rows = [Row() for _ in range(self.batch)]
        self.tail_base = 0
        self.tail_k, self.tail_v = (k.new_empty((self.batch, self.heads, 0, self.channels)) for _ in "KV")
        self.sinks_k, self.sinks_v = (
            k.new_empty((self.batch, self.heads, self.spec.sinks, self.channels)) for _ in "KV"
        )
        self._tail_tokens = torch.zeros(1, dtype=torch.int32, device=k.device)
        self._pages = torch.zeros((self.batch, 1), dtype=torch.int64, device=k.device)
        self._steps = tuple(
            None if heads is None else torch.tensor(heads, dtype=torch.float32, device=k.device)
            for heads in (self.spec.key.heads, self.spec.value.heads)
        )
        if self.transform is not None:
            self.transform = Transform(*(_on_device(of, k.device) for of in (self.transform.key, self.transform.value)))
        # Descriptions of the books as the kernels read them, and what they point to.
        self._books = torch.zeros((self.batch, BOOKS * ctypes.sizeof(Book)), dtype=torch.uint8, device=k.device)
        self._encoders = torch.zeros((self.batch, BOOKS * ctypes.sizeof(Encoder)), dtype=torch.uint8, device=k.device)
        self._tables = [[None] * (2 * BOOKS) for _ in range(self.batch)]
        self._arena = Arena(CHUNK_PAGES * self._largest_page, self.channels, self.device)
        for kind, tensor in enumerate((self.spec.key, self.spec.value)):
            if tensor.coding == "huffman":
                default, own = self._given[kind] if self._given else (default_book(tensor), None)
                self._enter_book(range(self.batch), kind, 0, default)
                self._enter_book(range(self.batch), kind, 1, own)
                for row in self.rows:
                    row.books[kind] = own
        self._publish()

    def _enter_book(self, rows: Sequence[int], kind: int, own: int, book: Codebook | None) -> None:
        """Put a book where the kernels find it, for these rows."""
        if book is None:
            return
        bits = index_bits((self.spec.key, self.spec.value)[kind])
        table, words = (
            torch.from_numpy(x.view(np.int32)).to(self.device) for x in (table_entries(book, bits), encoder_words(book))
        )
        index = 2 * kind + own
        for described, to, size in (
            (describe_book(book, table.data_ptr()), self._books, ctypes.sizeof(Book)),
            (describe_encoder(book, words.data_ptr()), self._encoders, ctypes.sizeof(Encoder)),
        ):
            content = torch.frombuffer(bytearray(bytes(described)), dtype=torch.uint8).to(self.device)
            for row in rows:
                to[row, size * index : size * (index + 1)] = content
        for row in rows:
            self._tables[row][2 * index : 2 * index + 2] = table, words

    def _publish(self) -> None:
        """Tell the device what the host knows of the rows."""
        capacity = self._pages.shape[1]
        places = torch.zeros((3 + capacity, self.batch), dtype=torch.int32)
        for index, row in enumerate(self.rows):
            numbers = [len(row.valid), row.sinks, row.tail_begin - self.tail_base, *row.valid]
            places[: len(numbers), index] = torch.tensor(numbers, dtype=torch.int32)
        host = torch.cat([places[:3].flatten(), places[3:].mT.flatten()])
        if self.device.type == "cuda":
            host = host.pin_memory()
        self._valid = host.to(self.device, non_blocking=True)
        self._pinned = host  # until the copy is made
        at, step = self._valid.data_ptr(), 4 * self.batch
        self._places = at + 3 * step, at, at + step, at + 2 * step
        self._tail_tokens.fill_(self.tokens - self.tail_base)

    def _join(self) -> None:
        """Let the current stream wait for what is being sealed."""
        if self._sealing is not None:
            torch.cuda.current_stream(self.device).wait_event(self._sealing)
            self._sealing = None

    def _tail_room(self) -> int:
        ragged = PAGE_TOKENS - 1 if self.batch > 1 else 0
        page = max(PAGE_TOKENS, self.spec.window // 4)
        return self.spec.window + page + ragged + (0 if self.compressed else self.spec.sinks)

    @torch.inference_mode(False)
    def _make_room(self, new: int) -> None:
        """Move what the tail must keep to a buffer with room for the new tokens."""
        base = min(min(row.tail_begin for row in self.rows), self.tokens) if self.compressed else self.tail_base
        kept = self.tokens - base
        need, steady = kept + new, self._tail_room()
        room = min(2 * need, steady) if need <= steady else need * 5 // 4 if kept else need
        shape = self.batch, self.heads, room, self.channels
        with enough_memory():
            buffers = self.tail_k.new_empty(shape), self.tail_v.new_empty(shape)
        for buffer, old in zip(buffers, (self.tail_k, self.tail_v), strict=True):
            buffer[:, :, :kept] = old[:, :, base - self.tail_base : self.tokens - self.tail_base]
        self.tail_k, self.tail_v = buffers
        self.tail_base = base
        self._publish()

    def _beside(self) -> AbstractContextManager[Any]:
        """The stream on which pages are sealed, after what the current one has done."""
        if self._side is None:
            return nullcontext()
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._side)

    @torch.inference_mode(False)
    def _seal_row(self, index: int) -> bool:
        """Compress what is ready of a row; says whether anything was."""
        row = self.rows[index]
        missing = self.spec.sinks - row.sinks if not row.valid else 0
        begin = row.tail_begin + missing
        pages = (self.tokens - self.spec.window - begin) // PAGE_TOKENS
        if pages < 1:
            return False
        at = begin - self.tail_base
        first = len(row.valid)
        if first + pages > self._pages.shape[1]:
            more = torch.zeros(
                (self.batch, max(first + pages, self._pages.shape[1] * 5 // 4)), dtype=torch.int64, device=self.device
            )
            more[:, : self._pages.shape[1]] = self._pages
            self._pages = more
        with self._beside():
            if missing:
                for sinks, tail in ((self.sinks_k, self.tail_k), (self.sinks_v, self.tail_v)):
                    sinks[index, :, row.sinks :] = tail[index, :, at - missing : at]
            k, v = (x[index, :, at : at + pages * PAGE_TOKENS] for x in (self.tail_k, self.tail_v))
            self._pages[index, first : first + pages] = self._encode(index, k, v, pages)
            if self._side is not None:
                for x in (self.tail_k, self.tail_v, self.sinks_k, self.sinks_v, self._pages):
                    x.record_stream(self._side)
        row.sinks += missing
        row.valid += [PAGE_TOKENS] * pages
        row.tail_begin = begin + pages * PAGE_TOKENS
        return True

    def _encode(self, index: int, k: Tensor, v: Tensor, pages: int) -> Tensor:
        """Addresses of the pages, int64 (pages,), of K and V (KV heads, 64 x pages, head_dim)."""
        row, on, build = self.rows[index], self._on, self._page_build
        blocks = pages, self.heads

        def room(*shape: int, dtype: torch.dtype) -> Tensor:
            held.append(torch.empty(shape, dtype=dtype, device=self.device))
            return held[-1]

        held: list[Tensor] = []
        a = EncodeArguments(pages=pages, heads=self.heads)
        counts: list[Tensor] = []
        for kind, (x, tensor) in enumerate(zip((k, v), (self.spec.key, self.spec.value), strict=True)):
            t = a.tensors[kind]
            t.values, (t.head, t.token) = x.data_ptr(), x.stride()[:2]
            steps = self._steps[kind]
            t.steps = 0 if steps is None else steps.data_ptr()
            t.relative_scale = 0.0 if isinstance(tensor.scale, tuple) else tensor.scale
            t.codes = room(*blocks, PAGE_TOKENS, self.channels, dtype=torch.uint8).data_ptr()
            t.scale = room(*blocks, build.most_units, dtype=torch.float32).data_ptr()
            t.zero = room(*blocks, build.most_units, dtype=torch.int32).data_ptr()
            t.raw = room(*blocks, dtype=torch.uint8).data_ptr()
            t.token_range = room(pages, PAGE_TOKENS, 2, dtype=torch.float32).data_ptr()
            counts.append(room(tensor.classes, MAX_CODES, MAX_CODES, dtype=torch.int32).zero_())
            t.counts = counts[-1].data_ptr()
            t.books = self._encoders[index].data_ptr() + 2 * kind * ctypes.sizeof(Encoder)
        a.modes = room(*blocks, 2, dtype=torch.uint8).data_ptr()
        a.sizes = room(*blocks, 2, dtype=torch.int32).data_ptr()
        a.lengths = room(*blocks, 2, 64, dtype=torch.int16).data_ptr()
        offsets = room(pages + 1, dtype=torch.int64)
        a.offsets = offsets.data_ptr()
        gpu_launch.quantise(on, build, a)
        tensors = self.spec.key, self.spec.value
        learning = [
            self._given is None and tensor.coding == "huffman" and row.books[kind] is None
            for kind, tensor in enumerate(tensors)
        ]
        if any(learning):
            gpu_launch.count_pairs(on, build, a)
            sealed = (len(row.valid) + pages) * PAGE_TOKENS
            for kind in np.flatnonzero(learning).tolist():
                self._learn(index, kind, counts[kind].cpu().numpy().view(np.uint32).astype(np.uint64), sealed)
        if any(learning) or pages > 1:  # a prompt: its pages get as much memory as they need
            cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
            a.cursor = cursor.data_ptr()
            gpu_launch.measure(on, build, a)
            chunk = Chunk(room(int(offsets[-1]) + self.channels, dtype=torch.uint8), cursor)
        else:
            chunk = self._arena.chunk_for(pages * self._largest_page)
            a.cursor = chunk.cursor.data_ptr()
            gpu_launch.measure(on, build, a)
        a.out = chunk.memory.data_ptr()
        gpu_launch.pack(on, build, a)
        if chunk not in row.chunks:
            row.chunks.append(chunk)
        self._arena.ask()
        addresses: Tensor = offsets[:-1] + chunk.memory.data_ptr()
        return addresses

    def _learn(self, index: int, kind: int, counts: npt.NDArray[np.uint64], sealed: int) -> None:
        """Gather pair counts until the row has sealed enough tokens to train its own book."""
        row = self.rows[index]
        earlier = row.counts[kind]
        counts = counts if earlier is None else counts + earlier
        if sealed >= TRAINING_TOKENS and counts.any():
            row.books[kind] = codebook.train(counts, (self.spec.key, self.spec.value)[kind].limit)
            row.counts[kind] = None
            self._enter_book([index], kind, 1, row.books[kind])
        else:
            row.counts[kind] = counts

    @property
    def _largest_page(self) -> int:
        block = PAGE_TOKENS * self.channels * self.dtype.itemsize + 4 * max(self.channels, PAGE_TOKENS)
        return self.layout.first_block + 2 * self.heads * ceil16(block)

    def _attend_build(self, query: str, softcap: bool) -> AttendBuild:
        key = query, softcap
        if key not in self._builds:
            self._builds[key] = attend_build(
                self.spec, self.channels, VALUES[self.dtype], query, softcap, self._on.machine
            )
        return self._builds[key]


@contextmanager
def enough_memory() -> Iterator[None]:
    """Raise LimitExceeded where the device has no memory left; the cache then holds what it held."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LimitExceeded(
            f"the device has no memory left for the cache: use a smaller batch, a shorter context or a coarser spec ({error})"
        ) from None


@lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> gpu_launch.Launcher:
    """The GPU behind a device of torch, which its current stream is used of. Raises BackendUnavailable for another device."""
    if device.type != "cuda" or torch.version.hip is not None:
        raise BackendUnavailable(
            f"backend='gpu' takes K and V on an NVIDIA GPU, not on {device}: use backend='cpu' there"
        )
    index = device.index or 0
    return Gpu(index, lambda: int(torch.cuda.current_stream(index).cuda_stream))


def _on_device(affine: Affine, device: torch.device) -> Affine:
    return Affine(*(x.to(device) for x in (affine.matrix, affine.mean, affine.inverse)))
