"""The two codebooks of a layer's K or V: a narrow one for its quiet blocks and a wide one for the others.

A block takes the narrow book if that has all of its codes (docs/format.md, section 2). How much the narrow one leaves
out is chosen by the bits of both together: next to nothing or, if the heads differ, one of them. Low bits are avoided
where that costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvcomp.calibration import CLASSES, Calibration
from kvcomp.codec import codebook
from kvcomp.codec.codebook import Codebook
from kvcomp.codec.quantise import HEAD_ZERO, MAX_CODES
from kvcomp.kernels import Books, load_backend
from kvcomp.spec import PAGE_TOKENS
from kvcomp.store import Memory, sealed

LIMIT = 12
# Shares of blocks that may have a code beyond one side of a class of the narrow book.
OUTSIDE = (0.002, 0.01, 0.03, 0.1, 0.2, 0.4, 0.55)
WIDER, WIDEST_LEAST = 2.0, 8  # the wide book: this many times the range seen, at least this far from zero
PLAIN = 15  # codes this far from zero need no low bits (``codebook.split_for``), which take longer to decode:
PLAIN_WIDER = 1.5  # the wide book ends there if that is still this many times the range seen,
LOW_BITS = 0.25  # and to do without is worth so many bits for each pair

ZERO = -HEAD_ZERO
Codes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]


def fit_books(codes: Codes, kind: int) -> Books:
    """The wide and the narrow book for blocks of codes of the unit ``head``.

    codes: uint8 (blocks, 64, classes, channels of a class). kind: K (0) or V (1).
    """
    if not len(codes):
        codes = np.full((1, *codes.shape[1:]), ZERO, np.uint8)
    pairs = _pairs(codes, kind)
    every = _counts(pairs)
    least, most = codes.min((1, 3)).astype(np.int64), codes.max((1, 3)).astype(np.int64)
    widest = _reach(least, most)
    best, lowest = None, np.inf
    ranges: dict[tuple[int, ...], tuple[Counts, Counts]] = {}  # many shares have the same
    for share in OUTSIDE:
        low = np.quantile(least, share, axis=0, method="lower")
        high = np.quantile(most, 1 - share, axis=0, method="higher")
        for first, last in ((low, high), _plain(low, high)):
            ranges.setdefault((*first.tolist(), *last.tolist()), (first, last))
    for first, last in ranges.values():
        inside = ((least >= first) & (most <= last)).all(1)
        quiet = _counts(pairs[:, inside]) if inside.mean() < 0.5 else every - _counts(pairs[:, ~inside])
        others = every - quiet
        books = _train(others, *widest), _train(quiet, first, last)
        cost = _cost(books[0], others) + _cost(books[1], quiet)
        if cost < lowest:
            best, lowest = books, cost
    assert best is not None
    return best


def books_of(x: Tensor, steps: Sequence[float], shifts: Tensor, kind: int) -> Books:
    """The books of a layer's coordinates of K (0) or V (1), (windows, KV heads, tokens, D), at the steps of its heads.

    shifts: of the coordinates, (KV heads, D).
    """
    heads = np.ascontiguousarray((x / shifts.exp2()[:, None]).transpose(0, 1).flatten(1, 2).numpy())
    coded = load_backend("cpu").quantise(heads, "head", tuple(steps))
    return fit_books(coded.codes[~coded.raw].reshape(-1, PAGE_TOKENS, CLASSES, x.shape[-1] // CLASSES), kind)


def page_bits(made: Calibration, level: str, index: int, kv: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Bits a value of a layer's pages at a level, with everything that is in them.

    kv: K and V of the layer, (1, KV heads, tokens, D) each.
    """
    spec, memory = made.spec(level), Memory()
    calibrated = made.layer(index, spec)
    for k, v in kv:
        memory += sealed(spec.bare().layer(index, made.about.layers), k, v, calibrated=calibrated).memory()
    return memory.coded_bits


def _reach(least: Counts, most: Counts) -> tuple[Counts, Counts]:
    """First and last code of each class of the wide book."""
    seen = np.maximum(ZERO - least.min(0), most.max(0) - ZERO)
    reach = np.maximum(WIDEST_LEAST, WIDER * seen)
    reach = np.where((reach > PLAIN) & (PLAIN_WIDER * seen <= PLAIN), PLAIN, reach).astype(np.int64)
    return np.maximum(0, ZERO - reach), np.minimum(MAX_CODES - 1, ZERO + reach)


def _plain(first: Counts, last: Counts) -> tuple[Counts, Counts]:
    """The same range without the codes that would need a class of not too many levels to have low bits."""
    few = last - first < 4 * PLAIN
    return np.where(few, np.maximum(first, ZERO - PLAIN), first), np.where(few, np.minimum(last, ZERO + PLAIN), last)


def _train(counts: Counts, first: Counts, last: Counts) -> Codebook:
    """A book whose classes have the codes from first to last, (classes,)."""
    counts = counts.copy()
    classes = np.arange(len(counts))
    counts[classes, first, first] += 1
    counts[classes, last, last] += 1
    return codebook.train(counts, LIMIT)


def _pairs(codes: Codes, kind: int) -> npt.NDArray[np.intp]:
    """Pairs 256 a + b, (classes, blocks, pairs): of K along channels, of V along tokens."""
    a, b = (codes[:, ::2], codes[:, 1::2]) if kind else (codes[..., ::2], codes[..., 1::2])
    joined = (a.astype(np.intp) * MAX_CODES + b).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(joined).reshape(codes.shape[2], len(codes), -1)


def _counts(pairs: npt.NDArray[np.intp]) -> Counts:
    """How often each pair occurs in each class, (classes, 256, 256)."""
    found = [np.bincount(of_class.ravel(), minlength=MAX_CODES**2) for of_class in pairs]
    return np.stack(found).astype(np.int64).reshape(-1, MAX_CODES, MAX_CODES)


def _cost(book: Codebook, counts: Counts) -> float:
    """Bits of pairs that occur so often, (classes, 256, 256), and what it costs to decode them. The book has them."""
    total = 0.0
    for index, of_class in enumerate(counts):
        k, m, first = book.split[index], book.symbols(index), book.first[index]
        pairs = np.flatnonzero(of_class)
        a, b = np.divmod(pairs, MAX_CODES)
        symbols, times = ((a - first) >> k) * m + ((b - first) >> k), of_class.ravel()[pairs]
        total += int(book.lengths_of(index)[symbols].astype(np.int64) @ times)
        total += (2 * k + (LOW_BITS if k else 0.0)) * int(times.sum())
    return total
