"""The CUDA attention kernel, run on the CPU, against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import attention_cases
from attention_cases import NUMPY, Case, build, scramble
from emulated_attention import attend
from emulated_decompression import decompress
from emulator import COMPILER, Array
from kvcomp.codec.dtypes import PATCHED as MODE_PATCHED
from kvcomp.codec.page import directory_of, width_of
from kvcomp.codec.quantise import round_to, to_float32
from kvcomp.kernels.cuda.layout import AttendBuild, attend_build, describe_book, machine
from kvcomp.spec import Coding

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")

# Relative to the largest sum of w |v|. Tensor cores cut off: a score of D channels may be off by D/16 2^-23 times the
# sum of |q| scale (128 + code), which is up to 4e-4 here, and a weight by as much.
TOLERANCE = 2e-4

PATCHED: tuple[Coding, Coding] = ("patched", "patched")
QUICK = {
    "the preset": Case(),
    "fixed width": Case(channels=64, queries=1, coding=("fixed", "fixed"), scales=(1 / 14, 1 / 4)),
    "pieces": Case(channels=64, queries=2, units=("head", "head"), classes=(4, 4), coding=PATCHED, scales=(0.1, 0.1)),
}
GRID = {
    "80 channels, five queries": Case(channels=80, queries=5, pages=(2, 1)),
    "96 channels, sixteen queries": Case(channels=96, queries=16, classes=(4, 4), pages=(2, 1), raw=True),
    "192 channels": Case(channels=192, queries=2, pages=(2,), units=("channel", "vector")),
    "256 channels": Case(channels=256, queries=8, pages=(2,), coding=("fixed", "huffman"), raw=True),
    "112 channels, limit 10": Case(channels=112, queries=3, pages=(2, 1), limit=10),
    "vector and channel, four classes": Case(units=("vector", "channel"), classes=(4, 4), raw=True, limit=11),
    "token and block, float16": Case(units=("token", "block"), value="float16", raw=True, heads=3),
    "soft cap, float32": Case(units=("block", "block"), value="float32", raw=True, softcap=20.0, partial=37),
    "split codes": Case(scales=(0.02, 0.03), limit=11),
    "codes split twice": Case(channels=64, scales=(0.012, 0.016), classes=(1, 4)),
    "three new tokens": Case(queries=12, new=3, partial=1, pages=(3, 2)),
    "steps of heads": Case(units=("head", "head"), classes=(4, 4), scales=(0.1, 0.1)),
    "fine steps of heads": Case(units=("head", "head"), classes=(4, 1), scales=(0.02, 0.03), limit=10),
    "steps of heads, two books": Case(units=("head", "head"), classes=(4, 4), scales=(0.05, 0.05), wide=True),
    "steps of heads, fixed width": Case(units=("head", "head"), coding=("fixed", "fixed"), scales=(0.2, 0.05)),
    "pieces, 128 channels": Case(units=("channel", "token"), coding=PATCHED, scales=(0.08, 0.15), raw=True, partial=37),
    "pieces, 80 channels, float16": Case(
        channels=80, queries=5, units=("block", "vector"), coding=PATCHED, pages=(2, 1), value="float16", raw=True
    ),
    "pieces, 112 channels, float32": Case(
        channels=112, queries=9, units=("token", "channel"), coding=PATCHED, pages=(2, 1), value="float32"
    ),
    "pieces, 192 channels, soft cap": Case(
        channels=192, units=("vector", "block"), coding=PATCHED, pages=(2,), softcap=20.0
    ),
    "pieces, 256 channels": Case(channels=256, units=("head", "head"), coding=PATCHED, pages=(2,), raw=True),
    "pieces without bits": Case(units=("head", "head"), coding=PATCHED, classes=(4, 4), scales=(0.5, 1.0)),
    "pieces of many bits": Case(
        channels=64, units=("head", "head"), coding=PATCHED, scales=(0.008, 0.008), new=3, queries=12
    ),
    "pieces of K, words of V": Case(channels=96, coding=("patched", "huffman")),
    "words of K, pieces of V": Case(
        channels=96, coding=("fixed", "patched"), units=("head", "head"), scales=(0.1, 0.1)
    ),
    "no own book": Case(own=False, channels=64, heads=1),
    "nothing but a tail": Case(pages=(0, 0), sinks=0, tail=130, value="float16"),
    "long rows": Case(channels=64, pages=(9, 4, 6), queries=7, sinks=70),
}


def build_for(case: Case, query: str = "float32", warps: int = 2) -> AttendBuild:
    chosen = attend_build(case.spec, case.channels, case.value, query, bool(case.softcap), machine(90))
    return replace(chosen, warps=warps)


@pytest.mark.parametrize(
    "case",
    [*QUICK.values(), *(pytest.param(x, marks=pytest.mark.emulated) for x in GRID.values())],
    ids=[*QUICK, *GRID],
)
def test_equals_the_oracle(case: Case) -> None:
    cache = build(case)
    result = attend(cache, build_for(case))
    expected = cache.expected()
    assert expected.error_of(result.out) < TOLERANCE
    np.testing.assert_allclose(result.lse, expected.lse, rtol=1e-5, atol=3e-4)


def test_does_not_depend_on_the_order_of_the_threads() -> None:
    case = QUICK["the preset"]
    cache, chosen = build(case), build_for(case)
    one, other = (attend(cache, chosen, ascending=ascending) for ascending in (True, False))
    np.testing.assert_array_equal(one.out, other.out)
    np.testing.assert_array_equal(one.lse, other.lse)


@pytest.mark.emulated
@pytest.mark.parametrize("splits", [1, 3])
def test_splits_of_the_context(splits: int) -> None:
    cache = build(GRID["long rows"])
    result = attend(cache, build_for(cache.case), splits=splits)
    assert cache.expected().error_of(result.out) < TOLERANCE


@pytest.mark.emulated
@pytest.mark.parametrize("query", ["bfloat16", "float16"])
def test_queries_of_the_model_type(query: str) -> None:
    cache = build(QUICK["the preset"])
    dtype = np.dtype(np.uint16 if query == "bfloat16" else np.float16)
    cache.q = to_float32(round_to(cache.q, dtype))
    result = attend(cache, build_for(cache.case, query), query=query)
    assert cache.expected().error_of(result.out) < (2**-8 if query == "bfloat16" else 2**-11)


@pytest.mark.emulated
@pytest.mark.parametrize("copies", [0, 1, 8])
def test_copies_of_the_tables(copies: int) -> None:
    case = replace(QUICK["the preset"], limit=10, classes=(4, 1))
    cache = build(case)
    result = attend(cache, replace(build_for(case), k_copies=copies, v_copies=copies))
    assert cache.expected().error_of(result.out) < TOLERANCE


@pytest.mark.emulated
def test_blocks_too_large_to_stage() -> None:
    case = Case(raw=True, units=("vector", "token"))
    cache = build(case)
    result = attend(cache, replace(build_for(case), k_stage=1024, v_stage=1024))
    assert cache.expected().error_of(result.out) < TOLERANCE


@pytest.mark.emulated
def test_tokens_that_do_not_count_may_hold_anything() -> None:
    case = Case(value="float16", raw=True, partial=37, pages=(2,))
    cache = build(case)
    expected = cache.expected()
    tail_k, tail_v = (
        np.concatenate([x, np.full((*x.shape[:2], 10, x.shape[3]), np.nan, x.dtype)], axis=2)
        for x in (cache.view.tail_k, cache.view.tail_v)
    )
    cache.view = replace(cache.view, tail_k=tail_k, tail_v=tail_v)
    result = attend(cache, build_for(case))
    assert expected.error_of(result.out) < TOLERANCE


@pytest.mark.emulated
def test_short_codes_with_low_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that occur alike have words so short that a pair is no longer than the limit with its low bits."""

    def alike(rng: np.random.Generator, heads: int, tokens: int, channels: int, value: str) -> Array:
        return round_to(rng.integers(0, 34, (heads, tokens, channels)).astype(np.float32), NUMPY[value])

    monkeypatch.setattr(attention_cases, "values_like", alike)
    case = Case(scales=(1.01 / 33, 1.01 / 33), units=("block", "block"))
    cache = build(case)
    own = [describe_book(of_kind[1], 0) for of_kind in cache.view.books[0]]
    assert all(book.split[0] == 1 and book.bits <= case.limit for book in own)
    result = attend(cache, replace(build_for(case), k_stage=8192, v_stage=8192))
    assert cache.expected().error_of(result.out) < TOLERANCE


@pytest.mark.emulated
@pytest.mark.parametrize("queries", range(1, 17))
def test_every_number_of_queries(queries: int) -> None:
    cache = build(Case(channels=64, queries=queries, heads=1, pages=(1,), tail=1, sinks=0))
    assert cache.expected().error_of(attend(cache, build_for(cache.case)).out) < TOLERANCE


@pytest.mark.emulated
@pytest.mark.parametrize("channels", [64, 96, 128, 256])
@pytest.mark.parametrize("width", range(1, 8))
def test_every_fixed_width(width: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value from 0 to 2^width - 1, in steps of about 1."""
    most = 2**width - 1

    def even(rng: np.random.Generator, heads: int, tokens: int, channels: int, value: str) -> Array:
        return round_to(rng.integers(0, most + 1, (heads, tokens, channels)).astype(np.float32), NUMPY[value])

    monkeypatch.setattr(attention_cases, "values_like", even)
    scale = min(0.9, 1.01 / most)
    case = Case(
        channels=channels, pages=(2, 1), units=("block", "block"), coding=("fixed", "fixed"), scales=(scale, scale)
    )
    cache = build(case)
    modes, _ = directory_of(cache.owners[0], 0, case.heads)
    assert [width_of(int(mode)) for mode in modes[:-1]] == 2 * case.heads * [width]
    assert cache.expected().error_of(attend(cache, build_for(case)).out) < TOLERANCE


@pytest.mark.emulated
@pytest.mark.parametrize("exceptions", [0.0, 0.03, 0.045])
@pytest.mark.parametrize("channels", [64, 80])
@pytest.mark.parametrize("width", range(1, 9))
def test_every_width_of_a_piece(width: int, channels: int, exceptions: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of so many bits around 0, in steps of 1, and some that have more, up to 46 in two pieces."""
    half = 2**width // 2

    def some_outside(rng: np.random.Generator, heads: int, tokens: int, channels: int, value: str) -> Array:
        shape = heads, tokens, channels
        x = rng.integers(-half, max(1, half), shape)
        further = rng.integers(1, 30, shape)
        outside = rng.random(shape) < exceptions
        x = np.where(outside, np.where(rng.random(shape) < 0.5, half - 1 + further, -half - further), x)
        return round_to(np.clip(x, -128, 127).astype(np.float32), NUMPY[value])

    monkeypatch.setattr(attention_cases, "values_like", some_outside)
    case = Case(channels=channels, heads=1, pages=(2,), units=("head", "head"), coding=PATCHED, scales=(0.25, 0.25))
    cache = build(case)
    modes, offsets = directory_of(cache.owners[0], 0, 1)
    for mode, begin in zip(modes[:-1], offsets[:-1], strict=True):
        if int(mode) != MODE_PATCHED:  # without exceptions a fixed width is smaller
            assert not exceptions or width == 8
            continue
        widths, _, counts = np.split(cache.owners[0][begin : begin + 3 * channels // 8], 3)
        assert np.median(widths) == width
        assert counts.any() == (exceptions > 0)
    assert cache.expected().error_of(attend(cache, build_for(case)).out) < TOLERANCE


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("channels", "coding"),
    [
        *((channels, coding) for coding in ("huffman", "fixed") for channels in range(64, 257, 16)),
        *((channels, "patched") for channels in (144, 176, 208, 224, 240)),  # others are above
    ],
)
def test_every_number_of_channels(channels: int, coding: Coding) -> None:
    cache = build(Case(channels=channels, queries=2, heads=1, pages=(2,), tail=1, coding=(coding, coding)))
    assert cache.expected().error_of(attend(cache, build_for(cache.case)).out) < TOLERANCE


HOSTILE = {
    "64 channels": Case(channels=64, limit=10),
    "128 channels, split": Case(scales=(0.03, 0.03), units=("block", "block")),
    "192 channels, channel and vector": Case(channels=192, units=("channel", "vector"), limit=10),
    "256 channels, four classes": Case(channels=256, classes=(1, 4)),
    "steps of heads": Case(units=("head", "head"), classes=(4, 4), scales=(0.1, 0.1)),
    "fixed width": Case(coding=("fixed", "fixed"), scales=(1 / 12, 1 / 5)),
    "pieces": Case(coding=PATCHED, units=("channel", "token"), scales=(0.08, 0.15)),
}


@pytest.mark.emulated
@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE)
def test_hostile_streams_are_read_within_the_arena(case: Case) -> None:
    """Every bit behind what is checked of a page is random, scales included: the result means nothing, but no read
    leaves the arena.
    """
    cache = build(replace(case, pages=(2,)))
    scramble(cache, np.random.default_rng(0))
    for stage in (None, 512):  # read from shared memory, and where it is
        chosen = build_for(case)
        attend(cache, chosen if stage is None else replace(chosen, k_stage=stage, v_stage=stage))
    decompress(cache)
