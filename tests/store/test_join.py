"""Rows that join and leave a batch on the CPU: every row is as if it were alone."""

from __future__ import annotations

import pytest

from batching import Batch
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store import KVStore
from kvcomp.store.attention import attend
from kvcomp.store.join import join
from stores import page_bytes

SPECS = {
    "the preset's units": CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=16, sinks=4),
    "no window": CodecSpec(TensorSpec("channel", 0.1), TensorSpec("vector", 0.1), window=0, sinks=0),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("seed", range(6))
def test_rows_join_and_leave_without_touching_the_others(spec: CodecSpec, seed: int) -> None:
    Batch(lambda: KVStore(spec), join, attend, page_bytes, seed).live(tolerance=0.0)
