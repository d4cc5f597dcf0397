"""Wavefronts of shared memory that a page takes, counted by the emulator (tests/emulator/wavefronts.cpp)."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import numpy.typing as npt

import emulator
from attention_cases import Cache, Case, build
from emulated_attention import attend
from kvcomp.kernels.cuda.layout import AttendBuild, attend_build, machine

ACCESSES = ("look-up", "refill", "read", "write", "copy", "global read")
SIZES = (4, 8, 16)  # bytes a lane
WARP = 32

PAGES = Case(heads=1, pages=(3,), sinks=0, tail=1)
CASES = {
    "kvcomp": replace(PAGES, units=("channel", "token"), scales=(0.08, 0.15)),
    "kvcomp:paper": PAGES,
    "packed": replace(PAGES, units=("channel", "token"), coding=("fixed", "fixed"), scales=(0.08, 1 / 6)),
    "packed:paper": replace(PAGES, coding=("fixed", "fixed"), scales=(1 / 14, 1 / 14)),
    "steps of heads": replace(PAGES, units=("head", "head"), classes=(4, 4), scales=(0.1, 0.1)),
    "low bits": replace(PAGES, units=("block", "block"), scales=(0.03, 0.03)),
}

Counts = dict[tuple[str, int], npt.NDArray[np.int64]]


def wavefronts(cache: Cache, build: AttendBuild) -> Counts:
    """How many instructions took 0, 1, .. 32 wavefronts for all pages of a cache, by access and size.

    Of ``global read`` lines of 128 bytes are counted in place of wavefronts. A run with the pages less one without.
    """
    alone = replace(build, warps=1)
    library = emulator.build("decode_attention", alone.defines, counting=True)
    shape = len(ACCESSES), len(SIZES), WARP + 1
    counter = np.ctypeslib.as_array((ctypes.c_longlong * int(np.prod(shape))).in_dll(library, "wavefronts"))
    found = []
    for view in (replace(cache.view, count=np.zeros_like(cache.view.count)), cache.view):
        before = counter.copy()
        attend(replace(cache, view=view), alone, splits=1, query="bfloat16", counting=True)
        found.append((counter - before).reshape(shape))
    pages = np.maximum(found[1] - found[0], 0)  # lines of what is not of pages may differ, as it lies elsewhere
    return {(access, size): pages[i, j] for i, access in enumerate(ACCESSES) for j, size in enumerate(SIZES)}


def pinned(name: str, architecture: int) -> dict[str, int]:
    """Wavefronts of shared memory for the pages of a case, by access, and ``all``."""
    case = CASES[name]
    counts = wavefronts(
        build(case), attend_build(case.spec, case.channels, case.value, "bfloat16", False, machine(architecture))
    )
    sums = {
        access: sum(int(counts[access, size] @ np.arange(WARP + 1)) for size in SIZES)
        for access in ACCESSES
        if access != "global read"
    }
    return sums | {"all": sum(sums.values())}
