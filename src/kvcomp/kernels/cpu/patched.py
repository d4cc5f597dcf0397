# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Blocks of pieces with widths of their own and exceptions (docs/format.md, section 5).

A half is unpacked to floats and its exceptions are added there, before anything is multiplied. So an exception costs
the same for any number of queries, and the products are those of ``fixed``: of K a run stays with eight tokens and
takes four positions of every piece, of V a piece is a run. What is unpacked are codes from -128 to 127.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvcomp.codec.patched import HALF, LEAST_OFFSET, PIECE, PIECE_CODES, POSITION_BITS
from kvcomp.kernels.cpu.bits import (
    F32,
    I32,
    I64,
    LANES,
    at,
    compiled,
    emitted,
    integers,
    integers_at,
    load_f32,
    load_i8,
    load_u8,
    load_u16,
    store_f32,
    vector,
)
from kvcomp.kernels.cpu.decode import V, stream_offset
from kvcomp.kernels.cpu.fixed import (
    GROUPS,
    PARTS,
    ROW_FLOATS,
    multiply_run,
    pair_up,
    unpacker,
)

HALF_ROW = 4 * HALF  # bytes of a row of words
f32, i64 = np.float32, np.int64

unpack_piece = unpacker(HALF_ROW, framed=True)


@compiled
def head_bytes(channels):
    """``codec.patched.head_bytes``."""
    return (3 * (channels // 8) + 3) & ~3


@compiled
def half_bytes(block, channels, half):
    """Bytes of the words of a half of a block."""
    pieces, total = channels // PIECE, i64(0)
    for i in range(half * pieces, (half + 1) * pieces):
        total += i64(load_u8(block + i))
    return HALF_ROW * ((PIECE * total + 31) >> 5)


@compiled
def begin_halves(block, channels):
    """Where the words of the two halves and the exceptions of a block begin."""
    first = block + head_bytes(channels)
    second = first + half_bytes(block, channels, 0)
    return first, second, second + half_bytes(block, channels, 1)


@compiled
def is_empty(block, channels, piece):
    """Whether all codes of a piece are 0 and take no bits."""
    pieces = channels // 8
    return load_u8(block + piece) | load_u8(block + pieces + piece) | load_u8(block + 2 * pieces + piece) == 0


@compiled
def filled_pieces(block, channels, half):
    """Pieces of a half up to the last that is not empty."""
    pieces = channels // PIECE
    count = pieces
    while count > 0 and is_empty(block, channels, half * pieces + count - 1):
        count -= 1
    return count


@compiled
def unpack_half(block, kind, channels, half, count, base, words, exceptions, out):
    """Unpack the first ``count`` pieces of a half, behind which all are empty, to float32 codes plus ``base``.

    words, exceptions: where those of the half begin. out: of K [four tokens][piece][four channels][lane], of V
    [piece][position][lane]. Returns where the exceptions end.
    """
    pieces, bit, four = channels // 8, i64(0), i64(4 * ROW_FLOATS)
    next_piece, next_four = (4 * four, four) if kind == V else (four, count * four)
    for i in range(count):
        piece, to = half * (channels // PIECE) + i, out + i * next_piece
        width, frame = i64(load_u8(block + piece)), f32(load_i8(block + pieces + piece)) + base
        unpack_piece(words + HALF_ROW * (bit >> 5), width, (bit & 31) >> 4, to, frame, next_four)
        bit += PIECE * width
        end = exceptions + 2 * i64(load_u8(block + 2 * pieces + piece))
        while exceptions < end:
            exception = i64(load_u16(exceptions))
            place = exception & (PIECE_CODES - 1)
            code = to + (place >> 7) * next_four + 4 * (place & 127)
            store_f32(code, load_f32(code) + f32((exception >> POSITION_BITS) + LEAST_OFFSET))
            exceptions += 2
    return exceptions


@compiled
def multiply_patched(block, kind, channels, factors, factor_bytes, queries, unpacked, out, out_bytes):
    """``fixed.multiply`` for the pieces at an address; factors of K are those of ``step_keys``."""
    first, second, exceptions = begin_halves(block, channels)
    for half in range(2):
        count = filled_pieces(block, channels, half)
        words = second if half else first
        exceptions = unpack_half(block, kind, channels, half, count, f32(0), words, exceptions, unpacked)
        if kind == V:
            for i in range(count):
                piece = half * (channels // PIECE) + i
                if not is_empty(block, channels, piece):
                    codes, place = unpacked + ROW_FLOATS * PIECE * i, out + 4 * GROUPS * piece
                    multiply_run(codes, PIECE, factors, factor_bytes, queries, place, out_bytes)
        else:
            for four in range(4):
                codes, place = unpacked + ROW_FLOATS * 4 * count * four, out + 4 * GROUPS * (four + 4 * half)
                multiply_run(codes, 4 * count, factors, factor_bytes, queries, place, out_bytes)


def _step(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    source, channels, out = args
    order = integers(I32, [4 * j + channel for channel in range(4) for j in range(PARTS)])
    with cgutils.for_range_slice(builder, I64(0), builder.shl(channels, I64(2)), I64(4 * LANES), I64) as (offset, _):
        x = builder.load(at(builder, builder.add(source, offset)), align=4, typ=vector(F32))
        builder.store(builder.shuffle_vector(x, x, order), at(builder, builder.add(out, offset)), align=4)


step_keys = emitted(types.void, [types.int64] * 3, _step)  # floats by channel to the order of K's factors


@compiled
def decode_patched(block, kind, channels, offsets, unpacked, out):
    """Decode pieces to wide pairs of codes plus 128, address to address; ``unpacked`` is scratch as in ``multiply``."""
    first, second, exceptions = begin_halves(block, channels)
    count, place_of = channels // PIECE, integers_at(offsets, channels // 2)
    for half in range(2):
        words = second if half else first
        exceptions = unpack_half(block, kind, channels, half, count, f32(128), words, exceptions, unpacked)
        for pair in range(channels // 2):
            if kind == V:
                target, step = stream_offset(V, channels, half, 0) + place_of[pair], 2 * channels
            else:  # [channel pair][64 tokens]; a piece has eight pairs, two of each lane & 3
                four, in_four = pair // (2 * count), pair % (2 * count)
                target, step = 128 * (8 * (in_four >> 1) + (in_four & 1)) + 16 * (four + 4 * half), 256
            pair_up(unpacked + 2 * ROW_FLOATS * pair, out + target, step)
