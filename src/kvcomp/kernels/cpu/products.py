# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Products of a block's codes with queries and weights.

Scales and zeros are folded into the factors, so that the inner loops run on bare codes.
All but the products of raw values take addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvcomp.kernels.cpu.bits import (
    F32,
    FAST,
    I16,
    I32,
    I64,
    LANES,
    OF_VECTOR,
    REGISTERS,
    at,
    compiled,
    emitted,
    integers,
    row_address,
    splat,
    sum_of_lanes,
    vector,
    widen,
)

i64, f32 = np.int64, np.float32
FLOATS = vector(F32)
MOST_VECTORS = (4, 4, 4) if REGISTERS == 32 else (1, 2, 2)  # for four queries, two and one


def _accumulator(queries: int, most: int) -> Any:
    """``accumulate(pairs, row_bytes, columns, rows, mask_a, mask_b, of_a, of_b, factor_bytes, out, out_bytes)``

    out[g, m] += sum over rows r of of_a[g, r] * a[r, m] + of_b[g, r] * b[r, m]

    for ``queries`` g and a multiple of 16 columns m, where a and b are what the masks leave of pairs[r, m].
    All are addresses and strides in bytes. The sums of up to 16 * ``most`` columns stay in registers, those of a and of
    b apart where there is room: an addition waits for the one before.
    """

    def some(builder: ir.IRBuilder, args: Sequence[ir.Value], column: ir.Value, vectors: int) -> None:
        pairs, row_bytes, _, rows, mask_a, mask_b, of_a, of_b, factor_bytes, out, out_bytes = args
        apart = 2 * queries * vectors * OF_VECTOR <= REGISTERS // 2
        masks = [splat(builder, builder.trunc(mask, I32)) for mask in (mask_a, mask_b)]
        sums: dict[tuple[int, int, int], ir.Value] = {}
        places: dict[tuple[int, int], ir.Value] = {}
        for g in range(queries):
            row = builder.add(builder.add(out, builder.shl(column, I64(2))), builder.mul(out_bytes, I64(g)))
            for m in range(vectors):
                places[g, m] = at(builder, row, 4 * LANES * m)
                first = builder.load(places[g, m], align=4, typ=FLOATS)
                sums[g, m, 0] = sums[g, m, 1] = cgutils.alloca_once_value(builder, first)
                if apart:
                    sums[g, m, 1] = cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [0.0] * LANES))
        begin = builder.add(pairs, builder.shl(column, I64(1)))
        with cgutils.for_range(builder, rows, intp=I64) as loop:
            row = builder.add(begin, builder.mul(loop.index, row_bytes))
            factor = builder.shl(loop.index, I64(2))
            words = [builder.load(at(builder, row, 2 * LANES * m), align=2, typ=vector(I16)) for m in range(vectors)]
            words = [builder.zext(word, vector(I32)) for word in words]
            for parity, (mask, factors) in enumerate(zip(masks, (of_a, of_b), strict=True)):
                codes = [builder.sitofp(builder.and_(word, mask), FLOATS) for word in words]
                for g in range(queries):
                    address = builder.add(builder.add(factors, builder.mul(factor_bytes, I64(g))), factor)
                    scale = splat(builder, builder.load(at(builder, address), typ=F32))
                    for m in range(vectors):
                        product = builder.fmul(codes[m], scale, flags=("contract",))
                        so_far = builder.load(sums[g, m, parity], typ=FLOATS)
                        builder.store(builder.fadd(so_far, product, flags=("contract",)), sums[g, m, parity])
        for (g, m), place in places.items():
            total = builder.load(sums[g, m, 0], typ=FLOATS)
            if apart:
                total = builder.fadd(total, builder.load(sums[g, m, 1], typ=FLOATS))
            builder.store(total, place, align=4)

    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        columns = args[2]
        whole = builder.and_(columns, I64(-LANES * most))
        for begin, end, vectors in ((I64(0), whole, most), (whole, columns, 1))[: 1 if most == 1 else 2]:
            with cgutils.for_range_slice(builder, begin, end, I64(LANES * vectors), I64) as (column, _):
                some(builder, args, column, vectors)

    return emitted(types.void, [types.int64] * 11, emit)


_sum_4, _sum_2, _sum_1 = (_accumulator(queries, most) for queries, most in zip((4, 2, 1), MOST_VECTORS, strict=True))


@compiled
def accumulate(pairs, row_bytes, columns, rows, mask_a, mask_b, of_a, of_b, factor_bytes, queries, out, out_bytes):
    """``_accumulator`` for any number of queries."""
    g = 0
    while g < queries:
        a, b, place = of_a + g * factor_bytes, of_b + g * factor_bytes, out + g * out_bytes
        if queries - g >= 4:
            _sum_4(pairs, row_bytes, columns, rows, mask_a, mask_b, a, b, factor_bytes, place, out_bytes)
            g += 4
        elif queries - g >= 2:
            _sum_2(pairs, row_bytes, columns, rows, mask_a, mask_b, a, b, factor_bytes, place, out_bytes)
            g += 2
        else:
            _sum_1(pairs, row_bytes, columns, rows, mask_a, mask_b, a, b, factor_bytes, place, out_bytes)
            g += 1


def _fold(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
    source, scale, zero, unit, count, of_a, of_b = args
    total = cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [0.0] * LANES))
    with cgutils.for_range_slice(builder, I64(0), count, I64(2 * LANES), I64) as (i, _):
        place = builder.shl(i, I64(2))
        folded = []
        for half in range(2):
            x, s, z, u = (
                builder.load(at(builder, builder.add(address, place), 4 * LANES * half), align=4, typ=FLOATS)
                for address in (source, scale, zero, unit)
            )
            x = builder.fmul(x, s)
            part = builder.fmul(x, z, flags=("contract",))
            builder.store(builder.fadd(builder.load(total, typ=FLOATS), part, flags=("contract",)), total)
            folded.append(builder.fmul(x, u))
        for parity, target in enumerate((of_a, of_b)):
            of_pairs = builder.shuffle_vector(folded[0], folded[1], integers(I32, range(parity, 2 * LANES, 2)))
            builder.store(of_pairs, at(builder, builder.add(target, builder.shl(i, I64(1)))), align=4)
    return sum_of_lanes(builder, builder.load(total, typ=FLOATS))


# fold(source, scale, zero, unit, count, of_a, of_b): x = source * scale; the even and odd elements of x * unit to of_a
# and of_b; the sum of x * zero as the result. ``count`` floats are read up to the next multiple of 32.
fold = emitted(types.float32, [types.int64] * 7, _fold)


def _add_multiple(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    row, source, factor, count = args
    factors = splat(builder, factor)
    with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (i, _):
        place = builder.shl(i, I64(2))
        x, y = (
            builder.load(at(builder, builder.add(address, place)), align=4, typ=FLOATS) for address in (row, source)
        )
        product = builder.fmul(factors, y, flags=("contract",))
        builder.store(builder.fadd(x, product, flags=("contract",)), at(builder, builder.add(row, place)), align=4)


# add_multiple(row, source, factor, count): row <- row + factor * source
add_multiple = emitted(types.void, [types.int64] * 2 + [types.float32, types.int64], _add_multiple)


def _rescale(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    row, scale, zero, factor, count = args
    factors = splat(builder, factor)
    with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (i, _):
        place = builder.shl(i, I64(2))
        x, s, z = (
            builder.load(at(builder, builder.add(address, place)), align=4, typ=FLOATS)
            for address in (row, scale, zero)
        )
        shifted = builder.fadd(x, builder.fmul(factors, z, flags=("contract",)), flags=("contract",))
        builder.store(builder.fmul(shifted, s), at(builder, builder.add(row, place)), align=4)


# rescale(row, scale, zero, factor, count): row <- (row + factor * zero) * scale
rescale = emitted(types.void, [types.int64] * 3 + [types.float32, types.int64], _rescale)


@compiled(fastmath=FAST)
def score_raw_keys(q, keys, step, tokens, dtype, scratch, score):
    """Score up to 64 raw tokens, ``step`` bytes apart at an address: score[g, t] = q[g] . k[t].

    q is [queries, channels], scratch [64, channels].
    """
    queries, channels = q.shape[0], scratch.shape[1]
    for t in range(tokens):
        widen(dtype, keys + t * step, row_address(scratch, t), channels)
    for g in range(queries):
        for t in range(tokens):
            dot = f32(0)
            for c in range(channels):
                dot += q[g, c] * scratch[t, c]
            score[g, t] = dot


def _add_rows(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    """Sums of up to 64 columns stay in registers."""
    weights, begin, end, rows, columns, out = args

    def some(column: ir.Value, vectors: int) -> None:
        begin_of, to = (builder.add(address, builder.shl(column, I64(2))) for address in (rows, out))
        places = [at(builder, to, 4 * LANES * m) for m in range(vectors)]
        sums = [cgutils.alloca_once(builder, FLOATS) for _ in places]
        for so_far, place in zip(sums, places, strict=True):
            builder.store(builder.load(place, align=4, typ=FLOATS), so_far)
        with cgutils.for_range_slice(builder, begin, end, I64(1), I64) as (index, _):
            weight = builder.load(at(builder, builder.add(weights, builder.shl(index, I64(2)))), typ=F32)
            row = builder.add(begin_of, builder.mul(builder.mul(index, columns), I64(4)))
            factor = splat(builder, weight)
            for m, so_far in enumerate(sums):
                x = builder.load(at(builder, row, 4 * LANES * m), align=4, typ=FLOATS)
                product = builder.fmul(x, factor, flags=("contract",))
                builder.store(builder.fadd(builder.load(so_far, typ=FLOATS), product, flags=("contract",)), so_far)
        for so_far, place in zip(sums, places, strict=True):
            builder.store(builder.load(so_far, typ=FLOATS), place, align=4)

    whole = builder.and_(columns, I64(-4 * LANES))
    for first, last, vectors in ((I64(0), whole, 4), (whole, columns, 1)):
        with cgutils.for_range_slice(builder, first, last, I64(LANES * vectors), I64) as (column, _):
            some(column, vectors)


# add_rows(weights, begin, end, rows, columns, out): out[c] += sum over rows from begin to end of weights[r] rows[r, c]
add_rows = emitted(types.void, [types.int64] * 6, _add_rows)


@compiled
def add_raw_values(weight, hidden, seen, values, step, tokens, dtype, scratch, out):
    """Add the sum of weight[g, t] * v[t] over the tokens that g sees to out[g].

    A token out of sight may be anything, NaN too.
    """
    queries, channels = out.shape
    for t in range(tokens):
        widen(dtype, values + t * step, row_address(scratch, t), channels)
    for g in range(queries):
        weights, sums = row_address(weight, g), row_address(out, g)
        add_rows(weights, hidden[g], seen[g], row_address(scratch, 0), channels, sums)
