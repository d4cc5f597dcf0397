"""GPUStore: the cache of one layer in the memory of a GPU, with the same bytes in its pages as a ``KVStore``.

Everything that attention reads lies on the device. How many tokens a row holds where follows from the number of tokens,
so the host knows it without asking. Sizes and places of pages depend on the data and stay on the device.

Of a prompt the host needs two things from the device: pair counts, to train a row's books, and the size of its pages.
It reads them back when the device has other work: at the next layer's prompt, or when the store is used again
(sealing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.calibration.transform import Transform
from kvcomp.errors import BackendUnavailable, InvalidInput
from kvcomp.kernels import Books
from kvcomp.kernels.cuda.launch import Launcher
from kvcomp.spec import CodecSpec
from kvcomp.store import places
from kvcomp.store.checks import check_crop, check_kv, check_more, check_shape, check_starts, row_index
from kvcomp.store.cpu import KVStore
from kvcomp.store.gpu import read
from kvcomp.store.gpu.arena import Arena, enough_memory
from kvcomp.store.gpu.books import DeviceBooks
from kvcomp.store.gpu.kernels import LayerKernels, gpu_of
from kvcomp.store.gpu.rows import Row, Table
from kvcomp.store.gpu.sealing import Sealing
from kvcomp.store.gpu.tail import Tail
from kvcomp.store.memory import Memory
from kvcomp.store.tail import grown_room, steady_room
from kvcomp.store.tensors import to_pinned
from kvcomp.store.training import default_book


class GPUStore:
    """The K and V of one layer on one device, compressed as they grow.

    While ``seal`` is under way the rows are as they were. ``step`` takes it on, ``drain`` and ``sync`` end it.

    Parameters
    ----------
    spec, books, transform
        As ``KVStore`` takes them.
    launcher
        Gives the kernels of a device; called with the device of the first tokens.
    """

    kernels: LayerKernels
    arena: Arena
    table: Table
    tail: Tail
    device_books: DeviceBooks
    sliding_window: int | None = None  # the kernels know none
    sinks_k: Tensor
    sinks_v: Tensor

    def __init__(
        self,
        spec: CodecSpec,
        books: tuple[Books, Books] | None = None,
        transform: Transform | None = None,
        launcher: Callable[[torch.device], Launcher] | None = None,
    ) -> None:
        self.spec = spec
        self.transform = self.given_transform = transform
        self._launcher = launcher or gpu_of
        self.given_books = books
        self.tokens = self.batch = self.heads = self.channels = 0
        self.rows: list[Row] = []
        self._sealing: list[Sealing] = []
        self._sealed: torch.cuda.Event | None = None  # after which the newest pages may be read

    def __deepcopy__(self, memo: dict[int, Any]) -> GPUStore:
        """An independent store; sealed pages, which never change, are shared."""
        twin = self.empty_twin()
        if self.batch:
            twin.select(torch.arange(self.batch))
        return twin

    @property
    def value_channels(self) -> int:
        return self.channels

    @property
    def held_channels(self) -> tuple[int, int]:
        return self.channels, self.channels

    def empty_twin(self) -> GPUStore:
        """A store of the same layer, dtype and device to ``hold`` other rows; until then it has these, but no arena of
        theirs.
        """
        if self.batch:
            self.sync()
        twin = object.__new__(GPUStore)
        twin.__dict__.update(self.__dict__)
        if self.batch:
            twin.arena = self.kernels.arena()
        return twin

    def join(self, others: Sequence[GPUStore], tokens: int | None = None) -> GPUStore:
        """One batch of these rows and those of others (``kvcomp.store.gpu.join``)."""
        from kvcomp.store.gpu.join import join

        return join((self, *others), tokens)

    def to_gpu(self, device: torch.device) -> GPUStore:
        """This store."""
        return self

    def to_main_memory(self) -> KVStore:
        """A copy in main memory, page by page; waits for the device."""
        from kvcomp.store.gpu.copies import to_main_memory

        return to_main_memory(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled: pages are known by their addresses."""
        raise InvalidInput("a GPUStore cannot be pickled: save the cache in a .kvc file")

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens at the end, raw until ``seal``.

        Parameters
        ----------
        k, v
            (batch, KV heads, new tokens, head_dim), float32, float16 or bfloat16, on one device.

        Raises
        ------
        InvalidInput, BackendUnavailable, LimitExceeded
            The store is then as it was.
        """
        self._check(k, v)
        new = not self.batch
        try:
            with enough_memory():
                if new:
                    self.allocate(k)
                if self.transform is not None:
                    waves = read.next_waves(self, k.shape[2])
                    k, v = self.transform.key.apply_waves(k, waves), self.transform.value.apply(v)
            self.prepare(k.shape[2])
        except BaseException:
            self.batch = 0 if new else self.batch
            raise
        self.tail.append(k, v, self.tokens - self.tail.base)
        self.tokens += k.shape[2]

    def prepare(self, new: int) -> None:
        """End a seal that is under way and give the tail room for so many new tokens. Raises LimitExceeded."""
        self.sync()
        if self.tokens - self.tail.base + new > self.tail.room:
            base = min(row.tail_begin for row in self.rows) if self.compressed else self.tail.base
            base = min(base, self.tokens)
            self._move_tail(base, grown_room(self.tokens - base, new, self.tail_room(), self.tail.room))

    def advance(self, new: int) -> None:
        """Count tokens that a replayed CUDA graph has appended."""
        self.tokens += new

    def set_starts(self, starts: Sequence[int]) -> None:
        """Say at which position each row's real tokens begin. Raises InvalidInput for a row sealed from another one."""
        check_starts(starts, self.batch, self.tokens)
        self.sync()
        moved = [(row, int(start)) for row, start in zip(self.rows, starts, strict=True) if start != row.start]
        if any(row.tail_begin > row.start or start < self.tail.base for row, start in moved):
            raise InvalidInput("the padding of a row cannot change once its tokens are compressed")
        places.place_tail(self, self.tail.k, self.tail.base, np.asarray(starts, np.int64))
        for row, start in moved:
            row.start = row.tail_begin = start
        self._publish()

    @torch.inference_mode(False)
    def seal(self) -> None:
        """Begin to compress every whole page of tokens beyond the window. What is sealed never changes.

        Decoding ends it here. A prompt needs the host twice more: ``step``, or whatever uses the store next.

        Raises
        ------
        LimitExceeded
            If memory ends. A row is then either sealed or as it was.
        """
        if not self.batch:
            return
        self.sync()
        sealing = [row for row in (Sealing(self, index) for index in range(self.batch)) if row.pages]
        pages = max((row.end for row in sealing), default=0)
        if pages > self.table.capacity:
            with enough_memory():
                self.table = self.table.grown(pages)
            self._publish()
        self._sealing = sealing
        self.step()

    @torch.inference_mode(False)
    def step(self) -> None:
        """Take a seal to where the host must wait again; waits until the device has come so far."""
        sealing, self._sealing = self._sealing, []
        before = self._page_count
        try:
            with enough_memory():
                self._sealing = [row for row in sealing if not row.step()]
        finally:
            if self._page_count > before:
                self._sealed = self.kernels.side.mark()
                self._publish()
                if not self._sealing:
                    self._trim_tail()

    def drain(self) -> None:
        """Take a seal to its end on the host."""
        while self._sealing:
            self.step()

    def sync(self) -> None:
        """``drain``, and let the current stream wait for the pages."""
        self.drain()
        if self._sealed is not None:
            torch.cuda.current_stream(self.device).wait_event(self._sealed)
            self._sealed = None

    @property
    def _page_count(self) -> int:
        return sum(len(row.valid) for row in self.rows)

    @torch.inference_mode(False)
    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` positions. Raises InvalidInput if there are fewer."""
        check_crop(tokens, self.tokens)
        if not self.batch:
            return
        self.sync()
        for row in self.rows:
            row.crop(tokens)
        self.tokens = tokens
        self.tail.base = min(self.tail.base, tokens)
        self._publish()

    @torch.inference_mode(False)
    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Make the batch of these rows, which may repeat; sealed pages are shared.

        Raises
        ------
        InvalidInput
            For rows that do not exist.
        LimitExceeded
            If memory ends.
        """
        index = row_index(rows, self.batch).tolist()
        self.sync()
        with enough_memory():
            chosen = to_pinned(np.array(index), self.device).to(self.device, non_blocking=True)
            sinks_k, sinks_v = (x.index_select(0, chosen) for x in (self.sinks_k, self.sinks_v))
            tail, books = self.tail.select(chosen), self.device_books.select(index, chosen)
            table = Table(self.table.pages.index_select(0, chosen))
        self.hold([self.rows[row].copy() for row in index], self.tokens, (sinks_k, sinks_v), tail, table, books)

    def hold(
        self,
        rows: list[Row],
        tokens: int,
        sinks: tuple[Tensor, Tensor],
        tail: Tail,
        table: Table,
        books: DeviceBooks,
    ) -> None:
        """Hold these rows, and nothing else."""
        self.rows, self.batch, self.tokens = rows, len(rows), tokens
        self.sinks_k, self.sinks_v = sinks
        self.tail, self.table, self.device_books = tail, table, books
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

    def can_attend(self, queries: int) -> bool:
        """Whether all of the last ``queries`` tokens lie in the tail, as ``attend`` needs: a crop may leave some in
        pages.
        """
        return queries <= self.tokens - max(row.tail_begin for row in self.rows) + 1

    def attend(self, q: Tensor, scaling: float, softcap: float = 0.0, sink_logits: Tensor | None = None) -> Tensor:
        """Fused attention of the last tokens, decoding the sealed pages; q: (batch, heads, queries, head_dim)."""
        self.sync()
        return read.attend(self, q, scaling, softcap, sink_logits)

    def tile(self, row: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """K and V, or K' and V', of the pages ``first`` to ``last`` of a row, (KV heads, tokens, head_dim)."""
        self.sync()
        return read.tile(self, row, first, last)

    def dense(self) -> tuple[Tensor, Tensor]:
        """K and V as attention sees them, (batch, KV heads, tokens, head_dim); padding is 0 once a row is sealed."""
        self.sync()
        return read.dense(self)

    def tiles(self, row: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """A row's tokens in order: position of the first, and K and V as held, (KV heads, tokens, head_dim) each."""
        self.sync()
        return read.tiles(self, row)

    def until_seal(self) -> int:
        """1: what a row has sealed is known after waiting for the device."""
        return 1

    def memory(self) -> Memory:
        """Bytes by part, pages as one (``codes``); waits for the device."""
        if not self.batch:
            return Memory()
        self.sync()
        return read.memory(self)

    @property
    def places(self) -> tuple[Any, ...]:
        """Where everything lies that a step reads or writes: a recorded step can be repeated while this
        stays the same.
        """
        held = self.tail.k, self.tail.v, self.tail.held, self.sinks_k, self.sinks_v
        device = self.table.pages, self.table.numbers, self.device_books.decoding
        return (*(x.data_ptr() for x in (*held, *device)), self.tail.room, self.table.capacity, self.batch)

    def _check(self, k: Tensor, v: Tensor) -> None:
        check_kv(k, v)
        if k.shape != v.shape:
            raise BackendUnavailable(
                f"the GPU kernels take one head_dim for K and V, not {k.shape[3]} and {v.shape[3]}: use backend='cpu'"
            )
        if k.device != v.device:
            raise InvalidInput(f"K is on {k.device}, V on {v.device}: they must be on one device")
        if self.batch:
            check_more(k, v, (self.batch, self.heads, self.channels, self.channels), self.dtype)
            if k.device != self.device:
                raise InvalidInput(f"this cache is on {self.device}, K and V are on {k.device}")
        else:
            check_shape((self.spec.key.heads, self.spec.value.heads), self.transform, k.shape[1], (k.shape[3],) * 2)

    @torch.inference_mode(False)
    def allocate(self, k: Tensor) -> None:
        """Take batch, heads, channels, dtype and device from the first K, (batch, KV heads, tokens, head_dim)."""
        self.kernels = LayerKernels(self._launcher(k.device), self.spec, k)
        self.batch, self.heads, _, self.channels = k.shape
        self.dtype, self.device = k.dtype, k.device
        self.rows = [Row() for _ in range(self.batch)]
        nothing = k.new_empty((self.batch, self.heads, 0, self.channels))
        self.tail = Tail(nothing, nothing)
        self.sinks_k, self.sinks_v = (
            k.new_empty((self.batch, self.heads, self.spec.sinks, self.channels)) for _ in "KV"
        )
        self.table = Table.empty(self.batch, k.device)
        if self.transform is not None:
            self.transform = self.transform.to(k.device)
        self.arena = self.kernels.arena()
        tensors = self.spec.key, self.spec.value
        self.device_books = DeviceBooks(self.batch, tensors, k.device)
        for kind, tensor in enumerate(tensors):
            if tensor.coding == "huffman":
                default, own = self.given_books[kind] if self.given_books else (default_book(tensor), None)
                self.device_books.add(range(self.batch), kind, 0, default)
                self.device_books.add(range(self.batch), kind, 1, own)
                for row in self.rows:
                    row.books[kind] = own
        self._publish()

    def _publish(self) -> None:
        """Tell the device what the host knows of the rows."""
        self.table.publish(self.rows, self.tail.base)
        self.tail.held.fill_(self.tokens - self.tail.base)

    def tail_room(self) -> int:
        """Tokens for which the tail has room between two seals."""
        return steady_room(self.spec, self.batch, self.compressed)

    def _trim_tail(self) -> None:
        """Give back what a prompt took, down to the steady room: a recorded step needs the tail where it is."""
        base, steady = min(row.tail_begin for row in self.rows), self.tail_room()
        if self.tail.room > steady >= self.tokens - base:
            self._move_tail(base, steady)

    def _move_tail(self, base: int, room: int) -> None:
        with enough_memory():
            self.tail.move(base, self.tokens - base, room)
        self._publish()
