"""The path that instructions are counted on (benchmarks/gpu_instructions.py) is the one that a page takes: as many
products, shuffles and powers of two as the kernel makes of a page when it is run."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import replace
from typing import Any

import pytest

import emulator
from attention_cases import Case, build
from emulated_attention import attend
from emulator import COMPILER
from kvcomp.codec.dtypes import PATCHED
from kvcomp.codec.page import directory_of
from kvcomp.kernels.cuda.layout import AttendBuild, attend_build, machine

pytest.importorskip("cuda.bindings.nvrtc", exc_type=ImportError)
pytestmark = [pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++"), pytest.mark.emulated]

CASES = {
    "symbols": Case(heads=1, sinks=0, tail=1),
    "split": Case(heads=1, sinks=0, tail=1, units=("block", "block"), scales=(0.03, 0.03)),
    "4 bits": Case(heads=1, sinks=0, tail=1, coding=("fixed", "fixed"), scales=(1 / 12, 1 / 12)),
    "5 bits": Case(heads=1, sinks=0, tail=1, coding=("fixed", "fixed"), scales=(1 / 24, 1 / 24)),
    "pieces": Case(
        heads=1, sinks=0, tail=1, pages=(1,), units=("head", "head"), coding=("patched", "patched"), scales=(0.2, 0.3)
    ),
}


@pytest.fixture(scope="module")
def gpu_instructions() -> Any:
    return importlib.import_module("gpu_instructions")


def counted(case: Case, build_of_it: AttendBuild) -> dict[str, int]:
    """What one page makes each lane do: a run with a page less one without."""
    library = emulator.build("decode_attention", build_of_it.defines)
    found = []
    for pages in (0, 1):
        names = {"HMMA": "products", "SHFL": "shuffles", "MUFU": "powers"}
        counters = {of: ctypes.c_ulonglong.in_dll(library, name) for of, name in names.items()}
        before = {of: counter.value for of, counter in counters.items()}
        attend(build(replace(case, pages=(pages,))), build_of_it, splits=1)
        found.append({of: counter.value - before[of] for of, counter in counters.items()})
    return {of: (found[1][of] - found[0][of]) // 32 for of in found[0]}


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_the_path_through_pieces(gpu_instructions: Any, architecture: int) -> None:
    """Each turn as it is: widths, and rounds of exceptions."""
    case = CASES["pieces"]
    chosen = attend_build(case.spec, 128, "bfloat16", "float32", False, machine(architecture))
    lines, _, _ = gpu_instructions.compiled(chosen, architecture)
    page, turns_of = build(case).owners[0].tobytes(), importlib.import_module("gpu_cycles").turns_of
    modes, offsets = directory_of(build(case).owners[0], 0, 1)
    assert list(modes[:-1]) == [PATCHED, PATCHED]
    keys, values = (turns_of(page, int(offsets[kind]), 128, 2) for kind in (0, 1))
    assert {turn.rounds for turn in keys + values} == {1, 2}
    of_page = gpu_instructions.page_of_pieces(lines, chosen, keys, values)
    run = counted(case, replace(chosen, warps=1))
    assert {name: of_page.names[name] for name in run} == run


@pytest.mark.parametrize(
    ("form", "architecture"),
    [("symbols", 80), ("symbols", 90), ("symbols", 120), ("split", 90), ("4 bits", 80), ("5 bits", 90)],
)
def test_the_path_does_what_a_page_does(gpu_instructions: Any, form: str, architecture: int) -> None:
    case = CASES[form]
    chosen = attend_build(case.spec, 128, "bfloat16", "float32", False, machine(architecture))
    lines, _, _ = gpu_instructions.compiled(chosen, architecture)
    page = gpu_instructions.page_of(lines, chosen, form)
    run = counted(case, replace(chosen, warps=1))
    assert {name: page.names[name] for name in run} == run
