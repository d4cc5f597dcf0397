"""Pages are sealed on a stream of their own: everything that two streams touch must be ordered by a wait."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch

from emulator import COMPILER, Emulator
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store.gpu.copies import to_main_memory
from kvcomp.store.gpu.rows import LEAST_PAGES
from kvcomp.store.gpu.sealing import Sealing, SideStream
from kvcomp.store.gpu.store import GPUStore
from streams import Streams, WatchedEmulator

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++"), pytest.mark.emulated]

SPEC = CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=16, sinks=4)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    with Streams(monkeypatch) as made:
        yield made


def store_on(streams: Streams) -> GPUStore:
    on = WatchedEmulator(streams)
    return GPUStore(SPEC, launcher=lambda device: on)


def append(store: GPUStore, tokens: int, rows: int = 0) -> None:
    store.append(*torch.randn(2, rows or store.batch, 1, tokens, 64).to(torch.bfloat16))


def attend(store: GPUStore) -> None:
    store.attend(torch.randn(store.batch, 2, 1, 64), 0.125)


def outgrow_the_table(store: GPUStore) -> None:
    """Two rows of different lengths seal in one call, and the longer one's pages no longer fit the page table."""
    append(store, 90, rows=2)
    store.set_starts([64, 0])
    append(store, 64 * LEAST_PAGES - 90 + 20)
    store.seal()
    for _ in range(64):
        append(store, 1)
        store.seal()
    attend(store)
    assert [len(row.valid) for row in store.rows] == [LEAST_PAGES, LEAST_PAGES + 1]


def test_a_table_that_grows_while_rows_are_sealed(streams: Streams) -> None:
    outgrow_the_table(store_on(streams))
    assert not streams.races


def test_rows_come_leave_and_are_copied(streams: Streams) -> None:
    one, other = store_on(streams), store_on(streams)
    append(one, 330, rows=1)
    one.seal()
    append(other, 200, rows=2)
    other.set_starts([0, 130])
    other.seal()
    for store in (one, other):
        append(store, 1)
        attend(store)
        store.seal()
    joined = one.join([other], 400)
    for _ in range(70):
        append(joined, 1)
        joined.seal()
    attend(joined)
    twin = deepcopy(joined)
    append(twin, 300)  # another prompt
    twin.seal()
    twin.step()
    attend(joined)
    twin.dense()
    twin.select([2, 0])
    append(twin, 80)
    twin.seal()
    twin.crop(450)
    append(twin, 1)
    attend(twin)
    to_main_memory(twin)
    assert not streams.races


def grow_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each row outgrow the table when its pages are placed, beside those of the rows before it."""
    place = Sealing.place

    def seal(store: GPUStore) -> None:
        store.sync()
        store._sealing = [row for row in (Sealing(store, index) for index in range(store.batch)) if row.pages]
        store.step()

    def grow_and_place(sealing: Sealing) -> None:
        store = sealing._store
        if sealing.end > store.table.capacity:
            store.table = store.table.grown(sealing.end)
        place(sealing)

    monkeypatch.setattr(GPUStore, "seal", seal)
    monkeypatch.setattr(Sealing, "place", grow_and_place)


def never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the side stream begin before the tokens are there."""
    monkeypatch.setattr(SideStream, "wait_for_current", lambda side: None)


def read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attention read pages that are not there yet."""
    monkeypatch.setattr(GPUStore, "sync", GPUStore.drain)


def keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory of the current stream be free again before the side stream has read it."""
    monkeypatch.setattr(SideStream, "keep", lambda side, *tensors: None)


@pytest.mark.parametrize(
    ("mistake", "race"),
    [
        (grow_late, "read at rows.py on main, write at sealing.py on side"),
        (never_wait, "read at encode.py on side, write at tail.py on main"),
        (read_at_once, "read at read.py on main, write at encode.py on side"),
        (keep_nothing, "memory of main that is not kept at books.py on side"),
    ],
)
def test_a_missing_wait_is_found(
    streams: Streams, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[pytest.MonkeyPatch], None], race: str
) -> None:
    mistake(monkeypatch)
    outgrow_the_table(store_on(streams))
    assert race in {re.sub(r":\d+", "", found) for found in streams.races}


def test_all_layers_seal_on_one_stream() -> None:
    stores = [GPUStore(SPEC, launcher=lambda device: Emulator()) for _ in range(2)]
    for store in stores:
        append(store, 1, rows=1)
    assert stores[0].kernels.side is stores[1].kernels.side
