"""The CPU kernels against the readable reference: the same codes and bytes, and attention within float32 rounding."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numba import config

import attention_cases
from attention_cases import NUMPY, Cache, Case, make_raw, relative_error, steps_of, values_like
from kvcomp.codec import codebook
from kvcomp.codec.dtypes import PATCHED, RAW
from kvcomp.codec.page import directory_of, fixed_mode
from kvcomp.codec.patched import piece_order
from kvcomp.codec.quantise import Quantised, round_to
from kvcomp.errors import InvalidInput
from kvcomp.kernels import Books, Steps, reference
from kvcomp.spec import KINDS, UNITS, Coding, Unit

cpu = pytest.importorskip("kvcomp.kernels.cpu.backend", exc_type=ImportError)

Array = npt.NDArray[Any]
DTYPES = ("bfloat16", "float32", "float16")
UNIT_PAIRS: tuple[tuple[Unit, Unit], ...] = (
    ("block", "token"),
    ("channel", "vector"),
    ("token", "channel"),
    ("vector", "block"),
    ("head", "head"),
    ("head", "token"),
    ("channel", "head"),
)
CODINGS: tuple[tuple[Coding, Coding], ...] = (
    ("huffman", "huffman"),
    ("fixed", "huffman"),
    ("patched", "patched"),
    ("huffman", "fixed"),
)
# Attention in float32 sums against float64, relative to the largest output; scores of tens magnify their own rounding.
TOLERANCE = 2e-5
# Codes of 16-bit values take factors of 16 bits: an error of a tenth of what rounding a query to float16 makes.
SHORT_TOLERANCE = 2e-4


def rounded(x: Array, value: str) -> Array:
    return round_to(x.astype(np.float32), NUMPY[value])


def scales_for(units: tuple[Unit, Unit], scales: tuple[float, float]) -> tuple[float, float]:
    """Scales of a case, larger where they are of the heads: so that these have about as many codes."""
    key, value = (1.5 * scale if unit == "head" else scale for unit, scale in zip(units, scales, strict=True))
    return key, value


def modes_of(address: int, heads: int) -> list[int]:
    """Modes of the blocks of a page."""
    words = np.frombuffer(reference.page_bytes(address, heads)[: 8 * heads], "<u4")
    return (words & 15).tolist()


def build(
    channels: int,
    queries: int,
    pages: tuple[int, ...],
    units: tuple[Unit, Unit] = ("block", "token"),
    classes: int = 1,
    scales: tuple[float, float] = (0.05, 0.1),
    **how: Any,
) -> Cache:
    """A case with a longer tail, of which each query sees a part, and as many classes for K as for V."""
    how = {"tail": 100, "classes": (classes, classes), "scales": scales_for(units, scales), **how}
    return attention_cases.build(Case(channels, queries, 0, pages, units=units, **how))


def assert_attends(cache: Cache, threads: int = 1) -> None:
    out, lse = cache.attend(cpu, threads)
    expected, expected_lse = cache.attend()
    assert out.dtype == lse.dtype == np.float32
    pages = cache.view.pages[np.arange(cache.view.pages.shape[1]) < np.asarray(cache.view.count)[:, None]]
    modes = {mode for page in pages for mode in modes_of(int(page), cache.case.heads)}
    short = cache.case.value != "float32" and max(modes, default=RAW) > RAW
    assert relative_error(out, expected) <= (SHORT_TOLERANCE if short else TOLERANCE)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=5e-4 if short else 3e-5)


@pytest.mark.parametrize("channels", [16, 64, 80, 96, 112, 128, 192, 256, 320, 512])
@pytest.mark.parametrize("case", range(len(UNIT_PAIRS)))
def test_attend_shapes(channels: int, case: int) -> None:
    group = (1, 2, 3, 4, 8, 16)[(case + channels // 16) % 6]
    assert_attends(
        build(
            channels,
            group,
            (3, 0, 1),
            UNIT_PAIRS[case],
            seed=case + channels,
            classes=(1, 4)[(case + channels // 16) % 2],
            coding=CODINGS[(case + channels // 16) % 4],
            value=DTYPES[(case + channels // 32) % 3],
            raw=True,
            partial=37,
        ),
        threads=2,
    )


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 33])
def test_attend_groups(group: int) -> None:
    assert_attends(build(64, group, (2,), seed=group))


@pytest.mark.parametrize(("channels", "value_channels"), [(192, 128), (128, 192), (16, 512), (80, 64), (288, 16)])
@pytest.mark.parametrize("units", UNIT_PAIRS)
def test_values_may_have_other_channels_than_keys(channels: int, value_channels: int, units: tuple[Unit, Unit]) -> None:
    """The same bytes and values as by the reference, and attention over them."""
    number = UNIT_PAIRS.index(units) + channels // 16
    classes, dtype, coding = (1, 4)[number % 2], DTYPES[number % 3], CODINGS[number % 4]
    cache = build(
        channels, 1 + number % 5, (2, 0), units, classes, coding=coding, value=dtype, raw=True,
        value_channels=value_channels,
    )  # fmt: skip
    assert_attends(cache)
    rng = np.random.default_rng(number)
    k, v = (values_like(rng, 2, 128, width, dtype) for width in (channels, value_channels))
    tensors = cache.case.spec.key, cache.case.spec.value
    kq, vq = (reference.quantise(x, t.unit, t.scale) for x, t in zip((k, v), tensors, strict=True))
    expected, offsets = reference.encode_pages(k, v, kq, vq, coding, units, *cache.view.books[0])
    got, got_offsets = cpu.encode_pages(k, v, kq, vq, coding, units, *cache.view.books[0])
    np.testing.assert_array_equal(got_offsets, offsets, strict=True)
    np.testing.assert_array_equal(got, expected, strict=True)
    outs = [[np.zeros_like(x) for x in (k, v)] for _ in range(2)]
    for kernels, both in zip((reference, cpu), outs, strict=True):
        kernels.decompress(expected.ctypes.data + offsets[:-1], units, *cache.view.books[0], *both, cache.view.steps)
    for one, other in zip(*outs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("units", UNIT_PAIRS)
@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("coding", CODINGS)
def test_attend_units(units: tuple[Unit, Unit], classes: int, coding: tuple[Coding, Coding]) -> None:
    assert_attends(build(64, 4, (2, 3), units, classes=classes, coding=coding, raw=True))


@pytest.mark.parametrize("scales", [(0.3, 0.3), (0.05, 0.04), (0.03, 0.02), (0.012, 0.014)])
@pytest.mark.parametrize("coding", [("huffman", "huffman"), ("fixed", "fixed"), ("patched", "patched")])
@pytest.mark.parametrize("own", [True, False])
def test_attend_precision(scales: tuple[float, float], coding: tuple[Coding, Coding], own: bool) -> None:
    """All splits of a code, narrow and wide tables, every fixed width."""
    for units in (("channel", "block"), ("head", "head")):
        for classes in (1, 4):
            assert_attends(
                build(64, 3, (2,), units, scales=scales, coding=coding, own=own, value="float32", classes=classes)
            )


def on_steps(k: Array, v: Array) -> tuple[Array, Array, list[Quantised], Steps]:
    """Codes as K and V of two heads with these steps, the same quantised, and the steps."""
    steps: Steps = ((1.0, 0.75), (0.5, 1.25))
    values, quantised = [], []
    for x, of_kind in zip((k, v), steps, strict=True):
        assert of_kind is not None
        values.append(x * np.array(of_kind, np.float32)[:, None, None])
        quantised.append(reference.quantise(values[-1], "head", of_kind))
    return values[0], values[1], quantised, steps


@pytest.mark.parametrize("channels", [16, 48, 80, 128, 288])
@pytest.mark.parametrize("width", range(1, 9))
def test_every_fixed_width(channels: int, width: int) -> None:
    """Codes that straddle words, rows that end in the middle of one, runs of K that begin there."""
    rng = np.random.default_rng(width)
    least, most = -(1 << (width - 1)), (1 << (width - 1)) - 1
    k, v = (rounded(rng.integers(least, most + 1, (2, 128, channels)), "float32") for _ in "KV")
    k, v, quantised, steps = on_steps(k, v)
    units: tuple[Unit, Unit] = ("head", "head")
    nothing: Books = (None, None)
    pages, offsets = cpu.encode_pages(k, v, *quantised, ("fixed",) * 2, units, nothing, nothing)
    addresses = pages.ctypes.data + offsets[:-1]
    modes = {mode for page in addresses.tolist() for mode in modes_of(page, 2)}
    assert modes == {fixed_mode(width)}
    out_k, out_v = np.zeros_like(k), np.zeros_like(v)
    cpu.decompress(addresses, units, nothing, nothing, out_k, out_v, steps)
    np.testing.assert_array_equal(out_k, k)
    np.testing.assert_array_equal(out_v, v)
    cache = build(channels, 1 + width % 3, (2,), units, tail=20, value="float32")
    cache.view.pages[0, :2] = addresses
    view = replace(cache.view, books=[(nothing, nothing)], steps=steps)
    assert_attends(replace(cache, view=view, scaling=channels**-0.5 / (1 << width), owners=[pages]))


@pytest.mark.parametrize("channels", [16, 48, 80, 128, 288, 512])
@pytest.mark.parametrize("queries", [1, 3, 16])
def test_pieces_of_every_width(channels: int, queries: int) -> None:
    """Widths of 0 to 8 in any order, pieces that begin in the middle of a word, empty pieces at the end and between,
    exceptions at the first and the last place of a piece and next to each other.
    """
    rng = np.random.default_rng(channels + queries)
    k, v = np.zeros((2, 2, 128, channels), np.float32)
    for kind, x in zip(KINDS, (k, v), strict=True):
        token, channel = piece_order(kind, channels)
        for head, page, piece in np.ndindex(2, 2, channels // 8):
            width = int(rng.integers(0, 10))
            if width < 9 and piece % (channels // 16) < max(1, channels // 20):
                codes = rng.integers(0, 1 << width, 512) + int(rng.integers(-128, 129 - (1 << width)))
                places = [0, 1, 511, *rng.integers(0, 512, 6)]
                codes[places] = np.clip(codes[places] + rng.integers(-63, 64, len(places)), -128, 127)
                x[head, 64 * page + token[piece], channel[piece]] = codes
    k, v, quantised, steps = on_steps(k, v)
    units: tuple[Unit, Unit] = ("head", "head")
    nothing: Books = (None, None)
    pages, offsets = cpu.encode_pages(k, v, *quantised, ("patched",) * 2, units, nothing, nothing)
    expected, _ = reference.encode_pages(k, v, *quantised, ("patched",) * 2, units, nothing, nothing)
    np.testing.assert_array_equal(pages, expected, strict=True)
    addresses = pages.ctypes.data + offsets[:-1]
    assert {mode for page in addresses.tolist() for mode in modes_of(page, 2)} >= {PATCHED}
    out_k, out_v = np.full_like(k, np.nan), np.full_like(v, np.nan)
    cpu.decompress(addresses, units, nothing, nothing, out_k, out_v, steps)
    np.testing.assert_array_equal(out_k, k)
    np.testing.assert_array_equal(out_v, v)
    cache = build(channels, queries, (2,), units, tail=20, value="float32")
    cache.view.pages[0, :2] = addresses
    view = replace(cache.view, books=[(nothing, nothing)], steps=steps)
    assert_attends(replace(cache, view=view, scaling=channels**-0.5 / 64, owners=[pages]))


@pytest.mark.parametrize("channels", [16, 64, 80, 128, 192, 512])
@pytest.mark.parametrize("swap", [False, True])
def test_classes_of_every_form_side_by_side(channels: int, swap: bool) -> None:
    """One symbol, narrow and wide tables, low bits apart: each class of K and V in another form."""
    rng = np.random.default_rng(channels)
    spread = np.repeat([5.0, 0.01, 25.0, 1.0], channels // 4)[:: -1 if swap else 1]
    k, v = (rounded(rng.normal(size=(2, 128, channels)) * spread, "bfloat16") for _ in "KV")
    steps: Steps = ((1.0, 0.75), (0.5, 1.25))
    quantised = [reference.quantise(x, "head", scale) for x, scale in zip((k, v), steps, strict=True) if scale]
    books: list[Books] = []
    for q, kind in zip(quantised, KINDS, strict=True):
        counts = reference.count_pairs(q, kind, 4)
        trained = codebook.train(counts, 12)
        assert channels in (16, 80) or ({0, 3} <= set(trained.split) and 1 in trained.levels)
        counts[:, :124] = counts[:, :, :124] = 0
        books.append((trained, codebook.train(counts, 12)))
    units: tuple[Unit, Unit] = ("head", "head")
    pages = [kernels.encode_pages(k, v, *quantised, ("huffman",) * 2, units, *books) for kernels in (reference, cpu)]
    np.testing.assert_array_equal(pages[0][0], pages[1][0])
    addresses = pages[0][0].ctypes.data + pages[0][1][:-1]
    outs = [[np.zeros_like(x) for x in (k, v)] for _ in range(2)]
    for kernels, (out_k, out_v) in zip((reference, cpu), outs, strict=True):
        kernels.decompress(addresses, units, *books, out_k, out_v, steps)
    for one, other in zip(*outs, strict=True):
        np.testing.assert_array_equal(one, other)
    cache = build(channels, 3, (2,), units, tail=20)
    cache.view.pages[0, :2] = addresses
    view = replace(cache.view, books=[(books[0], books[1])], steps=steps)
    assert_attends(replace(cache, view=view, scaling=channels**-0.5 / 16, owners=[pages[0][0]]))


@pytest.mark.parametrize("channels", [16, 64, 80, 128, 192, 512])
@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("spread", [0.7, 2.0, 9.0])
def test_codes_much_longer_than_their_book_is_made_for(channels: int, classes: int, spread: float) -> None:
    """Decoders guess how many pairs fit a window; here most guesses fail."""
    rng = np.random.default_rng(channels)
    k, v = (rounded(np.rint(rng.uniform(0, 5 * spread, (2, 128, channels))), "bfloat16") for _ in "KV")
    usual = rounded(np.abs(np.rint(rng.normal(size=(2, 4096, channels)) * spread / 2)), "bfloat16")
    steps: Steps = ((1.0, 1.0), (1.0, 1.0))
    quantised = [reference.quantise(x, "head", (1.0, 1.0)) for x in (k, v)]
    books: list[Books] = []
    for q, kind in zip(quantised, KINDS, strict=True):
        counts = cpu.count_pairs(cpu.quantise(usual, "head", (1.0, 1.0)), kind, classes)
        counts += reference.count_pairs(q, kind, classes) > 0
        books.append((None, codebook.train(counts, 12)))
    units: tuple[Unit, Unit] = ("head", "head")
    pages, offsets = cpu.encode_pages(k, v, *quantised, ("huffman",) * 2, units, *books)
    out_k, out_v = np.zeros_like(k), np.zeros_like(v)
    cpu.decompress(pages.ctypes.data + offsets[:-1], units, *books, out_k, out_v, steps)
    np.testing.assert_array_equal(out_k, k)
    np.testing.assert_array_equal(out_v, v)


@pytest.mark.parametrize(
    ("sinks", "tail", "pages"), [(0, 0, (2,)), (4, 0, (0,)), (0, 70, (0,)), (65, 1200, (18,)), (0, 64, (16, 17))]
)
def test_attend_parts(sinks: int, tail: int, pages: tuple[int, ...]) -> None:
    assert_attends(build(16, 2, pages, sinks=sinks, tail=tail, heads=1))


def test_attend_softcap() -> None:
    assert_attends(build(64, 4, (2,), raw=True, softcap=3.0))


def test_attend_sees_nothing() -> None:
    cache = build(16, 2, (0, 1), sinks=0, tail=0)
    out, lse = cache.attend(cpu)
    assert (out[0] == 0).all()
    assert np.isneginf(lse[0]).all()
    assert np.isfinite(lse[1]).all()


def test_attend_ignores_what_is_out_of_sight() -> None:
    cache = build(64, 2, (2,), tail=80)
    out, _ = cache.attend(cpu)
    for sinks in (cache.view.sinks_k, cache.view.sinks_v):
        sinks[0, :, cache.view.sink_count[0] :] = 0x7FC0  # NaN
    for tail in (cache.view.tail_k, cache.view.tail_v):
        tail[0, :, cache.tail_end.max() :] = 0x7FC0
    poisoned, _ = cache.attend(cpu)
    np.testing.assert_array_equal(out, poisoned)


@pytest.mark.parametrize("case", range(len(UNIT_PAIRS)))
def test_attend_hides_what_a_window_has_left(case: int) -> None:
    cache = build(64, 3, (3, 0, 18), UNIT_PAIRS[case], seed=case, value=DTYPES[case % 3], raw=True, partial=37)
    places = np.array([[0, 1, 3], [2, 40, 103], [64, 70, 1100]]) + np.array([[0], [0], [case]])
    for hidden in (places, places[::-1] if case % 2 else np.full((3, 3), 10_000)):
        cache.hidden = np.ascontiguousarray(hidden)
        assert_attends(cache, threads=2)


def test_attend_never_reads_values_of_hidden_tokens() -> None:
    """Of a raw page too, where a value may be NaN."""
    cache = build(64, 2, (2,), tail=80, raw=True, sinks=4, coding=("fixed", "fixed"))
    cache.view.count[0] = 1  # the page with the raw block of V
    cache.hidden = np.array([[20, 31]])
    out, lse = cache.attend(cpu)
    page, heads = cache.view.pages[0, 0] - cache.owners[0].ctypes.data, cache.case.heads
    modes, offsets = directory_of(cache.owners[0], page, heads)
    assert modes[2 * heads - 1] == RAW
    block = cache.owners[0][page + offsets[2 * heads - 1] : page + offsets[2 * heads]].view(np.uint16)
    block.reshape(64, 64)[: 20 - 4] = 0x7FC0
    cache.view.sinks_k[0] = cache.view.sinks_v[0] = 0x7FC0
    for expected, found in zip((out, lse), cache.attend(cpu), strict=True):
        np.testing.assert_array_equal(expected, found)
    cache.hidden = np.array([[68 + 5, 68 + 9]])
    out, _ = cache.attend(cpu)
    first = int(cache.view.tail_begin[0])
    cache.view.tail_k[0, :, first : first + 5] = cache.view.tail_v[0, :, first : first + 5] = 0x7FC0
    np.testing.assert_array_equal(out, cache.attend(cpu)[0])
    assert_attends(cache)


def test_attend_passes_on_nan() -> None:
    cache = build(64, 2, (2,), tail=80)
    cache.view.tail_k[0, 0, 5, 3] = 0x7FC0
    out, _ = cache.attend(cpu)
    assert np.isnan(out[0, 0]).all()
    assert np.isfinite(out[0, 1]).all()


def test_attend_rows_are_independent() -> None:
    cache = build(64, 4, (19, 0, 2), partial=37)
    together, lse = cache.attend(cpu, 2)
    for row in range(3):
        shared = "units", "steps", "derived"
        fields = {name: x[row : row + 1] for name, x in vars(cache.view).items() if name not in shared}
        view = replace(cache.view, **fields)
        out, one_lse = cpu.attend(cache.q[row : row + 1], view, cache.tail_end, cache.scaling)
        np.testing.assert_array_equal(out[0], together[row])
        np.testing.assert_array_equal(one_lse[0], lse[row])


def test_attend_does_not_depend_on_threads() -> None:
    cache = build(64, 4, (70,), heads=3, partial=37)
    expected = cache.attend(cpu, 1)
    for threads in (2, 3, 5):
        for _ in range(3):
            for one, other in zip(expected, cache.attend(cpu, threads), strict=True):
                np.testing.assert_array_equal(one, other)


def test_attend_takes_strided_values() -> None:
    cache = build(64, 2, (1,), tail=64)
    expected, _ = cache.attend(cpu)
    strided = {}
    for name in ("sinks_k", "sinks_v", "tail_k", "tail_v"):
        values = getattr(cache.view, name)
        rows, heads, tokens, channels = values.shape
        room = np.full((rows, tokens + 5, heads, channels), 0x7FC0, np.uint16)
        strided[name] = room.transpose(0, 2, 1, 3)[:, :, :tokens]
        strided[name][...] = values
    out, _ = cpu.attend(cache.q, replace(cache.view, **strided), cache.tail_end, cache.scaling)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_quantise_equals_reference(unit: Unit, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    channels = (16, 64, 80, 128)[seed]
    scale: float | tuple[float, ...] = (0.05, 0.4, 0.02, 0.1)[seed]
    x = rng.laplace(size=(3, 256, channels)) * np.exp(rng.normal(size=(3, 1, channels))) * 10.0 ** rng.integers(-3, 3)
    x[:, :, 0] += 50
    x[0, 5], x[1, :64], x[:, 70], x[0, :, 5] = 0, 3.5 * (seed % 2), -0.0, 1.25
    if seed == 1:
        x *= 1e-25
    special = {0: np.nan, 2: np.inf, 3: 1e30}
    if seed in special:
        x[1, 200, 3] = special[seed]
    x = rounded(x, dtype)
    if seed == 0 and dtype == "bfloat16":
        x[1, 200, 3] = 0x7FC1
    if unit == "head":
        scale = (
            tuple(float(np.nanmax(np.abs(x[0]))) / 2 ** (2 * head + 5) for head in range(3))
            if dtype == "float32"
            else (0.5, 7.0, 512.0)
        )
    expected, got = (
        reference.quantise(x, unit, scale),
        cpu.quantise(x.transpose(1, 0, 2).copy().transpose(1, 0, 2), unit, scale),
    )
    for name in ("codes", "scale", "zero", "raw"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name, strict=True)


@pytest.mark.parametrize("channels", [16, 48, 64, 128, 256, 512])
@pytest.mark.parametrize("units", UNIT_PAIRS)
@pytest.mark.parametrize("classes", [1, 4])
def test_bytes_equal_reference(channels: int, units: tuple[Unit, Unit], classes: int) -> None:
    """Counts, pages with all modes and what they decompress to."""
    case = channels // 16 + classes + UNIT_PAIRS.index(units)
    rng = np.random.default_rng(case)
    dtype, coding = DTYPES[case % 3], CODINGS[case % 4]
    scales = ((0.05, 0.1), (0.02, 0.3), (0.013, 0.04))[case % 3]
    spec = Case(heads=3, units=units, scales=scales_for(units, scales)).spec
    tensors = spec.key, spec.value
    k, v = (values_like(rng, 3, 192, channels, dtype) for _ in "KV")
    kq, vq = (reference.quantise(x, t.unit, t.scale) for x, t in zip((k, v), tensors, strict=True))
    make_raw(kq, 1, 0)
    make_raw(vq, 2, 1)
    books: list[Books] = []
    for q, kind, tensor in zip((kq, vq), KINDS, tensors, strict=True):
        counts = reference.count_pairs(q, kind, classes)
        np.testing.assert_array_equal(cpu.count_pairs(q, kind, classes), counts, strict=True)
        few = counts.copy()
        middle = 128 if tensor.unit == "head" else 0
        few[:, middle + 10 :] = few[:, :, middle + 10 :] = 0  # so that some blocks need the default book
        if middle:
            default = codebook.train(counts, 12) if case % 4 else None
        else:
            default = codebook.default(tensor.scale, classes, 12)
        books.append((default, codebook.train(few if case % 2 else counts, 10 + case % 3)))
    expected, offsets = reference.encode_pages(k, v, kq, vq, coding, units, *books)
    got, got_offsets = cpu.encode_pages(k, v, kq, vq, coding, units, *books)
    np.testing.assert_array_equal(got_offsets, offsets, strict=True)
    np.testing.assert_array_equal(got, expected, strict=True)

    addresses = expected.ctypes.data + offsets[:-1]
    results = []
    for kernels in (reference, cpu):
        outs = [rounded(np.full(x.shape, np.nan), dtype) for x in (k, v)]
        kernels.decompress(addresses, units, *books, *outs, steps_of(spec))
        results.append(outs)
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


def test_decompress_into_strided_memory() -> None:
    cache = build(64, 1, (2,))
    addresses, books = cache.view.pages[0, :2], cache.view.books[0]
    plain = [np.zeros((2, 128, 64), np.uint16) for _ in "KV"]
    strided = [np.zeros((128, 2, 64), np.uint16).transpose(1, 0, 2), np.zeros((2, 128, 64, 2), np.uint16)[..., 1]]
    for outs in (plain, strided):
        cpu.decompress(addresses, cache.case.units, *books, *outs)
    for one, other in zip(plain, strided, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rejects_other_types() -> None:
    with pytest.raises(InvalidInput, match="64\\*pages"):
        cpu.quantise(np.zeros((1, 60, 64), np.float32), "block", 0.1)
    with pytest.raises(InvalidInput, match="float64"):
        cpu.quantise(np.zeros((1, 64, 64)), "block", 0.1)


@pytest.mark.parametrize("kernels", [cpu, reference])
@pytest.mark.parametrize(
    ("unit", "scale"), [("head", 0.1), ("head", (1.0,)), ("head", (1.0,) * 3), ("block", (1.0, 1.0))]
)
def test_a_scale_that_does_not_fit_the_unit_is_refused(kernels: Any, unit: Unit, scale: Any) -> None:
    with pytest.raises(InvalidInput, match="needs a"):
        kernels.quantise(np.zeros((2, 64, 64), np.float32), unit, scale)


def test_compiles_without_a_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcomp.kernels.cpu import bits as cpu_bits

    def njit(*, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(cpu_bits, "njit", njit)
    monkeypatch.setattr(cpu_bits, "_cacheable", True)
    with pytest.warns(UserWarning, match="no writable cache directory") as caught:
        assert [cpu_bits.compiled(abs)(-1), cpu_bits.compiled(abs)(-2)] == [1, 2]
    assert len(caught) == 1


def test_compiles_where_the_disk_of_the_cache_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcomp.kernels.cpu import bits as cpu_bits

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kernel = cpu_bits.compiled(lambda x: x + 1, entry=True)
    monkeypatch.setattr(kernel._cache._cache_file, "save", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert kernel(1) == 2


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_compiles_where_files_of_the_cache_are_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """As a machine leaves them that goes off."""
    from kvcomp.kernels.cpu import bits as cpu_bits

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    assert cpu_bits.compiled(_successor, entry=True)(1) == 2
    (file,) = tmp_path.rglob(f"*.{suffix}")
    whole = file.read_bytes()
    file.write_bytes(b"")
    assert cpu_bits.compiled(_successor, entry=True)(1) == 2
    assert len(file.read_bytes()) == len(whole)


def _successor(x: int) -> int:
    return x + 1


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("value", ["bfloat16", "float32"])
def test_a_query_of_nan_gives_nan_and_spoils_no_other(coding: tuple[Coding, Coding], value: str) -> None:
    cache = build(64, 3, (2,), coding=coding, value=value)
    expected, _ = cache.attend(cpu)
    cache.q[:, :, 1, 5] = np.nan
    out, _ = cache.attend(cpu)
    assert np.isnan(out[:, :, 1]).all()
    np.testing.assert_array_equal(out[:, :, ::2], expected[:, :, ::2])
