"""GPUStore: the cache of one layer in the memory of a GPU. What ``KVStore`` is on the CPU, with the same bytes in its pages.

Everything the attention kernel reads lies on the device. How many tokens each row holds where depends on the number of tokens alone, so
the host knows it without asking; what depends on the data - sizes and places of pages - stays on the device. Of a prompt the host must know
something of the data twice: pair counts, to train a row's own codebooks, and how much memory its pages take. It asks, and comes back for
the answer when the device has other work: while the next layer's prompt is under way, or when the store is used again.

Pages go into chunks of memory that are never moved (arena.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcomp.calibration.transform import Affine, Transform
from kvcomp.codec import codebook
from kvcomp.codec.codebook import TRAINING_TOKENS
from kvcomp.codec.page import Layout, ceil16
from kvcomp.errors import BackendUnavailable, InvalidInput, LimitExceeded
from kvcomp.kernels import Books
from kvcomp.kernels.cuda import launch
from kvcomp.kernels.cuda.device import Gpu
from kvcomp.kernels.cuda.layout import AttendBuild, page_build
from kvcomp.spec import PAGE_TOKENS, CodecSpec
from kvcomp.store.checks import check_crop, check_kv, check_more, check_starts, row_index
from kvcomp.store.cpu import KVStore
from kvcomp.store.gpu.arena import Arena, Chunk, Sent, enough_memory
from kvcomp.store.gpu.books import DeviceBooks
from kvcomp.store.gpu.encode import Encoding
from kvcomp.store.gpu.held import Held
from kvcomp.store.gpu.rows import Row, Table
from kvcomp.store.gpu.tail import Tail
from kvcomp.store.protocol import Store
from kvcomp.store.tail import grown_room, steady_room
from kvcomp.store.tensors import NAMES
from kvcomp.store.training import default_book

CHUNK_PAGES = 4  # pages of the largest size that a chunk for decoding has room for


class GPUStore(Held):
    """The K and V of one layer on one device, compressed as they grow.

    spec, books, transform: as ``KVStore`` takes them. launcher: gives the kernels of a device; called with the first tokens' device.
    """

    def __init__(
        self,
        spec: CodecSpec,
        books: tuple[Books, Books] | None = None,
        transform: Transform | None = None,
        launcher: Callable[[torch.device], launch.Launcher] | None = None,
    ) -> None:
        self.spec = spec
        self.transform = self.given_transform = transform
        self._launcher = launcher or gpu_of
        self.given_books = books
        self.units = spec.key.unit, spec.value.unit
        self.tokens = self.batch = self.heads = self.channels = 0
        self.rows: list[Row] = []
        self._under_way, self._sealed = [], None

    def join(self, others: Sequence[Store], tokens: int | None = None) -> GPUStore:
        """One batch of these rows and those of others (``kvcomp.store.gpu.join``)."""
        from kvcomp.store.gpu.join import join

        stores = [store for store in (self, *others) if isinstance(store, GPUStore)]
        if len(stores) <= len(others):
            raise InvalidInput("a cache on a GPU and one in main memory cannot be joined: use one backend")
        return join(stores, tokens)

    def to_gpu(self, device: torch.device) -> GPUStore:
        """This store."""
        return self

    def to_main_memory(self) -> KVStore:
        """A copy in main memory, page by page; waits for the device."""
        from kvcomp.store.gpu.copies import to_main_memory

        return to_main_memory(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> GPUStore:
        """An independent store; sealed pages, which never change, are shared."""
        twin = object.__new__(GPUStore)
        twin.__dict__.update(self.__dict__)
        if self.batch:
            self.settle()
            twin._arena = self._new_arena()
            twin.select(torch.arange(self.batch))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled: pages are known by their addresses."""
        raise InvalidInput("a GPUStore cannot be pickled")

    # What one append or seal changes

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens at the end, raw until ``seal``: k, v (batch, KV heads, new tokens, head_dim), on one device.

        Raises InvalidInput, BackendUnavailable or LimitExceeded and leaves the store as it was.
        """
        self._check(k, v)
        new = not self.batch
        try:
            with enough_memory():
                if new:
                    self.begin(k)
                if self.transform is not None:
                    k, v = self.transform.key.apply(k), self.transform.value.apply(v)
            self.prepare(k.shape[2])
        except (BackendUnavailable, LimitExceeded):
            self.batch = 0 if new else self.batch
            raise
        self.tail.append(k, v, self.tokens - self.tail.base)
        self.tokens += k.shape[2]

    def prepare(self, new: int) -> None:
        """Make ready for so many new tokens: finish what is under way and give the tail room for them. Raises LimitExceeded."""
        self.settle()
        if self.tokens - self.tail.base + new > self.tail.room:
            base = min(row.tail_begin for row in self.rows) if self.compressed else self.tail.base
            base = min(base, self.tokens)
            self._move_tail(base, grown_room(self.tokens - base, new, self.tail_room(), self.tail.room))

    def advance(self, new: int) -> None:
        """Take note of tokens that the device has added by itself, repeating the recorded work of an ``append`` of one token."""
        self.tokens += new

    def set_starts(self, starts: Sequence[int]) -> None:
        """Say at which position each row's real tokens begin. Raises InvalidInput for a row that is sealed from another position."""
        check_starts(starts, self.batch, self.tokens)
        self.settle()
        for row, start in zip(self.rows, starts, strict=True):
            if start != row.start and (row.tail_begin > row.start or start < self.tail.base):
                raise InvalidInput("the padding of a row cannot change once its tokens are compressed")
        for row, start in zip(self.rows, starts, strict=True):
            if start != row.start:
                row.start = row.tail_begin = int(start)
        self.publish()

    def seal(self) -> None:
        """Begin to compress every whole page of tokens beyond the window, beside what the device does next. What is sealed never changes.

        For a prompt the host is needed twice later, after the device has come so far: ``proceed``, or whatever uses the store next.
        Raises LimitExceeded if memory ends; rows that are sealed are sealed, the others stay as they were.
        """
        if self.batch:
            self.settle()
            self._under_way = [self._seal_row(index) for index in range(self.batch)]
            self.proceed()

    @torch.inference_mode(False)
    def proceed(self) -> None:
        under_way, self._under_way = self._under_way, []
        before = sum(len(row.valid) for row in self.rows)
        try:
            with enough_memory():
                self._under_way = [rest for rest in under_way if next(rest, self) is not self]
        finally:
            if sum(len(row.valid) for row in self.rows) > before:
                if self._side is not None:
                    self._sealed = torch.cuda.Event()
                    self._sealed.record(self._side)
                self.publish()
                if not self._under_way:
                    self._trim_tail()

    @torch.inference_mode(False)
    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` positions. Raises InvalidInput if there are fewer."""
        check_crop(tokens, self.tokens)
        if not self.batch:
            return
        self.settle()
        for row in self.rows:
            row.crop(tokens)
        self.tokens = tokens
        self.tail.base = min(self.tail.base, tokens)
        self.publish()

    @torch.inference_mode(False)
    def select(self, rows: Tensor) -> None:
        """Make the batch of these rows, which may repeat; sealed pages are shared. Raises InvalidInput for rows that do not exist, LimitExceeded."""
        index = row_index(rows, self.batch).tolist()
        self.settle()
        with enough_memory():
            chosen = torch.tensor(index, device=self.device)
            sinks_k, sinks_v = (x.index_select(0, chosen) for x in (self.sinks_k, self.sinks_v))
            tail, books = self.tail.select(index), self.device_books.select(index)
            table = Table(self.table.pages.index_select(0, chosen))
        self.sinks_k, self.sinks_v, self.tail, self.device_books, self.table = sinks_k, sinks_v, tail, books, table
        self.rows = [self.rows[row].copy() for row in index]
        self.batch = len(index)
        self.publish()

    # Steps

    def _check(self, k: Tensor, v: Tensor) -> None:
        check_kv(k, v)
        if k.device != v.device:
            raise InvalidInput(f"K is on {k.device}, V on {v.device}: they must be on one device")
        if self.batch:
            check_more(k, (self.batch, self.heads, self.channels), self.dtype)
            if k.device != self.device:
                raise InvalidInput(f"this cache is on {self.device}, K and V are on {k.device}")

    @torch.inference_mode(False)
    def begin(self, k: Tensor) -> None:
        """Take batch, heads, channels, dtype and device from the first K, (batch, KV heads, tokens, head_dim)."""
        on = self._launcher(k.device)
        page = page_build(self.spec, k.shape[3], NAMES[k.dtype])
        self._on, self._page_build, self._builds = on, page, dict[tuple[str, bool], AttendBuild]()
        self.batch, self.heads, _, self.channels = k.shape
        self.dtype, self.device = k.dtype, k.device
        self._side = torch.cuda.Stream(k.device) if k.is_cuda else None
        self.layout = Layout(self.heads, self.channels, self.units, k.dtype.itemsize)
        self.rows = [Row() for _ in range(self.batch)]
        nothing = k.new_empty((self.batch, self.heads, 0, self.channels))
        self.tail = Tail(nothing, nothing)
        self.sinks_k, self.sinks_v = (
            k.new_empty((self.batch, self.heads, self.spec.sinks, self.channels)) for _ in "KV"
        )
        self.table = Table.empty(self.batch, k.device)
        key, value = (
            None if heads is None else torch.tensor(heads, dtype=torch.float32, device=k.device)
            for heads in (self.spec.key.heads, self.spec.value.heads)
        )
        self._steps = key, value
        if self.transform is not None:
            self.transform = Transform(*(_on_device(of, k.device) for of in (self.transform.key, self.transform.value)))
        self._arena = self._new_arena()
        tensors = self.spec.key, self.spec.value
        self.device_books = DeviceBooks(self.batch, tensors, k.device)
        for kind, tensor in enumerate(tensors):
            if tensor.coding == "huffman":
                default, own = self.given_books[kind] if self.given_books else (default_book(tensor), None)
                self.device_books.enter(range(self.batch), kind, 0, default)
                self.device_books.enter(range(self.batch), kind, 1, own)
                for row in self.rows:
                    row.books[kind] = own
        self.publish()

    def _new_arena(self) -> Arena:
        return Arena(CHUNK_PAGES * self._largest_page, self.channels, self.device)

    def publish(self) -> None:
        """Tell the device what the host knows of the rows."""
        self.table.publish(self.rows, self.tail.base)
        self.tail.held.fill_(self.tokens - self.tail.base)

    def tail_room(self) -> int:
        """Tokens for which the tail has room between two seals."""
        return steady_room(self.spec, self.batch, self.compressed)

    def _trim_tail(self) -> None:
        """Give back what a prompt took for tokens that are now sealed, down to the steady room: recorded steps need the tail where it is."""
        base, steady = min(row.tail_begin for row in self.rows), self.tail_room()
        if self.tail.room > steady >= self.tokens - base:
            self._move_tail(base, steady)

    def _move_tail(self, base: int, room: int) -> None:
        with enough_memory():
            self.tail.move(base, self.tokens - base, room)
        self.publish()

    def _beside(self) -> AbstractContextManager[Any]:
        """The stream on which pages are sealed."""
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def _seal_row(self, index: int) -> Iterator[None]:
        """Compress what is ready of a row; pauses where the host must wait for the device. The row changes at the end only."""
        row, tensors = self.rows[index], (self.spec.key, self.spec.value)
        missing = self.spec.sinks - row.sinks if not row.valid else 0
        begin, first = row.tail_begin + missing, len(row.valid)
        pages = (self.tokens - self.spec.window - begin) // PAGE_TOKENS
        if pages < 1:
            return
        at = begin - self.tail.base
        if first + pages > self.table.capacity:
            self.table = self.table.grown(first + pages)
            self.publish()
        learning = [
            kind
            for kind, tensor in enumerate(tensors)
            if self.given_books is None and tensor.coding == "huffman" and row.books[kind] is None
        ]
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        with self._beside():
            self._keep(self.tail.k, self.tail.v, self.sinks_k, self.sinks_v, self.table.pages)
            if missing:
                for sinks, tail in ((self.sinks_k, self.tail.k), (self.sinks_v, self.tail.v)):
                    sinks[index, :, row.sinks :] = tail[index, :, at - missing : at]
            k, v = (x[index, :, at : at + pages * PAGE_TOKENS] for x in (self.tail.k, self.tail.v))
            encoding = Encoding(self._on, self._page_build, tensors, self._steps, k, v)
            encoding.quantise()
            if learning:
                encoding.count_pairs()
            sent = [Sent(encoding.counts[kind]) for kind in learning]
            books = self.device_books.alone(index)
        trained, counts = list(row.books), list(row.counts)
        if learning:
            yield
            for kind, of_pages in zip(learning, sent, strict=True):
                found, earlier = of_pages.wait().view(np.uint32).astype(np.uint64), row.counts[kind]
                seen = found if earlier is None else found + earlier
                if (first + pages) * PAGE_TOKENS >= TRAINING_TOKENS and seen.any():
                    trained[kind], counts[kind] = codebook.train(seen, tensors[kind].limit), None
                else:
                    counts[kind] = seen
        new = [(kind, book) for kind, book in enumerate(trained) if book is not None and row.books[kind] is None]
        with self._beside():
            for kind, book in new:
                books.enter_encoder([0], kind, 1, book)
            if learning or pages > 1:  # a prompt: its pages get as much memory as they need
                cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
                encoding.measure(books.encoding[0], cursor)
                size = Sent(encoding.offsets[-1:])
            else:
                chunk = self._arena.chunk_for(self._largest_page)
                encoding.measure(books.encoding[0], chunk.cursor)
        if learning or pages > 1:
            yield
            bytes_needed = int(size.wait()[0]) + self.channels
            with self._beside():
                chunk = Chunk(torch.empty(bytes_needed, dtype=torch.uint8, device=self.device), cursor)
        with self._beside():
            self._keep(self.table.pages)
            self.table.pages[index, first : first + pages] = encoding.pack(chunk)
            self._arena.ask()
        for kind, book in new:
            self.device_books.enter([index], kind, 1, book)
        if self._side is not None:  # it is freed only after what reads it here
            chunk.memory.record_stream(torch.cuda.current_stream(self.device))
        if chunk not in row.chunks:
            row.chunks.append(chunk)
        row.books, row.counts = trained, counts
        row.sinks += missing
        row.valid += [PAGE_TOKENS] * pages
        row.tail_begin = begin + pages * PAGE_TOKENS

    def _keep(self, *tensors: Tensor) -> None:
        """Let these live until what is sealed beside has read or written them."""
        if self._side is not None:
            for x in tensors:
                x.record_stream(self._side)

    @property
    def _largest_page(self) -> int:
        block = PAGE_TOKENS * self.channels * self.dtype.itemsize + 4 * max(self.channels, PAGE_TOKENS)
        return self.layout.first_block + 2 * self.heads * ceil16(block)


@lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> launch.Launcher:
    """The GPU behind a device of torch, which its current stream is used of. Raises BackendUnavailable for another device."""
    if device.type != "cuda" or torch.version.hip is not None:
        raise BackendUnavailable(
            f"backend='gpu' takes K and V on an NVIDIA GPU, not on {device}: move the model to one, or use backend='cpu'"
        )
    index = device.index or 0
    return Gpu(index, lambda: int(torch.cuda.current_stream(index).cuda_stream))


def _on_device(affine: Affine, device: torch.device) -> Affine:
    return Affine(*(x.to(device) for x in (affine.matrix, affine.mean, affine.inverse)))
