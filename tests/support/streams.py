"""What two CUDA streams do to the same memory without an order between them, found on the CPU.

Torch's operations and the kernels of the emulator run one after the other, and each is noted on the stream that a GPU
would queue it on. Waits between streams move vector clocks on (Mattern, 1989). Two accesses of which one writes, and
that no wait orders, are a race.
"""

from __future__ import annotations

import bisect
import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emulator import Emulator
from kvcomp.kernels.cuda.launch import Launch
from kvcomp.store.gpu import arena, kernels, sealing

WRITTEN = {
    "attend": {"out", "lse", "partial_out", "partial_peak", "partial_total"},
    "merge": {"out", "lse"},
    "decompress": {"out_k", "out_v"},
    "measure_tokens": {"token_range"},
    "quantise": {"codes", "scale", "zero", "raw"},
    "count_pairs": {"counts"},
    "measure_blocks": {"modes", "sizes", "lengths"},
    "place_pages": {"offsets", "cursor"},
    "pack": {"out"},
}


class Stream:
    """clock: for each stream how much of its work comes before what is queued here next; of itself all of it."""

    device = torch.device("cpu")

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock = Counter[str]()

    def wait_stream(self, other: Stream) -> None:
        self.clock |= other.clock

    def wait_event(self, event: Event) -> None:
        self.clock |= event.clock


class Event:
    """Work of a stream up to here. The host that waits for it queues everything else behind it; it is never done
    before that.
    """

    def __init__(self, on: Streams) -> None:
        self._on = on
        self.clock = Counter[str]()

    def record(self, stream: Stream | None = None) -> None:
        self.clock = (stream or self._on.current).clock.copy()

    def synchronize(self) -> None:
        for stream in (self._on.main, self._on.side):
            stream.wait_event(self)

    def query(self) -> bool:
        return False


class Readback(arena.Readback):
    """As it is of a tensor on a GPU."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self._arrived = torch.cuda.Event()
        self._arrived.record()


class Access:
    """Who wrote last, and who has read since: stream, how much work it had then, and the line.

    home: the stream on which it was allocated, None if that is not known. kept: for which others it is kept.
    """

    def __init__(self, home: str | None = None) -> None:
        self.home, self.kept = home, set[str]()
        self.write: tuple[str, int, str] | None = None
        self.reads: dict[str, tuple[str, int, str]] = {}


class Streams(TorchDispatchMode):
    """While it is active, ``races`` gathers what is not ordered, and memory that main may free while side uses it.
    Memory is told apart by storages, pages by addresses.

    Parameters
    ----------
    patch
        Lets stores use these streams, until it is undone.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.main, self.side = Stream("main"), Stream("side")
        self.current = self.main
        self.races: set[str] = set()
        self._accesses: dict[int, Access] = {}
        self._kept: list[Any] = []  # so that no address comes again
        of_sealing = sealing.SideStream(torch.device("cpu"))
        of_sealing._stream = self.side  # type: ignore[assignment]
        patch.setattr(kernels, "side_stream_of", lambda device: of_sealing)
        patch.setattr(sealing, "Readback", Readback)
        patch.setattr(arena, "Readback", Readback)
        patch.setattr(torch.cuda, "Event", lambda: Event(self))
        patch.setattr(torch.cuda, "stream", self._use)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(Tensor, "record_stream", lambda x, stream: self._keep(x, stream.name))

    @contextmanager
    def _use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def _keep(self, x: Tensor, on: str) -> None:
        self._accesses.setdefault(_begin(x), Access()).kept.add(on)

    def begin(self) -> None:
        """What follows is one piece of work of the current stream."""
        self.current.clock[self.current.name] += 1

    def access(self, address: int, write: bool) -> None:
        """Note that the current piece of work reads or writes what begins at an address."""
        known, stream = self._accesses.setdefault(address, Access()), self.current
        mine = stream.name, stream.clock[stream.name], _line()
        if (known.home, stream) == ("main", self.side) and "side" not in known.kept:
            self.races.add(f"memory of main that is not kept at {mine[2]} on side")
        others = [known.write] if known.write else []
        for name, time, line in [*others, *known.reads.values()] if write else others:
            if stream.clock[name] < time:
                kinds = "write" if write else "read", "write" if (name, time, line) == known.write else "read"
                self.races.add(f"{kinds[0]} at {mine[2]} on {stream.name}, {kinds[1]} at {line} on {name}")
        if write:
            known.write, known.reads = mine, {}
        else:
            known.reads[stream.name] = mine

    def storage_of(self, address: int) -> int | None:
        """Where the storage begins that an address lies in."""
        starts = sorted(self._accesses)
        index = bisect.bisect_right(starts, address) - 1
        return starts[index] if index >= 0 else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.begin()
        given, written = {_begin(x) for x in _tensors((args, kwargs))}, set[int]()
        aliases = list[Any]()
        for argument, value in zip(func._schema.arguments, (*args, *kwargs.values()), strict=False):
            if argument.alias_info is not None:
                aliases.append(argument.alias_info)
                written |= {_begin(x) for x in _tensors(value) if argument.alias_info.is_write}
        out = func(*args, **kwargs)
        self._kept += _tensors(out)
        for x in _tensors(out):
            self._accesses.setdefault(_begin(x), Access(self.current.name))
        if aliases and not written:  # a view
            return out
        for address in given:
            self.access(address, address in written)
        for x in _tensors(out):
            if _begin(x) not in given and "empty" not in func._schema.name:
                self.access(_begin(x), True)
        return out


class WatchedEmulator(Emulator):
    """An emulator whose kernels are noted: what their arguments point to, and the pages behind the page table."""

    def __init__(self, streams: Streams) -> None:
        super().__init__(processors=4)
        self._streams = streams

    def launch(self, of: Launch) -> None:
        self._streams.begin()
        for name, address in _pointers(of.arguments):
            storage = self._streams.storage_of(address)
            if storage is not None:
                self._streams.access(storage, name in WRITTEN[of.kernel])
        for page in _pages_read(of):
            self._streams.access(page, False)
        super().launch(of)
        if of.kernel == "pack":
            a: Any = of.arguments
            for offset in (ctypes.c_int64 * a.pages).from_address(a.offsets):
                self._streams.access(a.out + offset, True)


def _pages_read(of: Launch) -> list[int]:
    a: Any = of.arguments
    if of.kernel == "decompress":
        return list((ctypes.c_uint64 * a.page_count).from_address(a.pages))
    if of.kernel != "attend":
        return []
    counts = (ctypes.c_int32 * a.rows).from_address(a.count)
    rows = (ctypes.c_uint64 * a.capacity * a.rows).from_address(a.pages)
    return [page for row, count in zip(rows, counts, strict=True) for page in row[:count]]


def _pointers(of: ctypes.Structure) -> Iterator[tuple[str, int]]:
    """Every pointer of a structure that is not null, and its name."""
    for name, kind in of._fields_:  # type: ignore[misc]
        value = getattr(of, name)
        if kind is ctypes.c_uint64 and value:
            yield name, value
        elif isinstance(value, ctypes.Structure):
            yield from _pointers(value)
        elif isinstance(value, ctypes.Array) and isinstance(value[0], ctypes.Structure):
            for one in value:
                yield from _pointers(one)


def _tensors(of: Any) -> list[Tensor]:
    return [x for x in tree_leaves(of) if isinstance(x, Tensor)]


def _begin(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _line() -> str:
    """The line of the library that the present work comes from."""
    frame = sys._getframe()
    while frame.f_back and "/kvcomp/store/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
