"""Codebooks: pair counts -> length-limited canonical Huffman lengths -> code words and decode tables.

Only the lengths are a codebook (docs/format.md, section 6); words and tables are derived from them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcomp.codec.quantise import MAX_CODES, MAX_LEVELS
from kvcomp.errors import CorruptData, InvalidInput

MAX_LIMIT = 12
SYMBOLS_A_SIDE = 32  # at most: a side's high bits fit five bits of a table's entry
SYMBOLS_A_SIDE_BELOW = 24  # what training takes for a limit below the largest, which 1,024 pairs would fill
MAX_SPLIT = 3
TRAINING_TOKENS = 256  # sealed tokens from which a sequence trains its own book

HEAD = struct.Struct("<2B")  # classes, limit
OF_CLASS = struct.Struct("<3B")  # first, levels - 1, split

Lengths = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Codebook:
    """Code lengths for pairs of codes, for each class of channels.

    Raises
    ------
    CorruptData
        If the lengths of a class are no complete prefix code: Kraft sum 1, or a single symbol of length 0.
    """

    first: tuple[int, ...]
    """The least code of each class."""
    levels: tuple[int, ...]
    """How many codes each class has. Rounded up to a multiple of 2^k they end at 256 at most."""
    split: tuple[int, ...]
    """k of each class: low bits of ``code - first`` that are stored as they are, 0 to 3."""
    limit: int
    """Longest code length in bits, at most 12."""
    lengths: Lengths
    """uint8, class after class. A class has m * m of them, m = ceil(levels / 2^k), at most 32.
    Entry ``hi_a * m + hi_b`` is that of a pair.
    A single symbol has length 0 and takes no bits; all others have at least 1."""
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What kernels make of the book once, each under a key of its own; it lives as long as the book."""

    def __post_init__(self) -> None:
        if len(self.levels) not in (1, 4) or not len(self.first) == len(self.levels) == len(self.split):
            raise CorruptData(f"codebook with {len(self.levels)} classes: 1 or 4 are possible")
        if not 1 <= self.limit <= MAX_LIMIT:
            raise CorruptData(f"codebook of {self.limit} bits: 1 to {MAX_LIMIT} are possible")
        for first, levels, split in zip(self.first, self.levels, self.split, strict=True):
            if not (0 <= split <= MAX_SPLIT and first >= 0 and levels >= 1 and _end(first, levels, split) <= MAX_CODES):
                raise CorruptData(f"codebook with first code {first}, levels {levels}, split {split} is out of range")
            if _symbols(levels, split) > SYMBOLS_A_SIDE:
                raise CorruptData(
                    f"codebook with {_symbols(levels, split)} symbols a side: {SYMBOLS_A_SIDE} are possible"
                )
        size = sum(self.symbols(index) ** 2 for index in range(self.classes))
        if self.lengths.dtype != np.uint8 or self.lengths.shape != (size,):
            raise CorruptData(f"codebook needs {size} lengths in uint8, not {self.lengths.shape}")
        for index in range(self.classes):
            lengths = self.lengths_of(index).astype(np.int64)
            if lengths.tolist() == [0]:
                continue
            kraft = int(np.sum(1 << (self.limit - np.minimum(lengths, self.limit))))
            if lengths.min() < 1 or lengths.max() > self.limit or kraft != 1 << self.limit:
                raise CorruptData("codebook lengths are no complete prefix code")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Codebook)
            and (self.first, self.levels, self.split, self.limit)
            == (other.first, other.levels, other.split, other.limit)
            and np.array_equal(self.lengths, other.lengths)
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has lengths of its own at another address, so it begins with nothing derived."""
        return Codebook, (self.first, self.levels, self.split, self.limit, self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the lengths, and of what kernels made of them."""
        return self.lengths.nbytes + sum(x.nbytes for x in list(self.derived.values()) if isinstance(x, np.ndarray))

    @property
    def classes(self) -> int:
        return len(self.levels)

    def symbols(self, of_class: int) -> int:
        """Symbols of one side of a pair in a class, m."""
        return _symbols(self.levels[of_class], self.split[of_class])

    def lengths_of(self, of_class: int) -> Lengths:
        """The lengths of a class, (symbols * symbols,)."""
        begin = sum(self.symbols(index) ** 2 for index in range(of_class))
        return self.lengths[begin : begin + self.symbols(of_class) ** 2]

    def words(self, of_class: int) -> npt.NDArray[np.uint32]:
        """Code word of every symbol of a class, (symbols * symbols,), bits reversed so that they go LSB first."""
        return _canonical_words(self.lengths_of(of_class))

    def to_bytes(self) -> bytes:
        """The book as files hold it (docs/format.md, section 6); ``read`` gives it back."""
        classes = zip(self.first, self.levels, self.split, strict=True)
        heads = b"".join(OF_CLASS.pack(first, levels - 1, split) for first, levels, split in classes)
        return HEAD.pack(self.classes, self.limit) + heads + self.lengths.tobytes()


def read(data: bytes, at: int = 0) -> tuple[Codebook, int]:
    """Read the book that begins at a place, and say where it ends. Raises CorruptData."""
    if len(data) - at < HEAD.size:
        raise CorruptData("a codebook is cut off")
    classes, limit = HEAD.unpack_from(data, at)
    at += HEAD.size
    if len(data) - at < classes * OF_CLASS.size:
        raise CorruptData("a codebook is cut off")
    of_class = [OF_CLASS.unpack_from(data, at + index * OF_CLASS.size) for index in range(classes)]
    at += classes * OF_CLASS.size
    size = sum(_symbols(levels + 1, min(split, MAX_SPLIT)) ** 2 for _, levels, split in of_class)
    if len(data) - at < size:
        raise CorruptData("a codebook is cut off")
    first, levels, split = (tuple(column) for column in zip(*of_class, strict=True)) if of_class else ((), (), ())
    lengths = np.frombuffer(data, np.uint8, size, at).copy()
    return Codebook(first, tuple(n + 1 for n in levels), split, limit, lengths), at + size


def train(counts: npt.NDArray[Any], limit: int) -> Codebook:
    """Train the best codebook for pair counts.

    Each class has every pair of codes from the least to the largest seen in it.

    Parameters
    ----------
    counts
        Integers (classes, n, n), ``counts[class, a, b]``, n at most 256.
    limit
        Longest code in bits.
    """
    firsts, levels, splits, lengths = zip(*(_train_class(of_class, limit) for of_class in counts), strict=True)
    return Codebook(firsts, levels, splits, limit, np.concatenate(lengths))


def _train_class(counts: npt.NDArray[Any], limit: int) -> tuple[int, int, int, Lengths]:
    """First code, levels, split and lengths of a class."""
    seen = np.flatnonzero(counts.any(axis=0) | counts.any(axis=1))
    least, most = (int(seen[0]), int(seen[-1]) + 1) if seen.size else (0, 1)
    k = split_for(most - least, limit)
    m = _symbols(most - least, k)
    first = min(least, MAX_CODES - (m << k))  # so that no symbol stands for a code that is no byte
    some = counts[first : first + (m << k), first : first + (m << k)]
    padded = np.zeros((m << k, m << k), np.int64)
    padded[: some.shape[0], : some.shape[1]] = some
    pairs = padded.reshape(m, 1 << k, m, 1 << k).sum(axis=(1, 3)).ravel()
    return first, most - first, k, code_lengths(16 * pairs + 1, limit)


@lru_cache(maxsize=256)
def default(relative_scale: float, classes: int, limit: int) -> Codebook:
    """The book for blocks that the sequence's own book does not cover, or that come before it. It is shared."""
    levels = min(MAX_LEVELS, int(min(MAX_LEVELS, 2 / relative_scale)) + 3)
    k = split_for(levels, limit)
    m = _symbols(levels, k)
    centre = min(m, -(-(int(min(MAX_LEVELS, 1 / relative_scale)) + 2) // (1 << k)))
    weight = [((h + 1) * (centre - h)) ** 4 if h < centre else 0 for h in range(m)]
    top = max(weight) ** 2
    pairs = np.array([(a * b << 20) // top for a in weight for b in weight], np.int64)
    lengths = np.tile(code_lengths(16 * pairs + 1, limit), classes)
    return Codebook((0,) * classes, (levels,) * classes, (k,) * classes, limit, lengths)


def _end(first: int, levels: int, split: int) -> int:
    """The code after the last one that a symbol can stand for."""
    return first + (_symbols(levels, split) << split)


def split_for(levels: int, limit: int) -> int:
    """Low bits k to take off each code so that a side has few symbols: 32 with codes of 12 bits, else 24."""
    most = SYMBOLS_A_SIDE if limit == MAX_LIMIT else SYMBOLS_A_SIDE_BELOW
    return next((k for k in range(MAX_SPLIT) if _symbols(levels, k) <= most), MAX_SPLIT)


def _symbols(levels: int, split: int) -> int:
    return -(-levels // (1 << split))


def code_lengths(weights: npt.NDArray[np.int64], limit: int) -> Lengths:
    """Find optimal code lengths of at most ``limit`` bits by package-merge (Larmore & Hirschberg, 1990).

    Weights are positive. Raises InvalidInput if there are more than 2^limit.
    """
    n = weights.size
    if n > 1 << limit:
        raise InvalidInput(f"{n} symbols need codes longer than {limit} bits")
    if n == 1:
        return np.zeros(1, np.uint8)
    order = np.argsort(weights, kind="stable")
    leaves = weights[order]
    merged, is_leaf = leaves, [np.ones(n, bool)]
    for _ in range(limit - 1):
        packages = merged[: merged.size // 2 * 2].reshape(-1, 2).sum(axis=1)
        both = np.concatenate([leaves, packages])
        rank = np.argsort(both, kind="stable")  # a leaf goes before a package of equal weight
        merged = both[rank]
        is_leaf.append(rank < n)
    depth = np.zeros(n, np.int64)
    take = 2 * n - 2
    for level in reversed(is_leaf):
        leaf_count = int(np.count_nonzero(level[:take]))
        depth[:leaf_count] += 1
        take = 2 * (take - leaf_count)
    lengths = np.empty(n, np.uint8)
    lengths[order] = depth
    return lengths


def decode_table(book: Codebook, of_class: int) -> npt.NDArray[np.uint32]:
    """Decode table of a class: ``bits | a << 16 | b << 24``, indexed by as many bits as the longest pair has."""
    k, lengths, words = book.split[of_class], book.lengths_of(of_class), book.words(of_class)
    table = np.zeros(1 << (int(lengths.max()) + 2 * k), np.uint32)
    first, symbols = book.first[of_class], book.symbols(of_class)
    for symbol in range(lengths.size):
        hi_a, hi_b = divmod(symbol, symbols)
        bits, word = int(lengths[symbol]), int(words[symbol])
        for lo in range(1 << (2 * k)):
            a, b = (hi_a << k) + (lo & ((1 << k) - 1)) + first, (hi_b << k) + (lo >> k) + first
            table[word | lo << bits :: 1 << (bits + 2 * k)] = bits + 2 * k | a << 16 | b << 24
    return table


def _canonical_words(lengths: Lengths) -> npt.NDArray[np.uint32]:
    """Canonical code words in the order (length, symbol), reversed."""
    words = np.zeros(lengths.size, np.uint32)
    code = previous = 0
    for symbol in np.argsort(lengths, kind="stable"):
        length = int(lengths[symbol])
        if length:
            code <<= length - previous
            words[symbol] = int(f"{code:0{length}b}"[::-1], 2)
            code, previous = code + 1, length
    return words
