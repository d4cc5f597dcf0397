# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Products of the decoded pairs of a Huffman block, in integers as those of ``fixed``. Addresses are int64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvcomp.kernels.cpu.bits import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    OF_VECTOR,
    at,
    compiled,
    emitted,
    integers,
    products_of_pairs,
    splat,
    vector,
)
from kvcomp.kernels.cpu.decode import EMPTY, MOST_CLASSES, NARROW, NARROW_A, NARROW_B, PAIR_STEP, WIDE, K
from kvcomp.kernels.cpu.fixed import FLOATS, GROUPS, WORDS, by_queries, each_case
from kvcomp.kernels.cpu.page import TOKENS
from kvcomp.kernels.cpu.scratch import run_of_form

TOGETHER = 4  # queries whose sums are in registers
FIRST_BITS = {NARROW: (NARROW_A, NARROW_B), WIDE: (0, 8)}  # of a and b in a pair
MASKS = {NARROW: 31, WIDE: 255}
i64 = np.int64


def _codes(builder: ir.IRBuilder, place: ir.Value, form: int) -> ir.Value:
    """Codes of 16 pairs of a form, as int16 [pair][2]."""
    words = builder.load(place, align=2, typ=vector(I16))
    both = builder.shuffle_vector(words, words, integers(I32, [lane // 2 for lane in range(2 * LANES)]))
    both = builder.lshr(both, integers(I16, [*FIRST_BITS[form]] * LANES))
    return builder.bitcast(builder.and_(both, integers(I16, [MASKS[form]] * 2 * LANES)), WORDS)


def _of_two_rows(builder: ir.IRBuilder, factors: ir.Value) -> ir.Value:
    """Factors of two rows at an address, each in as many lanes as there are g."""
    if OF_VECTOR == 1:
        both = builder.load(at(builder, factors), align=4, typ=vector(I32, 2))
        return builder.shuffle_vector(both, both, integers(I32, [lane // GROUPS for lane in range(LANES)]))
    rows = [builder.load(at(builder, factors, 4 * row), align=4, typ=I32) for row in range(2)]  # a register each
    return builder.shuffle_vector(*(splat(builder, row, GROUPS) for row in rows), integers(I32, range(LANES)))


def _tiles(queries: int, form: int, builder: ir.IRBuilder, args: Sequence[ir.Value], tile: ir.Value, some: int) -> None:
    """``some_tiles`` of some tiles from one on."""
    pairs, _, tile_bytes, runs, run_bytes, rows, factors, factor_bytes, steps, out, out_bytes = args
    sums = [
        [cgutils.alloca_once_value(builder, integers(I32, [0] * LANES)) for _ in range(some)] for _ in range(queries)
    ]
    pairs = builder.add(pairs, builder.mul(tile, tile_bytes))
    with cgutils.for_range(builder, runs, intp=I64) as run:
        of_run = builder.add(pairs, builder.mul(run.index, run_bytes))
        first = builder.mul(run.index, rows)
        with cgutils.for_range_slice(builder, I64(0), rows, I64(2), I64) as (row, _):
            begin = builder.add(of_run, builder.mul(row, I64(PAIR_STEP)))
            places = [builder.add(begin, builder.mul(tile_bytes, I64(m))) for m in range(some)]
            codes = [_codes(builder, at(builder, place), form) for place in places]
            factor = builder.add(factors, builder.shl(builder.add(first, row), I64(2)))
            for query, of_query in enumerate(sums):
                of_rows = builder.add(factor, builder.mul(factor_bytes, I64(query)))
                repeated = _of_two_rows(builder, of_rows)
                for so_far, of_tile in zip(of_query, codes, strict=True):
                    both = products_of_pairs(builder, of_tile, repeated)
                    builder.store(builder.add(builder.load(so_far, typ=WORDS), both), so_far)
    for query, of_query in enumerate(sums):
        step = splat(builder, builder.load(at(builder, steps, 4 * query), typ=F32), GROUPS)
        begin = builder.add(builder.add(out, builder.shl(tile, I64(5))), builder.mul(out_bytes, I64(query)))
        for m, total in enumerate(of_query):
            total = builder.sitofp(builder.load(total, typ=WORDS), FLOATS)
            low, high = (
                builder.shuffle_vector(total, total, integers(I32, range(lane, lane + GROUPS))) for lane in (0, GROUPS)
            )
            place = at(builder, begin, 4 * GROUPS * m)
            product = builder.fmul(builder.fadd(low, high), step, flags=("contract",))
            before = builder.load(place, align=4, typ=vector(F32, GROUPS))
            builder.store(builder.fadd(before, product, flags=("contract",)), place, align=4)


def _some_tiles(queries: int, context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    *of_all, form = args
    tiles, most = of_all[1], 4 if OF_VECTOR == 1 else max(1, 4 // queries)  # so many tiles' sums are in registers
    whole = builder.and_(tiles, I64(-most))

    def of_form(which: int) -> None:
        for begin, end, some in ((I64(0), whole, most), (whole, tiles, 1))[: 1 if most == 1 else 2]:
            with cgutils.for_range_slice(builder, begin, end, I64(some), I64) as (tile, _):
                _tiles(queries, which, builder, of_all, tile, some)

    each_case(builder, form, (NARROW, WIDE), of_form)


# some_tiles(pairs, tiles, tile_bytes, runs, run_bytes, rows, factors, factor_bytes, steps, out, out_bytes, form,
# queries): out[query, m, g] += steps[query] * sum over runs and rows n of the products of the two codes of the pair
# [m][n][g] with factors[query, n]
# A tile m has eight g; its rows, an even number, lie one after the other in each run. factors: int16 [query][n][2].
# A lane sums at most 256 codes of 255, those of every second row: below 2^31.
some_tiles = by_queries("some_tiles", 12, _some_tiles, TOGETHER)


@compiled
def multiply_tiles(
    pairs, tiles, tile_bytes, runs, run_bytes, rows, factors, factor_bytes, steps, queries, out, out_bytes, form
):
    """``some_tiles`` for any number of queries."""
    first = 0
    while first < queries:
        of, step, to = factors + first * factor_bytes, steps + 4 * first, out + first * out_bytes
        some = min(TOGETHER, queries - first)
        some_tiles(pairs, tiles, tile_bytes, runs, run_bytes, rows, of, factor_bytes, step, to, out_bytes, form, some)
        first += TOGETHER


@compiled
def multiply_huffman(kind, slot, books, channels, pairs, factors, factor_bytes, steps, queries, out, out_bytes):
    """Add products of a block's pairs, of the book in a slot, to ``out``: as ``fixed.multiply`` does.

    factors: int16 [query, pair of channels, 2] for K, [query, j, pair of a stream, 2] for V, see ``turn_pairs``.
    """
    half = channels // 16
    if kind == K:  # a run is a class j, its rows are the channels' pairs, a tile is eight tokens
        rows = channels // 8
        run_bytes = PAIR_STEP * 4 * rows
        for index in range(MOST_CLASSES):
            begin, end, form = run_of_form(index, slot, books, 4)
            if begin < end and form != EMPTY:
                for s in range(2):
                    multiply_tiles(
                        pairs + run_bytes * (4 * s + begin), 4, PAIR_STEP * rows, end - begin, run_bytes, rows,
                        factors + 4 * rows * begin, factor_bytes, steps, queries, out + 4 * (TOKENS // 2) * s,
                        out_bytes, form,
                    )  # fmt: skip
        return
    for index in range(MOST_CLASSES):  # a tile is eight channels, its rows in the four runs j are pairs of tokens
        begin, end, form = run_of_form(index, slot, books, 2 * half)
        for s in range(2):
            first, last = max(begin, half * s), min(end, half * (s + 1))
            if first < last and form != EMPTY:
                multiply_tiles(
                    pairs + PAIR_STEP * 8 * (first + 3 * half * s), last - first, PAIR_STEP * 8, 4,
                    PAIR_STEP * 8 * half, 8, factors, factor_bytes, steps, queries, out + 4 * GROUPS * first,
                    out_bytes, form,
                )  # fmt: skip


def _turn(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    halves = [builder.load(at(builder, args[0], 4 * LANES * half), align=4, typ=WORDS) for half in range(2)]
    for half in range(2):
        order = integers(I32, [4 * pair + j for j in (2 * half, 2 * half + 1) for pair in range(8)])
        builder.store(builder.shuffle_vector(*halves, order), at(builder, args[0], 4 * LANES * half), align=4)


# turn_pairs(address): factors of 32 pairs of tokens, int16 [pair of a stream of V : 8][j : 4][2], to [j][pair][2].
turn_pairs = emitted(types.void, [types.int64], _turn)
