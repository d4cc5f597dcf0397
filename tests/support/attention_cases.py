"""Caches that kernels attend to, on the CPU (tests/kernels) and of the CUDA sources on the emulator (tests/emulator):
pages from the readable reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from kvcomp.codec import codebook
from kvcomp.codec.dtypes import DEFAULT_BOOK, DTYPES, OWN_BOOK, PATCHED
from kvcomp.codec.page import directory_of
from kvcomp.codec.patched import head_bytes
from kvcomp.codec.quantise import Quantised, round_to, to_float32
from kvcomp.kernels import Books, CacheView, Steps, reference
from kvcomp.spec import KINDS, PAGE_TOKENS, CodecSpec, Coding, TensorSpec, Unit

Array = npt.NDArray[Any]
NUMPY = {name: dtype.array for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Case:
    """What a cache is like. pages: of each row. queries: of a KV head, of the last ``new`` tokens; where that is 0 each
    sees a random part of the tail. value: dtype of the cache.

    own: whether rows have their own books, trained on the first page only, so that some blocks need the default. wide:
    whether the unit ``head`` has a default too, trained on all pages. raw: one raw block of K and one of V in each row.
    partial: tokens that count of each row's last page.
    """

    channels: int = 128
    queries: int = 4
    new: int = 1
    pages: tuple[int, ...] = (3, 0, 1)
    heads: int = 2
    units: tuple[Unit, Unit] = ("block", "token")
    coding: tuple[Coding, Coding] = ("huffman", "huffman")
    classes: tuple[int, int] = (1, 1)
    limit: int = 12
    value: str = "bfloat16"
    scales: tuple[float, float] = (0.05, 0.1)
    own: bool = True
    wide: bool = False
    raw: bool = False
    partial: int = PAGE_TOKENS
    sinks: int = 4
    tail: int = 70
    softcap: float = 0.0
    seed: int = 0
    value_channels: int | None = None
    """Those of K if None."""

    @property
    def both_channels(self) -> tuple[int, int]:
        return self.channels, self.channels if self.value_channels is None else self.value_channels

    @property
    def spec(self) -> CodecSpec:
        def tensor(unit: Unit, coding: Coding, classes: int, scale: float) -> TensorSpec:
            if unit == "head":
                return TensorSpec(unit, None, coding, self.limit, classes, steps=(self.steps(scale),))
            return TensorSpec(unit, scale, coding, self.limit, classes)

        key, value = (tensor(*of) for of in zip(self.units, self.coding, self.classes, self.scales, strict=True))
        return CodecSpec(key, value, sinks=self.sinks)

    def steps(self, scale: float) -> tuple[float, ...]:
        """The heads' steps of the unit ``head``."""
        return tuple(scale * (1 + head / 2) * 4 for head in range(self.heads))


@dataclass
class Cache:
    """A built case, as the arguments of ``attend``. owners: for each row the buffer of its pages, addressed by the
    view. tail_end: for each query the tail tokens it sees.
    """

    case: Case
    q: Array
    view: CacheView
    tail_end: Array
    scaling: float
    owners: list[Array]
    hidden: Array | None = None
    """For each row and query how many of its row's first tokens it does not see."""

    def attend(self, kernels: Any = reference, threads: int = 1) -> tuple[Array, Array]:
        """The outputs, by the reference what they must be, and the natural log of the softmax denominators."""
        out: tuple[Array, Array] = kernels.attend(
            self.q, self.view, self.tail_end, self.scaling, self.case.softcap, threads, hidden=self.hidden
        )
        return out

    def expected(self) -> Expected:
        """What float64 gives."""
        return oracle(self.q, self.view, self.tail_end, self.scaling, self.case.softcap)


def values_like(rng: np.random.Generator, heads: int, tokens: int, channels: int, value: str) -> Array:
    """Values with a scale and some an offset for each channel."""
    spread = np.exp(rng.normal(size=(heads, 1, channels)) / 2)
    offset = np.where(rng.random((heads, 1, channels)) < 0.1, 4.0, 0.0)
    x = rng.laplace(size=(heads, tokens, channels)) * spread + offset
    return round_to(x.astype(np.float32), NUMPY[value])


def make_raw(q: Quantised, page: int, head: int) -> None:
    """Mark a block as raw, as the quantiser does where a bound fails."""
    q.raw[page, head] = True
    q.codes[page, head] = 0


def build(case: Case) -> Cache:
    rng = np.random.default_rng(case.seed)
    spec = case.spec
    rows, capacity = len(case.pages), max(case.pages) + 1
    addresses, valid = np.zeros((rows, capacity), np.int64), np.zeros((rows, capacity), np.int32)
    books: list[tuple[Books, Books]] = []
    owners: list[Array] = []
    for row, count in enumerate(case.pages):
        k, v = (values_like(rng, case.heads, PAGE_TOKENS * count, width, case.value) for width in case.both_channels)
        tensors = spec.key, spec.value
        kq, vq = (reference.quantise(x, t.unit, t.scale) for x, t in zip((k, v), tensors, strict=True))
        of_row: list[Books] = []
        for q, kind, tensor in zip((kq, vq), KINDS, tensors, strict=True):
            first = Quantised(q.codes[:1], q.scale[:1], q.zero[:1], q.raw[:1])
            trains = case.own and count and tensor.coding == "huffman"
            own = codebook.train(reference.count_pairs(first, kind, tensor.classes), tensor.limit) if trains else None
            default: codebook.Codebook | None = None
            if tensor.unit != "head":
                default = codebook.default(tensor.scale, tensor.classes, tensor.limit)
            elif trains and case.wide:
                default = codebook.train(reference.count_pairs(q, kind, tensor.classes), tensor.limit)
            of_row.append((default, own))
        if case.raw and count:
            make_raw(kq, count - 1, 0)
            make_raw(vq, 0, case.heads - 1)
        books.append((of_row[0], of_row[1]))
        buffer, offsets = reference.encode_pages(k, v, kq, vq, case.coding, case.units, *books[-1])
        owners.append(buffer)
        addresses[row, :count] = buffer.ctypes.data + offsets[:-1]
        valid[row, :count] = PAGE_TOKENS
        if count:
            valid[row, count - 1] = case.partial
    sinks_k, sinks_v, tail_k, tail_v = (
        values_like(rng, rows * case.heads, tokens, width, case.value).reshape(rows, case.heads, tokens, width)
        for tokens in (case.sinks, case.tail)
        for width in case.both_channels
    )
    if case.new:
        tail_end = np.tile(np.arange(case.tail - case.new + 1, case.tail + 1), case.queries // case.new)
    else:
        tail_end = np.sort(rng.integers(case.tail // 2, case.tail + 1, case.queries))
    view = CacheView(
        pages=addresses,
        valid=valid,
        count=np.array(case.pages),
        units=case.units,
        books=books,
        sinks_k=sinks_k,
        sinks_v=sinks_v,
        sink_count=np.array([max(0, case.sinks - row) for row in range(rows)]),
        tail_k=tail_k,
        tail_v=tail_v,
        tail_begin=np.array([min(3 * row, case.tail // 2) for row in range(rows)]),
        steps=steps_of(spec),
    )
    q = rng.normal(size=(rows, case.heads, case.queries, case.channels)).astype(np.float32)
    return Cache(case, q, view, tail_end, case.channels**-0.5, owners)


def steps_of(spec: CodecSpec) -> Steps:
    """As ``CacheView`` and ``decompress`` take them."""
    key, value = (tensor.scale if isinstance(tensor.scale, tuple) else None for tensor in (spec.key, spec.value))
    return key, value


def scramble(cache: Cache, rng: np.random.Generator) -> None:
    """Random bits in the first row's pages wherever a reader of foreign bytes does not look (docs/format.md, section
    5): scales, streams, fixed codes, words of pieces and exceptions; directories, lengths and heads of pieces stay."""
    case, buffer = cache.case, cache.owners[0]
    for page in cache.view.pages[0, : case.pages[0]] - buffer.ctypes.data:
        modes, offsets = directory_of(buffer, page, case.heads)
        for index, mode in enumerate(modes[:-1].tolist()):
            begin, end, kind = page + offsets[index], page + offsets[index + 1], index // case.heads
            bytes_of = {"block": 8, "channel": 4 * case.channels, "vector": 4 * PAGE_TOKENS}
            codes = begin + bytes_of.get(case.units[kind], 0)
            lengths = 4 + 8 * (int(buffer[codes]) & 15) if mode in (DEFAULT_BOOK, OWN_BOOK) else 0
            after = codes + (head_bytes(case.channels) if mode == PATCHED else lengths)
            for first, last in ((begin, codes), (after, end)):
                buffer[first:last] = rng.integers(0, 256, last - first, np.uint8)


@dataclass(frozen=True)
class Expected:
    """What float64 gives: the outputs, the natural log of the softmax denominators, and the sums of w |v|, which the
    rounding of an output is relative to: an output itself may be nearly 0 where a long context averages.
    """

    out: Array
    lse: Array
    sums: Array

    def error_of(self, out: Array) -> float:
        """Largest difference over the largest sum of w |v|."""
        difference = np.abs(out.astype(np.float64) - self.out)
        return float(difference.max() / self.sums.max()) if np.isfinite(out).all() else float("inf")


def oracle(q: Array, view: CacheView, tail_end: Array, scaling: float, softcap: float) -> Expected:
    """``Expected`` of a view; every page is decoded once."""
    pages: dict[tuple[bytes, int], tuple[Array, Array]] = {}
    decode = reference.decode_page

    def decode_once(page: bytes, layout: Any, books: Any, *rest: Any) -> tuple[Array, Array]:
        key = page, id(books)
        if key not in pages:
            pages[key] = decode(page, layout, books, *rest)
        return pages[key]

    def positive(*of: Any) -> tuple[Array, Array]:
        k, v = decode_once(*of)
        return k, np.abs(v)

    with patch.object(reference, "decode_page", decode_once):
        out, lse = reference.attend(q, view, tail_end, scaling, softcap)
    sinks_v, tail_v = (round_to(np.abs(to_float32(x)), x.dtype) for x in (view.sinks_v, view.tail_v))
    with patch.object(reference, "decode_page", positive):
        sums, _ = reference.attend(q, replace(view, sinks_v=sinks_v, tail_v=tail_v), tail_end, scaling, softcap)
    return Expected(out, lse, sums)


def relative_error(x: Array, expected: Array) -> float:
    """Largest difference over the largest expected value; NaN and infinities must be where they are expected."""
    if not np.array_equal(np.isfinite(x), np.isfinite(expected)):
        return float("inf")
    finite = np.isfinite(expected)
    difference = np.abs(x[finite].astype(np.float64) - expected[finite])
    return float(difference.max(initial=0) / max(1e-3, float(np.abs(expected[finite]).max(initial=0))))
