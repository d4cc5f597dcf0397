"""How the CUDA kernels are launched: grids, threads and shared memory, the same on a GPU and on the emulator."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple, Protocol

from kvcomp.codec.dtypes import TOKEN
from kvcomp.kernels.cuda.layout import (
    LANES,
    QUERIES,
    AttendArguments,
    AttendBuild,
    Build,
    DecompressArguments,
    EncodeArguments,
    Machine,
    PageBuild,
)
from kvcomp.spec import PAGE_TOKENS

Grid = tuple[int, int, int]
MOST_CTAS = 8  # for each multiprocessor, of the kernels whose warps take blocks until none is left
COUNTING_CTAS = 2  # the same for those that gather counts of their own


class Launch(NamedTuple):
    """A kernel of ``kernels/cuda/<source>.cu``, and how it runs."""

    source: str
    kernel: str
    build: Build
    grid: Grid
    threads: int
    shared: int
    """Bytes of shared memory."""
    arguments: ctypes.Structure
    extra: int | None = None
    """Its second argument, if it has one."""


class Launcher(Protocol):
    """A GPU, or what stands in for one."""

    machine: Machine

    def launch(self, of: Launch) -> None:
        """Queue a kernel on the current stream."""


def splits_for(on: Launcher, build: AttendBuild, rows: int, heads: int, queries: int, tokens: int) -> int:
    """Count the parts into which to cut the context, so that the multiprocessors end at about the same time."""
    ctas = rows * heads * -(-queries // QUERIES)
    return _splits(on.machine.processors, ctas, -(-tokens // (PAGE_TOKENS * build.warps)))


@lru_cache
def _splits(processors: int, ctas: int, turns: int) -> int:
    """turns: pages that each warp of a CTA takes of a whole context. Filling shared memory costs about one more."""

    def time(splits: int) -> int:
        return -(-ctas * splits // processors) * (-(-turns // splits) + 1)

    return min(range(1, min(processors, turns) + 1), key=time, default=1)


def attend(on: Launcher, build: AttendBuild, a: AttendArguments, splits: int) -> None:
    """Launch fused attention; a second launch joins the partial results of several splits."""
    grid = splits, a.heads * -(-a.queries // QUERIES), a.rows
    on.launch(Launch("decode_attention", "attend", build, grid, LANES * build.warps, build.shared, a))
    if splits > 1:
        queries = a.rows * a.heads * a.queries
        on.launch(Launch("decode_attention", "merge", build, (queries, 1, 1), build.channels, 0, a, splits))


def decompress(on: Launcher, build: PageBuild, a: DecompressArguments) -> None:
    """Launch the decoding of pages to tiles."""
    grid = _ctas(on, build, 2 * a.page_count * a.heads, MOST_CTAS), 1, 1
    on.launch(Launch("decompress", "decompress", build, grid, LANES * build.warps, build.shared, a))


def quantise(on: Launcher, build: PageBuild, a: EncodeArguments) -> None:
    """Turn values into codes, scales and zeros."""
    threads = LANES * build.warps
    if TOKEN in (build.k_unit, build.v_unit):
        on.launch(Launch("encode", "measure_tokens", build, (a.pages, 2, 1), threads, 0, a))
    on.launch(Launch("encode", "quantise", build, (a.pages, a.heads, 2), threads, build.quantise_shared, a))


def count_pairs(on: Launcher, build: PageBuild, a: EncodeArguments) -> None:
    """Add the pairs of the codes to the counts."""
    grid = _ctas(on, build, a.pages * a.heads, COUNTING_CTAS), 2, 1
    on.launch(Launch("encode", "count_pairs", build, grid, LANES * build.warps, build.count_shared, a))


def measure(on: Launcher, build: PageBuild, a: EncodeArguments) -> None:
    """Find modes, lengths and sizes of the blocks, and where the pages will lie."""
    threads = LANES * build.warps
    grid = _ctas(on, build, 2 * a.pages * a.heads, MOST_CTAS), 1, 1
    on.launch(Launch("encode", "measure_blocks", build, grid, threads, build.measure_shared, a))
    on.launch(Launch("encode", "place_pages", build, (1, 1, 1), threads, build.place_shared, a))


def pack(on: Launcher, build: PageBuild, a: EncodeArguments) -> None:
    """Write the pages."""
    grid = _ctas(on, build, 2 * a.pages * a.heads, MOST_CTAS), 1, 1
    on.launch(Launch("encode", "pack", build, grid, LANES * build.warps, build.pack_shared, a))


def _ctas(on: Launcher, build: PageBuild, blocks: int, most: int) -> int:
    return max(1, min(-(-blocks // build.warps), most * on.machine.processors))
