"""Codebooks as the decoding kernels want them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcomp.codec.codebook import Codebook
from kvcomp.errors import InvalidInput
from kvcomp.kernels import Books
from kvcomp.kernels.cpu.decode import COLUMNS, EMPTY, MOST_CLASSES, NARROW, WIDE

FAST_MEAN = {NARROW: 4.8, WIDE: 10.5}  # bits of a pair up to which twice as many pairs fit a window often enough
NO_COLUMNS = np.zeros(COLUMNS, np.int64)
NOWHERE = NO_COLUMNS.ctypes.data


def describe_books(books: Sequence[Books], value_channels: int) -> list[npt.NDArray[np.int64]]:
    """Describe the books of K and of V, in turn, as ``decode`` wants them: (columns,) each, kept with its book."""
    return [NO_COLUMNS if book is None else book.derived[key] for book, key in _described(books, value_channels)]


def book_addresses(books: Sequence[Books], value_channels: int) -> npt.NDArray[np.int64]:
    """Addresses of these descriptions, (2 * len(books),); they last as long as the books."""
    described = _described(books, value_channels)
    return np.array([NOWHERE if book is None else book.derived[key, "address"] for book, key in described], np.int64)


def _described(books: Sequence[Books], value_channels: int) -> list[tuple[Codebook | None, Any]]:
    """Each book and what its description is kept under, made once: it takes longer than the attention over some pages.

    Threads share books, and kernels read descriptions by address: the first one that is kept stays.
    """
    found = []
    for kind, of_kind in enumerate(books):
        key = "cpu", kind % 2 == 0 or value_channels % 64 == 0
        for book in of_kind:
            if book is not None and (key, "address") not in book.derived:
                kept = book.derived.setdefault(key, np.array(_describe(book, key[1]), np.int64))
                book.derived.setdefault((key, "address"), kept.ctypes.data)
            found.append((book, key))
    return found


def _describe(book: Codebook, mixed: bool) -> tuple[int, ...]:
    """A codebook as the columns of ``decode``; the caller keeps the book alive.

    mixed: whether classes may differ in the form of their pairs: not those of V whose channels are no whole vectors.
    """
    if not book.lengths.flags.c_contiguous:
        raise InvalidInput("a codebook's lengths must be contiguous")
    lengths_of = [book.lengths_of(index) for index in range(book.classes)]
    forms = [WIDE if split else NARROW if of.any() else EMPTY for split, of in zip(book.split, lengths_of, strict=True)]
    if not mixed:
        forms = [WIDE if any(book.split) else NARROW] * book.classes
    columns: list[int] = []
    for index, (lengths, form) in enumerate(zip(lengths_of, forms, strict=True)):
        columns += (
            lengths.__array_interface__["data"][0],
            book.first[index],
            book.levels[index],
            book.split[index],
            book.symbols(index),
            int(lengths.max()),
            form,
            _mean_bits(lengths) + 2 * book.split[index] < FAST_MEAN.get(form, 0),
        )
    return book.classes, *columns * (MOST_CLASSES // book.classes)


def _mean_bits(lengths: npt.NDArray[np.uint8]) -> float:
    """Bits of a code word of these lengths where each occurs as often as it is made for."""
    bits = lengths.astype(np.float64)
    return float(bits @ np.exp2(-bits))
