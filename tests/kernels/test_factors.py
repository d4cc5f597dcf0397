"""Factors of 16 bits and their products, instruction by instruction, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit, types

from kvcomp.kernels.cpu import bits, factors

INSTRUCTIONS = [None, *(width for width, of in ((256, "+avx2"), (512, "+avx512bw")) if of in bits.FEATURES)]


def multiply_at(register_bits: int | None) -> Any:
    """A compiled function that multiplies pairs, 16 lanes of two int16 at each address."""

    def emit(context: Any, builder: Any, args: Any) -> None:
        x, y, out = args
        lanes = bits.vector(bits.I32)
        both = [builder.load(bits.at(builder, of), align=4, typ=lanes) for of in (x, y)]
        product = bits.products_of_pairs(builder, *both, register_bits)
        builder.store(product, bits.at(builder, out), align=4)

    multiply = bits.emitted(types.void, [types.int64] * 3, emit)

    @njit
    def run(x, y, out):  # type: ignore[no-untyped-def]
        multiply(x, y, out)

    return run


@pytest.mark.parametrize("register_bits", INSTRUCTIONS)
def test_pairs_are_multiplied_exactly(register_bits: int | None) -> None:
    """Of codes of up to 8 bits and any factors, by every instruction that this processor has and by none."""
    rng = np.random.default_rng(0)
    multiply = multiply_at(register_bits)
    for codes in (rng.integers(-128, 256, 32), np.full(32, 255), np.full(32, -128)):
        for shorts in (rng.integers(-32768, 32768, 32), np.full(32, 32767), np.full(32, -32768)):
            x, y, out = codes.astype(np.int16), shorts.astype(np.int16), np.empty(16, np.int32)
            multiply(x.ctypes.data, y.ctypes.data, out.ctypes.data)
            np.testing.assert_array_equal(out, (codes * shorts).reshape(16, 2).sum(1))


@njit
def round_at(source, scale, zero, other, count, left, out, sums):  # type: ignore[no-untyped-def]
    return factors.round_factors(source, scale, zero, other, count, left, out, sums, sums + 4)


def rounded(x: Any, scale: Any = None) -> tuple[np.float32, Any, Any]:
    """Step, integers, and what rounding leaves of x times its scales. Sums are checked here."""
    scale = np.ones_like(x) if scale is None else scale
    left, out, sums = np.empty_like(x), np.empty(x.size, np.int16), np.array([3, 4], np.float32)
    zero, other = np.random.default_rng(x.size).standard_normal((2, x.size)).astype(np.float32)
    addresses = [of.ctypes.data for of in (x, scale, zero, other)]
    step = np.float32(round_at(*addresses, x.size, left.ctypes.data, out.ctypes.data, sums.ctypes.data))
    if np.isfinite(x).all():
        parts = out * np.float64(step) * (zero, other)
        np.testing.assert_allclose(sums - [3, 4], parts.sum(1), rtol=1e-4, atol=1e-5 * np.abs(parts).sum() + 1e-5)
    return step, out, left


@given(st.integers(0, 2**32 - 1))
def test_what_is_rounded_is_scaled(seed: int) -> None:
    x, scale = np.random.default_rng(seed).standard_normal((2, 48)).astype(np.float32)
    for ours, expected in zip(rounded(x, scale), rounded(x * scale), strict=True):
        np.testing.assert_array_equal(ours, expected)


@given(st.integers(1, 20), st.integers(0, 2**32 - 1), st.floats(-30, 30))
def test_rounding_leaves_half_a_step(groups: int, seed: int, exponent: float) -> None:
    x = (np.random.default_rng(seed).standard_normal(16 * groups) * 10.0**exponent).astype(np.float32)
    step, out, left = rounded(x)
    assert np.abs(out.astype(int)).max() == factors.LARGEST
    assert step == pytest.approx(np.abs(x).max() / factors.LARGEST, rel=1e-6)
    assert np.abs(left).max() <= 0.51 * step
    np.testing.assert_allclose(out * np.float64(step) + left, x, rtol=1e-6, atol=1e-6 * step)


@given(st.integers(0, 2**32 - 1))
def test_a_second_integer_has_what_the_first_leaves(seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal(64).astype(np.float32)
    step, out, left = rounded(x)
    second, more, _ = rounded(left)
    np.testing.assert_allclose(out * np.float64(step) + more * np.float64(second), x, atol=1e-7, rtol=0)


def test_factors_that_are_all_nothing() -> None:
    for x in (np.zeros(32, np.float32), np.full(32, 1e-38, np.float32), np.full(32, 1e-42, np.float32)):
        step, out, left = rounded(x)
        assert np.isfinite(left).all()
        np.testing.assert_allclose(out * np.float64(step) + left, x, atol=1e-37)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 17, 31])
def test_one_bad_factor_shows_in_the_step(bad: float, place: int) -> None:
    x = np.ones(32, np.float32)
    x[place] = bad
    assert not np.isfinite(rounded(x)[0])
