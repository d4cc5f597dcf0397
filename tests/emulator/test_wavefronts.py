"""Wavefronts that the emulator counts (wavefronts.cpp): the rule, what the kernel is known to take, and the committed
table.
"""

from __future__ import annotations

import ctypes
import importlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import emulator
from attention_cases import build
from emulated_attention import attend
from emulated_wavefronts import CASES, PAGES, WARP, pinned, wavefronts
from emulator import COMPILER
from kvcomp.kernels.cuda.layout import AttendBuild, attend_build, machine

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")

TABLE = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_cycles.json").read_text())["pinned"]
ALL = (1 << WARP) - 1
QUICK = ("kvcomp:paper", "90")


def chosen(name: str) -> AttendBuild:
    return replace(attend_build(CASES[name].spec, 128, "bfloat16", "bfloat16", False, machine(90)), warps=1)


@pytest.fixture(scope="module")
def library() -> Any:
    return emulator.build("decode_attention", chosen("kvcomp:paper").defines, counting=True)


def counted(library: Any, addresses: Sequence[int], active: int, size: int) -> int:
    return int(library.wavefronts_of((ctypes.c_uint64 * WARP)(*addresses), ctypes.c_uint32(active), size))


@pytest.mark.parametrize(
    ("addresses", "size", "expected"),
    [
        (range(0, 128, 4), 4, 1),
        ([64] * WARP, 4, 1),
        (range(0, 256, 8), 4, 2),
        (range(0, 132 * 32, 132), 4, 1),
        (range(0, 4096, 128), 4, 32),
        (range(0, 256, 8), 8, 2),
        (range(0, 4096, 128), 8, 32),
        (range(0, 512, 16), 16, 4),
        ([2 * lane for lane in range(WARP)], 2, 1),
    ],
)
def test_known_patterns(library: Any, addresses: Sequence[int], size: int, expected: int) -> None:
    assert counted(library, addresses, ALL, size) == expected


@given(
    words=st.lists(st.integers(0, 255), min_size=WARP, max_size=WARP),
    active=st.integers(0, ALL),
    size=st.sampled_from([4, 8, 16]),
)
def test_one_for_each_word_of_a_bank(library: Any, words: list[int], active: int, size: int) -> None:
    expected, at_once = 0, 128 // size
    for first in range(0, WARP, at_once):
        lanes = [lane for lane in range(first, first + at_once) if active >> lane & 1]
        read = {words[lane] * size // 4 + i for lane in lanes for i in range(size // 4)}
        expected += max((sum(word % 32 == bank for word in read) for bank in range(32)), default=0)
    assert counted(library, [size * word for word in words], active, size) == expected


def test_counting_changes_no_result() -> None:
    cache = build(PAGES)
    plain, counting = (attend(cache, chosen("kvcomp:paper"), counting=counting) for counting in (False, True))
    np.testing.assert_array_equal(plain.out, counting.out)
    np.testing.assert_array_equal(plain.lse, counting.lse)


def test_a_page_takes_the_accesses_that_it_must() -> None:
    """A look-up for every pair of a lane, a refill for every two, each tile's sums read and written once."""
    case = replace(PAGES, pages=(1,))
    counts = wavefronts(build(case), chosen("kvcomp:paper"))
    assert counts["look-up", 4].sum() == 2 * 128
    assert counts["refill", 4].sum() == 128
    assert counts["write", 8].tolist() == [16 if of == 2 else 0 for of in range(WARP + 1)]
    assert counts["write", 16].tolist() == [1 if of == 4 else 0 for of in range(WARP + 1)]
    assert counts["read", 8][2] >= 16


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        QUICK,
        *(
            pytest.param(name, of, marks=pytest.mark.emulated)
            for name in CASES
            for of in ("80", "90")
            if (name, of) != QUICK
        ),
    ],
)
def test_the_kernel_takes_what_the_table_says(name: str, architecture: str) -> None:
    """If it takes fewer: make gpu-model. Plain reads follow from what g++ keeps in registers, so they may differ a
    little.
    """
    expected, found = TABLE[name][architecture], pinned(name, int(architecture))
    through_the_seam = ("look-up", "refill", "write", "copy")
    assert {access: found[access] for access in through_the_seam} == {x: expected[x] for x in through_the_seam}
    assert 0.98 * expected["all"] <= found["all"] <= 1.02 * expected["all"]


def test_the_results_are_of_these_sources() -> None:
    gpu_cycles = importlib.import_module("gpu_instructions")
    compile_of = importlib.import_module("kvcomp.kernels.cuda.compile")
    results = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_cycles.json").read_text())
    assert results["sources"] == compile_of.sources_hash(gpu_cycles.SOURCE), "make gpu-model"
