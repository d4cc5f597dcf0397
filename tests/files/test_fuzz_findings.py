"""Inputs that a fuzz target found and that were not refused as they must be, each cut down to what matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvcomp.errors import CorruptData
from kvcomp.files.check import check_pages
from kvcomp.files.layers import parts_of
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store import KVStore


def test_a_block_said_to_lie_behind_its_page_and_the_next_one_before_it() -> None:
    """K's block was looked at, far out of range, before V's place showed that the order is wrong."""
    store = KVStore(CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=0, sinks=0))
    store.append(*torch.randn(2, 1, 2, 64, 16))
    store.seal()
    parts = parts_of(store, 0)
    arena = np.concatenate(parts.arena)
    arena[4:8].view("<u4")[0] += 1 << 20
    with pytest.raises(CorruptData, match="in order"):
        check_pages(arena, parts.offsets, store.layout)
