"""Wavefronts of shared memory that a page takes, counted by the emulator (tests/emulator/wavefronts.cpp)."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import numpy.typing as npt

import emulator
from attention_cases import Cache
from emulated_attention import attend
from kvcomp.kernels.cuda.layout import AttendBuild

ACCESSES = ("look-up", "refill", "read", "write", "copy", "global read")
SIZES = (4, 8, 16)  # bytes a lane
WARP = 32

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
    pages = found[1] - found[0]
    return {(access, size): pages[i, j] for i, access in enumerate(ACCESSES) for j, size in enumerate(SIZES)}


def total(counts: Counts) -> int:
    """Wavefronts of shared memory alone."""
    return sum(int(of @ np.arange(WARP + 1)) for (access, _), of in counts.items() if access != "global read")
