"""Pages: their layout, and each way a directory can be wrong, by hand-made bytes (docs/format.md, sections 2 and 5)."""

from __future__ import annotations

import struct
from itertools import product
from typing import Any

import numpy as np
import pytest

from kvcomp.codec.codebook import default, train
from kvcomp.codec.page import (
    DEFAULT_BOOK,
    FIXED,
    OWN_BOOK,
    RAW,
    Layout,
    assemble,
    blocks_of,
    ceil16,
    fixed_mode,
    token_scales_of,
    width_of,
)
from kvcomp.codec.quantise import quantise
from kvcomp.errors import CorruptData
from kvcomp.kernels import Books, Steps, reference
from kvcomp.spec import CODINGS, UNITS, Coding, Unit

TWO_HEADS = Layout(heads=2, channels=(16, 16), units=("block", "token"), value_bytes=2)
# 5 words of directory, padded to 32 bytes, then the V token scales: the first block starts at 288
FIRST = 288
RAW_BYTES = 64 * 16 * 2
BOOK: Books = (default(0.5, 1, 12), None)
BF16 = np.dtype(np.uint16)
STEPS = (0.5, 0.75)


def words(*values: int) -> bytes:
    return b"".join(struct.pack("<I", v) for v in values).ljust(32, b"\0")


def raw_page(*directory: int, size: int = FIRST + 4 * RAW_BYTES, scales: bytes = b"") -> bytes:
    """A page of two heads with this directory; its blocks, where it is right, are raw."""
    scales = scales or b"\x80\x3f" * 64 + bytes(128)
    return (words(*directory) + scales).ljust(size, b"\1")[:size]


RIGHT = [FIRST + i * RAW_BYTES for i in range(5)]


def changed(index: int, value: int) -> bytes:
    directory = list(RIGHT)
    directory[index] = value
    return raw_page(*directory)


def decode(page: bytes, layout: Layout = TWO_HEADS, books: Books = BOOK) -> Any:
    return reference.decode_page(page, layout, (books, books), BF16)


@pytest.mark.parametrize(("heads", "size"), [(1, 16), (2, 32), (4, 48), (5, 48), (8, 80), (96, 784)])
def test_the_directory_has_a_word_for_each_block_and_one_for_the_end(heads: int, size: int) -> None:
    layout = Layout(heads, (64, 64), ("block", "block"), 2)
    assert layout.directory_bytes == layout.first_block == size
    assert layout.token_scale_offsets == (None, None)


@pytest.mark.parametrize(
    ("units", "offsets", "first"),
    [
        (("token", "token"), (32, 288), 544),
        (("token", "channel"), (32, None), 288),
        (("vector", "token"), (None, 32), 288),
        (("block", "vector"), (None, None), 32),
    ],
)
def test_token_scales_lie_between_the_directory_and_the_blocks(
    units: tuple[Unit, Unit], offsets: tuple[int | None, int | None], first: int
) -> None:
    layout = Layout(2, (80, 80), units, 4)
    assert layout.token_scale_offsets == offsets
    assert layout.first_block == first


@pytest.mark.parametrize(
    ("unit", "scales"), [("block", 8), ("channel", 320), ("vector", 256), ("token", 0), ("head", 0)]
)
@pytest.mark.parametrize("kind", [0, 1])
def test_every_mode_needs_room_for_its_scales_and_codes(unit: Unit, scales: int, kind: int) -> None:
    other: Unit = "vector" if unit == "token" else "token"
    layout = Layout(2, (80, 80), (unit, other) if kind == 0 else (other, unit), 4)
    assert layout.least_block_bytes(RAW, kind) == 64 * 80 * 4
    assert layout.least_block_bytes(DEFAULT_BOOK, kind) == layout.least_block_bytes(OWN_BOOK, kind) == scales + 4
    for width, words_a_stream in zip(range(1, 8), (3, 5, 8, 10, 13, 15, 18), strict=True):
        assert layout.least_block_bytes(FIXED + width, kind) == scales + 256 * words_a_stream
    assert layout.least_block_bytes(FIXED, kind) == scales + 256 * 20


def test_width_8_has_the_mode_of_width_0() -> None:
    assert [fixed_mode(width) for width in range(1, 9)] == [9, 10, 11, 12, 13, 14, 15, 8]
    assert [width_of(fixed_mode(width)) for width in range(1, 9)] == list(range(1, 9))


@pytest.mark.parametrize("mode", [3, 5, 6, 7])
def test_a_mode_that_does_not_exist_is_corrupt(mode: int) -> None:
    with pytest.raises(CorruptData, match=f"unknown mode {mode}"):
        TWO_HEADS.least_block_bytes(mode, 0)
    with pytest.raises(CorruptData, match=f"unknown mode {mode}"):
        blocks_of(changed(1, RIGHT[1] | mode), TWO_HEADS)


def test_a_right_directory_gives_its_blocks() -> None:
    page = raw_page(*RIGHT)
    blocks = blocks_of(page, TWO_HEADS)
    assert [mode for mode, _ in blocks] == [RAW] * 4
    assert b"".join(data for _, data in blocks) == page[FIRST:]
    k, v = decode(page)
    assert k.shape == v.shape == (2, 64, 16)
    assert blocks_of(page + b"the next page", TWO_HEADS) == blocks


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (b"", "shorter than its directory"),
        (raw_page(*RIGHT, size=1), "shorter than its directory"),
        (raw_page(*RIGHT, size=19), "shorter than its directory"),
        (raw_page(*RIGHT, size=FIRST - 1), "shorter than its directory"),
        (raw_page(*RIGHT, size=FIRST), "does not fit"),
        (raw_page(*RIGHT, size=RIGHT[4] - 1), "does not fit"),
        (bytes(len(raw_page(*RIGHT))), "does not fit"),
        (b"\xff" * len(raw_page(*RIGHT)), "does not fit"),
        (changed(4, RIGHT[4] + 16), "does not fit"),  # the end lies behind the page
        (changed(4, 0xFFFFFFF0), "does not fit"),
        (changed(4, RIGHT[4] | 1), "does not fit"),  # the end has a mode
        (changed(4, RIGHT[4] | 15), "does not fit"),
        (changed(0, FIRST - 16), "does not fit"),  # the first block lies in the scales
        (changed(0, FIRST + 16), "does not fit"),  # a gap before it
        (changed(0, 0), "does not fit"),
        (changed(1, RIGHT[0]), "too short"),  # no bytes
        (changed(1, RIGHT[1] - 16), "too short"),
        (changed(2, RIGHT[0]), "too short"),  # offsets go back
        (changed(2, RIGHT[4] + 16), "too short"),
        (changed(3, 0xFFFFFFF0), "too short"),
        (changed(4, RIGHT[4] - 16), "too short"),
        (changed(4, RIGHT[3]), "too short"),
        (changed(4, 0), "too short"),
        (changed(0, FIRST | 5), "unknown mode"),
        (changed(3, RIGHT[3] | 7), "unknown mode"),
    ],
)
def test_a_directory_that_is_wrong_is_corrupt(page: bytes, message: str) -> None:
    with pytest.raises(CorruptData, match=message):
        blocks_of(page, TWO_HEADS)
    with pytest.raises(CorruptData, match=message):
        decode(page)


@pytest.mark.parametrize(("index", "kind_scales"), [(0, 8), (1, 8), (2, 0), (3, 0)])
@pytest.mark.parametrize("mode", [DEFAULT_BOOK, OWN_BOOK, *range(FIXED, FIXED + 8)])
def test_a_block_without_room_for_its_mode_is_corrupt(index: int, kind_scales: int, mode: int) -> None:
    need = kind_scales + (4 if mode < FIXED else 256 * (-(-16 * (mode - FIXED or 8) // 32)))
    for size, right in ((ceil16(need), True), (ceil16(need) - 16, False)):
        directory = [FIRST]
        for i in range(4):
            directory.append(directory[-1] + (size if i == index else RAW_BYTES))
        end = directory[-1]
        directory[index] |= mode
        page = raw_page(*directory, size=end)
        if right:
            begin = directory[index] & ~15
            assert blocks_of(page, TWO_HEADS)[index] == (mode, page[begin : begin + size])
        else:
            with pytest.raises(CorruptData, match="too short"):
                blocks_of(page, TWO_HEADS)


def test_a_block_of_the_own_book_without_that_book_is_corrupt() -> None:
    with pytest.raises(CorruptData, match="own codebook"):
        decode(changed(2, RIGHT[2] | OWN_BOOK))


def test_a_token_scale_that_no_encoder_writes_is_corrupt() -> None:
    page = changed(3, RIGHT[3] | DEFAULT_BOOK)
    decode(page[:FIRST] + bytes(len(page) - FIRST))
    with pytest.raises(CorruptData, match="scale"):
        decode(page[:32] + bytes(256) + bytes(len(page) - FIRST))


def test_token_scales_are_those_between_the_directory_and_the_blocks() -> None:
    scales = b"".join(struct.pack("<H", 0x3F80 + i) for i in range(64)) + b"".join(
        struct.pack("<h", -i) for i in range(64)
    )
    page = raw_page(*RIGHT, scales=scales)
    assert token_scales_of(page, TWO_HEADS, 0) is None
    found = token_scales_of(page, TWO_HEADS, 1)
    assert found is not None
    assert found[0].tolist() == [1 + i / 128 for i in range(64)]
    assert found[1].tolist() == [-i for i in range(64)]


def test_assemble_writes_offsets_modes_and_padding() -> None:
    blocks = [(1, b"a" * 17), (2, b"b" * 16), (9, b""), (0, b"c")]
    page = assemble(TWO_HEADS, [b"s" * 256], blocks)
    assert page[:32] == words(288 | 1, 320 | 2, 336 | 9, 336, 352)
    assert page[32:288] == b"s" * 256
    assert page[288:] == b"a" * 17 + bytes(15) + b"b" * 16 + b"c" + bytes(15)


def encoded(layout: Layout, coding: Coding, r: float = 0.4) -> tuple[bytes, Books]:
    """A page of Gaussian data, with one raw block if there are several heads."""
    x = np.random.default_rng(2).normal(size=(2, layout.heads, 64, layout.channels[0])).astype(np.float32)
    if layout.heads > 1:
        x[0, 1, 5, 5] = np.nan
    q = [quantise(x[i], unit, STEPS[: layout.heads] if unit == "head" else r) for i, unit in enumerate(layout.units)]
    books: Books = (train(sum(reference.count_pairs(q[i], kind, 1) for i, kind in enumerate("KV")), 12), None)
    page, _ = reference.encode_pages(x[0], x[1], q[0], q[1], (coding, coding), layout.units, books, books)
    return page.tobytes()[: page.size - layout.spare_bytes], books


def steps_of(layout: Layout) -> Steps:
    key, value = (STEPS[: layout.heads] if unit == "head" else None for unit in layout.units)
    return key, value


@pytest.mark.parametrize(("unit", "coding"), list(product(UNITS, CODINGS)))
def test_a_truncated_page_is_corrupt_at_every_length(unit: Unit, coding: Coding) -> None:
    layout = Layout(1, (16, 16), (unit, unit), 4)
    page, books = encoded(layout, coding)
    steps = steps_of(layout)
    reference.decode_page(page, layout, (books, books), np.dtype(np.float32), steps)
    for size in range(len(page)):
        with pytest.raises(CorruptData):
            reference.decode_page(page[:size], layout, (books, books), np.dtype(np.float32), steps)


@pytest.mark.parametrize(("unit", "coding"), list(product(UNITS, CODINGS)))
def test_hostile_changes_of_a_page_give_values_or_corrupt_data(unit: Unit, coding: Coding) -> None:
    rng = np.random.default_rng(3)
    layout = Layout(2, (16, 16), (unit, unit), 4)
    page, books = encoded(layout, coding)
    outcomes = set()
    for i in range(500):
        bad = bytearray(page)
        reach = layout.first_block if i % 2 else len(bad)  # every other time in the directory and the scales
        for _ in range(int(rng.integers(1, 5))):
            bad[int(rng.integers(0, reach))] = int(rng.integers(0, 256))
        try:
            k, v = reference.decode_page(bytes(bad), layout, (books, books), np.dtype(np.float32), steps_of(layout))
        except CorruptData:
            outcomes.add("corrupt")
        else:
            outcomes.add("values")
            assert k.shape == v.shape == (2, 64, 16)
    assert outcomes == {"corrupt", "values"}


def test_a_hundred_thousand_hostile_directories_give_blocks_that_fit_or_corrupt_data() -> None:
    rng = np.random.default_rng(4)
    layout = Layout(1, (16, 16), ("block", "vector"), 2)
    size = 16 + 3 * 2048
    offsets = 16 * rng.integers(0, size // 16 + 2, (100_000, 3))
    offsets[:, 0] = np.where(rng.random(100_000) < 0.9, 16, offsets[:, 0])
    directory = (offsets | rng.choice([0, 0, 1, 2, 9, 12, 15, 7, 8], (100_000, 3))).astype("<u4")
    directory[:, 2] &= np.where(rng.random(100_000) < 0.9, 0xFFFFFFF0, 0xFFFFFFFF).astype(np.uint32)
    body = bytes(size - 12)
    good = 0
    for entry in directory:
        try:
            blocks = blocks_of(entry.tobytes() + body, layout)
        except CorruptData:
            continue
        good += 1
        assert len(blocks) == 2
        for kind, (mode, data) in enumerate(blocks):
            assert layout.least_block_bytes(mode, kind) <= len(data) <= size - 16
    assert 1000 < good < 50_000
