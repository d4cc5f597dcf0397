"""Codebooks: pair counts -> length-limited canonical Huffman lengths -> code words and decode table.

Only the lengths are a codebook (docs/format.md, section 6); words and tables are derived from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcomp.errors import CorruptData, InvalidInput
from kvcomp.quantise import MAX_LEVELS

MAX_SYMBOLS_A_SIDE = 24  # the pair alphabet stays below 576 symbols where the split codes allow
MAX_LIMIT = 12
MAX_PAIR_BITS = 15  # L + 2k: so that the length of a stream fits a byte
TRAINING_TOKENS = 256  # sealed tokens from which a sequence trains its own book


@dataclass(frozen=True)
class Codebook:
    """Code lengths for pairs of codes.

    levels: number of codes, 1 to 128.
    split: k, low bits of each code that are stored as they are, 0 to 2.
    limit: L, longest code length in bits.
    lengths: uint8 (classes, symbols * symbols), symbols = ceil(levels / 2^k); entry ``hi_a * symbols + hi_b``; 0 means no code.

    Raises CorruptData if the lengths are no complete prefix code (Kraft sum 1, or a single symbol of length 1).
    """

    levels: int
    split: int
    limit: int
    lengths: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        longest = min(MAX_LIMIT, MAX_PAIR_BITS - 2 * self.split)
        if not (1 <= self.levels <= MAX_LEVELS and 0 <= self.split <= 2 and 1 <= self.limit <= longest):
            raise CorruptData(
                f"codebook with levels {self.levels}, split {self.split}, limit {self.limit} is out of range"
            )
        if self.lengths.dtype != np.uint8 or self.lengths.ndim != 2 or self.lengths.shape[1] != self.symbols**2:
            raise CorruptData(f"codebook needs uint8 lengths (classes, {self.symbols**2}), not {self.lengths.shape}")
        if self.lengths.shape[0] not in (1, 4):
            raise CorruptData(f"codebook with {self.lengths.shape[0]} classes: 1 or 4 are possible")
        for lengths in self.lengths:
            used = lengths[lengths > 0].astype(np.int64)
            kraft = int(np.sum(1 << (self.limit - np.minimum(used, self.limit))))
            single = used.size == 1 and used[0] == 1
            if not single and (used.size == 0 or used.max() > self.limit or kraft != 1 << self.limit):
                raise CorruptData("codebook lengths are no complete prefix code")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Codebook)
            and (self.levels, self.split, self.limit) == (other.levels, other.split, other.limit)
            and np.array_equal(self.lengths, other.lengths)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def symbols(self) -> int:
        """Symbols of one side of a pair, m."""
        return _symbols(self.levels, self.split)

    @property
    def classes(self) -> int:
        return int(self.lengths.shape[0])

    @property
    def words(self) -> npt.NDArray[np.uint32]:
        """Code word of every symbol, (classes, symbols * symbols), bits reversed so that they go LSB first."""
        return np.stack([_canonical_words(lengths) for lengths in self.lengths])

    def table(self) -> npt.NDArray[np.uint32]:
        """Decode table (classes, 2^(L + 2k)): ``bits | a << 16 | b << 24``, indexed by the next L + 2k bits of a stream."""
        k, size = self.split, 1 << (self.limit + 2 * self.split)
        table = np.zeros((self.classes, size), np.uint32)
        words = self.words
        for index, lengths in enumerate(self.lengths):
            single = np.count_nonzero(lengths) == 1
            for symbol in np.flatnonzero(lengths):
                hi_a, hi_b = divmod(int(symbol), self.symbols)
                bits, word = int(lengths[symbol]), int(words[index, symbol])
                for lo in range(1 << (2 * k)):
                    a, b = hi_a << k | lo & ((1 << k) - 1), hi_b << k | lo >> k
                    entry = bits + 2 * k | a << 16 | b << 24
                    for start in (0, 1) if single else (word,):
                        table[index, start | lo << bits :: 1 << (bits + 2 * k)] = entry
        return table


def train(counts: npt.NDArray[Any], limit: int) -> Codebook:
    """The best codebook for pair counts, with a code for every pair up to the largest code seen.

    counts: integers (classes, n, n), ``counts[class, a, b]``. limit: longest code in bits.
    """
    seen = np.flatnonzero(counts.sum(axis=0).sum(axis=0) + counts.sum(axis=0).sum(axis=1))
    levels = int(seen[-1]) + 1 if seen.size else 1
    k = split_for(levels)
    m = _symbols(levels, k)
    n = m << k
    padded = np.zeros((counts.shape[0], n, n), np.int64)
    padded[:, :levels, :levels] = counts[:, :levels, :levels]
    pairs = padded.reshape(-1, m, 1 << k, m, 1 << k).sum(axis=(2, 4)).reshape(-1, m * m)
    return _build(pairs, levels, k, limit)


@lru_cache(maxsize=256)
def default(relative_scale: float, classes: int, limit: int) -> Codebook:
    """The book for blocks that the sequence's own book does not cover, or that come before it; shared, a function of its arguments."""
    levels = min(MAX_LEVELS, int(min(MAX_LEVELS, 2 / relative_scale)) + 3)
    k = split_for(levels)
    m = _symbols(levels, k)
    centre = min(m, -(-(int(min(MAX_LEVELS, 1 / relative_scale)) + 2) // (1 << k)))
    weight = [((h + 1) * (centre - h)) ** 4 if h < centre else 0 for h in range(m)]
    top = max(weight) ** 2
    pairs = np.array([(a * b << 20) // top for a in weight for b in weight], np.int64)
    return _build(np.broadcast_to(pairs, (classes, m * m)), levels, k, limit)


def split_for(levels: int) -> int:
    """Low bits k to take off each code so that a side has few symbols."""
    return next((k for k in (0, 1) if _symbols(levels, k) <= MAX_SYMBOLS_A_SIDE), 2)


def _symbols(levels: int, split: int) -> int:
    return -(-levels // (1 << split))


def _build(pairs: npt.NDArray[np.int64], levels: int, split: int, limit: int) -> Codebook:
    limit = min(limit, MAX_PAIR_BITS - 2 * split)
    return Codebook(levels, split, limit, np.stack([code_lengths(16 * counts + 1, limit) for counts in pairs]))


def code_lengths(weights: npt.NDArray[np.int64], limit: int) -> npt.NDArray[np.uint8]:
    """Optimal code lengths of at most ``limit`` bits for positive integer weights: package-merge (Larmore & Hirschberg, 1990)."""
    n = weights.size
    if n > 1 << limit:
        raise InvalidInput(f"{n} symbols need codes longer than {limit} bits")
    if n == 1:
        return np.ones(1, np.uint8)
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


def _canonical_words(lengths: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
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
