# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Codes -> pages (docs/format.md, sections 2, 4 and 5)."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcomp.codec.block import LEAST_LENGTHS, MAX_DIFFERENCE_BITS, STREAMS
from kvcomp.codec.dtypes import BLOCK, DEFAULT_BOOK, FIXED, HEAD, OWN_BOOK, PATCHED, RAW, TOKEN
from kvcomp.codec.patched import PIECE_CODES
from kvcomp.codec.quantise import MAX_CODES
from kvcomp.kernels.cpu.bits import (
    address_of,
    clear_bytes,
    compiled,
    copy_bytes,
    load_u32,
    move_bytes,
    store_u16,
    store_u32,
    store_u64,
)
from kvcomp.kernels.cpu.count import code_range, pair_words
from kvcomp.kernels.cpu.decode import (
    BITS,
    CLASSES,
    FIRST,
    LENGTHS,
    LEVELS,
    MOST_CLASSES,
    SPLIT,
    SYMBOLS,
    K,
    canonical_words,
    class_of,
    of_class,
    unit_bits,
)
from kvcomp.kernels.cpu.pack_patched import choose_all, order_pieces, pack_patched
from kvcomp.kernels.cpu.page import TOKENS
from kvcomp.spec import CODINGS

i64, u64 = np.int64, np.uint64
HUFFMAN, PATCHED_CODING = CODINGS.index("huffman"), CODINGS.index("patched")
PAIR_BITS = 18  # most bits of a pair: 12 of its code word and 3 low bits of each code
PAIR_MASK = (1 << PAIR_BITS) - 1
MOST_LENGTHS = LEAST_LENGTHS + 8 * MAX_DIFFERENCE_BITS  # bytes that the lengths of a block's streams can take


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
    """Fill in the words of a book: word[b << 8 | a] = code word with the split bits, and its length << 18.

    ``words`` has for each class the address of the word of (0, 0).
    """
    canonical = np.empty(MAX_CODES * MAX_CODES, np.uint16)
    for index in range(book[CLASSES]):
        split, levels, symbols = (
            of_class(book, index, SPLIT),
            of_class(book, index, LEVELS),
            of_class(book, index, SYMBOLS),
        )
        lengths, first = of_class(book, index, LENGTHS), of_class(book, index, FIRST)
        lengths_of = code_lengths(lengths, symbols * symbols)
        canonical_words(lengths, symbols * symbols, of_class(book, index, BITS), canonical)
        low = (1 << split) - 1
        for a in range(levels):
            for b in range(levels):
                symbol = (a >> split) * symbols + (b >> split)
                length = i64(lengths_of[symbol])
                word = i64(canonical[symbol]) | (a & low | (b & low) << split) << length
                at = words[index] + 4 * ((b + first) << 8 | a + first)
                store_u32(at, np.uint32(word | (length + 2 * split) << PAIR_BITS))


@compiled
def covers(book, kind, low, high):
    """Say whether a book has the codes of a block, whose channels reach from ``low`` to ``high``, each in its class."""
    channels = low.size
    if book[CLASSES] == 0:
        return False
    for c in range(channels):
        index = class_of(kind, channels, book[CLASSES], c)
        first = of_class(book, index, FIRST)
        if low[c] < first or high[c] >= first + of_class(book, index, LEVELS):
            return False
    return True


@compiled
def code_lengths(lengths, count):
    """Copy the bytes at an address to an array."""
    copy = np.empty(count, np.uint8)
    fill_bytes(lengths, copy)
    return copy


@compiled
def fill_bytes(source, array):
    copy_bytes(source, address_of(array), i64(array.size))


def _packer(pairs_a_flush: int) -> Any:
    """``pack(streams, of_pair, tables, to, unit, lengths)``: Huffman streams to an address, their lengths in units.

    Returns their end. tables: int64, for each class the address where the words of ``build_words`` would begin if
    ``first`` were 0. A flush leaves at most 7 bits, so ``pairs_a_flush`` pairs may have 57 bits.
    """

    @compiled
    def pack(streams, of_pair, tables, to, unit, lengths):
        waiting, held = u64(0), u64(0)  # bits, and how many
        for stream in range(STREAMS):
            begin = to * 8 + i64(held)
            for pair in range(0, streams.shape[1], pairs_a_flush):
                table = tables[of_pair[stream, pair]]
                for i in range(pairs_a_flush):
                    entry = u64(load_u32(table + 4 * i64(streams[stream, pair + i])))
                    waiting |= (entry & u64(PAIR_MASK)) << held
                    held += entry >> u64(PAIR_BITS)
                store_u64(to, waiting)
                to += i64(held >> u64(3))
                waiting >>= held & u64(0x38)
                held &= u64(7)
            bits = to * 8 + i64(held) - begin
            units = (bits + unit - 1) // unit
            lengths[stream] = units
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
def store_lengths(kind, lengths, to):
    """Store the lengths of 64 streams, in units, at an address (section 5). Returns the end."""
    head, differences = i64(0), i64(0)
    for group in range(4):
        base = i64(127)
        most = i64(0)
        for i in range(STREAMS // 4):
            length = lengths[4 * i + group if kind == K else 16 * group + i]
            base, most = min(base, length), max(most, length)
        head |= base << (4 + 7 * group)
        differences |= most - base
    width = i64(0)
    while differences >> width:
        width += 1
    store_u32(to, np.uint32(head | width))
    to += 4
    waiting, held = u64(0), u64(0)
    for stream in range(STREAMS):
        group = stream & 3 if kind == K else stream >> 4
        waiting |= u64(lengths[stream] - (head >> (4 + 7 * group) & 127)) << held
        held += u64(width)
        if held >= u64(32):
            store_u32(to, np.uint32(waiting & u64(0xFFFFFFFF)))
            to += 4
            waiting >>= u64(32)
            held -= u64(32)
    return to


@compiled
def pack_fixed(streams, width, least, to):
    """Pack codes of a fixed width, from ``least`` on, behind the address ``to``. Returns the end.

    Word i of stream x goes to 4 (64 i + x) bytes behind it.
    """
    size = u64(width)
    rows = (2 * streams.shape[1] * width + 31) // 32
    for stream in range(STREAMS):
        waiting, held, place = u64(0), u64(0), to + 4 * stream
        for pair in range(streams.shape[1]):
            word = u64(streams[stream, pair])
            waiting |= ((word & u64(255)) - u64(least) | (word >> u64(8)) - u64(least) << size) << held
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
    """Store scales, as the bits of float32, and zeros at an address. Returns the end."""
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
    """Write zero bytes up to a multiple of 16 from ``begin``. Returns the end."""
    end = begin + ((to - begin + 15) & ~i64(15))
    clear_bytes(to, end - to)
    return end


@compiled
def place_words(books, tables):
    """Place the words of each book's classes in rows of 256 words. Returns the words of all.

    ``tables`` gets their byte offsets, as if ``first`` were 0.
    """
    total = 0
    for slot in range(4):
        for index in range(books[slot, CLASSES]):
            first = of_class(books[slot], index, FIRST)
            tables[slot, index] = 4 * (total - (first << 8 | first))
            total += of_class(books[slot], index, LEVELS) << 8
    return total


@compiled
def longest_pair(book):
    """Bits that a pair of codes takes at most."""
    longest = 0
    for index in range(book[CLASSES]):
        longest = max(longest, of_class(book, index, BITS) + 2 * of_class(book, index, SPLIT))
    return longest


@compiled
def fixed_codes(unit, low, high):
    """Width of a block whose codes have a fixed width, and the code that is stored as 0."""
    width = 1
    if unit == HEAD:
        while low.min() < 128 - (1 << (width - 1)) or high.max() >= 128 + (1 << (width - 1)):
            width += 1
        return width, 128 - (1 << (width - 1))
    while high.max() >> width:
        width += 1
    return width, 0


@compiled(entry=True)
def encode_blocks(
    values, value_strides, value_bytes, codes, raws, scale_bits, zeros, units, codings, books, buffer, offsets
):  # fmt: skip
    """Write pages to a buffer, from its first byte on.

    Parameters
    ----------
    values
        int64 (2,): addresses of K and V, (heads, 64*pages, channels of each).
    value_strides
        Bytes between their heads and tokens.
    value_bytes
        Bytes of a value.
    codes, raws, scale_bits, zeros
        Pairs of arrays, of K and of V; scale_bits are the bits of float32.
    units
        int64 (2,): units of K and V.
    codings
        int64 (2,): codings of K and V, by their place in ``CODINGS``.
    books
        int64 (4, columns): K default, K own, V default, V own, as ``describe_books`` gives them.
    buffer
        uint8, large enough.
    offsets
        int64 (pages + 1,): filled with where each page begins, and the end.
    """
    pages, heads = codes[0].shape[:2]
    widest = max(codes[0].shape[3], codes[1].shape[3])
    all_streams = np.empty(STREAMS * widest // 2, np.uint16)
    columns = np.empty(TOKENS * widest // 2, np.uint16)
    lows, highs = np.empty(widest, np.uint8), np.empty(widest, np.uint8)
    tables = np.empty((4, MOST_CLASSES), i64)  # where the words of each book's classes would begin if ``first`` were 0
    memory = np.empty(place_words(books, tables), np.uint32)
    tables += address_of(memory)
    built = np.zeros(4, np.bool_)
    lengths = np.empty(STREAMS, i64)
    of_pair = np.empty((4, STREAMS, widest // 2), np.uint8)
    all_pieces, chosen = np.empty((widest // 8, PIECE_CODES), i64), np.empty((widest // 8, 3), i64)
    below = np.empty(MAX_CODES + 1, i64)
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
            channels = codes[kind].shape[3]
            pairs = channels // 2
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
                if units[kind] != TOKEN and units[kind] != HEAD:
                    to = store_scales(units[kind], scale_bits[kind][page, head], zeros[kind][page, head], to)
                low, high = lows[:channels], highs[:channels]
                code_range(block, low, high)
                streams = all_streams[: STREAMS * pairs].reshape(STREAMS, pairs)
                words = columns[: TOKENS * pairs]
                shaped = words.reshape(TOKENS, pairs) if kind == K else words.reshape(TOKENS // 2, channels)
                pair_words(kind, block, shaped)
                order_streams(kind, shaped, streams)
                slot = 2 * kind + 1
                while slot >= 2 * kind and (codings[kind] != HUFFMAN or not covers(books[slot], kind, low, high)):
                    slot -= 1
                if slot < 2 * kind:
                    width, least = fixed_codes(units[kind], low, high)
                    mode = FIXED + (width & 7)
                    pieces, of_block = all_pieces[: channels // 8], chosen[: channels // 8]
                    if codings[kind] == PATCHED_CODING:
                        order_pieces(kind, units[kind], block, pieces)
                        if choose_all(pieces, below, of_block) < 4 * STREAMS * ((channels * width + 31) // 32):
                            mode = PATCHED
                    if mode == PATCHED:
                        to = pack_patched(pieces, of_block, to)
                    else:
                        to = pack_fixed(streams, width, least, to)
                else:
                    mode = OWN_BOOK if slot == 2 * kind + 1 else DEFAULT_BOOK
                    book = books[slot]
                    if not built[slot]:
                        built[slot] = True
                        build_words(book, tables[slot])
                        pair_classes(kind, channels, book[CLASSES], of_pair[slot])
                    begin_streams = to + MOST_LENGTHS
                    unit = 1 << unit_bits(channels)
                    if longest_pair(book) <= 14:
                        end = _pack_4(streams, of_pair[slot], tables[slot], begin_streams, unit, lengths)
                    else:
                        end = _pack_2(streams, of_pair[slot], tables[slot], begin_streams, unit, lengths)
                    to = store_lengths(kind, lengths, to)
                    move_bytes(begin_streams, to, end - begin_streams)
                    to += end - begin_streams
                to = pad(to, begin)
            store_u32(begin + 4 * number, np.uint32((at - begin) | mode))
        store_u32(begin + 8 * heads, np.uint32(to - begin))
    offsets[pages] = to - address_of(buffer)
    return memory.size  # mentioned here, so that Numba keeps it until here


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
