# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Blocks -> pairs of codes (docs/format.md, sections 4 and 5), the innermost loop of every reader.

Decoded pairs lie where the products want them: K as [channel pair][token], V as [token pair][channel], 16 bits each, in one of two
forms: *narrow* ``bits : 6 | a : 5 | b : 5``, an entry of a small decode table as it is, or *wide* ``a : 8 | b : 8``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvcomp.kernels.cpu_bits import (
    I1,
    I16,
    I32,
    I64,
    at,
    compiled,
    emitted,
    integers,
    integers_at,
    load_u8,
    load_u32,
    splat,
    vector,
)

K, V = np.int64(0), np.int64(1)  # not int: Numba would compile for each of the two numbers
RAW, DEFAULT_BOOK, OWN_BOOK, FIXED = 0, 1, 2, 8
NARROW_LEVELS = 32  # classes of at most so many levels and without split codes have entries of 16 bits: half the cache
NARROW_A, NARROW_B = 6, 11  # first bits of a and b

# A book's description (see ``_describe`` in cpu.py): how many classes it has, 0 for no book, and for each of four classes these columns.
CLASSES, MOST_CLASSES = 0, 4
LENGTHS, FIRST, LEVELS, SPLIT, SYMBOLS, BITS, NARROW, OF_CLASS = 0, 1, 2, 3, 4, 5, 6, 7
COLUMNS = 1 + MOST_CLASSES * OF_CLASS

STREAMS, TOGETHER = 64, 8  # TOGETHER streams are decoded at the same time: lanes j, j + 4, .. j + 28 of one s


@compiled
def of_class(book, index, column):
    """A column of one of a book's classes."""
    return book[1 + index * OF_CLASS + column]


@compiled
def entry_of(bits, a, b, narrow):
    """Entry of a decode table."""
    if narrow:
        return bits | a << NARROW_A | b << NARROW_B
    return bits | a << 16 | b << 24


@compiled
def canonical_words(lengths, count, limit, words):
    """Reversed canonical code words of ``count`` symbols (section 4); ``lengths`` is an address."""
    first = np.zeros(17, np.int64)
    for symbol in range(count):
        first[load_u8(lengths + symbol) + 1] += 1
    first[1] = 0
    code = 0
    for length in range(
        1, limit + 1
    ):  # the first code of each length; so far first[length + 1] counts those of this length
        number = first[length + 1]
        first[length] = code
        code = (code + number) << 1
    for symbol in range(count):
        length = np.int64(load_u8(lengths + symbol))
        words[symbol] = 0
        if length:
            code = first[length]
            first[length] += 1
            word = 0
            for _ in range(length):
                word = word << 1 | code & 1
                code >>= 1
            words[symbol] = word


@compiled
def build_table(lengths, symbols, split, bits, narrow, table):
    """Decode table of 2^bits entries for one class, whose longest code has that many bits; codes with their low bits zero.

    The codes of a length are entered when the table has just one place for each, then the table is doubled.
    """
    count = symbols * symbols
    words = np.empty(count, np.uint16)
    canonical_words(lengths, count, bits, words)
    # symbols by length
    begin = np.zeros(18, np.int64)
    for symbol in range(count):
        begin[load_u8(lengths + symbol) + 1] += 1
    for length in range(17):
        begin[length + 1] += begin[length]
    ordered = np.empty(count, np.uint16)
    fill = begin.copy()
    for symbol in range(count):
        length = load_u8(lengths + symbol)
        ordered[fill[length]] = symbol
        fill[length] += 1
    table[0] = entry_of(0, 0, 0, narrow)  # a single symbol takes no bits
    size = 1
    for length in range(1, bits + 1):
        for i in range(size):
            table[size + i] = table[i]
        size *= 2
        for index in range(begin[length], begin[length + 1]):
            symbol = np.int64(ordered[index])
            entry = entry_of(length, symbol // symbols << split, symbol % symbols << split, narrow)
            table[np.int64(words[symbol])] = entry


def _pair_decoder(entry: ir.IntType, split: bool, pairs_a_window: int) -> Any:
    """``decode(positions, table, table_bits, k, offsets, out, pairs)``: the next pairs of eight streams, interleaved.

    positions: address of eight int64, the absolute bit positions of the streams, which move on. table: address. k: low bits that follow
    each code word, first those of a; looked at only if ``split``. offsets: address of int64, where each pair lies in the output, in
    bytes; the eight streams lie side by side. pairs: a multiple of pairs_a_window.

    A stream's window is 64 bits from its position, ended by a sentinel 1, so that the leading zeros count what was taken. Positions
    stay in memory: registers are for the windows.
    """

    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        positions, table, table_bits, k, offsets, out, pairs = args
        mask = builder.not_(builder.shl(I64(-1), table_bits))
        scale = I64(1 if entry == I16 else 2)
        twice = builder.shl(k, I64(1))
        both = builder.not_(builder.shl(I64(-1), twice))  # the low bits of a and b
        apart = builder.sub(I64(8), k)  # what takes those of b to the second byte
        of_one = builder.not_(builder.shl(I64(-1), k))
        of_each = builder.or_(of_one, builder.shl(of_one, I64(8)))
        with cgutils.for_range_slice(builder, I64(0), pairs, I64(pairs_a_window), I64) as (pair, _):
            windows = []
            for stream in range(TOGETHER):
                position = builder.load(at(builder, positions, 8 * stream), typ=I64)
                bits = builder.load(at(builder, builder.lshr(position, I64(3))), align=1, typ=I64)
                windows.append(builder.or_(builder.lshr(bits, builder.and_(position, I64(7))), I64(-(1 << 63))))
            for i in range(pairs_a_window):
                offset = builder.load(at(builder, builder.add(offsets, builder.shl(pair, I64(3))), 8 * i), typ=I64)
                target = builder.add(out, offset)
                for stream in range(TOGETHER):
                    index = builder.shl(builder.and_(windows[stream], mask), scale)
                    found = at(builder, builder.add(table, index))
                    bits = head = builder.load(found, typ=I16)
                    if entry == I32:  # a second load is cheaper than a shift
                        head = builder.load(at(builder, builder.add(table, index), 2), typ=I16)
                    taken = builder.and_(builder.zext(bits, I64), I64(63))
                    rest = builder.lshr(windows[stream], taken)
                    if split:
                        low = builder.and_(rest, both)
                        low = builder.and_(builder.or_(low, builder.shl(low, apart)), of_each)
                        head = builder.or_(head, builder.trunc(low, I16))
                        rest = builder.lshr(rest, twice)
                    builder.store(head, at(builder, target, 2 * stream), align=2)
                    windows[stream] = rest
            for stream in range(TOGETHER):
                slot = at(builder, positions, 8 * stream)
                taken = builder.ctlz(windows[stream], I1(1))
                builder.store(builder.add(builder.load(slot, typ=I64), taken), slot)

    return emitted(types.void, [types.int64] * 7, emit)


_narrow_4, _wide_4 = _pair_decoder(I16, False, 4), _pair_decoder(I32, False, 4)
_split_4, _split_2 = _pair_decoder(I32, True, 4), _pair_decoder(I32, True, 2)


@compiled
def decode_pairs(book, index, positions, table, offsets, out, pairs):
    """The right decoder for a class: 57 bits of a window are sure, so four pairs of 14 bits or two of 18."""
    bits, split = of_class(book, index, BITS), of_class(book, index, SPLIT)
    if of_class(book, index, NARROW):
        _narrow_4(positions, table, bits, split, offsets, out, pairs)
    elif not split:
        _wide_4(positions, table, bits, split, offsets, out, pairs)
    elif bits + 2 * split <= 14:
        _split_4(positions, table, bits, split, offsets, out, pairs)
    else:
        _split_2(positions, table, bits, split, offsets, out, pairs)


@compiled
def pair_offsets(kind, channels, offsets):
    """Byte offset of each of a stream's D/2 pairs in the decoded block, without that of the stream (section 4)."""
    run = channels // 8
    for pair in range(channels // 2):
        if kind == K:  # [channel pair][64 tokens]
            offsets[pair] = pair % run * 128 + pair // run * 16
        else:  # [token pair][D channels]
            offsets[pair] = (8 * (pair >> 1 & 3) + 4 * (pair & 1)) * 2 * channels + 16 * (pair >> 3)


@compiled
def class_of(kind, channels, classes, channel):
    """Codebook class of a channel."""
    if classes == 1:
        return 0
    return channel // (channels // 4) if kind == K else 4 * (channel // 8) // (channels // 8)


@compiled
def stream_offset(kind, channels, s, j):
    """Byte offset of the streams (s, j, g = 0 .. 7), which lie side by side."""
    if kind == K:
        return j * (channels // 8) * 128 + s * 64
    return j * 2 * channels + s * channels


@compiled
def decode_huffman(codes, kind, channels, book, tables, offsets, positions, out):
    """The lengths of 64 streams and the streams behind them to pairs; all by address but ``book``.

    tables: int64 [classes], addresses. positions: scratch, int64 [64].
    """
    begin, table_of = integers_at(positions, STREAMS), integers_at(tables, MOST_CLASSES)
    unit = 4 if channels <= 128 else 8
    head = np.int64(load_u32(codes))
    width = head & 15
    differences, mask = 8 * (codes + 4), (1 << width) - 1
    position = differences + 64 * width
    for stream in range(STREAMS):
        lane, group = stream & 31, stream & 3 if kind == K else stream >> 4
        begin[(stream & 32) + (lane & 3) * TOGETHER + (lane >> 2)] = position
        difference = np.int64(load_u32(differences >> 3)) >> (differences & 7) & mask
        position += ((head >> (4 + 7 * group) & 127) + difference) * unit
        differences += width
    for s in range(2):
        for j in range(4):
            of_streams = positions + (s * 4 + j) * TOGETHER * 8
            target = out + stream_offset(kind, channels, s, j)
            if book[CLASSES] == 1 or kind == K:
                index = j if book[CLASSES] > 1 else 0
                decode_pairs(book, index, of_streams, table_of[index], offsets, target, channels // 2)
            else:  # a class of V is a run of tiles of eight channels, eight pairs each
                first, tiles = s * (channels // 16), channels // 16
                tile = 0
                while tile < tiles:
                    index = 4 * (first + tile) // (channels // 8)
                    end = tile + 1
                    while end < tiles and 4 * (first + end) // (channels // 8) == index:
                        end += 1
                    pairs = (end - tile) * 8
                    decode_pairs(book, index, of_streams, table_of[index], offsets + tile * 64, target, pairs)
                    tile = end


def _unpack(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    """One pair of 32 streams, from a row of words and the next; to four runs of eight streams."""
    words, following, shift, width, out, step = args
    low, high = (builder.load(at(builder, address), align=1, typ=vector(I32, 32)) for address in (words, following))
    wide, lanes = I64, 32
    both = builder.or_(
        builder.zext(low, vector(wide, lanes)),
        builder.shl(builder.zext(high, vector(wide, lanes)), integers(wide, [32] * lanes)),
    )
    both = builder.trunc(builder.lshr(both, splat(builder, shift, lanes)), vector(I32, lanes))
    count = builder.trunc(width, I32)
    mask = splat(builder, builder.not_(builder.shl(I32(-1), count)), lanes)
    second = builder.and_(builder.lshr(both, splat(builder, count, lanes)), mask)
    pair = builder.or_(builder.and_(both, mask), builder.shl(second, integers(I32, [8] * lanes)))
    pair = builder.trunc(pair, vector(I16, lanes))
    for j in range(4):
        streams = integers(I32, [4 * g + j for g in range(TOGETHER)])
        run = builder.shuffle_vector(pair, ir.Constant(pair.type, ir.Undefined), streams)
        builder.store(run, at(builder, builder.add(out, builder.mul(step, I64(j)))), align=2)


_unpack_pair = emitted(types.void, [types.int64] * 6, _unpack)


@compiled
def decode_fixed(codes, kind, channels, width, offsets, out):
    """Codes of a fixed width at an address, word i of stream x at 4 (64 i + x), to wide pairs at another."""
    rows = (channels * width + 31) // 32
    step = stream_offset(kind, channels, 0, 1)
    place_of = integers_at(offsets, channels // 2)
    for s in range(2):
        for pair in range(channels // 2):
            bit = 2 * pair * width
            row = bit >> 5
            words = codes + 4 * (STREAMS * row + 32 * s)
            following = words + (4 * STREAMS if row + 1 < rows else 0)
            target = out + stream_offset(kind, channels, s, 0) + place_of[pair]
            _unpack_pair(words, following, bit & 31, width, target, step)
