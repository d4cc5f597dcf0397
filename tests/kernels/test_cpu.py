"""The CPU kernels against the readable reference: the same codes and bytes, and attention within float32 rounding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvcomp import codebook
from kvcomp.errors import InvalidInput
from kvcomp.kernels import Books, reference
from kvcomp.quantise import Quantised
from kvcomp.spec import Coding, Unit

cpu = pytest.importorskip("kvcomp.kernels.cpu", exc_type=ImportError)

Array = npt.NDArray[Any]
DTYPES = ("uint16", "float32", "float16")  # uint16: the bits of bfloat16
UNIT_PAIRS: tuple[tuple[Unit, Unit], ...] = (
    ("block", "token"),
    ("channel", "vector"),
    ("token", "channel"),
    ("vector", "block"),
)
CODINGS: tuple[tuple[Coding, Coding], ...] = (("huffman", "huffman"), ("fixed", "huffman"), ("huffman", "fixed"))
# Attention in float32 sums against float64, relative to the largest output; scores of tens magnify their own rounding.
TOLERANCE = 2e-5


def as_dtype(x: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):
        if dtype != "uint16":
            return x.astype(dtype)
        bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def keys_like(rng: np.random.Generator, heads: int, tokens: int, channels: int, dtype: str) -> Array:
    """Values with a scale and some an offset for each channel."""
    spread = np.exp(rng.normal(size=(heads, 1, channels)) / 2)
    offset = np.where(rng.random((heads, 1, channels)) < 0.1, 4.0, 0.0)
    return as_dtype(rng.laplace(size=(heads, tokens, channels)) * spread + offset, dtype)


def make_raw(q: Quantised, page: int, head: int) -> None:
    """Mark a block as raw, as the quantiser does where a bound fails."""
    q.raw[page, head] = True
    q.codes[page, head] = 0


@dataclass
class Cache:
    """Arguments of ``attend`` for some rows; keeps the pages alive."""

    arguments: tuple[Any, ...]
    scaling: float
    softcap: float
    owners: list[Array] = field(default_factory=list)

    def attend(self, kernels: Any, threads: int = 1) -> tuple[Array, Array]:
        out: tuple[Array, Array] = kernels.attend(*self.arguments, self.scaling, self.softcap, threads)
        return out


def build(
    channels: int,
    group: int,
    pages: tuple[int, ...],
    units: tuple[Unit, Unit],
    *,
    seed: int = 0,
    heads: int = 2,
    classes: int = 1,
    coding: tuple[Coding, Coding] = ("huffman", "huffman"),
    dtype: str = "uint16",
    scales: tuple[float, float] = (0.05, 0.1),
    own: bool = True,
    raw: bool = False,
    partial: bool = False,
    sinks: int = 4,
    tail: int = 100,
    softcap: float = 0.0,
) -> Cache:
    rng = np.random.default_rng(seed)
    rows, capacity = len(pages), max(pages) + 1
    addresses, valid = np.zeros((rows, capacity), np.int64), np.zeros((rows, capacity), np.int32)
    books: list[tuple[Books, Books]] = []
    owners: list[Array] = []
    for row, count in enumerate(pages):
        k, v = (keys_like(rng, heads, 64 * count, channels, dtype) for _ in "KV")
        kq, vq = (reference.quantise(x, unit, scale) for x, unit, scale in zip((k, v), units, scales, strict=True))
        if raw and count > 1:
            make_raw(kq, 1, 0)
            make_raw(vq, 1, heads - 1)
        of_row: list[Books] = []
        for q, kind, scale in ((kq, "K", scales[0]), (vq, "V", scales[1])):
            trained = codebook.train(reference.count_pairs(q, kind, classes), 12) if own and count else None
            of_row.append((codebook.default(scale, classes, 12), trained))
        books.append((of_row[0], of_row[1]))
        buffer, offsets = reference.encode_pages(k, v, kq, vq, coding, units, *books[-1])
        owners.append(buffer)
        addresses[row, :count] = buffer.ctypes.data + offsets[:-1]
        valid[row, :count] = 64
        if partial and count:
            valid[row, count - 1] = 37
    sink_k, sink_v = (as_dtype(rng.normal(size=(rows, heads, sinks, channels)), dtype) for _ in "KV")
    tail_k, tail_v = (as_dtype(rng.normal(size=(rows, heads, tail, channels)), dtype) for _ in "KV")
    tail_end = np.sort(rng.integers(tail // 2, tail + 1, group))
    arguments = (
        rng.normal(size=(rows, heads, group, channels)).astype(np.float32),
        addresses,
        valid,
        np.array(pages),
        units,
        books,
        sink_k,
        sink_v,
        np.array([max(0, sinks - row) for row in range(rows)]),
        tail_k,
        tail_v,
        np.array([min(3 * row, tail // 2) for row in range(rows)]),
        tail_end,
    )
    return Cache(arguments, channels**-0.5, softcap, owners)


def assert_attends(cache: Cache, threads: int = 1) -> None:
    out, lse = cache.attend(cpu, threads)
    expected, expected_lse = cache.attend(reference)
    assert out.dtype == lse.dtype == np.float32
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE * max(1e-3, np.abs(expected).max()))
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=3e-5)


@pytest.mark.parametrize("channels", [16, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("case", range(4))
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
            coding=CODINGS[(case + channels // 16) % 3],
            dtype=DTYPES[(case + channels // 32) % 3],
            raw=True,
            partial=True,
        ),
        threads=2,
    )


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 33])
def test_attend_groups(group: int) -> None:
    assert_attends(build(64, group, (2,), ("block", "token"), seed=group))


@pytest.mark.parametrize("units", UNIT_PAIRS)
@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("coding", CODINGS)
def test_attend_units(units: tuple[Unit, Unit], classes: int, coding: tuple[Coding, Coding]) -> None:
    assert_attends(build(64, 4, (2, 3), units, classes=classes, coding=coding, raw=True))


@pytest.mark.parametrize("scales", [(0.3, 0.3), (0.05, 0.04), (0.03, 0.02), (0.012, 0.014)])
@pytest.mark.parametrize("coding", [("huffman", "huffman"), ("fixed", "fixed")])
@pytest.mark.parametrize("own", [True, False])
def test_attend_precision(scales: tuple[float, float], coding: tuple[Coding, Coding], own: bool) -> None:
    """All splits of a code, narrow and wide tables, every fixed width."""
    assert_attends(build(64, 3, (2,), ("channel", "block"), scales=scales, coding=coding, own=own, dtype="float32"))


@pytest.mark.parametrize(
    ("sinks", "tail", "pages"), [(0, 0, (2,)), (4, 0, (0,)), (0, 70, (0,)), (65, 1200, (18,)), (0, 64, (16, 17))]
)
def test_attend_parts(sinks: int, tail: int, pages: tuple[int, ...]) -> None:
    assert_attends(build(16, 2, pages, ("block", "token"), sinks=sinks, tail=tail, heads=1))


def test_attend_softcap() -> None:
    assert_attends(build(64, 4, (2,), ("block", "token"), raw=True, softcap=3.0))


def test_attend_sees_nothing() -> None:
    cache = build(16, 2, (0, 1), ("block", "token"), sinks=0, tail=0)
    out, lse = cache.attend(cpu)
    assert (out[0] == 0).all()
    assert np.isneginf(lse[0]).all()
    assert np.isfinite(lse[1]).all()


def test_attend_ignores_what_is_out_of_sight() -> None:
    cache = build(64, 2, (2,), ("block", "token"), tail=80)
    out, _ = cache.attend(cpu)
    for raw in (6, 7, 9, 10):  # sinks and tail, K and V
        cache.arguments[raw][0, :, cache.arguments[8][0] if raw < 8 else cache.arguments[12].max() :] = 0x7FC0  # NaN
    poisoned, _ = cache.attend(cpu)
    np.testing.assert_array_equal(out, poisoned)


def test_attend_passes_on_nan() -> None:
    cache = build(64, 2, (2,), ("block", "token"), tail=80)
    cache.arguments[9][0, 0, 5, 3] = 0x7FC0
    out, _ = cache.attend(cpu)
    assert np.isnan(out[0, 0]).all()
    assert np.isfinite(out[0, 1]).all()


def test_attend_rows_are_independent() -> None:
    cache = build(64, 4, (19, 0, 2), ("block", "token"), partial=True)
    together, lse = cache.attend(cpu, 2)
    for row in range(3):
        one = [x[row : row + 1] if isinstance(x, np.ndarray | list) else x for x in cache.arguments[:-1]]
        out, one_lse = cpu.attend(*one, cache.arguments[-1], cache.scaling, 0.0, 1)
        np.testing.assert_array_equal(out[0], together[row])
        np.testing.assert_array_equal(one_lse[0], lse[row])


def test_attend_does_not_depend_on_threads() -> None:
    cache = build(64, 4, (70,), ("block", "token"), heads=3, partial=True)
    expected = cache.attend(cpu, 1)
    for threads in (2, 3, 5):
        for _ in range(3):
            for one, other in zip(expected, cache.attend(cpu, threads), strict=True):
                np.testing.assert_array_equal(one, other)


def test_attend_takes_strided_values() -> None:
    cache = build(64, 2, (1,), ("block", "token"), tail=64)
    expected, _ = cache.attend(cpu)
    arguments = list(cache.arguments)
    for index in (6, 7, 9, 10):
        rows, heads, tokens, channels = arguments[index].shape
        room = np.full((rows, tokens + 5, heads, channels), 0x7FC0, np.uint16)
        arguments[index] = room.transpose(0, 2, 1, 3)[:, :, :tokens]
        arguments[index][...] = cache.arguments[index]
    out, _ = cpu.attend(*arguments, cache.scaling, 0.0, 1)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("unit", ["block", "channel", "vector", "token"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_quantise_equals_reference(unit: Unit, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    channels, scale = (16, 64, 80, 128)[seed], (0.05, 0.4, 0.02, 0.1)[seed]
    x = rng.laplace(size=(3, 256, channels)) * np.exp(rng.normal(size=(3, 1, channels))) * 10.0 ** rng.integers(-3, 3)
    x[:, :, 0] += 50
    x[0, 5], x[1, :64], x[:, 70], x[0, :, 5] = 0, 3.5 * (seed % 2), -0.0, 1.25
    if seed == 1:
        x *= 1e-25
    special = {0: np.nan, 2: np.inf, 3: 1e30}
    if seed in special:
        x[1, 200, 3] = special[seed]
    x = as_dtype(x, dtype)
    if seed == 0 and dtype == "uint16":
        x[1, 200, 3] = 0x7FC1
    expected, got = (
        reference.quantise(x, unit, scale),
        cpu.quantise(x.transpose(1, 0, 2).copy().transpose(1, 0, 2), unit, scale),
    )
    for name in ("codes", "scale", "zero", "raw"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name, strict=True)


@pytest.mark.parametrize("channels", [16, 48, 64, 128, 256])
@pytest.mark.parametrize("units", UNIT_PAIRS)
@pytest.mark.parametrize("classes", [1, 4])
def test_bytes_equal_reference(channels: int, units: tuple[Unit, Unit], classes: int) -> None:
    """Counts, pages with all modes and what they decompress to."""
    case = channels // 16 + classes + UNIT_PAIRS.index(units)
    rng = np.random.default_rng(case)
    dtype, coding = DTYPES[case % 3], CODINGS[case % 3]
    scales = ((0.05, 0.1), (0.02, 0.3), (0.013, 0.04))[case % 3]
    k, v = (keys_like(rng, 3, 192, channels, dtype) for _ in "KV")
    kq, vq = (reference.quantise(x, unit, scale) for x, unit, scale in zip((k, v), units, scales, strict=True))
    make_raw(kq, 1, 0)
    make_raw(vq, 2, 1)
    books = []
    for q, kind, scale in ((kq, "K", scales[0]), (vq, "V", scales[1])):
        counts = reference.count_pairs(q, kind, classes)
        np.testing.assert_array_equal(cpu.count_pairs(q, kind, classes), counts, strict=True)
        few = counts.copy()
        few[:, 10:] = few[:, :, 10:] = 0  # so that some blocks need the default book
        books.append((codebook.default(scale, classes, 12), codebook.train(few if case % 2 else counts, 10 + case % 3)))
    expected, offsets = reference.encode_pages(k, v, kq, vq, coding, units, *books)
    got, got_offsets = cpu.encode_pages(k, v, kq, vq, coding, units, *books)
    np.testing.assert_array_equal(got_offsets, offsets, strict=True)
    np.testing.assert_array_equal(got, expected, strict=True)

    addresses = expected.ctypes.data + offsets[:-1]
    results = []
    for kernels in (reference, cpu):
        outs = [as_dtype(np.full(x.shape, np.nan), dtype) for x in (k, v)]
        kernels.decompress(addresses, units, *books, *outs)
        results.append(outs)
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


def test_decompress_into_strided_memory() -> None:
    cache = build(64, 1, (2,), ("block", "token"))
    addresses, books = cache.arguments[1][0, :2], cache.arguments[5][0]
    plain = [np.zeros((2, 128, 64), np.uint16) for _ in "KV"]
    strided = [np.zeros((128, 2, 64), np.uint16).transpose(1, 0, 2), np.zeros((2, 128, 64, 2), np.uint16)[..., 1]]
    for outs in (plain, strided):
        cpu.decompress(addresses, ("block", "token"), *books, *outs)
    for one, other in zip(plain, strided, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rejects_other_types() -> None:
    with pytest.raises(InvalidInput, match="64\\*pages"):
        cpu.quantise(np.zeros((1, 60, 64), np.float32), "block", 0.1)
    with pytest.raises(InvalidInput, match="float64"):
        cpu.quantise(np.zeros((1, 64, 64)), "block", 0.1)


def test_compiles_without_a_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcomp.kernels import cpu_bits

    def njit(*, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(cpu_bits, "njit", njit)
    monkeypatch.setattr(cpu_bits, "_cacheable", True)
    with pytest.warns(UserWarning, match="no writable cache directory") as caught:
        assert [cpu_bits.compiled(abs)(-1), cpu_bits.compiled(abs)(-2)] == [1, 2]
    assert len(caught) == 1
