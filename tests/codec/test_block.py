"""One block: the order of its codes and every bit of its streams, against loops written from docs/format.md."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvcomp.codec import block
from kvcomp.codec.codebook import Codebook, code_lengths, default
from kvcomp.errors import CorruptData, InvalidInput
from kvcomp.spec import KINDS, Kind

CHANNELS = [*range(16, 257, 16), 320, 512]
Codes = npt.NDArray[np.uint8]


def order(kind: Kind, channels: int) -> list[list[tuple[int, int]]]:
    """(token, channel) of every code of the 64 streams, as the format says it."""
    streams = []
    for x in range(64):
        s, lane = divmod(x, 32)
        g, j = lane >> 2, lane & 3
        stream = []
        if kind == "K":
            for t in range(4):
                for channel in range(j * channels // 4, (j + 1) * channels // 4):
                    stream.append((8 * (t + 4 * s) + g, channel))
        else:
            for i in range(channels // 16):
                for u in range(4):
                    for token in (16 * u + 2 * j, 16 * u + 2 * j + 1, 16 * u + 8 + 2 * j, 16 * u + 9 + 2 * j):
                        stream.append((token, 8 * (i + s * (channels // 16)) + g))
        streams.append(stream)
    return streams


def class_of(kind: Kind, channels: int, stream: int, channel: int, classes: int) -> int:
    if classes == 1:
        return 0
    return stream & 3 if kind == "K" else 4 * (channel // 8) // (channels // 8)


def code_bits(book: Codebook, index: int) -> dict[int, str]:
    """Canonical codes from the lengths alone, as strings of bits, first bit of the stream first."""
    lengths = book.lengths_of(index).tolist()
    codes, value, before = {}, 0, 0
    for symbol in sorted((s for s, n in enumerate(lengths) if n), key=lambda s: (lengths[s], s)):
        value <<= lengths[symbol] - before
        before = lengths[symbol]
        codes[symbol] = f"{value:0{before}b}"
        value += 1
    return codes


def literal_encode(codes: Codes, kind: Kind, book: Codebook) -> bytes:
    """Section 5 as strings of bits."""
    channels = codes.shape[1]
    words = [code_bits(book, index) for index in range(book.classes)]
    unit = 4 if channels <= 128 else 8 if channels <= 256 else 16
    lengths, text = [], ""
    for x, stream in enumerate(order(kind, channels)):
        bits = ""
        for at, next_ in zip(stream[::2], stream[1::2], strict=True):
            index = class_of(kind, channels, x, at[1], book.classes)
            k, m, first = book.split[index], book.symbols(index), book.first[index]
            a, b = int(codes[at]) - first, int(codes[next_]) - first
            bits += words[index].get((a >> k) * m + (b >> k), "")
            bits += "".join(str(q >> i & 1) for q in (a, b) for i in range(k))
        bits += "0" * (-len(bits) % unit)
        lengths.append(len(bits) // unit)
        text += bits
    text += "0" * (-len(text) % 8)
    return literal_lengths(lengths, kind) + bytes(int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8))


def literal_lengths(lengths: list[int], kind: Kind) -> bytes:
    """The first part of section 5 as strings of bits, first bit first."""
    group = [x % 4 if kind == "K" else x // 16 for x in range(64)]
    base = [min([127, *(n for n, of in zip(lengths, group, strict=True) if of == g)]) for g in range(4)]
    differences = [n - base[g] for n, g in zip(lengths, group, strict=True)]
    width = max(differences).bit_length()
    text = f"{width:04b}"[::-1] + "".join(f"{b:07b}"[::-1] for b in base)
    text += "".join(f"{d:0{width}b}"[::-1] for d in differences) if width else ""
    return bytes(int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8))


def literal_decode_fixed(data: bytes, channels: int, kind: Kind, width: int) -> Codes:
    words = np.frombuffer(data, "<u4").tolist()
    codes = np.zeros((64, channels), np.uint8)
    for x, stream in enumerate(order(kind, channels)):
        whole = sum(words[64 * i + x] << (32 * i) for i in range(math.ceil(channels * width / 32)))
        for i, at in enumerate(stream):
            codes[at] = whole >> (width * i) & ((1 << width) - 1)
    return codes


def book_of(*shapes: tuple[int, int, int], limit: int = 12, seed: int = 0) -> Codebook:
    """A book whose classes have these (first code, levels, split)."""
    rng = np.random.default_rng(seed)
    symbols = [(-(-levels // 2**split)) ** 2 for _, levels, split in shapes]
    lengths = [code_lengths(1 + (rng.pareto(0.5, n) * 10).clip(0, 2.0**30).astype(np.int64), limit) for n in symbols]
    first, levels, split = (tuple(column) for column in zip(*shapes, strict=True))
    return Codebook(first, levels, split, limit, np.concatenate(lengths))


def codes_of(book: Codebook, kind: Kind, channels: int, seed: int) -> Codes:
    """Codes (64, D) that a book has, each in its class."""
    rng = np.random.default_rng(seed)
    classes = [class_of(kind, channels, c // (channels // 4), c, book.classes) for c in range(channels)]
    first, levels = (np.array(x)[classes] for x in (book.first, book.levels))
    spread = rng.choice([0.0, 1 / 8, 10.0])
    return np.clip(rng.normal(first + levels / 2, spread * levels, (64, channels)), first, first + levels - 1).astype(
        np.uint8
    )


def random_codes(seed: int, channels: int, levels: int) -> Codes:
    return codes_of(book_of((0, levels, 3)), "K", channels, seed)


# first code, levels, split: small alphabets, every split, a single symbol with and without low bits
SHAPES = [(0, 2, 0), (7, 9, 0), (3, 9, 1), (0, 13, 2), (120, 5, 0), (240, 16, 1), (128, 1, 0), (8, 4, 2), (100, 24, 3)]


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_has_one_place_in_the_streams_and_it_is_that_of_the_format(kind: Kind, channels: int) -> None:
    token, channel = block.stream_order(kind, channels)
    assert token.shape == channel.shape == (64, channels)
    found = [list(zip(t, c, strict=True)) for t, c in zip(token.tolist(), channel.tolist(), strict=True)]
    assert found == order(kind, channels)
    assert len({at for stream in found for at in stream}) == 64 * channels


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_lie_along_channels_in_k_and_along_tokens_in_v(kind: Kind) -> None:
    token, channel = block.stream_order(kind, 80)
    along, across = (channel, token) if kind == "K" else (token, channel)
    assert (along[:, 1::2] - along[:, ::2] == 1).all()
    assert (across[:, 1::2] == across[:, ::2]).all()


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_the_quarters_of_the_channels(kind: Kind, channels: int) -> None:
    assert not block.pair_classes(kind, channels, 1).any()
    expected = [
        [class_of(kind, channels, x, stream[i][1], 4) for i in range(0, channels, 2)]
        for x, stream in enumerate(order(kind, channels))
    ]
    assert block.pair_classes(kind, channels, 4).tolist() == expected
    assert set(np.unique(expected)) <= {0, 1, 2, 3}


@given(st.integers(0, 2**32), st.sampled_from(CHANNELS), st.sampled_from(KINDS))
def test_streams_and_back_is_the_identity(seed: int, channels: int, kind: Kind) -> None:
    codes = random_codes(seed, channels, 128)
    np.testing.assert_array_equal(block.from_streams(block.to_streams(codes, kind), kind), codes)


@settings(max_examples=40)
@given(
    st.integers(0, 2**32),
    st.sampled_from([16, 32, 48, 64, 80, 96, 112, 128, 144, 256, 512]),
    st.sampled_from(KINDS),
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=1)
    | st.lists(st.sampled_from(SHAPES), min_size=4, max_size=4),
)
@example(1, 128, "K", [(0, 256, 3)])
@example(2, 256, "V", [(30, 128, 2)])
def test_huffman_blocks_have_the_bits_of_the_format_and_come_back(
    seed: int, channels: int, kind: Kind, shapes: list[tuple[int, int, int]]
) -> None:
    book = book_of(*shapes, seed=seed)
    codes = codes_of(book, kind, channels, seed)
    assert block.covers(book, codes, kind)
    data = block.encode_huffman(codes, kind, book)
    assert data == literal_encode(codes, kind, book)
    np.testing.assert_array_equal(block.decode_huffman(data, channels, kind, book), codes)
    padded = data + b"\xff" * 16  # what follows the streams is not read
    np.testing.assert_array_equal(block.decode_huffman(padded, channels, kind, book), codes)


@given(st.lists(st.integers(0, 288), min_size=64, max_size=64), st.sampled_from([0, 1, 7, 288]), st.sampled_from(KINDS))
def test_lengths_have_the_bits_of_the_format_and_come_back(lengths: list[int], spread: int, kind: Kind) -> None:
    lengths = [min(288, lengths[0] + n % (spread + 1)) for n in lengths]
    data = block.lengths_bytes(np.array(lengths), kind)
    assert data == literal_lengths(lengths, kind)
    found, size = block.lengths_from(data + b"more", kind)
    assert (found.tolist(), size) == (lengths, len(data))
    for cut in range(len(data)):
        with pytest.raises(CorruptData):
            block.lengths_from(data[:cut], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_lengths_in_a_group_take_4_bytes(kind: Kind) -> None:
    lengths = np.array([3, 0, 127, 50])[block.stream_groups(kind)]
    assert block.lengths_bytes(lengths, kind) == ((3 | 0 << 7 | 127 << 14 | 50 << 21) << 4).to_bytes(4, "little")
    groups = block.stream_groups(kind).tolist()
    assert groups == ([0, 1, 2, 3] * 16 if kind == "K" else [0] * 16 + [1] * 16 + [2] * 16 + [3] * 16)


@pytest.mark.parametrize("width", range(10, 16))
def test_differences_of_more_than_9_bits_are_corrupt(width: int) -> None:
    with pytest.raises(CorruptData, match="lengths"):
        block.lengths_from(width.to_bytes(4, "little") + bytes(200), "K")


@pytest.mark.parametrize("channels", [128, 256, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_possible_streams_have_288_units(kind: Kind, channels: int) -> None:
    lengths = np.array([*range(1, 9), 10, 11, 11, 11, 12, 12, 11, 11], np.uint8)
    book = Codebook((7,), (32,), (3,), 12, lengths)  # 18 bits a pair
    codes = np.empty((64, channels), np.uint8)
    for stream in order(kind, channels):
        for at, next_ in zip(stream[::2], stream[1::2], strict=True):
            codes[at], codes[next_] = 7 + 24, 7  # symbol 3 * 4 + 0 = 12, of 12 bits
    data = block.encode_huffman(codes, kind, book)
    units = 18 * channels // 2 // (4 if channels <= 128 else 8 if channels <= 256 else 16)
    assert units == 288
    assert block.lengths_from(data, kind)[0].tolist() == [units] * 64
    assert len(data) == 4 + 8 * 8 + 64 * 18 * channels // 16  # 288 - 127 takes 8 bits
    np.testing.assert_array_equal(block.decode_huffman(data, channels, kind, book), codes)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from(CHANNELS), st.sampled_from(KINDS), st.integers(1, 8))
def test_fixed_blocks_have_the_bits_of_the_format_and_come_back(
    seed: int, channels: int, kind: Kind, width: int
) -> None:
    codes = random_codes(seed, channels, 1 << width)
    data = block.encode_fixed(codes, kind, width)
    assert len(data) == 256 * math.ceil(channels * width / 32) == 256 * block.fixed_words(channels, width)
    np.testing.assert_array_equal(literal_decode_fixed(data, channels, kind, width), codes)
    np.testing.assert_array_equal(block.decode_fixed(data, channels, kind, width), codes)


@pytest.mark.parametrize(
    ("largest", "width"), [(0, 1), (1, 1), (2, 2), (3, 2), (4, 3), (63, 6), (64, 7), (127, 7), (128, 8), (255, 8)]
)
def test_the_width_is_the_smallest_that_fits(largest: int, width: int) -> None:
    codes = np.zeros((64, 16), np.uint8)
    codes[3, 5] = largest
    assert block.fixed_width(codes) == width


@pytest.mark.parametrize(
    ("code", "width"),
    [
        (128, 1),
        (127, 1),
        (129, 2),
        (126, 2),
        (130, 3),
        (125, 3),
        (124, 3),
        (132, 4),
        (0, 8),
        (63, 8),
        (64, 7),
        (191, 7),
        (192, 8),
        (255, 8),
    ],
)
def test_the_width_of_the_unit_head_fits_codes_on_both_sides_of_128(code: int, width: int) -> None:
    codes = np.full((64, 16), 128, np.uint8)
    codes[3, 5] = code
    assert block.signed_width(codes) == width


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 4])
def test_a_book_covers_a_block_whose_codes_it_has_in_every_class(kind: Kind, classes: int) -> None:
    book = book_of(*[(10 * c, 5, 0) for c in range(classes)])
    codes = codes_of(book, kind, 48, 3)
    assert block.covers(book, codes, kind)
    for channel in range(48):
        of_class = class_of(kind, 48, channel // 12, channel, classes)
        for code, covered in (
            (10 * of_class - 1, False),
            (10 * of_class, True),
            (10 * of_class + 4, True),
            (10 * of_class + 5, False),
        ):
            changed = codes.copy()
            changed[17, channel] = code % 256
            assert block.covers(book, changed, kind) == covered


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_counted_as_the_streams_hold_them(kind: Kind, classes: int) -> None:
    codes = random_codes(3, 48, 256)
    expected = np.zeros((classes, 256, 256), np.int64)
    for x, stream in enumerate(order(kind, 48)):
        for at, next_ in zip(stream[::2], stream[1::2], strict=True):
            expected[class_of(kind, 48, x, at[1], classes), codes[at], codes[next_]] += 1
    counts = block.count_pairs(codes, kind, classes)
    assert counts.dtype == np.uint64
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize(
    ("channels", "kind", "shape"), [(16, "K", (9, 5, 0)), (32, "V", (0, 9, 1)), (144, "V", (255, 1, 0))]
)
def test_a_truncated_huffman_block_is_corrupt_at_every_length(
    channels: int, kind: Kind, shape: tuple[int, int, int]
) -> None:
    book = book_of(shape)
    data = block.encode_huffman(codes_of(book, kind, channels, 5), kind, book)
    for size in range(len(data)):
        with pytest.raises(CorruptData):
            block.decode_huffman(data[:size], channels, kind, book)


@pytest.mark.parametrize("width", [1, 3, 7])
def test_a_truncated_fixed_block_is_corrupt_at_every_length(width: int) -> None:
    data = block.encode_fixed(random_codes(6, 16, 1 << width), "K", width)
    for size in range(len(data)):
        with pytest.raises(CorruptData):
            block.decode_fixed(data[:size], 16, "K", width)


def hostile_bytes(count: int, most: int) -> Iterator[bytes]:
    """Random bytes of random lengths; in half of them the lengths are small enough to be plausible."""
    rng = np.random.default_rng(12)
    for i in range(count):
        data = rng.integers(0, 256, int(rng.integers(0, most)), np.uint8)
        if i % 2:
            data[:4] = [int(rng.integers(0, 4)), 0, 0, 0][: data.size]
        yield data.tobytes()


def test_hostile_huffman_blocks_give_codes_of_the_book_or_corrupt_data() -> None:
    books = [book_of((0, 2, 0)), book_of((9, 5, 1), (128, 1, 0), (3, 4, 0), (200, 30, 2)), book_of((128, 1, 0))]
    decoded = 0
    for i, data in enumerate(hostile_bytes(1500, 600)):
        book = books[i % 3]
        try:
            codes = block.decode_huffman(data, 16, KINDS[i // 3 % 2], book)
        except CorruptData:
            continue
        decoded += 1
        assert codes.shape == (64, 16)
        last = [book.first[i] + (book.symbols(i) << book.split[i]) for i in range(book.classes)]
        assert min(book.first) <= codes.min() <= codes.max() < max(last)
    assert 100 < decoded < 1400


def test_hostile_fixed_blocks_give_codes_or_corrupt_data() -> None:
    decoded = 0
    for i, data in enumerate(hostile_bytes(4000, 1800)):
        width = i % 7 + 1
        try:
            codes = block.decode_fixed(data, 16, "V", width)
        except CorruptData:
            continue
        decoded += 1
        assert codes.max() < 1 << width
    assert 100 < decoded < 3900


def test_hostile_scales_are_in_range_or_corrupt() -> None:
    decoded = 0
    for i, data in enumerate(hostile_bytes(4000, 100)):
        try:
            scale, zero = block.scales_from(data, (1, 16, 2)[i % 3])
        except CorruptData:
            continue
        decoded += 1
        assert ((scale >= 2.0**-100) & (scale <= 2.0**100)).all()
        assert (np.abs(zero.astype(np.int64)) <= 32767).all()
    assert 10 < decoded < 3900


def test_a_block_without_bytes_is_corrupt() -> None:
    with pytest.raises(CorruptData):
        block.decode_huffman(b"", 16, "K", book_of((0, 2, 0)))


@pytest.mark.parametrize("count", [16, 64, 256])
def test_many_scales_are_stored_as_bfloat16_and_int16(count: int) -> None:
    rng = np.random.default_rng(count)
    scale = (rng.integers(27 << 7, (227 << 7) + 1, count).astype(np.uint32) << 16).view(np.float32)  # 2^-100 to 2^100
    scale[:2] = 2.0**-100, 2.0**100
    zero = rng.integers(-32767, 32768, count).astype(np.int32)
    data = block.scale_bytes(scale, zero)
    assert len(data) == 4 * count == block.scales_size(count)
    bits = [int(s) >> 16 for s in scale.view(np.uint32)] + [int(z) & 0xFFFF for z in zero]
    assert data == b"".join(b.to_bytes(2, "little") for b in bits)
    for a, b in zip(block.scales_from(data + b"more", count), (scale, zero), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_scale_is_stored_as_float32_and_int32() -> None:
    scale, zero = np.array([[0.1]], np.float32), np.array([[-3]], np.int32)
    data = block.scale_bytes(scale, zero)
    assert data == bytes.fromhex("cdcccc3d fdffffff")
    assert len(data) == block.scales_size(1)
    assert [x.tolist() for x in block.scales_from(data, 1)] == [[np.float32(0.1)], [-3]]


@pytest.mark.parametrize("count", [1, 16, 64])
def test_truncated_scales_are_corrupt(count: int) -> None:
    data = block.scale_bytes(np.ones(count, np.float32), np.zeros(count, np.int32))
    for size in range(len(data)):
        with pytest.raises(CorruptData, match="scales"):
            block.scales_from(data[:size], count)


@pytest.mark.parametrize("bad", [0.0, -0.0, -1.0, np.nan, np.inf, -np.inf, 2.0**-101, 2.0**101, 1e-40])
@pytest.mark.parametrize("count", [1, 16])
def test_a_scale_that_no_encoder_writes_is_corrupt(count: int, bad: float) -> None:
    scale = np.ones(count, np.float32)
    scale[-1] = bad
    with pytest.raises(CorruptData, match="scale"):
        block.scales_from(block.scale_bytes(scale, np.zeros(count, np.int32)), count)


@pytest.mark.parametrize(("count", "bad"), [(1, 32768), (1, -32768), (1, 2**31 - 1), (1, -(2**31)), (16, -32768)])
def test_a_zero_that_no_encoder_writes_is_corrupt(count: int, bad: int) -> None:
    zero = np.zeros(count, np.int32)
    zero[-1] = bad
    with pytest.raises(CorruptData, match="zero"):
        block.scales_from(block.scale_bytes(np.ones(count, np.float32), zero), count)


@pytest.mark.parametrize("channels", [-16, 0, 1, 8, 15, 17, 40, 100, 257, 528])
def test_other_numbers_of_channels_are_refused(channels: int) -> None:
    with pytest.raises(InvalidInput, match="multiple of 16"):
        block.check_channels(channels)
    with pytest.raises(InvalidInput):
        block.stream_order("K", channels)


@pytest.mark.parametrize("channels", CHANNELS)
def test_multiples_of_16_up_to_512_are_accepted(channels: int) -> None:
    block.check_channels(channels)


def test_the_default_book_codes_a_whole_block() -> None:
    book = default(0.25, 4, 12)
    codes: Any = random_codes(9, 64, book.levels[0])
    codes[0, 0] = book.levels[0] - 1
    np.testing.assert_array_equal(block.decode_huffman(block.encode_huffman(codes, "V", book), 64, "V", book), codes)
