"""Into how many parts a context is cut, and that kernels are known by what they are built with."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kvcomp.kernels.cuda.launch import splits_for
from kvcomp.kernels.cuda.layout import attend_build, machine, page_build
from kvcomp.spec import PRESETS

SPEC = PRESETS["kvcomp:paper"]


@pytest.mark.parametrize(
    ("rows", "tokens", "splits"),
    [
        (1, 64, 1),  # one page
        (8, 32768, 2),  # 64 CTAs a split: two splits fit 132 multiprocessors
        (1, 32768, 16),  # all at once
        (17, 32768, 8),  # 136 CTAs would take two turns, the second with four of them
    ],
)
def test_splits_let_the_multiprocessors_end_together(rows: int, tokens: int, splits: int) -> None:
    on: Any = SimpleNamespace(machine=machine(90, processors=132))
    build = replace(attend_build(SPEC, 128, "bfloat16", "bfloat16", False, on.machine), warps=8)
    assert splits_for(on, build, rows, 8, 4, tokens) == splits


def test_builds_of_two_stores_are_one_key() -> None:
    one, other = (page_build(SPEC, 128, "bfloat16") for _ in range(2))
    assert one is not other
    assert len({("encode", one), ("encode", other)}) == 1
