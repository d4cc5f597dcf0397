# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""The softmax, taken online (Milakov & Gimelshein, 2018), in powers of two."""

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
    I32,
    I64,
    LANES,
    at,
    compiled,
    emitted,
    floats_at,
    fold_lanes,
    integers,
    integers_at,
    splat,
    sum_of_lanes,
    vector,
)
from kvcomp.spec import PAGE_TOKENS as TOKENS

f32 = np.float32
LOG2_E, LN_2 = f32(1.4426950408889634), f32(0.6931471805599453)
LOWEST = f32(-1e30)  # what no score reaches; finite, so that differences are numbers

FLOATS = vector(F32)
# 2^y for |y| <= 1/2, to 2e-7: 1 + y (c1 + y (c2 + ...))
POWER_SERIES = (
    1.0,
    6.931472028550421e-1,
    2.402264791363012e-1,
    5.550332471162809e-2,
    9.618437357674640e-3,
    1.339887440266574e-3,
    1.535336188319500e-4,
)
LEAST_POWER = -126.0


@compiled(fastmath=FAST)
def soften(score, tokens, softcap):
    """Replace scores, which come scaled, by cap(score) in powers of two."""
    for g in range(score.shape[0]):
        for t in range(tokens):
            score[g, t] = softcap * np.tanh(score[g, t] / softcap) * LOG2_E


def _row_peak(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
    address, least = args
    best = splat(builder, least)
    for m in range(TOKENS // LANES):
        x = builder.load(at(builder, address, 4 * LANES * m), align=4, typ=FLOATS)
        best = builder.select(builder.fcmp_ordered(">", x, best), x, best)
    return fold_lanes(builder, best, lambda low, high: builder.select(builder.fcmp_ordered(">", low, high), low, high))


row_peak = emitted(
    types.float32, [types.int64, types.float32], _row_peak
)  # largest of 64 floats and one more, NaN aside


def _exponentials(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
    row, peak = args

    def constant(x: float) -> ir.Constant:
        return ir.Constant(FLOATS, [x] * LANES)

    floor = cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOATS, [FLOATS]), f"llvm.floor.v{LANES}f32")
    peaks, total = splat(builder, peak), constant(0.0)
    for m in range(TOKENS // LANES):
        place = at(builder, row, 4 * LANES * m)
        x = builder.fsub(builder.load(place, align=4, typ=FLOATS), peaks)
        x = builder.select(builder.fcmp_ordered("<", x, constant(LEAST_POWER)), constant(LEAST_POWER), x)  # NaN stays
        whole = builder.call(floor, [builder.fadd(x, constant(0.5))])
        y = builder.fsub(x, whole)
        power = constant(POWER_SERIES[-1])
        for coefficient in reversed(POWER_SERIES[:-1]):
            power = builder.fadd(
                builder.fmul(power, y, flags=("contract",)), constant(coefficient), flags=("contract",)
            )
        finite = builder.select(builder.fcmp_ordered("ord", x, x), whole, constant(0.0))
        exponent = builder.add(builder.fptosi(finite, vector(I32)), integers(I32, [127] * LANES))
        scale = builder.bitcast(builder.shl(exponent, integers(I32, [23] * LANES)), FLOATS)
        power = builder.fmul(power, scale)
        builder.store(power, place, align=4)
        total = builder.fadd(total, power)
    return sum_of_lanes(builder, total)


exponentials = emitted(
    types.float32, [types.int64, types.float32], _exponentials
)  # 64 floats x -> 2^(x - peak), and their sum


def _shrink(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    row, factor, count = args
    factors = splat(builder, factor)
    with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (i, _):
        place = at(builder, builder.add(row, builder.shl(i, I64(2))))
        builder.store(builder.fmul(builder.load(place, align=4, typ=FLOATS), factors), place, align=4)


shrink_row = emitted(types.void, [types.int64, types.float32, types.int64], _shrink)  # row *= factor


@compiled(fastmath=FAST)
def weigh(scores, queries, hidden, seen, peaks, totals, rests, out, channels):
    """Take one step of the online softmax: scores [g, 64] become weights relative to the new peaks.

    What was summed before is scaled down. All but the counts are addresses. hidden, seen: int64, query g sees the
    tokens from hidden[g] to seen[g]; the others get weight 0.
    """
    score, begin, end = floats_at(scores, (queries, TOKENS)), integers_at(hidden, queries), integers_at(seen, queries)
    peak, total, rest = floats_at(peaks, queries), floats_at(totals, queries), floats_at(rests, queries)
    for g in range(queries):
        row = scores + 4 * TOKENS * g
        for t in range(begin[g]):
            score[g, t] = LOWEST
        for t in range(end[g], TOKENS):
            score[g, t] = LOWEST
        top = row_peak(row, peak[g])
        if top > peak[g]:
            if peak[g] > LOWEST:
                shrink = f32(2) ** max(peak[g] - top, f32(LEAST_POWER))
                total[g] *= shrink
                rest[g] *= shrink
                shrink_row(out + 4 * channels * g, shrink, channels)
            peak[g] = top
        sum_ = exponentials(row, top)
        for t in range(begin[g]):
            sum_ -= score[g, t]
            score[g, t] = f32(0)
        for t in range(end[g], TOKENS):
            sum_ -= score[g, t]
            score[g, t] = f32(0)
        total[g] += sum_


@compiled(entry=True, fastmath=FAST)
def merge(first_part, partial_out, partial_peak, partial_total, out, lse):
    """Merge parts to the softmax output and the natural log of its denominator: 0 and -inf where no token was seen."""
    rows, heads, queries, channels = out.shape
    for row in range(rows):
        for head in range(heads):
            for g in range(queries):
                top = LOWEST
                for part in range(first_part[row], first_part[row + 1]):
                    top = max(top, partial_peak[part, head, g])
                total = f32(0)
                to = out[row, head, g]
                to[:] = f32(0)
                for part in range(first_part[row], first_part[row + 1]):
                    if partial_total[part, head, g] != f32(0):  # NaN counts as seen
                        weight = f32(2) ** max(partial_peak[part, head, g] - top, f32(-126))
                        total += weight * partial_total[part, head, g]
                        of_part = partial_out[part, head, g]
                        for c in range(channels):
                            to[c] += weight * of_part[c]
                if total != f32(0):
                    lse[row, head, g] = (top + np.log2(total)) * LN_2
                    for c in range(channels):
                        to[c] /= total
                else:
                    lse[row, head, g] = f32(-np.inf)
