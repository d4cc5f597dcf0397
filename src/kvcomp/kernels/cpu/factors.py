# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Factors of codes: queries and weights, with scales folded in, as integers of 16 bits.

They count steps, one for a block and query: the largest has 32767, so the largest error is 2^-16 of that. What rounding
leaves over may be rounded again, to a second integer, as is done for float32 values. Addresses are int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvcomp.kernels.cpu.bits import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    at,
    emitted,
    fold_lanes,
    integers,
    splat,
    sum_of_lanes,
    vector,
)
from kvcomp.kernels.cpu.fixed import FLOATS, PARTS, WORDS

LARGEST = 32767


def _round(order: Sequence[int]) -> Any:
    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        source, scale, zero, other, count, left, out, of_zero, of_other = args
        largest = cgutils.alloca_once_value(builder, integers(I32, [0] * LANES))
        sums = [cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [0.0] * LANES)) for _ in range(2)]

        def each() -> Any:
            return cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64)

        def of(address: ir.Value, i: ir.Value) -> ir.Value:
            return at(builder, builder.add(address, builder.shl(i, I64(2))))

        def larger(x: ir.Value, y: ir.Value) -> ir.Value:
            return builder.select(builder.icmp_unsigned(">", x, y), x, y)

        with each() as (i, _):  # magnitudes are ordered as their bits are, and NaN is above all
            x = builder.fmul(*(builder.load(of(address, i), align=4, typ=FLOATS) for address in (source, scale)))
            builder.store(x, of(left, i), align=4)
            size = builder.and_(builder.bitcast(x, WORDS), integers(I32, [0x7FFFFFFF] * LANES))
            builder.store(larger(size, builder.load(largest, typ=WORDS)), largest)
        most = builder.bitcast(fold_lanes(builder, builder.load(largest, typ=WORDS), larger), F32)
        step = builder.fmul(most, ir.Constant(F32, 1 / LARGEST))
        inverse = builder.fdiv(ir.Constant(F32, LARGEST), most)
        finite = builder.fcmp_unordered("!=", inverse, ir.Constant(F32, float("inf")))
        inverse = builder.select(finite, inverse, ir.Constant(F32, 0.0))  # below 1e-34 a factor counts as 0
        inverse, steps = splat(builder, inverse), splat(builder, step)
        whole = ir.Constant(FLOATS, [1.5 * 2**23] * LANES)  # what is added to it is rounded to the lowest bits
        with each() as (i, _):
            x = builder.load(of(left, i), align=4, typ=FLOATS)
            product = builder.fadd(builder.fmul(x, inverse, flags=("contract",)), whole, flags=("contract",))
            number = builder.fsub(product, whole)
            taken = builder.fmul(number, steps, flags=("contract",))
            builder.store(builder.fsub(x, taken, flags=("contract",)), of(left, i), align=4)
            for address, so_far in zip((zero, other), sums, strict=True):
                part = builder.fmul(number, builder.load(of(address, i), align=4, typ=FLOATS), flags=("contract",))
                builder.store(builder.fadd(builder.load(so_far, typ=FLOATS), part, flags=("contract",)), so_far)
            shorts = builder.trunc(builder.bitcast(product, WORDS), vector(I16))
            ordered = builder.shuffle_vector(shorts, shorts, integers(I32, order))
            builder.store(ordered, at(builder, builder.add(out, builder.shl(i, I64(1)))), align=2)
        for address, so_far in zip((of_zero, of_other), sums, strict=True):
            total = builder.fmul(sum_of_lanes(builder, builder.load(so_far, typ=FLOATS)), step)
            place = at(builder, address)
            builder.store(builder.fadd(builder.load(place, align=4, typ=F32), total), place, align=4)
        return step

    return emitted(types.float32, [types.int64] * 9, emit)


# round_factors(source, scale, zero, other, count, left, out, of_zero, of_other): floats, a multiple of 16, times their
# scales, to int16 times the step that is returned. What that leaves of them goes to ``left``, which may be the source.
# The sums of what it takes times ``zero`` and times ``other`` are added to the two floats of_zero and of_other.
# The step is 0 where all are, and NaN or infinity where any is.
round_factors = _round(range(LANES))
# The same for factors of K by channel, four of each j after one another, in the order of pieces (section 5).
round_factors_of_pieces = _round(
    [4 * j + 2 * pair + odd for pair in range(2) for j in range(PARTS) for odd in range(2)]
)


def _turn(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    source, pairs, out = args
    step = builder.shl(pairs, I64(2))
    with cgutils.for_range_slice(builder, I64(0), step, I64(8), I64) as (first, _):
        places = [builder.add(source, builder.add(first, builder.mul(step, I64(j)))) for j in range(PARTS)]
        rows = [builder.load(at(builder, place), align=4, typ=vector(I32, 2)) for place in places]
        low, high = (builder.shuffle_vector(*rows[j : j + 2], integers(I32, range(4))) for j in (0, 2))
        order = integers(I32, [2 * j + pair for pair in range(2) for j in range(PARTS)])
        place = at(builder, builder.add(out, builder.shl(first, I64(2))))
        builder.store(builder.shuffle_vector(low, high, order), place, align=4)


turn_factors = emitted(types.void, [types.int64] * 3, _turn)  # int16 [j][pair][2], so many pairs, to [pair][j][2]
