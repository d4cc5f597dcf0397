"""Error-bounded quantisation: floats -> codes and scales, and back (KVComp, arXiv 2509.00579, section 3.1).

This is the readable reference of docs/format.md, section 3; the kernels do the same arithmetic and give the same codes.

Why the bound holds. Let s be the scale and e = r (max - min) / 2 the bound of a unit, u the spacing of the output type
at ``peak``. A code is the nearest grid point. It is off by at most s/2 plus the rounding of float32: inv, x*inv and the
product, together less than peak 2^-21. Rounding to the output type adds at most u/2. So s = 2 (e - u/2 - peak 2^-21)
suffices. On a grid s = 2^i the float32 arithmetic is exact, and so is the output: where 2^i >= u every grid point is
representable, where 2^i < u the value x is itself a grid point. So s = 2^floor(log2(2e)) suffices too. The encoder
still checks every value: what fails, NaN and infinity included, is kept raw.

The unit ``head`` has a step s of 16 significant bits that is known beforehand, and codes q + 128 for -128 <= q <= 127.
Its bound is s/2 before the rounding to the output type, as attention takes the values before it. q*s is a float32 and
so, by Sterbenz' lemma, is x - q*s: one step up or down where that exceeds s/2 leaves no error of arithmetic. The output
type adds at most half of its spacing at q*s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcomp.codec.dtypes import DType, dtype_of
from kvcomp.errors import InvalidInput
from kvcomp.spec import PAGE_TOKENS, SCALE_RANGE, Unit

MAX_CODES = 256  # codes are bytes
MAX_LEVELS = 128  # of a unit whose range the encoder measures
HEAD_ZERO = -128  # of the unit ``head``
MAX_ZERO = 32767
ARITHMETIC_SLACK = 2.0**-21

# What is above may become infinite; the other types reach further than any code of the unit ``head``.
LARGEST_FLOAT16 = 65504.0

# Axes of (pages, heads, tokens, channels) over which a unit extends.
UNIT_AXES: dict[Unit, tuple[int, ...]] = {
    "block": (2, 3),
    "channel": (2,),
    "vector": (3,),
    "token": (1, 3),
    "head": (0, 2, 3),
}
# Stored significand bits of a scale: float32 for a block, bfloat16 else.
SCALE_BITS: dict[Unit, int] = {"block": 24, "channel": 8, "vector": 8, "token": 8}

Array = npt.NDArray[Any]


def to_float32(x: Array) -> npt.NDArray[np.float32]:
    """Values of a float32, float16 or bfloat16 (bits in uint16) array, exactly, as float32."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


def round_to(x: npt.NDArray[np.float32], dtype: np.dtype[Any]) -> Array:
    """Round float32 values to the nearest float32, float16 or bfloat16 (bits in uint16), ties to even."""
    if dtype == np.uint16:
        bits = x.view(np.uint32)
        rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)
    with np.errstate(over="ignore"):
        return x.astype(dtype)


@dataclass(frozen=True)
class Quantised:
    """Integer codes with what it takes to undo them."""

    codes: npt.NDArray[np.uint8]
    """(pages, heads, 64, channels)"""
    scale: npt.NDArray[np.float32]
    """As ``codes``, with a 1 for each axis over which the unit extends. The steps of the unit ``head``."""
    zero: npt.NDArray[np.int32]
    """In the shape of ``scale``; -128 for the unit ``head``."""
    raw: npt.NDArray[np.bool_]
    """(pages, heads): blocks that miss the bound and are kept as they came. Their codes are 0 and mean nothing."""

    def dequantise(self, dtype: np.dtype[Any]) -> Array:
        """(codes + zero) * scale in float32, rounded to ``dtype``: (pages, heads, 64, channels)."""
        return round_to((self.codes + self.zero).astype(np.float32) * self.scale, dtype)


def error_bound(x: Array, unit: Unit, scale: float | tuple[float, ...]) -> npt.NDArray[np.float64]:
    """The bound of every unit of ``x`` (heads, 64*pages, channels), in the shape of ``Quantised.scale``.

    It is r (max - min) / 2 with ``scale`` r, kept by the values in their dtype. For the unit ``head``, whose ``scale``
    are the heads' steps, it is half a step, kept before the rounding to the dtype.
    """
    if isinstance(scale, tuple):
        return np.array(scale, np.float64).reshape(1, -1, 1, 1) / 2
    values = _pages(x).astype(np.float64)
    axes = UNIT_AXES[unit]
    bound: npt.NDArray[np.float64] = scale * (values.max(axes, keepdims=True) - values.min(axes, keepdims=True)) / 2
    return bound


def quantise(x: Array, unit: Unit, scale: float | tuple[float, ...]) -> Quantised:
    """Quantise whole pages so that every value of a block that is not raw comes back within ``error_bound``.

    Parameters
    ----------
    x
        (heads, 64*pages, channels), float32, float16 or bfloat16 as uint16 bits.
    unit
        Which values share a scale.
    scale
        The relative scale, or, for the unit ``head``, the step of each head (``TensorSpec.scale``).

    Raises
    ------
    InvalidInput
        For another shape or dtype, or if ``scale`` does not fit the unit and the heads.
    """
    check_scale(x, unit, scale)
    return _quantise_heads(x, scale) if isinstance(scale, tuple) else _quantise_ranges(x, unit, scale)


def check_values(x: Array) -> None:
    """Raise InvalidInput unless these are whole pages of values, (heads, 64*pages, channels), in one of the dtypes."""
    dtype_of(x.dtype)
    if x.ndim != 3 or x.shape[1] % PAGE_TOKENS:
        raise InvalidInput(f"quantise takes whole pages, (heads, 64*pages, channels), not {x.shape}")


def check_scale(x: Array, unit: Unit, scale: float | tuple[float, ...]) -> None:
    """Raise InvalidInput unless this is a relative scale, or, for the unit ``head``, a step for each head of x."""
    if isinstance(scale, tuple) != (unit == "head") or (isinstance(scale, tuple) and len(scale) != x.shape[0]):
        raise InvalidInput(
            f"the unit {unit!r} of {x.shape[0]} heads needs "
            + ("a step for each head" if unit == "head" else "a relative scale")
        )


def _quantise_heads(x: Array, steps: tuple[float, ...]) -> Quantised:
    values = _pages(x)
    step = np.array(steps, np.float32).reshape(1, -1, 1, 1)
    with np.errstate(invalid="ignore", over="ignore"):
        nearest = np.rint(values * (np.float32(1) / step))
        error = values - nearest * step
        half = step / 2
        nearest += (error > half).astype(np.float32) - (error < -half).astype(np.float32)
        codes = nearest - HEAD_ZERO
        kept = (codes >= 0) & (codes < MAX_CODES)  # a NaN fails the comparison
        if x.dtype == np.float16:
            kept &= np.abs(nearest * step) <= LARGEST_FLOAT16
    raw: npt.NDArray[np.bool_] = ~np.asarray(kept.all(axis=(2, 3)))
    return Quantised(
        codes=np.where(raw[:, :, None, None], 0, codes).astype(np.uint8),
        scale=step,
        zero=np.full(step.shape, HEAD_ZERO, np.int32),
        raw=raw,
    )


def _quantise_ranges(x: Array, unit: Unit, relative_scale: float) -> Quantised:
    values = _pages(x)
    axes = UNIT_AXES[unit]
    with np.errstate(invalid="ignore", over="ignore"):
        lo = values.min(axes, keepdims=True).astype(np.float64)
        hi = values.max(axes, keepdims=True).astype(np.float64)
        bound = relative_scale * (hi - lo) / 2
        scale, constant_zero, storable = _scales(lo, hi, bound, dtype_of(x.dtype), SCALE_BITS[unit])
        inverse = np.float32(1) / scale
        zero = np.where(lo == hi, constant_zero, np.rint(lo.astype(np.float32) * inverse))
        storable &= np.abs(zero) <= MAX_ZERO
        scale = np.where(storable, scale, np.float32(1))
        inverse = np.where(storable, inverse, np.float32(1))
        zero = np.where(storable, zero, 0).astype(np.int32)
        codes = np.rint(values * inverse) - zero.astype(np.float32)
        back = (codes + zero.astype(np.float32)) * scale
        error = np.abs(to_float32(round_to(back, x.dtype)).astype(np.float64) - values)
        kept = storable & (codes < MAX_LEVELS) & (error <= bound)  # a NaN fails the comparison
    raw: npt.NDArray[np.bool_] = ~np.asarray(kept.all(axis=(2, 3)))
    if unit == "token":  # one scale serves all heads
        unused = np.broadcast_to(np.asarray(raw.all(axis=1))[:, None, None, None], scale.shape)
    else:
        unused = np.broadcast_to(raw[:, :, None, None], scale.shape)
    return Quantised(
        codes=np.where(raw[:, :, None, None], 0, codes).astype(np.uint8),
        scale=np.where(unused, np.float32(1), scale),
        zero=np.where(unused, 0, zero),
        raw=raw,
    )


def _pages(x: Array) -> npt.NDArray[np.float32]:
    """(heads, 64*pages, channels) of any dtype -> (pages, heads, 64, channels) float32."""
    check_values(x)
    heads, tokens, channels = x.shape
    return to_float32(x).reshape(heads, tokens // PAGE_TOKENS, PAGE_TOKENS, channels).swapaxes(0, 1)


def _scales(
    lo: npt.NDArray[np.float64],
    hi: npt.NDArray[np.float64],
    bound: npt.NDArray[np.float64],
    dtype: DType,
    bits: int,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Scale of each unit, zero of each constant unit, and whether the scale can be stored."""
    peak = np.maximum(np.abs(lo), np.abs(hi)) + bound
    ulp = np.exp2(np.maximum(_floor_log2(peak), dtype.least_exponent) - (dtype.significand - 1))
    fine = 2 * (bound - ulp / 2 - peak * ARITHMETIC_SLACK)
    even = np.exp2(_floor_log2(2 * bound))
    varying = np.maximum(_round_down(fine, bits), even)

    mantissa, exponent = np.frexp(lo)
    integer = np.where(np.isfinite(lo), mantissa * 2.0**24, 0).astype(np.int64)
    trailing = _floor_log2((integer & -integer).astype(np.float64))
    constant = np.where(integer == 0, 1.0, np.exp2(exponent - 24 + trailing))
    constant_zero = np.where(integer == 0, 0.0, integer / np.exp2(trailing))

    scale = np.where(lo == hi, constant, varying)
    storable = np.isfinite(lo) & np.isfinite(hi) & (scale >= SCALE_RANGE[0]) & (scale <= SCALE_RANGE[1])
    return np.where(storable, scale, 1.0).astype(np.float32), constant_zero, storable


def _floor_log2(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    exponent = np.where(np.isfinite(x) & (x > 0), np.frexp(x)[1] - 1, 0)
    return exponent.astype(np.float64)


def _round_down(x: npt.NDArray[np.float64], bits: int) -> npt.NDArray[np.float64]:
    """Round down to a significand of ``bits`` bits; what is not positive gives 0."""
    mantissa, exponent = np.frexp(np.where(np.isfinite(x) & (x > 0), x, 0))
    rounded: npt.NDArray[np.float64] = np.ldexp(np.floor(np.ldexp(mantissa, bits)), exponent - bits)
    return rounded
