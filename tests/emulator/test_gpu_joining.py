"""Rows that join and leave a batch on the GPU, in the emulator: every row is as if it were alone."""

from __future__ import annotations

import pytest
import torch

from batching import Batch
from emulator import COMPILER, Emulator
from kvcomp.errors import InvalidInput
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store.gpu.copies import to_main_memory
from kvcomp.store.gpu.join import join
from kvcomp.store.gpu.store import GPUStore
from stores import page_bytes

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++"), pytest.mark.emulated]

SPEC = CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=16, sinks=4)
TOLERANCE = 1e-4  # the context is split otherwise


@pytest.mark.parametrize("seed", range(3))
def test_rows_join_and_leave_without_touching_the_others(seed: int) -> None:
    on = Emulator()
    batch = Batch(
        make=lambda: GPUStore(SPEC, launcher=lambda device: on),
        join=join,
        attend=lambda store, q, by: store.attend(q, by),
        pages=lambda store: page_bytes(to_main_memory(store)),
        seed=seed,
    )
    batch.live(TOLERANCE, rounds=6)


def test_stores_that_do_not_belong_together_are_refused() -> None:
    made = [GPUStore(SPEC, launcher=lambda device: Emulator()) for _ in range(3)]
    made[0].append(*torch.randn(2, 1, 2, 3, 64))
    made[1].append(*torch.randn(2, 1, 1, 3, 64))
    with pytest.raises(InvalidInput, match="one spec, shape, dtype and device"):
        join(made[:2], 3)
    with pytest.raises(InvalidInput, match="that hold tokens"):
        join([made[0], made[2]], 3)
