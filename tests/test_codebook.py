"""Codebooks: optimal under the limit, complete, canonical, decodable; bad lengths are refused."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomp import codebook
from kvcomp.codebook import Codebook, code_lengths, default, split_for, train
from kvcomp.errors import CorruptData, InvalidInput

Lengths = npt.NDArray[np.uint8]

# equal weights, powers of two, Fibonacci-like and wide ranges: where a limit bites and ties occur
weights_lists = st.one_of(
    st.lists(st.integers(1, 4), min_size=1, max_size=32),
    st.lists(st.integers(0, 40).map(lambda e: 2**e), min_size=1, max_size=32),
    st.lists(st.integers(1, 2**40), min_size=1, max_size=32),
)


def least_cost(weights: list[int], limit: int) -> int:
    """The least sum of weight * length over all prefix codes with lengths up to the limit: every shape of a tree.

    Depth by depth: of the nodes at a depth some become leaves, for the heaviest symbols left, the others have two
    children. A symbol not yet placed costs its weight for every further depth.
    """
    heavy = sorted(weights, reverse=True)
    left = [sum(heavy[i:]) for i in range(len(heavy) + 1)]

    @cache
    def best(depth: int, placed: int, nodes: int) -> float:
        missing = len(heavy) - placed
        if missing == 0:
            return math.inf if nodes else 0
        if nodes == 0 or depth > limit or nodes > missing:
            return math.inf
        return min(
            left[placed + leaves] + best(depth + 1, placed + leaves, 2 * (nodes - leaves))
            for leaves in range(nodes + 1)
        )

    return len(heavy) and heavy[0] if len(heavy) == 1 else left[0] + int(best(1, 0, 2))


def package_merge(weights: list[int], limit: int) -> list[int]:
    """Lengths by the definition of package-merge, packages as lists of symbols; the ties of docs/format.md."""
    leaves = [(weight, 0, [symbol]) for symbol, weight in enumerate(weights)]
    leaves.sort(key=lambda leaf: (leaf[0], leaf[2]))
    row = leaves
    for _ in range(limit - 1):
        packages = [(a[0] + b[0], 1, a[2] + b[2]) for a, b in zip(row[::2], row[1::2], strict=False)]
        row = sorted(leaves + packages, key=lambda entry: entry[:2])
    lengths = [0] * len(weights)
    for _, _, symbols in row[: 2 * len(weights) - 2]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


def code_strings(lengths: Lengths, words: npt.NDArray[Any]) -> dict[int, str]:
    """The code of every symbol as the bits of the stream, first bit first."""
    return {s: f"{int(words[s]):0{int(n)}b}"[::-1] for s, n in enumerate(lengths.tolist()) if n}


def random_book(seed: int, levels: int, split: int, limit: int, classes: int) -> Codebook:
    rng = np.random.default_rng(seed)
    symbols = (-(-levels // 2**split)) ** 2
    weights = 1 + (rng.pareto(0.5, (classes, symbols)) * 10).clip(0, 2.0**40).astype(np.int64)
    return Codebook(levels, split, limit, np.stack([code_lengths(w, limit) for w in weights]))


books = st.builds(
    lambda seed, shape, classes: random_book(seed, *shape, classes),
    st.integers(0, 2**32),
    st.sampled_from(
        [(2, 0, 12), (5, 0, 6), (9, 0, 12), (9, 1, 9), (10, 2, 8), (16, 2, 11), (1, 0, 8), (3, 0, 4), (4, 2, 1)]
    ),
    st.sampled_from([1, 4]),
)


@settings(max_examples=300)
@given(weights_lists, st.integers(0, 5))
def test_lengths_are_optimal_under_the_limit(weights: list[int], slack: int) -> None:
    limit = max(1, (len(weights) - 1).bit_length()) + slack
    lengths = code_lengths(np.array(weights, np.int64), limit).astype(int).tolist()
    assert max(lengths) <= limit
    assert min(lengths) >= 1
    if len(weights) > 1:
        assert sum(2.0**-n for n in lengths) == 1
    assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == least_cost(weights, limit)


@given(weights_lists.filter(lambda w: len(w) > 1), st.integers(0, 4))
def test_lengths_follow_the_order_of_ties_in_the_format(weights: list[int], slack: int) -> None:
    limit = (len(weights) - 1).bit_length() + slack
    assert code_lengths(np.array(weights, np.int64), limit).tolist() == package_merge(weights, limit)


@pytest.mark.parametrize("limit", [10, 12])
def test_lengths_of_the_largest_alphabets_are_those_of_package_merge(limit: int) -> None:
    rng = np.random.default_rng(limit)
    for size in (1024, 576, 529):
        weights = (rng.pareto(0.4, size) * 5).clip(0, 2.0**30).astype(np.int64) + 1
        lengths = code_lengths(weights, limit).astype(np.int64)
        assert lengths.tolist() == package_merge(weights.tolist(), limit)
        assert int((1 << (limit - lengths)).sum()) == 1 << limit


def test_without_a_biting_limit_the_lengths_are_those_of_huffman() -> None:
    assert code_lengths(np.array([1, 1, 2, 4, 8, 16]), 12).tolist() == [5, 5, 4, 3, 2, 1]
    assert code_lengths(np.array([1, 1, 2, 4, 8, 16]), 3).tolist() == [3, 3, 3, 3, 2, 2]


def test_one_symbol_has_length_1() -> None:
    assert code_lengths(np.array([5]), 8).tolist() == [1]


def test_more_symbols_than_the_limit_can_tell_apart_are_refused() -> None:
    assert set(code_lengths(np.ones(256, np.int64), 8).tolist()) == {8}
    with pytest.raises(InvalidInput, match="257 symbols"):
        code_lengths(np.ones(257, np.int64), 8)


@given(books)
def test_code_words_are_canonical_and_prefix_free(book: Codebook) -> None:
    for lengths, words in zip(book.lengths, book.words, strict=True):
        codes = code_strings(lengths, words)
        ordered = [codes[s] for s in sorted(codes, key=lambda s: (lengths[s], s))]
        assert set(ordered[0]) == {"0"}
        for earlier, later in pairwise(ordered):  # consecutive values, shifted where the length grows
            assert int(later, 2) == (int(earlier, 2) + 1) << (len(later) - len(earlier))
            assert len(later) >= len(earlier)
        for one, next_ in pairwise(sorted(ordered)):
            assert not next_.startswith(one)


@given(books, st.integers(0, 2**32))
def test_the_table_decodes_every_pair_whatever_follows_it(book: Codebook, seed: int) -> None:
    rng, k, m = np.random.default_rng(seed), book.split, book.symbols
    table = book.table()
    width = book.limit + 2 * k
    assert table.shape == (book.classes, 1 << width)
    for index in range(book.classes):
        hits = 0
        for symbol, code in code_strings(book.lengths[index], book.words[index]).items():
            for low in range(4**k):
                low_a, low_b = low % 2**k, low >> k
                bits = code + (f"{low_a:0{k}b}"[::-1] + f"{low_b:0{k}b}"[::-1] if k else "")
                free = width - len(bits)
                window = int(bits[::-1], 2) | int(rng.integers(0, 1 << free)) << len(bits)
                entry = int(table[index, window])
                assert (entry & 0xFFFF, entry >> 16 & 0xFF, entry >> 24) == (
                    len(bits),
                    symbol // m << k | low_a,
                    symbol % m << k | low_b,
                )
                hits += 1 << free
        single = np.count_nonzero(book.lengths[index]) == 1
        assert hits * (2 if single else 1) == 1 << width  # every window stands for one pair


def test_both_bits_decode_to_the_only_symbol_of_a_book() -> None:
    for lengths, pair in (([1], (0, 0)), ([0, 0, 1, 0], (1, 0))):
        levels = math.isqrt(len(lengths))
        table = Codebook(levels, 0, 3, np.array([lengths], np.uint8)).table()
        assert set(table[0].tolist()) == {1 | pair[0] << 16 | pair[1] << 24}


def pair_counts(classes: int, levels: int, seed: int) -> npt.NDArray[np.uint64]:
    """Pair counts as a block gives them: (classes, 128, 128), few pairs seen, the largest code ``levels - 1``."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((classes, 128, 128), np.uint64)
    seen = np.clip(rng.normal(levels / 2, levels / 6, (400, 2)), 0, levels - 1).astype(int)
    for a, b in seen:
        counts[rng.integers(0, classes), a, b] += np.uint64(rng.integers(1, 1000))
    counts[0, int(rng.integers(0, levels)), levels - 1] += np.uint64(1)
    return counts


@pytest.mark.parametrize("limit", [10, 12])
@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("levels", [1, 2, 9, 24, 25, 48, 49, 96, 97, 127, 128])
def test_a_trained_book_has_a_code_for_every_pair_up_to_the_largest_code(levels: int, classes: int, limit: int) -> None:
    book = train(pair_counts(classes, levels, levels), limit)
    k = next(k for k in (0, 1, 2) if math.ceil(levels / 2**k) <= 24 or k == 2)
    assert (book.levels, book.split, book.classes) == (levels, k, classes)
    assert book.limit == min(limit, 15 - 2 * k)
    assert book.symbols == math.ceil(levels / 2**k)
    assert book.lengths.shape == (classes, book.symbols**2)
    assert book.lengths.min() >= 1
    assert book.lengths.max() + 2 * k <= 15


@pytest.mark.parametrize(("levels", "classes"), [(3, 1), (9, 4), (30, 1), (61, 4)])
def test_a_trained_book_is_optimal_for_16_times_the_count_plus_1(levels: int, classes: int) -> None:
    counts = pair_counts(classes, levels, 11)
    book = train(counts, 12)
    k, m = book.split, book.symbols
    for index in range(classes):
        weights = [1] * m**2
        for a in range(levels):
            for b in range(levels):
                weights[(a >> k) * m + (b >> k)] += 16 * int(counts[index, a, b])
        assert book.lengths[index].tolist() == package_merge(weights, book.limit)


def test_a_pair_never_seen_weighs_a_seventeenth_of_one_seen_once() -> None:
    counts = np.zeros((1, 128, 128), np.uint64)
    counts[0, 4, 4] = 1
    lengths = train(counts, 12).lengths[0].tolist()
    assert lengths == package_merge([1] * 24 + [17], 12)
    assert lengths != package_merge([2] * 24 + [18], 12)  # another rule would show
    assert lengths != package_merge([1] * 24 + [16], 12)


def test_training_on_nothing_gives_the_book_of_one_code() -> None:
    book = train(np.zeros((4, 128, 128), np.uint64), 12)
    assert (book.levels, book.lengths.tolist()) == (1, [[1]] * 4)


def test_training_does_not_change_the_counts_and_gives_the_same_book_again() -> None:
    counts = pair_counts(4, 30, 5)
    before = counts.copy()
    assert train(counts, 11) == train(counts[:, :30, :30].astype(np.uint32), 11)
    np.testing.assert_array_equal(counts, before)


def default_weights(r: float, k: int, m: int) -> list[int]:
    """Weights of the default book's symbols, by docs/format.md, section 6."""
    c = min(m, math.ceil((math.floor(min(1 / r, 1e9)) + 2) / 2**k))
    w = [((h + 1) * (c - h)) ** 4 if h < c else 0 for h in range(m)]
    return [16 * ((w[a] * w[b] * 2**20) // max(w) ** 2) + 1 for a in range(m) for b in range(m)]


JUST_BELOW = (0.6666666666666667, 0.33333333333333337, 0.28571428571428575)  # 2/r is just below a whole number


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize(
    "r",
    [
        *(0.999, 0.7, 0.5, 0.3, 0.1, 0.05, 0.04, 0.03, 1 / 14, 0.02, 0.01, 0.005, 1e-9, 5e-324),
        *JUST_BELOW,
    ],
)
def test_the_default_book_is_that_of_the_format(r: float, classes: int) -> None:
    book = default(r, classes, 12)
    levels = min(128, math.floor(min(2 / r, 1e9)) + 3)
    k = next(k for k in (0, 1, 2) if math.ceil(levels / 2**k) <= 24 or k == 2)
    assert (book.levels, book.split, book.classes, book.limit) == (levels, k, classes, min(12, 15 - 2 * k))
    lengths = package_merge(default_weights(r, k, book.symbols), book.limit)
    assert book.lengths.tolist() == [lengths] * classes


@pytest.mark.parametrize("limit", [10, 11, 12])
def test_every_limit_that_a_spec_may_have_gives_books_for_every_number_of_levels(limit: int) -> None:
    for levels in range(1, 129):
        counts = np.zeros((1, 128, 128), np.uint64)
        counts[0, 0, levels - 1] = 1
        assert train(counts, limit).lengths.max() <= limit
        assert default(min(0.99, 2 / levels), 1, limit).lengths.max() <= limit


def test_the_default_book_depends_on_its_arguments_alone() -> None:
    one = default(0.1, 4, 12)
    codebook.default.cache_clear()
    again = default(0.1, 4, 12)
    assert again is not one
    assert again == one
    assert again != default(0.1, 1, 12)
    assert again != default(0.1, 4, 11)
    assert again != "a book"


def test_split_takes_the_fewest_low_bits_that_leave_24_symbols_a_side() -> None:
    assert [split_for(levels) for levels in (1, 24, 25, 48, 49, 96, 97, 128)] == [0, 0, 1, 1, 2, 2, 2, 2]


GOOD = {"levels": 2, "split": 0, "limit": 3, "lengths": np.array([[1, 2, 3, 3]], np.uint8)}


@pytest.mark.parametrize("limit", [13, 15])
def test_a_limit_beyond_12_bits_is_refused(limit: int) -> None:
    with pytest.raises(CorruptData):
        Codebook(**{**GOOD, "limit": limit})


def lengths_of(*classes: list[int]) -> Lengths:
    return np.array(classes, np.uint8)


@pytest.mark.parametrize(
    "change",
    [
        {"levels": 0},
        {"levels": 129},
        {"levels": -1},
        {"levels": 3},
        {"split": -1},
        {"split": 3},
        {"split": 1},
        {"limit": 0},
        {"limit": 2},
        {"limit": 16},
        {"levels": 4, "split": 2, "limit": 12, "lengths": lengths_of([1])},
        {"lengths": lengths_of([1, 2, 3, 0])},  # incomplete
        {"lengths": lengths_of([2, 2, 2, 0])},
        {"lengths": lengths_of([1, 1, 1, 0])},  # over-full
        {"lengths": lengths_of([1, 2, 2, 3])},
        {"lengths": lengths_of([1, 2, 3, 4])},  # longer than the limit
        {"limit": 4, "lengths": lengths_of([1, 2, 3, 3 + 2])},
        {"lengths": lengths_of([0, 0, 0, 0])},  # empty
        {"lengths": lengths_of([2, 0, 0, 0])},  # a single symbol, not of length 1
        {"lengths": lengths_of([255, 255, 255, 255])},
        {"lengths": lengths_of([1, 2, 3])},
        {"lengths": lengths_of([1, 2, 3, 3, 0])},
        {"lengths": lengths_of([1, 2, 3, 3])[0]},
        {"lengths": lengths_of([1, 2, 3, 3]).astype(np.int64)},
        {"lengths": lengths_of([1, 2, 3, 3])[:0]},
        {"lengths": lengths_of(*[[1, 2, 3, 3]] * 2)},
        {"lengths": lengths_of(*[[1, 2, 3, 3]] * 5)},
        {"lengths": lengths_of(*[[1, 2, 3, 3]] * 3, [1, 2, 3, 2])},  # one bad class of four
    ],
)
def test_lengths_that_are_no_complete_prefix_code_are_refused(change: dict[str, Any]) -> None:
    Codebook(**GOOD)
    with pytest.raises(CorruptData):
        Codebook(**{**GOOD, **change})


@pytest.mark.parametrize(
    "lengths", [[1, 2, 3, 3], [2, 2, 2, 2], [0, 1, 1, 0], [0, 0, 1, 0], [3, 3, 2, 1], [0, 1, 2, 2]]
)
def test_complete_and_single_symbol_lengths_are_accepted(lengths: list[int]) -> None:
    for classes in (1, 4):
        book = Codebook(2, 0, 3, lengths_of(*[lengths] * classes))
        assert (book.classes, book.symbols) == (classes, 2)


@given(st.lists(st.integers(0, 6), min_size=9, max_size=9))
def test_lengths_are_accepted_exactly_when_they_decode_without_gaps(lengths: list[int]) -> None:
    used = [n for n in lengths if n]
    if used == [1] or (used and max(used) <= 5 and sum(2.0**-n for n in used) == 1):
        assert (Codebook(3, 0, 5, lengths_of(lengths)).table() > 0).all()
    else:
        with pytest.raises(CorruptData):
            Codebook(3, 0, 5, lengths_of(lengths))
