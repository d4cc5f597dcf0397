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

from kvcomp.codec import codebook
from kvcomp.codec.codebook import Codebook, code_lengths, decode_table, default, read, split_for, train
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

    return 0 if len(heavy) == 1 else left[0] + int(best(1, 0, 2))


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


def lengths_of(*classes: list[int]) -> Lengths:
    return np.array([n for lengths in classes for n in lengths], np.uint8)


def random_book(seed: int, shapes: list[tuple[int, int, int]]) -> Codebook:
    """A book whose classes have the (first code, levels, split) of these shapes."""
    rng = np.random.default_rng(seed)
    symbols = [(-(-levels // 2**split)) ** 2 for _, levels, split in shapes]
    limit = int(rng.integers(max(1, (max(symbols) - 1).bit_length()), 13))
    lengths = [code_lengths(1 + (rng.pareto(0.5, n) * 10).clip(0, 2.0**40).astype(np.int64), limit) for n in symbols]
    first, levels, split = (tuple(column) for column in zip(*shapes, strict=True))
    return Codebook(first, levels, split, limit, np.concatenate(lengths))


shapes = st.sampled_from(
    [(0, 2), (0, 5), (9, 9), (1, 9), (0, 10), (2, 16), (100, 1), (0, 3), (7, 4), (128, 20), (236, 20)]
)
books = st.builds(
    lambda seed, of_classes, splits: random_book(
        seed, [(first, levels, split) for (first, levels), split in zip(of_classes, splits, strict=False)]
    ),
    st.integers(0, 2**32),
    st.lists(shapes, min_size=1, max_size=1) | st.lists(shapes, min_size=4, max_size=4),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
)


@settings(max_examples=300)
@given(weights_lists, st.integers(0, 5))
def test_lengths_are_optimal_under_the_limit(weights: list[int], slack: int) -> None:
    limit = max(1, (len(weights) - 1).bit_length()) + slack
    lengths = code_lengths(np.array(weights, np.int64), limit).astype(int).tolist()
    assert max(lengths) <= limit
    if len(weights) > 1:
        assert min(lengths) >= 1
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


def test_one_symbol_takes_no_bits() -> None:
    assert code_lengths(np.array([5]), 8).tolist() == [0]


def test_more_symbols_than_the_limit_can_tell_apart_are_refused() -> None:
    assert set(code_lengths(np.ones(256, np.int64), 8).tolist()) == {8}
    with pytest.raises(InvalidInput, match="257 symbols"):
        code_lengths(np.ones(257, np.int64), 8)


@given(books)
def test_code_words_are_canonical_and_prefix_free(book: Codebook) -> None:
    for index in range(book.classes):
        lengths = book.lengths_of(index)
        codes = code_strings(lengths, book.words(index))
        if not codes:
            assert lengths.tolist() == [0]
            continue
        ordered = [codes[s] for s in sorted(codes, key=lambda s: (lengths[s], s))]
        assert set(ordered[0]) == {"0"}
        for earlier, later in pairwise(ordered):  # consecutive values, shifted where the length grows
            assert int(later, 2) == (int(earlier, 2) + 1) << (len(later) - len(earlier))
            assert len(later) >= len(earlier)
        for one, next_ in pairwise(sorted(ordered)):
            assert not next_.startswith(one)


@given(books, st.integers(0, 2**32))
def test_the_table_decodes_every_pair_whatever_follows_it(book: Codebook, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for index in range(book.classes):
        k, m, first = book.split[index], book.symbols(index), book.first[index]
        lengths, table = book.lengths_of(index), decode_table(book, index)
        width = int(lengths.max()) + 2 * k
        assert table.shape == (1 << width,)
        hits = 0
        for symbol, code in (code_strings(lengths, book.words(index)) or {0: ""}).items():
            for low in range(4**k):
                low_a, low_b = low % 2**k, low >> k
                bits = code + (f"{low_a:0{k}b}"[::-1] + f"{low_b:0{k}b}"[::-1] if k else "")
                free = width - len(bits)
                window = int(bits[::-1] or "0", 2) | int(rng.integers(0, 1 << free)) << len(bits)
                entry = int(table[window])
                assert (entry & 0xFFFF, entry >> 16 & 0xFF, entry >> 24) == (
                    len(bits),
                    (symbol // m << k | low_a) + first,
                    (symbol % m << k | low_b) + first,
                )
                hits += 1 << free
        assert hits == 1 << width  # every window stands for one pair


@given(books, st.integers(0, 9))
def test_books_survive_their_bytes(book: Codebook, before: int) -> None:
    data = bytes(before) + book.to_bytes()
    assert len(book.to_bytes()) == 2 + 3 * book.classes + book.lengths.size
    assert read(data + b"more", before) == (book, len(data))
    for size in range(len(data) - before):
        with pytest.raises(CorruptData):
            read(data[: before + size], before)


LENGTHS = lengths_of([1, 2, 3, 3], [0], [10] * 1024, [3] * 7 + [4] * 2)


def test_the_bytes_of_a_book_are_those_of_the_format() -> None:
    book = Codebook((3, 128, 0, 1), (4, 1, 256, 3), (1, 0, 3, 0), 10, LENGTHS)
    assert book.to_bytes() == bytes([4, 10, 3, 3, 1, 128, 0, 0, 0, 255, 3, 1, 2, 0]) + LENGTHS.tobytes()


def test_hostile_bytes_are_a_book_or_corrupt() -> None:
    rng, good, found = (
        np.random.default_rng(5),
        random_book(1, [(3, 5, 0), (0, 9, 1), (128, 1, 0), (40, 3, 0)]).to_bytes(),
        0,
    )
    for number in range(3000):
        data = bytearray(good) if number % 2 else bytearray(rng.integers(0, 256, int(rng.integers(0, 60)), np.uint8))
        for _ in range(int(rng.integers(0, 3))):
            if data:
                data[int(rng.integers(0, min(len(data), 20)))] = int(rng.integers(0, 256))
        try:
            book, end = read(bytes(data))
        except CorruptData:
            continue
        found += 1
        assert bytes(data[:end]) == book.to_bytes()
    assert 100 < found < 2900


def pair_counts(ranges: list[tuple[int, int]], seed: int) -> npt.NDArray[np.uint64]:
    """Pair counts as a block gives them, (classes, 256, 256): few pairs seen, of codes from ``first`` to ``last`` of
    each class.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros((len(ranges), 256, 256), np.uint64)
    for of_class, (first, last) in zip(counts, ranges, strict=True):
        seen = np.clip(rng.normal((first + last) / 2, (last - first) / 6, (400, 2)), first, last).astype(int)
        for a, b in seen:
            of_class[a, b] += np.uint64(rng.integers(1, 1000))
        of_class[last, first] += np.uint64(1)
    return counts


def fewest_low_bits(levels: int, limit: int) -> int:
    return next(k for k in (0, 1, 2, 3) if math.ceil(levels / 2**k) <= (32 if limit == 12 else 24) or k == 3)


@pytest.mark.parametrize("limit", [10, 12])
@pytest.mark.parametrize("first", [0, 1, 100])
@pytest.mark.parametrize("levels", [1, 2, 9, 24, 25, 32, 33, 48, 49, 64, 65, 96, 97, 127, 128, 129, 152])
def test_a_trained_class_has_a_code_for_every_pair_from_the_least_to_the_largest_code(
    levels: int, first: int, limit: int
) -> None:
    ranges = [(0, 8), (first, first + levels - 1), (200, 200), (250, 255)]
    for classes in (ranges, ranges[1:2]):
        book = train(pair_counts(classes, levels), limit)
        widths = [last - least + 1 for least, last in classes]
        splits = [fewest_low_bits(width, limit) for width in widths]
        assert book.limit == limit
        assert book.levels == tuple(widths)
        assert book.first == tuple(least for least, _ in classes)
        assert book.split == tuple(splits)
        for index, (width, k) in enumerate(zip(widths, splits, strict=True)):
            assert book.symbols(index) == math.ceil(width / 2**k)
            assert book.lengths_of(index).shape == (book.symbols(index) ** 2,)
            assert book.lengths_of(index).min() >= (width > 1)


@pytest.mark.parametrize(
    ("least", "most", "first", "split"), [(223, 255, 222, 1), (127, 255, 120, 3), (158, 255, 156, 2), (1, 255, 0, 3)]
)
def test_a_class_begins_lower_where_its_last_symbol_would_stand_for_codes_beyond_a_byte(
    least: int, most: int, first: int, split: int
) -> None:
    book = train(pair_counts([(least, most)], 3), 12)
    assert (book.first, book.levels, book.split) == ((first,), (most - first + 1,), (split,))


@pytest.mark.parametrize("ranges", [[(0, 2)], [(0, 8), (3, 40), (120, 180), (7, 7)], [(128, 157)], [(150, 249)]])
def test_a_trained_book_is_optimal_for_16_times_the_count_plus_1(ranges: list[tuple[int, int]]) -> None:
    counts = pair_counts(ranges, 11)
    book = train(counts, 12)
    for index, (first, last) in enumerate(ranges):
        k, m = book.split[index], book.symbols(index)
        weights = [1] * m**2
        for a in range(first, last + 1):
            for b in range(first, last + 1):
                weights[(a - first >> k) * m + (b - first >> k)] += 16 * int(counts[index, a, b])
        expected = package_merge(weights, 12) if m > 1 else [0]
        assert book.lengths_of(index).tolist() == expected


def test_a_pair_never_seen_weighs_a_seventeenth_of_one_seen_once() -> None:
    counts = np.zeros((1, 256, 256), np.uint64)
    counts[0, 0, 4] = 1
    lengths = train(counts, 12).lengths.tolist()
    assert lengths == package_merge([1] * 4 + [17] + [1] * 20, 12)
    assert lengths != package_merge([2] * 4 + [18] + [2] * 20, 12)  # another rule would show
    assert lengths != package_merge([1] * 4 + [16] + [1] * 20, 12)


def test_training_on_nothing_gives_the_book_of_one_code() -> None:
    book = train(np.zeros((4, 256, 256), np.uint64), 12)
    assert (book.first, book.levels, book.split, book.lengths.tolist()) == ((0,) * 4, (1,) * 4, (0,) * 4, [0] * 4)


def test_training_does_not_change_the_counts_and_gives_the_same_book_again() -> None:
    counts = pair_counts([(0, 29)] * 4, 5)
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
    k = fewest_low_bits(levels, 12)
    assert (book.first, book.levels, book.split) == ((0,) * classes, (levels,) * classes, (k,) * classes)
    assert book.limit == 12
    lengths = package_merge(default_weights(r, k, book.symbols(0)), 12)
    assert book.lengths.tolist() == lengths * classes


@pytest.mark.parametrize("limit", [10, 11, 12])
def test_every_limit_that_a_spec_may_have_gives_books_for_every_number_of_levels(limit: int) -> None:
    for levels in range(1, 257):
        counts = np.zeros((1, 256, 256), np.uint64)
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


@pytest.mark.parametrize(("limit", "most"), [(12, 32), (11, 24), (10, 24)])
def test_split_takes_the_fewest_low_bits_that_leave_few_symbols_a_side(limit: int, most: int) -> None:
    levels = [1, most, most + 1, 2 * most, 2 * most + 1, 4 * most, 4 * most + 1, 8 * most, 256]
    assert [split_for(each, limit) for each in levels] == [0, 0, 1, 1, 2, 2, 3, 3, 3]


def test_a_side_has_at_most_32_symbols() -> None:
    def uniform(side: int, split: int) -> Codebook:
        lengths = code_lengths(np.ones(side**2, np.int64), 12)
        return Codebook((0,), (side << split,), (split,), 12, lengths)

    assert uniform(32, 3).symbols(0) == 32
    for side, split in ((33, 0), (33, 2), (64, 0)):
        with pytest.raises(CorruptData, match="32 are possible"):
            uniform(side, split)


GOOD = {"first": (5,), "levels": (2,), "split": (0,), "limit": 3, "lengths": np.array([1, 2, 3, 3], np.uint8)}


@pytest.mark.parametrize(
    "change",
    [
        {"levels": (0,)},
        {"levels": (257,)},
        {"levels": (-1,)},
        {"levels": (3,)},
        {"first": (-1,)},
        {"first": (255,)},
        {"first": (253,), "levels": (3,), "split": (1,)},  # its last symbol stands for the codes 255 and 256
        {"first": (0, 0)},
        {"first": ()},
        {"split": (-1,)},
        {"split": (4,), "lengths": lengths_of([0])},
        {"split": (1,)},
        {"split": (0, 0)},
        {"limit": 0},
        {"limit": 2},
        {"limit": 13},
        {"limit": 16},
        {"lengths": lengths_of([1, 2, 3, 0])},  # incomplete
        {"lengths": lengths_of([2, 2, 2, 0])},
        {"lengths": lengths_of([1, 1, 1, 0])},  # over-full
        {"lengths": lengths_of([1, 2, 2, 3])},
        {"lengths": lengths_of([1, 2, 3, 4])},  # longer than the limit
        {"limit": 4, "lengths": lengths_of([1, 2, 3, 3 + 2])},
        {"lengths": lengths_of([0, 0, 0, 0])},  # empty
        {"lengths": lengths_of([1, 0, 0, 0])},  # one code word where several are needed
        {"lengths": lengths_of([0, 1, 1, 0])},  # complete, but not for every pair
        {"lengths": lengths_of([0, 1, 2, 2])},
        {"levels": (1,), "lengths": lengths_of([1])},  # a single symbol that takes bits
        {"lengths": lengths_of([255, 255, 255, 255])},
        {"lengths": lengths_of([1, 2, 3])},
        {"lengths": lengths_of([1, 2, 3, 3, 0])},
        {"lengths": lengths_of([1, 2, 3, 3])[None]},
        {"lengths": lengths_of([1, 2, 3, 3]).astype(np.int64)},
        {"lengths": lengths_of([1, 2, 3, 3])[:0]},
        {"first": (0,) * 2, "levels": (2,) * 2, "split": (0,) * 2, "lengths": lengths_of(*[[1, 2, 3, 3]] * 2)},
        {"first": (0,) * 5, "levels": (2,) * 5, "split": (0,) * 5, "lengths": lengths_of(*[[1, 2, 3, 3]] * 5)},
        {"first": (), "levels": (), "split": (), "lengths": lengths_of()},
        {
            "first": (0,) * 4,
            "levels": (2,) * 4,
            "split": (0,) * 4,
            "lengths": lengths_of(*[[1, 2, 3, 3]] * 3, [1, 2, 3, 2]),  # one bad class of four
        },
    ],
)
def test_lengths_that_are_no_complete_prefix_code_are_refused(change: dict[str, Any]) -> None:
    Codebook(**GOOD)
    with pytest.raises(CorruptData):
        Codebook(**{**GOOD, **change})


@pytest.mark.parametrize("lengths", [[1, 2, 3, 3], [2, 2, 2, 2], [3, 3, 2, 1]])
def test_complete_lengths_are_accepted(lengths: list[int]) -> None:
    for classes in (1, 4):
        book = Codebook((254,) * classes, (2,) * classes, (0,) * classes, 3, lengths_of(*[lengths] * classes))
        assert (book.classes, book.symbols(0)) == (classes, 2)
    assert Codebook((255,), (1,), (0,), 3, lengths_of([0])).symbols(0) == 1
    assert Codebook((248,), (8,), (3,), 3, lengths_of([0])).symbols(0) == 1


@given(st.lists(st.integers(0, 6), min_size=9, max_size=9))
def test_lengths_are_accepted_exactly_when_they_decode_without_gaps(lengths: list[int]) -> None:
    lengths = [n + 1 for n in lengths] if sum(2.0 ** -(n + 1) for n in lengths) == 1 else lengths
    if min(lengths) and max(lengths) <= 5 and sum(2.0**-n for n in lengths) == 1:
        assert (decode_table(Codebook((0,), (3,), (0,), 5, lengths_of(lengths)), 0) > 0).all()
    else:
        with pytest.raises(CorruptData):
            Codebook((0,), (3,), (0,), 5, lengths_of(lengths))
