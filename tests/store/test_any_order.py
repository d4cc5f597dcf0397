"""A store beside plain rows, through appends, seals, crops, selections and copies in any order."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcomp.spec import CODINGS, UNITS, CodecSpec, Coding, Unit
from kvcomp.store import KVStore
from stores import DTYPES, allocated, bound_of, page_bytes, snapshot, spec_of

pytestmark = pytest.mark.usefixtures("poison")


class Row:
    """The plain model of a row: its tokens as given, and for each value how far the stored one may be off."""

    def __init__(self, start: int, new: npt.NDArray[np.float64]) -> None:
        self.start = start  # padding before the first token
        self.values = new[:, :, start:]
        self.bounds = np.zeros_like(self.values)
        self.sealed = 0  # tokens that are sinks or lie in pages
        self.pages = 0

    def append(self, new: npt.NDArray[np.float64]) -> None:
        self.values = np.concatenate([self.values, new], axis=2)
        self.bounds = np.concatenate([self.bounds, np.zeros_like(new)], axis=2)

    def seal(self, spec: CodecSpec) -> None:
        begin = self.sealed if self.pages else spec.sinks
        while self.values.shape[2] - begin >= 64 + spec.window:
            for kind, tensor in enumerate((spec.key, spec.value)):
                page = torch.from_numpy(self.values[kind, :, begin : begin + 64])
                self.bounds[kind, :, begin : begin + 64] = bound_of(page, tensor.unit, tensor.scale).numpy()
            begin += 64
            self.sealed = begin
            self.pages += 1

    def crop(self, count: int, spec: CodecSpec) -> None:
        self.start = min(self.start, count)
        count -= self.start
        self.values, self.bounds = self.values[:, :, :count], self.bounds[:, :, :count]
        self.sealed = min(self.sealed, count)
        if self.sealed <= spec.sinks:
            self.pages = 0


class StoreMachine(RuleBasedStateMachine):
    """A KVStore and plain rows go through the same appends, seals, crops, selections and copies."""

    backend = "reference"

    @initialize(
        units=st.tuples(st.sampled_from(UNITS), st.sampled_from(UNITS)),
        window=st.sampled_from([0, 5, 64]),
        sinks=st.sampled_from([0, 4, 70]),
        coding=st.sampled_from(CODINGS),
        dtype=st.sampled_from(DTYPES),
        first=st.sampled_from([1, 90, 340]),
        padding=st.lists(st.floats(0, 1) | st.just(0.0), min_size=1, max_size=3),
        seed=st.integers(0, 99),
    )
    def begin(
        self,
        units: tuple[Unit, Unit],
        window: int,
        sinks: int,
        coding: Coding,
        dtype: torch.dtype,
        first: int,
        padding: list[float],
        seed: int,
    ) -> None:
        self.spec = spec_of(*units, coding=coding, window=window, sinks=sinks, r=0.5)
        self.store = KVStore(self.spec, self.backend)
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.copies: list[tuple[KVStore, dict[str, Any]]] = []
        self.length = first
        starts = [int(share * first) for share in padding]
        self.rows = [
            Row(start, new) for start, new in zip(starts, self.append_to_store(len(padding), first), strict=True)
        ]
        self.store.set_starts(starts)

    def append_to_store(self, batch: int, count: int) -> npt.NDArray[np.float64]:
        k, v = ((torch.randn((batch, 2, count, 16), generator=self.generator) * 3).to(self.dtype) for _ in "kv")
        self.store.append(k, v)
        return torch.stack([k, v], 1).double().numpy()

    @rule(count=st.sampled_from([1, 2, 7, 63, 64, 65, 130, 300]), seal=st.booleans())
    @precondition(lambda self: self.length < 450)
    def append(self, count: int, seal: bool) -> None:
        for row, new in zip(self.rows, self.append_to_store(len(self.rows), count), strict=True):
            row.append(new)
        self.length += count
        if seal:
            self.seal()

    @rule()
    def seal(self) -> None:
        self.store.seal()
        for row in self.rows:
            row.seal(self.spec)

    @rule(back=st.sampled_from([0, 1, 5, 63, 64, 65, 150]))
    def crop_the_end(self, back: int) -> None:
        self.crop(max(0, self.length - back))

    @rule(share=st.floats(0, 1))
    def crop_anywhere(self, share: float) -> None:
        self.crop(int(share * self.length))

    def crop(self, count: int) -> None:
        self.store.crop(count)
        self.length = count
        for row in self.rows:
            row.crop(count, self.spec)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=3))
        self.store.select(torch.tensor(chosen))
        self.rows = [deepcopy(self.rows[row]) for row in chosen]

    @rule()
    @precondition(lambda self: len(self.copies) < 2)
    def copy(self) -> None:
        kept = self.store
        self.store = deepcopy(kept)
        self.copies.append((kept, snapshot(kept)))

    @invariant()
    def the_store_holds_the_tokens(self) -> None:
        if not hasattr(self, "store"):
            return
        assert (self.store.tokens, self.store.batch) == (self.length, len(self.rows))
        dense = torch.stack(self.store.dense(), 1).double().numpy()
        for index, row in enumerate(self.rows):
            error = np.abs(dense[index, :, :, row.start :] - row.values)
            assert (error <= row.bounds).all()
            assert int(self.store.starts[index]) == row.start
            assert int(self.store.rows.tail_begin[index]) == row.start + row.sealed
        memory = self.store.memory()
        assert memory.total == allocated(self.store)
        pages = [self.store.rows.pages[row, : self.store.rows.count[row]].tolist() for row in range(self.store.batch)]
        sizes = {
            a: len(b)
            for row, old in zip(pages, page_bytes(self.store), strict=True)
            for a, b in zip(row, old, strict=True)
        }
        assert memory.pages == sum(sizes.values())

    def teardown(self) -> None:
        for kept, before in getattr(self, "copies", []):
            assert snapshot(kept) == before


def test_a_store_behaves_like_plain_rows_whatever_is_done_to_it(backend: str) -> None:
    machine = type("Machine", (StoreMachine,), {"backend": backend})
    run_state_machine_as_test(machine, settings=settings(max_examples=settings().max_examples, stateful_step_count=12))
