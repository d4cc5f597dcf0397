"""One block: 64 tokens x D channels of one head as 64 bit streams (docs/format.md, sections 4 and 5).

This is the readable reference, which the kernels are checked against: it fixes the order of the codes and the meaning
of every bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcomp.codec.codebook import Codebook, decode_table
from kvcomp.codec.quantise import HEAD_ZERO, MAX_CODES, MAX_ZERO
from kvcomp.errors import CorruptData, InvalidInput
from kvcomp.spec import PAGE_TOKENS, SCALE_RANGE, Kind

STREAMS = 64
MAX_CHANNELS = 512
MAX_BASE, MAX_DIFFERENCE_BITS = 127, 9  # a stream has at most 288 units: 64 pairs of 18 bits in units of 4 bits
LEAST_LENGTHS = 4  # bytes that the lengths of a block's streams take at least

Indices = npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint8]


def check_channels(channels: int) -> None:
    """Raise InvalidInput unless a block can have this many channels."""
    if channels % 16 or not 16 <= channels <= MAX_CHANNELS:
        raise InvalidInput(f"a block has a multiple of 16 channels from 16 to {MAX_CHANNELS}, not {channels}")


def held_channels(channels: int) -> int:
    """Channels of the blocks that hold heads of so many, zeros included. Raises InvalidInput for other sizes."""
    if channels % 8 or not 8 <= channels <= MAX_CHANNELS:
        raise InvalidInput(f"head_dim must be a multiple of 8 from 8 to {MAX_CHANNELS}, not {channels}")
    return -(-channels // 16) * 16


@lru_cache(maxsize=64)
def stream_order(kind: Kind, channels: int) -> tuple[Indices, Indices]:
    """Token and channel of every code: two (64 streams, D codes) arrays. Pairs are neighbours along the second axis."""
    check_channels(channels)
    stream, position = np.mgrid[:STREAMS, :channels]
    s, g, j = stream >> 5, (stream & 31) >> 2, stream & 3
    if kind == "K":
        quarter = channels // 4
        return 8 * (position // quarter + 4 * s) + g, j * quarter + position % quarter
    tile, u, i = position // 16 + s * (channels // 16), position // 4 % 4, position % 4
    return 16 * u + 8 * (i >> 1) + 2 * j + (i & 1), 8 * tile + g


def channel_classes(kind: Kind, channels: int, classes: int) -> Indices:
    """Codebook class of every channel, (D,)."""
    channel = np.arange(channels)
    if classes == 1:
        return np.zeros_like(channel)
    return channel // (channels // 4) if kind == "K" else 4 * (channel // 8) // (channels // 8)


@lru_cache(maxsize=64)
def pair_classes(kind: Kind, channels: int, classes: int) -> Indices:
    """Codebook class of every pair, (64 streams, D/2 pairs)."""
    _, channel = stream_order(kind, channels)
    return channel_classes(kind, channels, classes)[channel[:, ::2]]


def length_unit(channels: int) -> int:
    """Bits that one unit of a stream's length stands for."""
    return 4 if channels <= 128 else 8 if channels <= 256 else 16


def stream_groups(kind: Kind) -> Indices:
    """Which of the four bases of a block's lengths is that of each stream, (64,)."""
    stream = np.arange(STREAMS)
    return stream & 3 if kind == "K" else stream >> 4


def lengths_bytes(lengths: Indices, kind: Kind) -> bytes:
    """Stored form of the lengths of 64 streams in units."""
    groups = stream_groups(kind)
    bases = [min(MAX_BASE, int(lengths[groups == group].min())) for group in range(4)]
    differences = lengths - np.array(bases)[groups]
    width = int(differences.max()).bit_length()
    head = width | sum(base << (4 + 7 * group) for group, base in enumerate(bases))
    bits = sum(int(difference) << (width * stream) for stream, difference in enumerate(differences))
    return head.to_bytes(4, "little") + bits.to_bytes(8 * width, "little")


def lengths_from(data: bytes, kind: Kind) -> tuple[Indices, int]:
    """Undo ``lengths_bytes``, and say how many bytes that took. Raises CorruptData."""
    head = int.from_bytes(data[:4], "little")
    width = head & 15
    size = 4 + 8 * width
    if width > MAX_DIFFERENCE_BITS or len(data) < size:
        raise CorruptData("a block is too short for the lengths of its streams")
    bits = int.from_bytes(data[4:size], "little")
    differences = np.array([bits >> (width * stream) & ((1 << width) - 1) for stream in range(STREAMS)])
    bases = np.array([head >> (4 + 7 * group) & MAX_BASE for group in range(4)])
    return bases[stream_groups(kind)] + differences, size


def to_streams(codes: Codes, kind: Kind) -> Codes:
    """(64 tokens, D) -> (64 streams, D codes)."""
    return codes[stream_order(kind, codes.shape[1])]


def from_streams(streams: Codes, kind: Kind) -> Codes:
    """(64 streams, D codes) -> (64 tokens, D)."""
    codes = np.empty((PAGE_TOKENS, streams.shape[1]), np.uint8)
    codes[stream_order(kind, streams.shape[1])] = streams
    return codes


def count_pairs(codes: Codes, kind: Kind, classes: int) -> npt.NDArray[np.uint64]:
    """Count how often each pair of codes occurs in a block (64, D): (classes, 256, 256)."""
    streams = to_streams(codes, kind).astype(np.int64)
    of_class = pair_classes(kind, codes.shape[1], classes)
    symbol = (of_class * MAX_CODES + streams[:, ::2]) * MAX_CODES + streams[:, 1::2]
    counts = np.bincount(symbol.ravel(), minlength=classes * MAX_CODES**2)
    return counts.reshape(classes, MAX_CODES, MAX_CODES).astype(np.uint64)


def covers(book: Codebook, codes: Codes, kind: Kind) -> bool:
    """Whether a book has all codes of a block (64, D), each in its class."""
    channels = codes.shape[1]
    low, high = codes.min(axis=0), codes.max(axis=0)
    of_channel = channel_classes(kind, channels, book.classes)
    first, levels = np.array(book.first)[of_channel], np.array(book.levels)[of_channel]
    return bool(((low >= first) & (high < first + levels)).all())


def encode_huffman(codes: Codes, kind: Kind, book: Codebook) -> bytes:
    """Encode a block of codes (64, D), which the book covers, as lengths and streams; not padded to 16 bytes."""
    channels = codes.shape[1]
    streams = to_streams(codes, kind).astype(np.int64)
    classes = pair_classes(kind, channels, book.classes)
    word, bits = np.zeros((2, *classes.shape), np.int64)
    for of_class in range(book.classes):
        here, k = classes == of_class, book.split[of_class]
        a, b = (streams[:, i::2][here] - book.first[of_class] for i in (0, 1))
        symbol = (a >> k) * book.symbols(of_class) + (b >> k)
        length = book.lengths_of(of_class)[symbol].astype(np.int64)
        low = (1 << k) - 1
        word[here] = book.words(of_class)[symbol].astype(np.int64) | (a & low) << length | (b & low) << (length + k)
        bits[here] = length + 2 * k
    unit = length_unit(channels)
    units, total, position = [], 0, 0
    for stream_words, stream_bits in zip(word.tolist(), bits.tolist(), strict=True):
        begin = position
        for value, width in zip(stream_words, stream_bits, strict=True):
            total |= value << position
            position += width
        position = begin + -(-(position - begin) // unit) * unit
        units.append((position - begin) // unit)
    return lengths_bytes(np.array(units), kind) + total.to_bytes((position + 7) // 8, "little")


def decode_huffman(data: bytes, channels: int, kind: Kind, book: Codebook) -> Codes:
    """Decode lengths and streams to a block of codes (64, D). Raises CorruptData if the streams leave the data."""
    lengths, size = lengths_from(data, kind)
    tables = [decode_table(book, of_class) for of_class in range(book.classes)]
    classes = pair_classes(kind, channels, book.classes).tolist()
    starts = np.concatenate([[0], np.cumsum(lengths)]) * length_unit(channels)
    if starts[-1] > 8 * (len(data) - size):
        raise CorruptData("a block's streams are longer than the block")
    bits = int.from_bytes(data[size:], "little")
    streams = np.empty((STREAMS, channels), np.uint8)
    for stream in range(STREAMS):
        position = int(starts[stream])
        for pair in range(channels // 2):
            table = tables[classes[stream][pair]]
            entry = int(table[bits >> position & (table.size - 1)])
            streams[stream, 2 * pair : 2 * pair + 2] = entry >> 16 & 255, entry >> 24
            position += entry & 255
    return from_streams(streams, kind)


def fixed_width(codes: Codes) -> int:
    """Bits a code of a block needs at fixed width, at least 1."""
    return max(1, int(codes.max()).bit_length())


def signed_width(codes: Codes) -> int:
    """The least w for which the codes of a block of the unit ``head`` lie in 128 - 2^(w-1) .. 128 + 2^(w-1) - 1."""
    signed = codes.astype(np.int64) + HEAD_ZERO
    return 1 + int(np.maximum(signed, ~signed).max()).bit_length()


def encode_fixed(codes: Codes, kind: Kind, width: int) -> bytes:
    """Code area of a block (64, D) at fixed width: word i of stream x is word 64*i + x."""
    streams = to_streams(codes, kind)
    bits = (streams[:, :, None] >> np.arange(width, dtype=np.uint8)) & 1
    padded = np.zeros((STREAMS, fixed_words(codes.shape[1], width) * 32), np.uint8)
    padded[:, : streams.shape[1] * width] = bits.reshape(STREAMS, -1)
    words = np.packbits(padded, axis=1, bitorder="little").view("<u4")
    return np.ascontiguousarray(words.T).tobytes()


def decode_fixed(data: bytes, channels: int, kind: Kind, width: int) -> Codes:
    """Undo ``encode_fixed``. Raises CorruptData if the data is too short."""
    count = fixed_words(channels, width)
    if len(data) < 4 * STREAMS * count:
        raise CorruptData("a fixed-width block is too short for its codes")
    words = np.ascontiguousarray(np.frombuffer(data, "<u4", STREAMS * count).reshape(count, STREAMS).T)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : channels * width]
    weights = (1 << np.arange(width)).astype(np.uint8)
    return from_streams((bits.reshape(STREAMS, channels, width) * weights).sum(axis=2).astype(np.uint8), kind)


def fixed_words(channels: int, width: int) -> int:
    """Words of one stream at fixed width."""
    return -(-channels * width // 32)


def scale_bytes(scale: npt.NDArray[np.float32], zero: npt.NDArray[np.int32]) -> bytes:
    """Stored form of the scales of one unit set: a single float32/int32, or bfloat16 and int16 arrays."""
    if scale.size == 1:
        return scale.astype("<f4").tobytes() + zero.astype("<i4").tobytes()
    return (scale.ravel().view(np.uint32) >> 16).astype("<u2").tobytes() + zero.ravel().astype("<i2").tobytes()


def scales_from(data: bytes, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Undo ``scale_bytes``, for ``count`` scales and zeros. Raises CorruptData if one is missing or out of range."""
    if len(data) < scales_size(count):
        raise CorruptData("a block is too short for its scales")
    scale: npt.NDArray[Any]
    if count == 1:
        scale, zero = np.frombuffer(data, "<f4", 1), np.frombuffer(data, "<i4", 1, 4)
    else:
        scale = (np.frombuffer(data, "<u2", count).astype(np.uint32) << 16).view(np.float32)
        zero = np.frombuffer(data, "<i2", count, 2 * count)
    if (
        not ((scale >= SCALE_RANGE[0]) & (scale <= SCALE_RANGE[1])).all()
        or (np.abs(zero.astype(np.int64)) > MAX_ZERO).any()
    ):
        raise CorruptData("a block has a scale or a zero that no encoder writes")
    return scale.astype(np.float32), zero.astype(np.int32)


def scales_size(count: int) -> int:
    """Bytes of ``count`` scales and zeros."""
    return 8 if count == 1 else 4 * count
