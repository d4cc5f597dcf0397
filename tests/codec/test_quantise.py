"""The quantiser: the bound holds for every value, and scales, zeros, codes and raw blocks are those of docs/format.md.

``literal`` below is section 3 of that page written once more, unit by unit, with Python's own floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomp.codec.quantise import Quantised, error_bound, quantise, round_to, to_float32
from kvcomp.errors import InvalidInput
from kvcomp.spec import UNITS, TensorSpec, Unit

Array = npt.NDArray[Any]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST = {name: torch.finfo(dtype).max for name, dtype in DTYPES.items()}
# spacing of the dtypes: significand bits and least exponent of a normal number
FORMATS = {"float32": (24, -126), "float16": (11, -14), "bfloat16": (8, -126)}
BF16 = np.dtype(np.uint16)
RANGED = UNITS[:-1]  # the units with a relative scale


def cast(x: Array, dtype: str) -> Array:
    """float32 values rounded by torch to a dtype, as the quantiser takes them."""
    y = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(DTYPES[dtype])
    return y.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else y.numpy()


def exact(x: Array) -> npt.NDArray[np.float64]:
    """The values of an array of any dtype."""
    if x.dtype == np.uint16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).double().numpy()
    return torch.from_numpy(np.ascontiguousarray(x)).double().numpy()


def in_pages(x: Array) -> Array:
    """(heads, 64*pages, channels) -> (pages, heads, 64, channels)."""
    heads, tokens, channels = x.shape
    return x.reshape(heads, tokens // 64, 64, channels).swapaxes(0, 1)


def units_of(unit: Unit, shape: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Index of the values of every unit in (pages, heads, 64, channels)."""
    pages, heads, tokens, channels = (range(n) for n in shape)
    all_ = slice(None)
    if unit == "block":
        yield from ((p, h, all_, all_) for p in pages for h in heads)
    elif unit == "channel":
        yield from ((p, h, all_, c) for p in pages for h in heads for c in channels)
    elif unit == "vector":
        yield from ((p, h, t, all_) for p in pages for h in heads for t in tokens)
    else:
        yield from ((p, all_, t, all_) for p in pages for t in tokens)


def bounds(x: Array, unit: Unit, r: float) -> npt.NDArray[np.float64]:
    """r (max - min) / 2 of the unit of every value, spread over (pages, heads, 64, channels)."""
    axes = {"block": (2, 3), "channel": (2,), "vector": (3,), "token": (1, 3)}[unit]
    values = in_pages(exact(x))
    with np.errstate(invalid="ignore"):
        bound = r * (values.max(axes, keepdims=True) - values.min(axes, keepdims=True)) / 2
    return np.broadcast_to(bound, values.shape)


def misses(x: Array, q: Quantised, unit: Unit, r: float) -> int:
    """How many values of blocks that are not raw miss their bound in the output type."""
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(exact(q.dequantise(x.dtype)) - in_pages(exact(x)))
        return int(np.count_nonzero(~(error <= bounds(x, unit, r)) & ~q.raw[:, :, None, None]))


def floor_log2(x: float) -> int:
    return math.frexp(x)[1] - 1


def step(lo: float, hi: float, r: float, dtype: str, bits: int) -> tuple[float, int] | None:
    """Scale and, for a constant unit, zero; None if the scale cannot be stored."""
    if not (math.isfinite(lo) and math.isfinite(hi)):
        return None
    zero = 0
    if lo == hi == 0:
        scale = 1.0
    elif lo == hi:
        top, bottom = lo.as_integer_ratio()
        twos = (top & -top).bit_length() - 1
        scale, zero = 2.0**twos / bottom, top >> twos
    else:
        significand, least = FORMATS[dtype]
        eb = r * (hi - lo) / 2
        peak = max(abs(lo), abs(hi)) + eb
        ulp = 2.0 ** (max(floor_log2(peak), least) - (significand - 1))
        fine = 2 * (eb - ulp / 2 - peak * 2.0**-21)
        even = 2.0 ** floor_log2(2 * eb) if eb else 0.0
        cut = 2.0 ** (floor_log2(fine) - (bits - 1)) if fine > 0 else 1.0
        scale = max(math.floor(fine / cut) * cut, even)
    return (scale, zero) if 2.0**-100 <= scale <= 2.0**100 else None


def literal(x: Array, unit: Unit, r: float, dtype: str) -> Quantised:
    """Section 3 of docs/format.md."""
    values = in_pages(to_float32(x))
    shape = values.shape
    scale, zero, codes = np.ones(shape, np.float32), np.zeros(shape, np.int64), np.zeros(shape, np.float64)
    unstorable, failed = np.zeros(shape, bool), np.zeros(shape, bool)
    for at in units_of(unit, shape):
        some = values[at]
        lo, hi = float(some.min()), float(some.max())
        found = step(lo, hi, r, dtype, 24 if unit == "block" else 8)
        if found is None:
            unstorable[at] = True
            continue
        s = np.float32(found[0])
        inv = np.float32(1) / s
        z = found[1] if lo == hi else int(np.rint(np.float32(lo) * inv))
        if abs(z) > 32767:
            unstorable[at] = True
            continue
        code = np.rint(some * inv).astype(np.float64) - z
        with np.errstate(over="ignore"):
            back = exact(cast((code + z).astype(np.float32) * s, dtype))
            error = np.abs(back - some.astype(np.float64))
        scale[at], zero[at], codes[at] = s, z, code
        failed[at] = (code > 127) | (error > r * (hi - lo) / 2)
    raw = (unstorable | failed).any(axis=(2, 3))
    if unit == "token":
        raw |= unstorable.any(axis=(1, 2, 3))[:, None]
    blank = raw.all(axis=1, keepdims=True) if unit == "token" else raw
    blank = np.broadcast_to(blank[:, :, None, None], shape)
    codes = np.where(raw[:, :, None, None], 0, codes)
    return Quantised(
        codes.astype(np.uint8), np.where(blank, np.float32(1), scale), np.where(blank, 0, zero).astype(np.int32), raw
    )


@st.composite
def hostile(draw: st.DrawFn, finite: bool = True) -> tuple[Array, str]:
    """(heads, 64*pages, channels) of a dtype: every value out of a few, constants, tiny ranges far from 0, mixtures."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(st.sampled_from([(1, 64, 16), (3, 64, 16), (2, 128, 32)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    one = st.floats(allow_nan=not finite, allow_infinity=not finite, width=16 if dtype == "float16" else 32)
    kind = draw(st.sampled_from(["few", "near", "scaled", "rows"]))
    if kind == "few":  # hypothesis likes extremes, subnormals, -0.0 and round numbers
        x = rng.choice(np.array(draw(st.lists(one, min_size=1, max_size=4)), np.float32), shape)
    elif kind == "near":  # neighbours of one value in the dtype: the tiniest range that there is
        centre = cast(np.array([draw(one)]), dtype)
        integer = centre.view({2: np.int16, 4: np.int32}[centre.itemsize]).astype(np.int64)
        near = (integer + rng.integers(-draw(st.integers(0, 300)), 1, shape)).astype(integer.dtype)
        x = near.astype({2: np.int16, 4: np.int32}[centre.itemsize]).view(centre.dtype)
        x = exact(x).astype(np.float32)
    elif kind == "scaled":  # offset and range of any size
        low, high = {"float16": (-24, 15)}.get(dtype, (-149, 127))
        size, offset = draw(st.integers(low, high)), draw(st.integers(low, high) | st.none())
        with np.errstate(over="ignore"):
            x = rng.normal(size=shape) * 2.0**size + (2.0**offset if offset is not None else 0)
    else:  # channels and tokens of very different sizes
        x = rng.normal(size=shape) * np.exp2(rng.integers(-20, 10, shape[2])) + np.exp2(
            rng.integers(-9, 9, (shape[1], 1))
        )
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.float32)
    if finite:
        x = np.nan_to_num(x, nan=1.0, posinf=LARGEST[dtype], neginf=-LARGEST[dtype])
        x = np.clip(x, -LARGEST[dtype], LARGEST[dtype])
    elif draw(st.booleans()):
        x = np.where(rng.random(shape) < draw(st.sampled_from([0.001, 0.5])), draw(one), x)
    return cast(x, dtype), dtype


scales = st.sampled_from([0.02, 0.05, 0.1, 1 / 14, 0.5, 0.999]) | st.floats(0.001, 0.999)


@settings(max_examples=300)
@given(hostile(), st.sampled_from(RANGED), scales)
def test_every_value_of_a_block_that_is_not_raw_is_within_its_bound(
    data: tuple[Array, str], unit: Unit, r: float
) -> None:
    x, _ = data
    assert misses(x, quantise(x, unit, r), unit, r) == 0


@settings(max_examples=200)
@given(hostile(finite=False), st.sampled_from(RANGED), scales)
def test_scales_zeros_codes_and_raw_blocks_are_those_of_the_format(
    data: tuple[Array, str], unit: Unit, r: float
) -> None:
    x, dtype = data
    found, expected = quantise(x, unit, r), literal(x, unit, r, dtype)
    np.testing.assert_array_equal(found.raw, expected.raw)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(np.broadcast_to(found.scale, expected.scale.shape), expected.scale)
    np.testing.assert_array_equal(np.broadcast_to(found.zero, expected.zero.shape), expected.zero)


@given(hostile(finite=False), st.sampled_from(RANGED), scales)
def test_what_is_stored_fits_its_type(data: tuple[Array, str], unit: Unit, r: float) -> None:
    x, _ = data
    heads, tokens, channels = x.shape
    pages = tokens // 64
    q = quantise(x, unit, r)
    assert (q.codes.dtype, q.scale.dtype, q.zero.dtype, q.raw.dtype) == (np.uint8, np.float32, np.int32, np.bool_)
    assert q.codes.shape == (pages, heads, 64, channels)
    assert q.raw.shape == (pages, heads)
    axes = {"block": (1, 1), "channel": (1, channels), "vector": (64, 1), "token": (64, 1)}[unit]
    assert q.scale.shape == q.zero.shape == (pages, 1 if unit == "token" else heads, *axes)
    assert q.codes.max() <= 127
    assert (np.abs(q.zero) <= 32767).all()
    assert ((q.scale >= 2.0**-100) & (q.scale <= 2.0**100)).all()
    if unit != "block":  # bfloat16: nothing below the upper half of the bits
        assert not (q.scale.view(np.uint32) & 0xFFFF).any()


@given(hostile(finite=False), st.sampled_from(RANGED), scales)
def test_a_block_with_a_value_that_is_not_finite_is_raw(data: tuple[Array, str], unit: Unit, r: float) -> None:
    x, _ = data
    broken = ~np.isfinite(in_pages(exact(x))).all(axis=(2, 3))
    raw = quantise(x, unit, r).raw
    assert raw[broken].all()
    if unit == "token":
        assert raw[broken.any(axis=1)].all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("unit", RANGED)
def test_a_value_that_is_not_finite_makes_raw_what_shares_its_unit_and_nothing_else(unit: Unit, bad: float) -> None:
    x = np.random.default_rng(1).normal(size=(3, 192, 32)).astype(np.float32)
    x[1, 100, 7] = bad
    expected = np.zeros((3, 3), bool)
    expected[1, slice(None) if unit == "token" else 1] = True
    np.testing.assert_array_equal(quantise(x, unit, 0.1).raw, expected)


def test_in_a_token_unit_a_value_that_misses_its_bound_makes_only_its_own_block_raw() -> None:
    x = np.zeros((3, 64, 16), np.float32)
    x[0, 5] = 65504 - 32 * np.arange(16)  # the step is 1024 and the nearest point to 65504 is infinite in float16
    x[1, 5] = 32768.0
    x[2, 5] = 40960.0
    q = quantise(x.astype(np.float16), "token", 0.0626)
    np.testing.assert_array_equal(q.raw, literal(x.astype(np.float16), "token", 0.0626, "float16").raw)
    np.testing.assert_array_equal(q.raw, [[True, False, False]])
    assert q.scale[0, 0, 5, 0] > 1


def huge_mixture(rng: np.random.Generator, dtype: str, heads: int, pages: int, channels: int) -> Array:
    """Values whose size and offset change with channel and token, over the whole range of a dtype."""
    low, high = {"float16": (-20, 14)}.get(dtype, (-100, 98))
    shape = heads, pages, 64, channels
    size = rng.integers(low, high, (heads, pages, 1, 1)) + rng.integers(-3, 4, (heads, pages, 1, channels))
    x = rng.standard_normal(shape, np.float32) * np.exp2(np.clip(size, low, high - 3)).astype(np.float32)
    x += (np.exp2(np.clip(size + rng.integers(-30, 9, (1, pages, 64, 1)), low, high - 3))).astype(np.float32)
    kind = rng.integers(0, 8, (heads, pages, 1, 1))
    x = np.where(kind == 0, x[:, :, :1, :1], x)  # a constant block
    x = np.where(kind == 1, np.round(x), x)
    return cast(x.reshape(heads, pages * 64, channels), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_million_values_are_within_their_bounds(dtype: str) -> None:
    rng = np.random.default_rng(7)
    values = coded = 0
    for unit in RANGED:
        for r in (0.02, 0.05, 0.1, 0.3):
            x = huge_mixture(rng, dtype, 8, 10, 128)
            q = quantise(x, unit, r)
            assert misses(x, q, unit, r) == 0
            values += x.size
            coded += np.count_nonzero(~q.raw) * 64 * 128
    assert values >= 10_000_000
    assert coded >= values / 3  # "everything raw" would be no achievement


@pytest.mark.parametrize("r", [0.02, 0.05, 0.1, 1 / 14, 0.5])
@pytest.mark.parametrize("unit", RANGED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ordinary_data_is_never_raw_and_uses_its_levels(dtype: str, unit: Unit, r: float) -> None:
    x = cast(np.random.default_rng(3).normal(size=(4, 256, 64)) * 3, dtype)
    q = quantise(x, unit, r)
    assert not q.raw.any()
    levels = q.codes.max(axis=(2, 3)).astype(int) + 1
    assert (levels <= math.floor(2 / r) + 3).all()
    assert (levels >= 1 / r).all()
    assert (q.scale > bounds(x, unit, r)).all()  # the step is more than half of the widest possible


@pytest.mark.parametrize("unit", RANGED)
def test_the_step_of_float32_data_is_close_to_the_widest_possible(unit: Unit) -> None:
    x = np.random.default_rng(4).normal(size=(2, 64, 64)).astype(np.float32)
    widest = 2 * bounds(x, unit, 0.1)
    q = quantise(x, unit, 0.1)
    assert (q.scale <= widest).all()
    assert (q.scale >= widest * (1 - (2.0**-17 if unit == "block" else 2.0**-7 + 2.0**-17))).all()


def test_a_channel_with_a_large_offset_is_not_raw() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(2, 128, 32))
    x[:, :, 3] = 200 + rng.uniform(-10, 10, (2, 128))
    assert not quantise(cast(x, "bfloat16"), "channel", 0.05).raw.any()


@given(
    st.sampled_from(list(DTYPES)),
    st.sampled_from(RANGED),
    st.floats(0.03, 0.99),
    st.integers(-32767, 32767),
    st.integers(-30, 40),
    st.integers(0, 9),
)
def test_a_constant_unit_comes_back_exactly(
    dtype: str, unit: Unit, r: float, odd: int, exponent: int, seed: int
) -> None:
    shape = 2, 64, 16
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    with np.errstate(over="ignore"):
        constant = exact(cast(np.array([odd * 2.0**exponent]), dtype))[0]
    if not np.isfinite(constant):
        return
    where: dict[Unit, Any] = {
        "block": (1,), "channel": (1, slice(None), 5), "vector": (1, 7), "token": (slice(None), 7),
    }  # fmt: skip
    x[where[unit]] = constant
    x = cast(x, dtype)
    q = quantise(x, unit, r)
    assert not q.raw.any()
    np.testing.assert_array_equal(exact(q.dequantise(x.dtype))[0][where[unit]], np.float64(constant))


def test_a_constant_that_needs_more_than_15_bits_is_raw_and_one_of_zeros_is_not() -> None:
    x = np.full((1, 64, 16), 65537.0, np.float32)
    assert quantise(x, "block", 0.1).raw.all()
    q = quantise(0 * x, "block", 0.1)
    assert (q.raw.any(), q.codes.any(), float(q.scale[0, 0, 0, 0]), int(q.zero[0, 0, 0, 0])) == (False, False, 1.0, 0)


@pytest.mark.parametrize("unit", RANGED)
@pytest.mark.parametrize("size", [2.0**-103, 2.0**103])
def test_a_scale_too_small_or_large_to_store_makes_the_block_raw(unit: Unit, size: float) -> None:
    x = np.random.default_rng(6).uniform(-1, 1, (2, 64, 16)).astype(np.float32)
    assert not quantise(x, unit, 0.1).raw.any()
    y = (x * np.float32(size)).astype(np.float32)
    assert quantise(y, unit, 0.1).raw.all()


@pytest.mark.parametrize("largest", [127, 128])
def test_more_than_128_levels_make_the_block_raw(largest: int) -> None:
    x = (np.arange(64 * 16) % (largest + 1)).astype(np.float32).reshape(1, 64, 16)
    q = quantise(x, "block", 1.00001 / largest)  # a step of 1
    assert q.raw.all() == (largest == 128)
    assert q.codes.max() == (127 if largest == 127 else 0)


@pytest.mark.parametrize(("lowest", "raw"), [(32767, False), (32768, True), (-32767, False), (-32768, True)])
def test_a_zero_of_more_than_15_bits_makes_the_block_raw(lowest: int, raw: bool) -> None:
    x = (lowest + np.arange(64 * 16) % 11).astype(np.float32).reshape(1, 64, 16)
    q = quantise(x, "block", 0.1001)  # a step of 1
    assert q.raw.all() == raw
    assert int(q.zero[0, 0, 0, 0]) == (0 if raw else lowest)


@pytest.mark.parametrize("unit", RANGED)
def test_the_pages_and_heads_of_a_call_do_not_affect_each_other(unit: Unit) -> None:
    x = huge_mixture(np.random.default_rng(8), "bfloat16", 4, 3, 32)
    whole = quantise(x, unit, 0.05)
    for page in range(3):
        alone = quantise(np.ascontiguousarray(x[:, 64 * page : 64 * page + 64]), unit, 0.05)
        for name in ("codes", "scale", "zero", "raw"):
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(whole, name)[page])
    if unit != "token":
        alone = quantise(x[2:3], unit, 0.05)
        np.testing.assert_array_equal(alone.codes[:, 0], whole.codes[:, 2])
        np.testing.assert_array_equal(alone.raw[:, 0], whole.raw[:, 2])


def test_values_that_do_not_lie_together_in_memory_give_the_same_codes() -> None:
    x = np.random.default_rng(9).normal(size=(2, 200, 16)).astype(np.float32)
    part = x[:, 20:148]
    np.testing.assert_array_equal(quantise(part, "token", 0.1).codes, quantise(part.copy(), "token", 0.1).codes)


@pytest.mark.parametrize("shape", [(64, 16), (1, 1, 64, 16), (1, 63, 16), (1, 65, 16)])
def test_what_is_no_whole_pages_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="whole pages"):
        quantise(np.zeros(shape, np.float32), "block", 0.1)


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint8, np.dtype(">f4")])
def test_another_type_is_refused(dtype: Any) -> None:
    with pytest.raises(InvalidInput, match="values must be float32, float16 or bfloat16"):
        quantise(np.zeros((1, 64, 16), dtype), "block", 0.1)


def test_no_pages_give_no_codes() -> None:
    q = quantise(np.zeros((2, 0, 16), np.float32), "channel", 0.1)
    assert (q.codes.shape, q.raw.shape) == ((0, 2, 64, 16), (0, 2))


@given(hostile(), st.sampled_from(RANGED), scales)
def test_error_bound_says_r_times_half_the_range(data: tuple[Array, str], unit: Unit, r: float) -> None:
    x, _ = data
    found = error_bound(x, unit, r)
    assert found.shape == quantise(x, unit, r).scale.shape
    np.testing.assert_array_equal(np.broadcast_to(found, bounds(x, unit, r).shape), bounds(x, unit, r))


@given(
    st.lists(
        st.floats(width=32) | st.integers(0, 2**32 - 1).map(lambda b: float(np.uint32(b).view(np.float32))), min_size=1
    )
)
def test_rounding_is_that_of_torch_ties_to_even_included(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64).float().numpy()
    ties = ((x.view(np.uint32) & 0xFFFF0000) | 0x8000).view(np.float32)  # half way between two bfloat16
    for y in (x, ties):
        for dtype, torch_dtype in DTYPES.items():
            with np.errstate(invalid="ignore"):  # a signalling NaN
                found = round_to(y, BF16 if dtype == "bfloat16" else np.dtype(dtype))
                np.testing.assert_array_equal(exact(found), torch.from_numpy(y).to(torch_dtype).double().numpy())
                np.testing.assert_array_equal(to_float32(found).astype(np.float64), exact(found))


# The unit ``head``


def spacing(x: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[np.float64]:
    """Distance of the values of a dtype around x."""
    significand, least = FORMATS[dtype]
    exponent = np.frexp(x)[1] - 1
    return np.exp2(np.where(x == 0, least, np.maximum(exponent, least)) - significand + 1)


def steps_for(x: Array, fractions: list[float]) -> tuple[float, ...]:
    """A step for each head: a fraction of its largest value."""
    top = np.nan_to_num(np.abs(exact(x)), nan=1.0, posinf=1.0, neginf=1.0).max(axis=(1, 2))
    steps = (min(max(float(t) * f, 2.0**-100), 2.0**100) for t, f in zip(top, fractions, strict=False))
    heads = TensorSpec("head", steps=(tuple(steps),)).heads
    assert heads is not None
    return heads


fractions = st.lists(
    st.sampled_from([1 / 127, 1 / 128, 1 / 120, 0.02, 0.3, 1.0, 2.0, 3.0]) | st.floats(1 / 200, 3),
    min_size=9,
    max_size=9,
)


@settings(max_examples=300)
@given(hostile(finite=False), fractions)
def test_a_step_of_a_head_is_kept_exactly_before_the_rounding_and_to_half_a_spacing_after_it(
    data: tuple[Array, str], shares: list[float]
) -> None:
    x, dtype = data
    steps = steps_for(x, shares)
    q = quantise(x, "head", steps)
    values, coded = in_pages(exact(x)), ~q.raw[:, :, None, None]
    point = (q.codes.astype(np.float64) - 128) * np.array(steps).reshape(1, -1, 1, 1)  # exact: 8 bits by 16
    with np.errstate(invalid="ignore", over="ignore"):
        assert not (coded & ~(np.abs(point - values) <= np.array(steps).reshape(1, -1, 1, 1) / 2)).any()
        back = exact(q.dequantise(x.dtype))
        assert not (coded & ~(np.abs(back - point) <= spacing(point, dtype) / 2)).any()
    assert (q.scale.ravel().tolist(), q.zero.ravel().tolist()) == (list(steps), [-128] * len(steps))
    assert q.scale.shape == q.zero.shape == (1, x.shape[0], 1, 1)


@settings(max_examples=200)
@given(hostile(finite=False), fractions)
def test_blocks_are_raw_exactly_where_a_value_has_no_code(data: tuple[Array, str], shares: list[float]) -> None:
    x, dtype = data
    steps = steps_for(x, shares)
    found = quantise(x, "head", steps)
    values = in_pages(exact(x))
    with np.errstate(invalid="ignore"):
        least = np.array(steps).reshape(1, -1, 1, 1) * -128.5
        fits = (values >= least) & (values <= -least - np.array(steps).reshape(1, -1, 1, 1))  # 127.5 steps
        if dtype == "float16":
            fits &= np.abs(values) <= 65504 - np.array(steps).reshape(1, -1, 1, 1) / 2
    near = np.isclose(values, least) | np.isclose(values, 127.5 * least / -128.5)
    if dtype == "float16":
        near |= np.abs(values) > 65504 - np.array(steps).reshape(1, -1, 1, 1)
    sure = ~near.any(axis=(2, 3))
    np.testing.assert_array_equal(found.raw[sure], ~fits.all(axis=(2, 3))[sure])
    assert not found.codes[found.raw].any()


@pytest.mark.parametrize("q", [-128, -127, -3, -1, 0, 1, 2, 126, 127])
@pytest.mark.parametrize("step", [1.0, 0.75, 3 * 2.0**-60, float(0xFFFF), 0x8001 * 2.0**-20])
def test_around_the_middle_between_two_points_the_nearer_one_is_taken(q: int, step: float) -> None:
    """Where float32 alone errs: values one unit in the last place beside q + 1/2 steps."""
    x = np.zeros((1, 64, 16), np.float32)
    middle = np.float32((q + 0.5) * step)
    around = [np.nextafter(middle, np.float32(-np.inf)), middle, np.nextafter(middle, np.float32(np.inf))]
    x[0, 0, : 3 if q < 127 else 1] = around if q < 127 else around[:1]
    codes = quantise(x, "head", (step,)).codes[0, 0, 0].astype(int) - 128
    assert codes[0] == q
    if q < 127:
        assert codes[1] in (q, q + 1)
        assert codes[2] == q + 1


def test_codes_of_a_head_reach_from_minus_128_to_127() -> None:
    x = np.zeros((2, 192, 16), np.float32)
    x[0, 0, :2] = -128, 127
    x[0, 64, 0], x[0, 128, 0] = -128.5 - 2.0**-10, 127.5 + 2.0**-10
    q = quantise(x, "head", (1.0, 1.0))
    np.testing.assert_array_equal(q.raw, [[False, False], [True, False], [True, False]])
    assert q.codes[0, 0, 0, :3].tolist() == [0, 255, 128]


def test_a_point_beyond_the_largest_float16_makes_a_block_raw() -> None:
    x = np.zeros((2, 64, 16), np.float16)
    x[:, 0, 0] = 65504
    q = quantise(x, "head", (1024.0, 818.75))  # 64 steps are 65536, which is infinite; 80 steps are 65500
    np.testing.assert_array_equal(q.raw, [[True, False]])


def test_the_bound_of_a_head_is_half_its_step() -> None:
    bound = error_bound(np.zeros((2, 64, 16), np.float32), "head", (1.0, 0.5))
    assert bound.shape == (1, 2, 1, 1)
    assert bound.ravel().tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("unit", "scale"), [("head", 0.1), ("head", (1.0,)), ("head", (1.0, 1.0, 1.0)), ("token", (1.0, 1.0))]
)
def test_a_scale_must_fit_the_unit_and_the_heads(unit: Unit, scale: Any) -> None:
    with pytest.raises(InvalidInput, match="2 heads needs"):
        quantise(np.zeros((2, 64, 16), np.float32), unit, scale)
