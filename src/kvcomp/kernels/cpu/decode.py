# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Blocks -> pairs of codes (docs/format.md, sections 4 and 5), the innermost loop of every reader.

Decoded pairs lie where the products want them: K as [channel pair][token], V as [token pair][channel].
A pair has 16 bits in one of two forms: *narrow* ``bits : 6 | a : 5 | b : 5``, an entry of a decode table as it is, or
*wide* ``a : 8 | b : 8``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvcomp.codec.block import STREAMS
from kvcomp.kernels.cpu.bits import (
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
    splat,
    vector,
)
from kvcomp.spec import PAGE_TOKENS as TOKENS

K, V = np.int64(0), np.int64(1)  # not int: Numba would compile for each of the two numbers
NARROW_A, NARROW_B = 6, 11  # first bits of a and b

# A book's description (see ``_describe`` in tables.py) says how many classes it has, 0 for no book. Then come these
# columns for each of four classes.
CLASSES, MOST_CLASSES = 0, 4
LENGTHS, FIRST, LEVELS, SPLIT, SYMBOLS, BITS, FORM, FAST, OF_CLASS = 0, 1, 2, 3, 4, 5, 6, 7, 8
COLUMNS = 1 + MOST_CLASSES * OF_CLASS
WIDE, NARROW, EMPTY = 0, 1, 2  # forms; of a class of a single code, which takes no bits, no pairs are written

TOGETHER = 8  # TOGETHER streams are decoded at the same time: lanes j, j + 4, .. j + 28 of one s
STREAM_STEP = 4 * 8  # bytes between their positions


@compiled
def of_class(book, index, column):
    """A column of one of a book's classes."""
    return book[1 + index * OF_CLASS + column]


_reversed = emitted(types.int64, [types.int64], lambda context, builder, args: builder.bitreverse(args[0]))


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
            words[symbol] = _reversed(first[length] << (64 - length))
            first[length] += 1


@compiled
def build_table(lengths, symbols, bits, table):
    """Build the decode table of a class whose longest code has so many bits: 2^bits narrow entries.

    Where codes are split, the entries are of the high parts. The codes of a length are entered when the table has just
    one place for each, then the table is doubled.
    """
    begin = np.zeros(18, np.int64)
    for symbol in range(symbols * symbols):
        begin[load_u8(lengths + symbol) + 1] += 1
    for length in range(17):
        begin[length + 1] += begin[length]
    ordered = np.empty(symbols * symbols, np.uint16)  # entries by length
    fill = begin.copy()
    for a in range(symbols):
        for b in range(symbols):
            length = np.int64(load_u8(lengths + a * symbols + b))
            ordered[fill[length]] = length | a << NARROW_A | b << NARROW_B
            fill[length] += 1
    table[0] = 0  # a single symbol takes no bits
    code, size = 0, 1
    for length in range(1, bits + 1):
        for i in range(size):
            table[size + i] = table[i]
        size *= 2
        for index in range(begin[length], begin[length + 1]):
            table[_reversed(code << (64 - length))] = ordered[index]
            code += 1
        code <<= 1


def _pair_decoder(*window_pairs: int, checked: bool = False, split: bool = False) -> Any:
    """``decode(positions, table, table_bits, k, offsets, out, low, pairs)``: the next pairs of eight streams.

    The streams are interleaved. All but table_bits, k and pairs are addresses. Returns how many pairs there were.
    positions: int64, the absolute bit positions of the streams, which move on; three lie between two of these streams.
    offsets: int64, where each pair lies in the output, in bytes; the eight streams lie side by side.
    pairs: a multiple of all window_pairs.
    checked: stop before a window whose pairs do not fit the 57 bits that are sure.
    split: k low bits of a, then of b follow each code word. For ``join`` what follows goes to ``low``, at the same
    place.

    A stream's window is 64 bits from its position, ended by a sentinel 1: its leading zeros count what was taken.
    Positions stay in memory: registers are for the windows.
    """

    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        positions, table, table_bits, k, offsets, out, low, pairs = args
        mask = builder.not_(builder.shl(I64(-1), table_bits))
        done = cgutils.alloca_once_value(builder, I64(0))
        head, body, end = (builder.append_basic_block(name) for name in ("head", "body", "end"))
        builder.branch(head)

        builder.position_at_end(head)
        pair = builder.load(done, typ=I64)
        builder.cbranch(builder.icmp_signed("<", pair, pairs), body, end)

        builder.position_at_end(body)
        for first, count in zip(accumulate((0, *window_pairs)), window_pairs, strict=False):
            windows = []
            for stream in range(TOGETHER):
                position = builder.load(at(builder, positions, STREAM_STEP * stream), typ=I64)
                bits = builder.load(at(builder, builder.lshr(position, I64(3))), align=1, typ=I64)
                windows.append(builder.or_(builder.lshr(bits, builder.and_(position, I64(7))), I64(-(1 << 63))))
            for i in range(first, first + count):
                offset = builder.load(at(builder, builder.add(offsets, builder.shl(pair, I64(3))), 8 * i), typ=I64)
                target, of_low = builder.add(out, offset), builder.add(low, offset)
                for stream in range(TOGETHER):
                    index = builder.shl(builder.and_(windows[stream], mask), I64(1))
                    found = builder.load(at(builder, builder.add(table, index)), typ=I16)
                    builder.store(found, at(builder, target, 2 * stream), align=2)
                    rest = builder.lshr(windows[stream], builder.and_(builder.zext(found, I64), I64(63)))
                    if split:
                        builder.store(builder.trunc(rest, I16), at(builder, of_low, 2 * stream), align=2)
                        rest = builder.lshr(rest, builder.shl(k, I64(1)))
                    windows[stream] = rest
            if checked:
                over = I64(0)  # negative once the sentinel has come down to the lowest six bits of a window
                for window in windows:
                    over = builder.or_(over, builder.sub(window, I64(64)))
                go_on = builder.append_basic_block("go_on")
                builder.cbranch(builder.icmp_signed("<", over, I64(0)), end, go_on)
                builder.position_at_end(go_on)
            for stream in range(TOGETHER):
                slot = at(builder, positions, STREAM_STEP * stream)
                taken = builder.ctlz(windows[stream], I1(1))
                builder.store(builder.add(builder.load(slot, typ=I64), taken), slot)
            builder.store(builder.add(pair, I64(first + count)), done)
        builder.branch(head)

        builder.position_at_end(end)
        return builder.load(done, typ=I64)

    return emitted(types.int64, [types.int64] * 8, emit)


def _joiner(lanes: int) -> Any:
    """``join(pairs, low, k, count)``: narrow pairs and the low bits of each to wide pairs, in place.

    The low bits are k of a and then k of b; ``count`` is a multiple of lanes.
    """
    words_of = vector(I16, lanes)

    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        pairs, low, k, count = args
        k = builder.trunc(k, I16)
        of_one = builder.not_(builder.shl(I16(-1), k))
        high = builder.shl(I16(31), k)
        masks = [high, builder.shl(high, I16(8)), of_one, builder.shl(of_one, I16(8))]
        shifts = [builder.sub(I16(NARROW_A), k), builder.sub(I16(NARROW_B - 8), k), builder.sub(I16(8), k)]
        high_a, high_b, low_a, low_b = (splat(builder, mask, lanes) for mask in masks)
        down_a, down_b, up_b = (splat(builder, shift, lanes) for shift in shifts)
        with cgutils.for_range_slice(builder, I64(0), count, I64(lanes), I64) as (i, _):
            place, of_low = (at(builder, builder.add(x, builder.shl(i, I64(1)))) for x in (pairs, low))
            words, rest = (builder.load(x, align=2, typ=words_of) for x in (place, of_low))
            a = builder.or_(builder.and_(builder.lshr(words, down_a), high_a), builder.and_(rest, low_a))
            b = builder.and_(builder.lshr(words, down_b), high_b)
            b = builder.or_(b, builder.and_(builder.shl(rest, up_b), low_b))
            builder.store(builder.or_(a, b), place, align=2)

    return emitted(types.void, [types.int64] * 4, emit)


_narrow_4, _narrow_8 = _pair_decoder(4), _pair_decoder(8, checked=True)
_split_4, _split_8 = _pair_decoder(4, checked=True, split=True), _pair_decoder(3, 3, 2, split=True)
_split_2 = _pair_decoder(2, split=True)
_join_8, _join_16 = _joiner(8), _joiner(16)


@compiled
def decode_pairs(book, index, positions, table, offsets, out, low, pairs):
    """Decode the pairs of a class, a multiple of 8.

    A window has as many as always fit or, where such mostly do, twice as many.
    """
    form, bits, split = of_class(book, index, FORM), of_class(book, index, BITS), of_class(book, index, SPLIT)
    fast = of_class(book, index, FAST)
    done = pairs if form == EMPTY else 0
    while done < pairs:
        if form == NARROW:
            if fast:
                done += _narrow_8(positions, table, bits, split, offsets + 8 * done, out, low, pairs - done)
            if done < pairs:
                some = 8 if fast else pairs
                done += _narrow_4(positions, table, bits, split, offsets + 8 * done, out, low, some)
        else:
            if not fast:
                done += _split_8(positions, table, bits, split, offsets, out, low, pairs)
            else:
                done += _split_4(positions, table, bits, split, offsets + 8 * done, out, low, pairs - done)
                if done < pairs:
                    done += _split_2(positions, table, bits, split, offsets + 8 * done, out, low, 4)


@compiled
def join(book, index, rows, columns, row_bytes, pairs, low):
    """Make the pairs of a class wide by their low bits, if that is its form.

    The rows have so many columns, a multiple of 8.
    """
    split = of_class(book, index, SPLIT)
    if of_class(book, index, FORM) == WIDE:
        for row in range(rows):
            if columns % 16:
                _join_8(pairs + row * row_bytes, low + row * row_bytes, split, columns)
            else:
                _join_16(pairs + row * row_bytes, low + row * row_bytes, split, columns)


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
def unit_bits(channels):
    """The logarithm of the bits that a unit of a stream's length stands for: ``codec.block.length_unit``."""
    return 2 if channels <= 128 else 3 if channels <= 256 else 4


@compiled
def stream_offset(kind, channels, s, j):
    """Byte offset of the streams (s, j, g = 0 .. 7), which lie side by side."""
    if kind == K:
        return j * (channels // 8) * 128 + s * 64
    return j * 2 * channels + s * channels


def _begin(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    codes, kind, unit_bits, positions = args
    four = vector(I64, 4)

    def moved(x: ir.Value, lanes: int) -> ir.Value:
        return builder.shuffle_vector(x, ir.Constant(four, [0] * 4), integers(I32, [*[4] * lanes, *range(4 - lanes)]))

    head = builder.zext(builder.load(at(builder, codes), align=1, typ=I32), I64)
    width = builder.and_(head, I64(15))
    mask = splat(builder, builder.not_(builder.shl(I64(-1), width)), 4)
    steps = builder.mul(splat(builder, width, 4), integers(I64, range(4)))
    shifts = integers(I64, range(4, 4 + 4 * 7, 7))
    bases = builder.and_(builder.lshr(splat(builder, head, 4), shifts), integers(I64, [127] * 4))
    differences = builder.add(codes, I64(4))
    first = builder.add(builder.shl(differences, I64(3)), builder.shl(width, I64(6)))
    so_far = splat(builder, first, 4)
    is_key = builder.icmp_signed("==", kind, I64(K))
    for four_streams in range(STREAMS // 4):
        quarter = builder.shuffle_vector(bases, bases, integers(I32, [four_streams // 4] * 4))
        bit = builder.mul(width, I64(4 * four_streams))
        word = builder.load(at(builder, builder.add(differences, builder.lshr(bit, I64(3)))), align=1, typ=I64)
        word = splat(builder, builder.lshr(word, builder.and_(bit, I64(7))), 4)
        lengths = builder.and_(builder.lshr(word, steps), mask)
        lengths = builder.add(lengths, builder.select(is_key, bases, quarter))
        lengths = builder.shl(lengths, splat(builder, unit_bits, 4))
        sums = builder.add(lengths, moved(lengths, 1))
        sums = builder.add(sums, moved(sums, 2))
        place = at(builder, positions, 8 * 4 * four_streams)
        builder.store(builder.add(so_far, builder.sub(sums, lengths)), place, align=8)
        so_far = builder.add(so_far, builder.shuffle_vector(sums, sums, integers(I32, [3] * 4)))


# begin_streams(codes, kind, unit_bits, positions): where the streams of a block begin, in bits from address 0.
# It goes by the lengths at ``codes``, in units of 2^unit_bits bits.
begin_streams = emitted(types.void, [types.int64] * 4, _begin)


@compiled
def decode_huffman(codes, kind, channels, book, tables, offsets, positions, out, low):
    """Decode the lengths of 64 streams, and the streams behind them, to pairs; all are addresses but ``book``.

    tables: int64 [classes], addresses. positions: scratch, int64 [64]. low: scratch, as large as ``out``.
    """
    table_of, classes = integers_at(tables, MOST_CLASSES), book[CLASSES]
    begin_streams(codes, kind, unit_bits(channels), positions)
    for s in range(2):
        first, last = s * (channels // 16), (s + 1) * (channels // 16)  # tiles of eight channels of V, eight pairs each
        tile = first
        while tile < last:
            index, end = 0, last
            if kind == V and classes > 1:
                index = class_of(V, channels, classes, 8 * tile)
                end = min(last, (channels // 8 * (index + 1) + 3) // 4)
            for j in range(4):
                if kind == K and classes > 1:
                    index = j
                streams, place = positions + (STREAMS // 2 * s + j) * 8, stream_offset(kind, channels, s, j)
                places, pairs = offsets + 64 * (tile - first), 8 * (end - tile)
                decode_pairs(book, index, streams, table_of[index], places, out + place, low + place, pairs)
            if kind == V:
                join(book, index, TOKENS // 2, 8 * (end - tile), 2 * channels, out + 16 * tile, low + 16 * tile)
            tile = end
    if kind == K:
        for j in range(4):
            place = stream_offset(kind, channels, 0, j)
            join(book, j if classes > 1 else 0, 1, TOKENS * channels // 8, 0, out + place, low + place)
