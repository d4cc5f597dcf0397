# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Blocks -> pairs of codes (docs/format.md, sections 4 and 5), the innermost loop of every reader.

Decoded pairs lie in the order of their streams, [s][j][pair][g] (section 4), so that a store's place is known early. A
pair has 16 bits in one of two forms: *narrow* ``bits : 6 | a : 5 | b : 5``, an entry of a decode table as it is, or
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
    LANES,
    alone,
    at,
    compiled,
    emitted,
    integers,
    integers_at,
    load_u8,
    splat,
    vector,
)

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
PAIR_STEP = 2 * TOGETHER  # bytes from the pairs that they begin with to those that follow


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
    # The first code of each length; so far first[length + 1] counts those of this length.
    for length in range(1, limit + 1):
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
    one place for each, then the table is doubled. The place of a word is its complement: see ``_pair_decoder``.
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
            table[size - 1 - _reversed(code << (64 - length))] = ordered[index]
            code += 1
        code <<= 1


def _pair_decoder(*window_pairs: int, checked: bool = False, split: bool = False) -> Any:
    """``decode(positions, table, table_bits, k, out, low, pairs)``: the next pairs of eight streams, g = 0 to 7.

    The streams are interleaved. All but table_bits, k and pairs are addresses. Returns how many pairs there were.
    positions: int64, one before the absolute bit positions of the streams, which move on; three lie between two.
    pairs: a multiple of all window_pairs.
    checked: stop before a window whose pairs do not fit the 56 bits that are sure.
    split: k low bits of a, then of b follow each code word. For ``join`` they go to ``low``, at the same place, with a
    bit before them.

    A stream's window is 64 bits from its position, ended by a sentinel 1: its leading zeros count what was taken. Its
    first bit is not the stream's, so that the next word stands where a byte offset in the table needs it. The
    complement of that word needs no copy of the window (``andn``). Positions are locals: stores to ``out`` would make
    LLVM load them anew.
    """

    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        positions, table, table_bits, k, out, low, pairs = args
        mask = builder.shl(builder.not_(builder.shl(I64(-1), table_bits)), I64(1))
        end, of_low = builder.add(out, builder.mul(pairs, I64(PAIR_STEP))), builder.sub(low, out)
        place = cgutils.alloca_once_value(builder, out)
        slots = [at(builder, positions, STREAM_STEP * stream) for stream in range(TOGETHER)]
        local = [cgutils.alloca_once_value(builder, builder.load(slot, typ=I64)) for slot in slots]
        head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
        builder.branch(head)

        builder.position_at_end(head)
        to = builder.load(place, typ=I64)
        builder.cbranch(builder.icmp_unsigned("<", to, end), body, done)

        builder.position_at_end(body)
        for first, count in zip(accumulate((0, *window_pairs)), window_pairs, strict=False):
            windows = []
            for moving in local:
                position = builder.load(moving, typ=I64)
                bits = builder.load(at(builder, builder.lshr(position, I64(3))), align=1, typ=I64)
                windows.append(builder.lshr(bits, builder.and_(position, I64(7))))
            for i in range(first, first + count):
                for stream, window in enumerate(windows):
                    offset = PAIR_STEP * i + 2 * stream
                    index = builder.and_(builder.not_(window), mask)
                    found = builder.load(at(builder, builder.add(table, index)), typ=I16)
                    builder.store(found, at(builder, to, offset), align=2)
                    rest = window if i > first else builder.or_(window, I64(-(1 << 63)))
                    rest = builder.lshr(rest, builder.and_(builder.zext(found, I64), I64(63)))
                    if split:
                        builder.store(builder.trunc(rest, I16), at(builder, builder.add(to, of_low), offset), align=2)
                        rest = builder.lshr(rest, builder.shl(k, I64(1)))
                    windows[stream] = rest
            if checked:
                over = I64(0)  # negative once the sentinel has come down to the lowest seven bits of a window
                for window in windows:
                    over = builder.or_(over, builder.sub(window, I64(128)))
                go_on = builder.append_basic_block("go_on")
                builder.cbranch(builder.icmp_signed("<", over, I64(0)), done, go_on)
                builder.position_at_end(go_on)
            for window, moving in zip(windows, local, strict=True):
                taken = builder.ctlz(window, I1(1))
                builder.store(builder.add(builder.load(moving, typ=I64), taken), moving)
            builder.store(builder.add(to, I64(PAIR_STEP * (first + count))), place)
        builder.branch(head)

        builder.position_at_end(done)
        for slot, moving in zip(slots, local, strict=True):
            builder.store(builder.load(moving, typ=I64), slot)
        return builder.sdiv(builder.sub(builder.load(place, typ=I64), out), I64(PAIR_STEP))

    name = f"decode_{'_'.join(map(str, window_pairs))}{'_checked' * checked}{'_split' * split}"
    return emitted(types.int64, [types.int64] * 7, alone(name, emit, I64))


def _join(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    pairs, low, k, count = args
    k, words_of = builder.trunc(k, I16), vector(I16)
    of_one = builder.not_(builder.shl(I16(-1), k))
    high = builder.shl(I16(31), k)
    masks = [high, builder.shl(high, I16(8)), of_one, builder.shl(of_one, I16(8))]
    shifts = [builder.sub(I16(amount), k) for amount in (NARROW_A, NARROW_B - 8, 7)]
    high_a, high_b, low_a, low_b = (splat(builder, mask) for mask in masks)
    down_a, down_b, up_b = (splat(builder, shift) for shift in shifts)
    with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (i, _):
        place, of_low = (at(builder, builder.add(x, builder.shl(i, I64(1)))) for x in (pairs, low))
        words, rest = (builder.load(x, align=2, typ=words_of) for x in (place, of_low))
        a = builder.and_(builder.lshr(words, down_a), high_a)
        a = builder.or_(a, builder.and_(builder.lshr(rest, splat(builder, I16(1))), low_a))
        b = builder.and_(builder.lshr(words, down_b), high_b)
        b = builder.or_(b, builder.and_(builder.shl(rest, up_b), low_b))
        builder.store(builder.or_(a, b), place, align=2)


# join(pairs, low, k, count): narrow pairs and the low bits of each to wide pairs, in place. Low bits are a bit of no
# meaning, k of a and then k of b; ``count`` is a multiple of 16.
join = emitted(types.void, [types.int64] * 4, _join)

_narrow_4, _narrow_8 = _pair_decoder(4), _pair_decoder(8, checked=True)
_split_4, _split_8 = _pair_decoder(4, checked=True, split=True), _pair_decoder(3, 3, 2, split=True)
_split_2 = _pair_decoder(2, split=True)


@compiled
def decode_pairs(book, index, positions, table, out, low, pairs):
    """Decode the pairs of a class, a multiple of 8 for each of eight streams, to the form of that class.

    A window has as many as always fit or, where such mostly do, twice as many.
    """
    form, bits, split = of_class(book, index, FORM), of_class(book, index, BITS), of_class(book, index, SPLIT)
    fast = of_class(book, index, FAST)
    done = pairs if form == EMPTY else 0
    while done < pairs:
        to, low_to = out + PAIR_STEP * done, low + PAIR_STEP * done
        if form == NARROW:
            if fast:
                done += _narrow_8(positions, table, bits, split, to, low_to, pairs - done)
                to = out + PAIR_STEP * done
            if done < pairs:
                done += _narrow_4(positions, table, bits, split, to, low_to, 8 if fast else pairs)
        else:
            if not fast:
                done += _split_8(positions, table, bits, split, to, low_to, pairs)
            else:
                done += _split_4(positions, table, bits, split, to, low_to, pairs - done)
                if done < pairs:
                    to, low_to = out + PAIR_STEP * done, low + PAIR_STEP * done
                    done += _split_2(positions, table, bits, split, to, low_to, 4)
    if form == WIDE:
        join(out, low, split, TOGETHER * pairs)


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
    first = builder.sub(builder.add(builder.shl(differences, I64(3)), builder.shl(width, I64(6))), I64(1))
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


# begin_streams(codes, kind, unit_bits, positions): the bits before those that the streams of a block begin with, from
# address 0. It goes by the lengths at ``codes``, in units of 2^unit_bits bits.
begin_streams = emitted(types.void, [types.int64] * 4, _begin)


@compiled
def decode_huffman(codes, kind, channels, book, tables, positions, out, low):
    """Decode the lengths of 64 streams, and the streams behind them, to pairs; all are addresses but ``book``.

    tables: int64 [classes], addresses. positions: scratch, int64 [64]. low: scratch, as large as ``out``.
    """
    table_of, classes = integers_at(tables, MOST_CLASSES), book[CLASSES]
    begin_streams(codes, kind, unit_bits(channels), positions)
    half = channels // 16  # tiles of eight channels of V, eight pairs each, of a half s
    for stream in range(8):
        s, j = stream // 4, stream % 4
        streams, place = positions + 8 * (STREAMS // 2 * s + j), PAIR_STEP * 8 * half * stream
        tile = 0
        while tile < half:
            index, end = 0, half
            if classes > 1:
                index = j if kind == K else class_of(V, channels, classes, 8 * (s * half + tile))
                if kind == V:
                    end = min(half, (channels // 8 * (index + 1) + 3) // 4 - s * half)
            to = place + PAIR_STEP * 8 * tile
            decode_pairs(book, index, streams, table_of[index], out + to, low + to, 8 * (end - tile))
            tile = end
