# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Codes -> pages (docs/format.md, sections 2, 4 and 5), and the pair counts that codebooks are made from."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcomp.kernels.cpu_bits import (
    address_of,
    clear_bytes,
    compiled,
    copy_bytes,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
)
from kvcomp.kernels.cpu_decode import (
    CLASSES,
    DEFAULT_BOOK,
    FIXED,
    LENGTHS,
    LEVELS,
    LIMIT,
    OWN_BOOK,
    RAW,
    SPLIT,
    STREAMS,
    SYMBOLS,
    K,
    canonical_words,
)
from kvcomp.kernels.cpu_page import BLOCK, TOKEN, TOKENS
from kvcomp.quantise import MAX_LEVELS

i64, u64 = np.int64, np.uint64


@compiled
def class_of(kind, channels, classes, channel):
    """Codebook class of a pair that begins in this channel."""
    if classes == 1:
        return 0
    return channel // (channels // 4) if kind == K else 4 * (channel // 8) // (channels // 8)


@compiled
def pair_words(kind, codes, words):
    """codes [64, D] -> pairs ``a | b << 8``: K [token, channel pair], V [token pair, channel]."""
    if kind == K:
        for t in range(TOKENS):
            for i in range(words.shape[1]):
                words[t, i] = np.uint16(codes[t, 2 * i]) | np.uint16(codes[t, 2 * i + 1]) << np.uint16(8)
    else:
        for t in range(TOKENS // 2):
            for c in range(words.shape[1]):
                words[t, c] = np.uint16(codes[2 * t, c]) | np.uint16(codes[2 * t + 1, c]) << np.uint16(8)


@compiled(entry=True)
def count_blocks(codes, raw, kind, counts):
    """counts[class, a, b] += how often the pair (a, b) occurs in the blocks (pages, heads, 64, channels) that are not raw."""
    pages, heads, _, channels = codes.shape
    classes = counts.shape[0]
    shape = (TOKENS, channels // 2) if kind == K else (TOKENS // 2, channels)
    words = np.empty(shape, np.uint16)
    # Two tables in turn: equal pairs often follow each other, and adding to the same place twice waits for memory.
    partial = np.zeros((classes, 2, MAX_LEVELS * MAX_LEVELS), np.uint32)
    of_column = np.empty(shape[1], i64)
    for column in range(shape[1]):
        of_column[column] = class_of(kind, channels, classes, 2 * column if kind == K else column)
    for page in range(pages):
        for head in range(heads):
            if raw[page, head]:
                continue
            pair_words(kind, codes[page, head], words)
            for row in range(shape[0]):
                for column in range(0, shape[1], 2):  # a class begins at an even column
                    table = partial[of_column[column]]
                    first, second = i64(words[row, column]), i64(words[row, column + 1])
                    table[0, (first & 127) << 7 | first >> 8] += np.uint32(1)
                    table[1, (second & 127) << 7 | second >> 8] += np.uint32(1)
    flat = counts.reshape(classes, MAX_LEVELS * MAX_LEVELS)
    for of_class in range(classes):
        for pair in range(MAX_LEVELS * MAX_LEVELS):
            flat[of_class, pair] += u64(partial[of_class, 0, pair]) + u64(partial[of_class, 1, pair])


@compiled
def order_streams(kind, words, streams):
    """Pairs as ``pair_words`` has them -> [64 streams, D/2 pairs] (section 4)."""
    pairs = streams.shape[1]
    for stream in range(STREAMS):
        s, g, j = stream >> 5, (stream & 31) >> 2, stream & 3
        if kind == K:
            run = pairs // 4
            for t in range(4):
                for i in range(run):
                    streams[stream, t * run + i] = words[8 * (t + 4 * s) + g, j * run + i]
        else:
            tiles = pairs // 8
            for i in range(tiles):
                channel = 8 * (i + s * tiles) + g
                for m in range(8):
                    streams[stream, 8 * i + m] = words[4 * m + j, channel]


@compiled
def build_words(book, words):
    """words[class, b << 7 | a] = code word with the split bits, and its length << 16."""
    symbols, split, limit, levels = book[SYMBOLS], book[SPLIT], book[LIMIT], book[LEVELS]
    count = symbols * symbols
    canonical = np.empty(count, np.uint16)
    low = (1 << split) - 1
    for of_class in range(book[CLASSES]):
        lengths = book[LENGTHS] + of_class * count
        lengths_of = code_lengths(lengths, count)
        canonical_words(lengths, count, limit, canonical)
        for a in range(levels):
            for b in range(levels):
                symbol = (a >> split) * symbols + (b >> split)
                length = i64(lengths_of[symbol])
                word = i64(canonical[symbol]) | (a & low | (b & low) << split) << length
                words[of_class, b << 7 | a] = word | (length + 2 * split) << 16


@compiled
def code_lengths(lengths, count):
    """The bytes at an address as an array."""
    copy = np.empty(count, np.uint8)
    fill_bytes(lengths, copy)
    return copy


@compiled
def fill_bytes(source, array):
    copy_bytes(source, address_of(array), i64(array.size))


def _packer(pairs_a_flush: int) -> Any:
    """``pack(streams, of_pair, words, lengths, unit)``: Huffman streams behind 64 length bytes at an address. Returns their end.

    A flush leaves at most 7 bits, so ``pairs_a_flush`` pairs may have 57 bits.
    """

    @compiled
    def pack(streams, of_pair, words, lengths, unit):
        to = lengths + STREAMS
        waiting, held = u64(0), u64(0)  # bits, and how many
        for stream in range(STREAMS):
            begin = to * 8 + i64(held)
            for pair in range(0, streams.shape[1], pairs_a_flush):
                table = words[of_pair[stream, pair]]
                for i in range(pairs_a_flush):
                    word = i64(streams[stream, pair + i])
                    entry = u64(table[(word >> 8) << 7 | word & 127])
                    waiting |= (entry & u64(0xFFFF)) << held
                    held += entry >> u64(16)
                store_u64(to, waiting)
                to += i64(held >> u64(3))
                waiting >>= held & u64(0x38)
                held &= u64(7)
            bits = to * 8 + i64(held) - begin
            units = (bits + unit - 1) // unit
            store_u8(lengths + stream, np.uint8(units))
            held += u64(units * unit - bits)
            store_u64(to, waiting)
            to += i64(held >> u64(3))
            waiting >>= held & u64(0x38)
            held &= u64(7)
        store_u64(to, waiting)
        return to + (1 if held else 0)

    return pack


_pack_4, _pack_2 = _packer(4), _packer(2)


@compiled
def pack_fixed(streams, width, to):
    """Codes of a fixed width: word i of stream x to 4 (64 i + x) bytes behind an address. Returns the end."""
    size = u64(width)
    rows = (2 * streams.shape[1] * width + 31) // 32
    for stream in range(STREAMS):
        waiting, held, place = u64(0), u64(0), to + 4 * stream
        for pair in range(streams.shape[1]):
            word = u64(streams[stream, pair])
            waiting |= (word & u64(127) | word >> u64(8) << size) << held
            held += u64(2) * size
            if held >= u64(32):
                store_u32(place, np.uint32(waiting & u64(0xFFFFFFFF)))
                place += 4 * STREAMS
                waiting >>= u64(32)
                held -= u64(32)
        if held:
            store_u32(place, np.uint32(waiting & u64(0xFFFFFFFF)))
    return to + 4 * STREAMS * rows


@compiled
def store_scales(unit, scale_bits, zero, to):
    """Scales, as the bits of float32, and zeros to an address. Returns the end."""
    if unit == BLOCK:
        store_u32(to, scale_bits[0])
        store_u32(to + 4, np.uint32(zero[0]))
        return to + 8
    count = scale_bits.size
    for i in range(count):
        store_u16(to + 2 * i, np.uint16(scale_bits[i] >> np.uint32(16)))
        store_u16(to + 2 * count + 2 * i, np.uint16(zero[i] & 0xFFFF))
    return to + 4 * count


@compiled
def pad(to, begin):
    """Zero bytes up to a multiple of 16 from ``begin``. Returns the end."""
    end = begin + ((to - begin + 15) & ~i64(15))
    clear_bytes(to, end - to)
    return end


@compiled(entry=True)
def encode_blocks(
    values, value_strides, value_bytes, codes, raws, scale_bits, zeros, units, fixed, books, buffer, offsets
):  # fmt: skip
    """Pages to ``buffer``, large enough; offsets[i] is where page i begins.

    values: addresses of K and V (heads, 64*pages, channels), value_strides: their bytes between heads and tokens. codes, raws,
    scale_bits, zeros: pairs of arrays, of K and of V. fixed: whether their codes have a fixed width. books: K default, K own, V default, V own.
    """
    pages, heads, _, channels = codes[0].shape
    pairs = channels // 2
    streams = np.empty((STREAMS, pairs), np.uint16)
    columns = np.empty(TOKENS * pairs, np.uint16)
    most = max(1, max(books[0, CLASSES], books[2, CLASSES]))
    words = np.empty((4, most, MAX_LEVELS * MAX_LEVELS), np.uint32)
    built = np.zeros(4, np.bool_)
    of_pair = np.empty((4, STREAMS, pairs), np.uint8)
    unit = 4 if channels <= 128 else 8
    to = address_of(buffer)
    for page in range(pages):
        begin = to
        offsets[page] = begin - address_of(buffer)
        directory = 4 * (2 * heads + 1)
        to = pad(begin + directory, begin)
        for kind in range(2):
            if units[kind] == TOKEN:
                to = store_scales(TOKEN, scale_bits[kind][page, 0], zeros[kind][page, 0], to)
        for number in range(2 * heads):
            kind, head = number // heads, number % heads
            at = to
            if raws[kind][page, head]:
                mode = RAW
                row = values[kind] + head * value_strides[kind, 0] + page * TOKENS * value_strides[kind, 1]
                for _ in range(TOKENS):
                    copy_bytes(row, to, channels * value_bytes)
                    row += value_strides[kind, 1]
                    to += channels * value_bytes
            else:
                block = codes[kind][page, head]
                if units[kind] != TOKEN:
                    to = store_scales(units[kind], scale_bits[kind][page, head], zeros[kind][page, head], to)
                top = 0
                for t in range(TOKENS):
                    for c in range(channels):
                        top = max(top, block[t, c])
                shaped = columns.reshape(TOKENS, pairs) if kind == K else columns.reshape(TOKENS // 2, channels)
                pair_words(kind, block, shaped)
                order_streams(kind, shaped, streams)
                if fixed[kind]:
                    width = 1
                    while top >> width:
                        width += 1
                    mode = FIXED + width
                    to = pack_fixed(streams, width, to)
                else:
                    own = 2 * kind + 1
                    slot = own if books[own, LENGTHS] and top < books[own, LEVELS] else own - 1
                    mode = OWN_BOOK if slot == own else DEFAULT_BOOK
                    book = books[slot]
                    if not built[slot]:
                        built[slot] = True
                        build_words(book, words[slot])
                        pair_classes(kind, channels, book[CLASSES], of_pair[slot])
                    if book[LIMIT] + 2 * book[SPLIT] <= 14:
                        to = _pack_4(streams, of_pair[slot], words[slot], to, unit)
                    else:
                        to = _pack_2(streams, of_pair[slot], words[slot], to, unit)
                to = pad(to, begin)
            store_u32(begin + 4 * number, np.uint32((at - begin) | mode))
        store_u32(begin + 8 * heads, np.uint32(to - begin))
    offsets[pages] = to - address_of(buffer)


@compiled
def pair_classes(kind, channels, classes, of_pair):
    """Codebook class of every pair of every stream (section 4)."""
    for stream in range(STREAMS):
        for pair in range(channels // 2):
            if kind == K:
                channel = (stream & 3) * (channels // 4)
            else:
                channel = 8 * (pair // 8 + (stream >> 5) * (channels // 16))
            of_pair[stream, pair] = class_of(kind, channels, classes, channel)
