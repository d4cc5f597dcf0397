# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Products of raw values with queries and weights, and rows of floats that are scaled and added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvcomp.kernels.cpu.bits import F32, FAST, I64, LANES, at, compiled, emitted, row_address, splat, vector, widen

i64, f32 = np.int64, np.float32
FLOATS = vector(F32)


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
