# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Values -> codes under the bound, exactly as ``kvcomp.codec.quantise`` says (docs/format.md, section 3).

Nothing here is compiled with fast arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvcomp.codec.dtypes import BFLOAT16, BLOCK, CHANNEL, DTYPES, FLOAT16, FLOAT32, TOKEN, VECTOR
from kvcomp.codec.quantise import ARITHMETIC_SLACK, HEAD_ZERO, LARGEST_FLOAT16, MAX_CODES, MAX_LEVELS, MAX_ZERO
from kvcomp.kernels.cpu.bits import (
    F16,
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    LANES,
    address_of,
    at,
    bits_of,
    compiled,
    emitted,
    float_of,
    fold_lanes,
    integers,
    round_bfloat16,
    splat,
    vector,
    widen,
)
from kvcomp.spec import PAGE_TOKENS as TOKENS
from kvcomp.spec import SCALE_RANGE

F64 = ir.DoubleType()
f32, f64, i64 = np.float32, np.float64, np.int64
LEAST_SCALE, MOST_SCALE = SCALE_RANGE
SIGNIFICANDS = tuple(dtype.significand for dtype in DTYPES.values())
LEAST_EXPONENTS = tuple(dtype.least_exponent for dtype in DTYPES.values())
SCALE, INVERSE, ZERO, PARAMETERS = 0, 1, 2, 3  # rows of a unit's float32 parameters


def _row_extremes(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    """(values, count, to): least and greatest of ``count`` floats to two floats; both are NaN if one is not finite."""
    values, count, to = args
    floats = vector(F32)
    least = cgutils.alloca_once_value(builder, ir.Constant(floats, [float("inf")] * LANES))
    most = cgutils.alloca_once_value(builder, ir.Constant(floats, [float("-inf")] * LANES))
    poison = cgutils.alloca_once_value(builder, ir.Constant(floats, [0.0] * LANES))
    with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (i, _):
        x = builder.load(at(builder, builder.add(values, builder.shl(i, I64(2)))), align=4, typ=floats)
        low, high = builder.load(least, typ=floats), builder.load(most, typ=floats)
        builder.store(builder.select(builder.fcmp_ordered("<", x, low), x, low), least)
        builder.store(builder.select(builder.fcmp_ordered(">", x, high), x, high), most)
        builder.store(builder.fadd(builder.load(poison, typ=floats), builder.fsub(x, x)), poison)  # 0, or NaN
    spoiled = builder.load(poison, typ=floats)
    low = builder.fadd(builder.load(least, typ=floats), spoiled)
    high = builder.fadd(builder.load(most, typ=floats), spoiled)
    any_spoiled = builder.icmp_unsigned(
        "!=", builder.bitcast(builder.fcmp_unordered("uno", spoiled, spoiled), I16), I16(0)
    )
    nan = ir.Constant(F32, float("nan"))
    for offset, pick, lanes in ((0, "<", low), (4, ">", high)):
        value = fold_lanes(builder, lanes, lambda a, b: builder.select(builder.fcmp_ordered(pick, a, b), a, b))  # noqa: B023
        builder.store(builder.select(any_spoiled, nan, value), at(builder, to, offset), align=4)


row_extremes = emitted(types.void, [types.int64] * 3, _row_extremes)


def _row_quantiser(dtype: int, by_channel: bool) -> Any:
    """``quantise_row(values, count, parameters, pitch, bound, codes)``: one row, True if all values keep their bound.

    values: address of float32, exact values of the dtype.
    parameters: address of the float32 rows SCALE, INVERSE, ZERO, ``pitch`` bytes apart. bound: address of float64.
    Where ``by_channel``, each channel has its own parameters and bound, else all have the first.
    """

    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        values, count, parameters, pitch, bound, codes = args
        floats, doubles, flags = vector(F32), vector(F64), vector(I1)
        rint = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(floats, [floats]), f"llvm.rint.v{LANES}f32"
        )
        fabs = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(doubles, [doubles]), f"llvm.fabs.v{LANES}f64"
        )

        def parameter(address: ir.Value, element: ir.Type, size: int, i: ir.Value | None) -> ir.Value:
            if i is None:
                return splat(builder, builder.load(at(builder, address), align=size, typ=element))
            return builder.load(
                at(builder, builder.add(address, builder.mul(i, I64(size)))), align=size, typ=vector(element)
            )

        def all_parameters(i: ir.Value | None) -> list[ir.Value]:
            rows = [builder.add(parameters, builder.mul(pitch, I64(row))) for row in (SCALE, INVERSE, ZERO)]
            return [*(parameter(row, F32, 4, i) for row in rows), parameter(bound, F64, 8, i)]

        shared = None if by_channel else all_parameters(None)
        kept = cgutils.alloca_once_value(builder, ir.Constant(flags, [1] * LANES))
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (i, _):
            scale, inverse, zero, limit = all_parameters(i) if shared is None else shared
            x = builder.load(at(builder, builder.add(values, builder.shl(i, I64(2)))), align=4, typ=floats)
            code = builder.fsub(builder.call(rint, [builder.fmul(x, inverse)]), zero)
            back = builder.fmul(builder.fadd(code, zero), scale)
            if dtype == FLOAT16:
                back = builder.fpext(builder.fptrunc(back, vector(F16)), floats)
            elif dtype == BFLOAT16:
                rounded = builder.and_(round_bfloat16(builder, back), integers(I32, [-(1 << 16)] * LANES))
                back = builder.bitcast(rounded, floats)
            difference = builder.fsub(builder.fpext(back, doubles), builder.fpext(x, doubles))
            within = builder.fcmp_ordered("<=", builder.call(fabs, [difference]), limit)
            small = builder.fcmp_ordered("<", code, ir.Constant(floats, [float(MAX_LEVELS)] * LANES))
            keep = builder.and_(within, small)
            whole = builder.fptosi(builder.select(keep, code, ir.Constant(floats, [0.0] * LANES)), vector(I32))
            builder.store(builder.trunc(whole, vector(I8)), at(builder, builder.add(codes, i)), align=1)
            builder.store(builder.and_(builder.load(kept, typ=flags), keep), kept)
        return builder.icmp_signed("==", builder.bitcast(builder.load(kept, typ=flags), I16), I16(-1))

    return emitted(types.boolean, [types.int64] * 6, emit)


def _head_quantiser(dtype: int) -> Any:
    """``quantise_row(values, count, step, codes)``: the unit ``head``, True if all values have a code.

    All but step are addresses or counts.
    """

    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        values, count, step, codes = args
        floats, flags = vector(F32), vector(I1)

        def constant(x: float) -> ir.Constant:
            return ir.Constant(floats, [x] * LANES)

        rint, fabs = (
            cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(floats, [floats]), f"llvm.{name}.v{LANES}f32"
            )
            for name in ("rint", "fabs")
        )
        steps = splat(builder, step)
        inverse, half = builder.fdiv(constant(1.0), steps), builder.fmul(steps, constant(0.5))
        kept = cgutils.alloca_once_value(builder, ir.Constant(flags, [1] * LANES))
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (i, _):
            x = builder.load(at(builder, builder.add(values, builder.shl(i, I64(2)))), align=4, typ=floats)
            nearest = builder.call(rint, [builder.fmul(x, inverse)])
            error = builder.fsub(x, builder.fmul(nearest, steps))
            above = builder.fcmp_ordered(">", error, half)
            below = builder.fcmp_ordered("<", error, builder.fneg(half))
            nearest = builder.fadd(nearest, builder.select(above, constant(1.0), constant(0.0)))
            nearest = builder.fsub(nearest, builder.select(below, constant(1.0), constant(0.0)))
            code = builder.fsub(nearest, constant(HEAD_ZERO))
            keep = builder.and_(
                builder.fcmp_ordered(">=", code, constant(0.0)), builder.fcmp_ordered("<", code, constant(MAX_CODES))
            )
            if dtype == FLOAT16:
                size = builder.call(fabs, [builder.fmul(nearest, steps)])
                keep = builder.and_(keep, builder.fcmp_ordered("<=", size, constant(LARGEST_FLOAT16)))
            whole = builder.fptosi(builder.select(keep, code, constant(0.0)), vector(I32))
            builder.store(builder.trunc(whole, vector(I8)), at(builder, builder.add(codes, i)), align=1)
            builder.store(builder.and_(builder.load(kept, typ=flags), keep), kept)
        return builder.icmp_signed("==", builder.bitcast(builder.load(kept, typ=flags), I16), I16(-1))

    return emitted(types.boolean, [types.int64, types.int64, types.float32, types.int64], emit)


_of_head, _of_head_float16 = _head_quantiser(FLOAT32), _head_quantiser(FLOAT16)

_by_channel_float32, _by_channel_float16, _by_channel_bfloat16 = (_row_quantiser(dtype, True) for dtype in range(3))
_by_row_float32, _by_row_float16, _by_row_bfloat16 = (_row_quantiser(dtype, False) for dtype in range(3))


@compiled
def quantise_row(dtype, by_channel, values, count, parameters, pitch, bound, codes):
    """``_row_quantiser`` of the dtype."""
    if by_channel:
        if dtype == FLOAT32:
            return _by_channel_float32(values, count, parameters, pitch, bound, codes)
        if dtype == FLOAT16:
            return _by_channel_float16(values, count, parameters, pitch, bound, codes)
        return _by_channel_bfloat16(values, count, parameters, pitch, bound, codes)
    if dtype == FLOAT32:
        return _by_row_float32(values, count, parameters, pitch, bound, codes)
    if dtype == FLOAT16:
        return _by_row_float16(values, count, parameters, pitch, bound, codes)
    return _by_row_bfloat16(values, count, parameters, pitch, bound, codes)


@compiled
def floor_log2(x):
    """Exponent of a positive, normal float64; 0 for what is not positive and finite."""
    if x > 0 and x < np.inf:
        return (bits_of(x) >> 52) - 1023
    return i64(0)


@compiled
def power_of_two(exponent):
    return float_of((max(exponent, -1022) + 1023) << 52)


@compiled
def set_unit(lo, hi, relative_scale, scale_bits, dtype, parameters, bounds, unit):
    """Set scale, its inverse, zero and bound of a unit from its extremes (section 3, steps 1 to 3).

    Returns whether they can be stored.
    """
    lo, hi = f64(lo), f64(hi)
    bound = relative_scale * (hi - lo) / 2
    zero = 0.0
    if lo == hi:
        scale = 1.0
        if lo != 0:
            exponent = floor_log2(abs(lo)) - 23  # |lo| = integer * 2^exponent, 24 bits
            integer = i64(lo * power_of_two(-exponent)) if exponent >= -900 else i64(0)
            while integer & 1 == 0:
                integer >>= 1
                exponent += 1
            scale, zero = power_of_two(exponent), f64(integer)
    else:
        peak = max(abs(lo), abs(hi)) + bound
        ulp = power_of_two(max(floor_log2(peak), LEAST_EXPONENTS[dtype]) - (SIGNIFICANDS[dtype] - 1))
        fine = 2 * (bound - ulp / 2 - peak * ARITHMETIC_SLACK)
        scale = power_of_two(floor_log2(2 * bound))
        if fine > 0 and fine < np.inf:
            fine = float_of(bits_of(fine) & -(1 << (53 - scale_bits)))  # rounded down to what can be stored
            scale = max(scale, fine)
    storable = np.isfinite(lo) and np.isfinite(hi) and scale >= LEAST_SCALE and scale <= MOST_SCALE
    stored = f32(scale) if storable else f32(1)
    inverse = f32(1) / stored
    if lo != hi:
        zero = f64(np.rint(f32(lo) * inverse))
    storable = storable and abs(zero) <= MAX_ZERO
    parameters[SCALE, unit] = stored if storable else f32(1)
    parameters[INVERSE, unit] = inverse if storable else f32(1)
    parameters[ZERO, unit] = f32(zero) if storable else f32(0)
    bounds[unit] = bound
    return storable


@compiled
def channel_extremes(values, lo, hi):
    """Least and greatest of each channel of [64, D]; a NaN is passed over and fails later."""
    for c in range(values.shape[1]):
        lo[c] = hi[c] = values[0, c]
    for t in range(1, TOKENS):
        for c in range(values.shape[1]):
            x = values[t, c]
            lo[c] = min(lo[c], x)
            hi[c] = max(hi[c], x)


@compiled
def wider(lo, hi, range_, t):
    """Widen token t's extremes by a row's; NaN stays."""
    lo[t] = lo[t] if np.isnan(lo[t]) or range_[0] >= lo[t] else range_[0]
    hi[t] = hi[t] if np.isnan(hi[t]) or range_[1] <= hi[t] else range_[1]


@compiled
def keep_parameters(parameters, count, used, scale, zero):
    """The parameters of ``count`` units as stored; 1 and 0 where nobody uses them."""
    for unit in range(count):
        scale[unit] = parameters[SCALE, unit] if used else f32(1)
        zero[unit] = np.int32(parameters[ZERO, unit]) if used else np.int32(0)


@compiled(entry=True)
def quantise_blocks(source, strides, dtype, unit, relative_scale, scale_bits, codes, scale, zero, raw):
    """Quantise (heads, 64*pages, channels) values at an address, ``strides`` bytes apart.

    These are filled: codes (pages, heads, 64, channels), scale and zero (pages, heads or 1, units of a block), raw
    (pages, heads).
    """
    pages, heads, _, channels = codes.shape
    values = np.empty((TOKENS, channels), f32)
    parameters = np.empty((PARAMETERS, max(channels, TOKENS)), f32)
    bounds = np.empty(max(channels, TOKENS), f64)
    lo, hi, range_ = np.empty(max(channels, TOKENS), f32), np.empty(max(channels, TOKENS), f32), np.empty(2, f32)
    for page in range(pages):
        storable_page = True
        if unit == TOKEN:
            lo[:TOKENS], hi[:TOKENS] = f32(np.inf), f32(-np.inf)
            for head in range(heads):
                load_block(source + head * strides[0] + page * TOKENS * strides[1], strides[1], dtype, values)
                for t in range(TOKENS):
                    extremes_of(values[t], range_)
                    wider(lo, hi, range_, t)
            for t in range(TOKENS):
                storable_page &= set_unit(lo[t], hi[t], relative_scale, scale_bits, dtype, parameters, bounds, t)
        for head in range(heads):
            load_block(source + head * strides[0] + page * TOKENS * strides[1], strides[1], dtype, values)
            kept = storable_page
            if unit == CHANNEL:
                channel_extremes(values, lo[:channels], hi[:channels])
                for c in range(channels):
                    kept &= set_unit(lo[c], hi[c], relative_scale, scale_bits, dtype, parameters, bounds, c)
            elif unit != TOKEN:
                lo[0], hi[0] = f32(np.inf), f32(-np.inf)
                for t in range(TOKENS):
                    extremes_of(values[t], range_)
                    if unit == VECTOR:
                        kept &= set_unit(range_[0], range_[1], relative_scale, scale_bits, dtype, parameters, bounds, t)
                    else:
                        wider(lo, hi, range_, 0)
                if unit == BLOCK:
                    kept &= set_unit(lo[0], hi[0], relative_scale, scale_bits, dtype, parameters, bounds, 0)
            block = codes[page, head]
            if kept:
                kept = quantise_values(values, dtype, unit, parameters, bounds, block)
            if not kept:
                block[:] = 0
            raw[page, head] = not kept
            if unit != TOKEN:
                keep_parameters(parameters, scale.shape[2], kept, scale[page, head], zero[page, head])
        if unit == TOKEN:
            keep_parameters(parameters, TOKENS, not raw[page].all(), scale[page, 0], zero[page, 0])


@compiled(entry=True)
def quantise_heads(source, strides, dtype, steps, codes, raw):
    """Quantise values as ``quantise_blocks`` does, for the unit ``head`` with the float32 steps of the heads."""
    pages, heads, _, channels = codes.shape
    values = np.empty((TOKENS, channels), f32)
    for page in range(pages):
        for head in range(heads):
            load_block(source + head * strides[0] + page * TOKENS * strides[1], strides[1], dtype, values)
            block = codes[page, head]
            kept = True
            for t in range(TOKENS):
                row, to = address_of(values[t]), address_of(block[t])
                if dtype == FLOAT16:
                    kept &= _of_head_float16(row, i64(channels), steps[head], to)
                else:
                    kept &= _of_head(row, i64(channels), steps[head], to)
            if not kept:
                block[:] = 0
            raw[page, head] = not kept


@compiled
def load_block(source, step, dtype, values):
    """64 rows of values, ``step`` bytes apart, as float32."""
    for t in range(TOKENS):
        widen(dtype, source + t * step, address_of(values[t]), i64(values.shape[1]))


@compiled
def extremes_of(row, range_):
    row_extremes(address_of(row), i64(row.size), address_of(range_))


@compiled
def quantise_values(values, dtype, unit, parameters, bounds, codes):
    """Quantise a block; False if a value misses its bound."""
    pitch = i64(parameters.strides[0])
    kept = True
    for t in range(TOKENS):
        first = t if unit in (VECTOR, TOKEN) else 0
        kept &= quantise_row(
            dtype,
            unit == CHANNEL,
            address_of(values[t]),
            i64(values.shape[1]),
            address_of(parameters) + 4 * first,
            pitch,
            address_of(bounds) + 8 * first,
            address_of(codes[t]),
        )
    return kept
