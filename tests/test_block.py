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

from kvcomp import block
from kvcomp.codebook import Codebook, code_lengths, default
from kvcomp.errors import CorruptData, InvalidInput
from kvcomp.spec import Kind

CHANNELS = list(range(16, 257, 16))
KINDS: tuple[Kind, Kind] = ("K", "V")
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
    lengths = book.lengths[index].tolist()
    codes, value, before = {}, 0, 0
    for symbol in sorted((s for s, n in enumerate(lengths) if n), key=lambda s: (lengths[s], s)):
        value <<= lengths[symbol] - before
        before = lengths[symbol]
        codes[symbol] = f"{value:0{before}b}"
        value += 1
    return codes


def literal_encode(codes: Codes, kind: Kind, book: Codebook) -> bytes:
    """Section 5 as strings of bits."""
    channels, k, m = codes.shape[1], book.split, book.symbols
    words = [code_bits(book, index) for index in range(book.classes)]
    unit = 4 if channels <= 128 else 8
    lengths, text = [], ""
    for x, stream in enumerate(order(kind, channels)):
        bits = ""
        for at, next_ in zip(stream[::2], stream[1::2], strict=True):
            a, b = int(codes[at]), int(codes[next_])
            bits += words[class_of(kind, channels, x, at[1], book.classes)][(a >> k) * m + (b >> k)]
            bits += "".join(str(q >> i & 1) for q in (a, b) for i in range(k))
        bits += "0" * (-len(bits) % unit)
        lengths.append(len(bits) // unit)
        text += bits
    text += "0" * (-len(text) % 8)
    return bytes(lengths) + bytes(int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8))


def literal_decode_fixed(data: bytes, channels: int, kind: Kind, width: int) -> Codes:
    words = np.frombuffer(data, "<u4").tolist()
    codes = np.zeros((64, channels), np.uint8)
    for x, stream in enumerate(order(kind, channels)):
        whole = sum(words[64 * i + x] << (32 * i) for i in range(math.ceil(channels * width / 32)))
        for i, at in enumerate(stream):
            codes[at] = whole >> (width * i) & ((1 << width) - 1)
    return codes


def book_of(levels: int, split: int, limit: int, classes: int, seed: int = 0) -> Codebook:
    rng = np.random.default_rng(seed)
    symbols = (-(-levels // 2**split)) ** 2
    weights = 1 + (rng.pareto(0.5, (classes, symbols)) * 10).clip(0, 2.0**30).astype(np.int64)
    return Codebook(levels, split, limit, np.stack([code_lengths(w, limit) for w in weights]))


def random_codes(seed: int, channels: int, levels: int) -> Codes:
    rng = np.random.default_rng(seed)
    spread = rng.choice([0.0, levels / 8, 10.0 * levels])
    return np.clip(rng.normal(levels / 2, spread, (64, channels)), 0, levels - 1).astype(np.uint8)


# levels, split, limit: small alphabets, every split, L + 2k up to 15, a single symbol
SHAPES = [(2, 0, 2), (9, 0, 12), (9, 1, 8), (13, 2, 11), (5, 0, 5), (16, 1, 12), (1, 0, 3), (4, 2, 1), (128, 2, 11)]


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
    st.sampled_from([16, 32, 48, 64, 80, 96, 112, 128, 144, 256]),
    st.sampled_from(KINDS),
    st.sampled_from(SHAPES[:-1]),
    st.sampled_from([1, 4]),
)
@example(1, 128, "K", (128, 2, 11), 1)
@example(2, 256, "V", (128, 2, 11), 1)
def test_huffman_blocks_have_the_bits_of_the_format_and_come_back(
    seed: int, channels: int, kind: Kind, shape: tuple[int, int, int], classes: int
) -> None:
    book = book_of(*shape, classes, seed)
    codes = random_codes(seed, channels, shape[0])
    data = block.encode_huffman(codes, kind, book)
    assert data == literal_encode(codes, kind, book)
    np.testing.assert_array_equal(block.decode_huffman(data, channels, kind, book), codes)
    padded = data + b"\xff" * 16  # what follows the streams is not read
    np.testing.assert_array_equal(block.decode_huffman(padded, channels, kind, book), codes)


@pytest.mark.parametrize("channels", [128, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_possible_streams_fit_their_length_byte(kind: Kind, channels: int) -> None:
    lengths = np.array([[*range(1, 12), 11, *([0] * 4)]], np.uint8)
    book = Codebook(16, 2, 11, lengths)  # 15 bits a pair
    codes = np.full((64, channels), 11, np.uint8)  # symbol 2 * 4 + 2 = 10, of 11 bits
    data = block.encode_huffman(codes, kind, book)
    assert set(data[:64]) == {240}
    assert len(data) == 64 + 64 * 15 * channels // 16
    np.testing.assert_array_equal(block.decode_huffman(data, channels, kind, book), codes)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from(CHANNELS), st.sampled_from(KINDS), st.integers(1, 7))
def test_fixed_blocks_have_the_bits_of_the_format_and_come_back(
    seed: int, channels: int, kind: Kind, width: int
) -> None:
    codes = random_codes(seed, channels, 1 << width)
    data = block.encode_fixed(codes, kind, width)
    assert len(data) == 256 * math.ceil(channels * width / 32) == 256 * block.fixed_words(channels, width)
    np.testing.assert_array_equal(literal_decode_fixed(data, channels, kind, width), codes)
    np.testing.assert_array_equal(block.decode_fixed(data, channels, kind, width), codes)


@pytest.mark.parametrize(("largest", "width"), [(0, 1), (1, 1), (2, 2), (3, 2), (4, 3), (63, 6), (64, 7), (127, 7)])
def test_the_width_is_the_smallest_that_fits(largest: int, width: int) -> None:
    codes = np.zeros((64, 16), np.uint8)
    codes[3, 5] = largest
    assert block.fixed_width(codes) == width


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_counted_as_the_streams_hold_them(kind: Kind, classes: int) -> None:
    codes = random_codes(3, 48, 128)
    expected = np.zeros((classes, 128, 128), np.int64)
    for x, stream in enumerate(order(kind, 48)):
        for at, next_ in zip(stream[::2], stream[1::2], strict=True):
            expected[class_of(kind, 48, x, at[1], classes), codes[at], codes[next_]] += 1
    counts = block.count_pairs(codes, kind, classes)
    assert counts.dtype == np.uint64
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize(
    ("channels", "kind", "shape"), [(16, "K", (5, 0, 8)), (32, "V", (9, 1, 9)), (144, "V", (2, 0, 2))]
)
def test_a_truncated_huffman_block_is_corrupt_at_every_length(
    channels: int, kind: Kind, shape: tuple[int, int, int]
) -> None:
    book = book_of(*shape, 1)
    data = block.encode_huffman(random_codes(5, channels, shape[0]), kind, book)
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
    """Random bytes of random lengths; in half of them the length bytes are small enough to be plausible."""
    rng = np.random.default_rng(12)
    for i in range(count):
        data = rng.integers(0, 256, int(rng.integers(0, most)), np.uint8)
        if i % 2:
            data[:64] %= max(1, data.size // 40)
        yield data.tobytes()


def test_hostile_huffman_blocks_give_codes_of_the_book_or_corrupt_data() -> None:
    books = [book_of(2, 0, 3, 1), book_of(5, 1, 5, 4), book_of(1, 0, 8, 1)]
    decoded = 0
    for i, data in enumerate(hostile_bytes(1500, 600)):
        book = books[i % 3]
        try:
            codes = block.decode_huffman(data, 16, KINDS[i // 3 % 2], book)
        except CorruptData:
            continue
        decoded += 1
        assert codes.shape == (64, 16)
        assert codes.max() < book.symbols << book.split
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
        block.decode_huffman(b"", 16, "K", book_of(2, 0, 2, 1))


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


@pytest.mark.parametrize("channels", [-16, 0, 1, 8, 15, 17, 40, 100, 257, 272, 512])
def test_other_numbers_of_channels_are_refused(channels: int) -> None:
    with pytest.raises(InvalidInput, match="multiple of 16"):
        block.check_channels(channels)
    with pytest.raises(InvalidInput):
        block.stream_order("K", channels)


@pytest.mark.parametrize("channels", CHANNELS)
def test_multiples_of_16_up_to_256_are_accepted(channels: int) -> None:
    block.check_channels(channels)


def test_the_default_book_codes_a_whole_block() -> None:
    book = default(0.25, 4, 12)
    codes: Any = random_codes(9, 64, book.levels)
    codes[0, 0] = book.levels - 1
    np.testing.assert_array_equal(block.decode_huffman(block.encode_huffman(codes, "V", book), 64, "V", book), codes)
