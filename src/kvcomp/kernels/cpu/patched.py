# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Blocks of pieces with widths of their own and exceptions (docs/format.md, section 5).

A half is unpacked to floats and its exceptions are added there, before anything is multiplied. So an exception costs
the same for any number of queries, and the products are those of ``fixed``: of K a run stays with eight tokens and
takes four positions of every piece, of V a piece is a run. What is unpacked are codes from -128 to 127.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvcomp.codec.patched import HALF, LEAST_OFFSET, PIECE, PIECE_BYTES, PIECE_CODES, POSITION_BITS
from kvcomp.kernels.cpu.bits import (
    F32,
    I16,
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
    splat,
    store_f32,
    vector,
)
from kvcomp.kernels.cpu.decode import V, stream_offset
from kvcomp.kernels.cpu.fixed import (
    GROUPS,
    PARTS,
    ROW_FLOATS,
    codes_of,
    multiply_run,
    pair_up,
)

f32, i64 = np.float32, np.int64


def _unpack(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    """``unpack_piece(words, width, frame, out, step)``: the codes of a piece, as float32 [four][position of it][lane].

    frame: added to each code, as a float. step: bytes from four positions to the next.
    """
    words, width, frame, out, step = args
    done = builder.append_basic_block("done")
    chosen = builder.switch(width, done)
    for bits in range(9):
        case = builder.append_basic_block(f"unpack_{bits}")
        chosen.add_case(I64(bits), case)
        builder.position_at_end(case)
        _unpack_width(builder, bits, words, frame, out, step)
        builder.branch(done)
    builder.position_at_end(done)


def _unpack_width(
    builder: ir.IRBuilder, bits: int, words: ir.Value, frame: ir.Value, out: ir.Value, step: ir.Value
) -> None:
    frames = splat(builder, frame)
    with cgutils.for_range_slice(builder, I64(0), I64(ROW_FLOATS), I64(4 * LANES), I64) as (lanes, _):
        row, column = (builder.add(x, lanes) for x in (words, out))
        rows = [builder.load(at(builder, row, 4 * HALF * i), align=4, typ=vector(I32)) for i in range(bits // 2)]
        if bits % 2:
            last = at(builder, builder.add(words, builder.lshr(lanes, I64(1))), 4 * HALF * (bits // 2))
            rows.append(builder.zext(builder.load(last, align=2, typ=vector(I16)), vector(I32)))
        codes = codes_of(builder, rows, 0, bits) if bits else repeat(None, PIECE)
        for position, code in enumerate(codes):
            four = builder.add(column, builder.mul(step, I64(position // 4)))
            x = frames if code is None else builder.fadd(code, frames)
            builder.store(x, at(builder, four, ROW_FLOATS * (position % 4)), align=4)


unpack_piece = emitted(types.void, [types.int64, types.int64, types.float32, types.int64, types.int64], _unpack)


@compiled
def head_bytes(channels):
    """``codec.patched.head_bytes``."""
    return (3 * (channels // 8) + 3) & ~3


@compiled
def begin_exceptions(block, channels):
    """Where the exceptions of a block begin."""
    place = block + head_bytes(channels)
    for piece in range(channels // 8):
        place += PIECE_BYTES * i64(load_u8(block + piece))
    return place


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
    [piece][position][lane]. Returns where words and exceptions end.
    """
    pieces, four = channels // 8, i64(4 * ROW_FLOATS)
    next_piece, next_four = (4 * four, four) if kind == V else (four, count * four)
    for i in range(count):
        piece, to = half * (channels // PIECE) + i, out + i * next_piece
        width, frame = i64(load_u8(block + piece)), f32(load_i8(block + pieces + piece)) + base
        unpack_piece(words, width, frame, to, next_four)
        words += PIECE_BYTES * width
        end = exceptions + 2 * i64(load_u8(block + 2 * pieces + piece))
        while exceptions < end:
            exception = i64(load_u16(exceptions))
            place = exception & (PIECE_CODES - 1)
            code = to + (place >> 7) * next_four + 4 * (place & 127)
            store_f32(code, load_f32(code) + f32((exception >> POSITION_BITS) + LEAST_OFFSET))
            exceptions += 2
    return words, exceptions


@compiled
def multiply_patched(block, kind, channels, factors, factor_bytes, queries, unpacked, out, out_bytes):
    """``fixed.multiply`` for the pieces at an address; factors of K are those of ``step_keys``."""
    words, exceptions = block + head_bytes(channels), begin_exceptions(block, channels)
    for half in range(2):
        count = filled_pieces(block, channels, half)
        words, exceptions = unpack_half(block, kind, channels, half, count, f32(0), words, exceptions, unpacked)
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
    words, exceptions = block + head_bytes(channels), begin_exceptions(block, channels)
    count, place_of = channels // PIECE, integers_at(offsets, channels // 2)
    for half in range(2):
        words, exceptions = unpack_half(block, kind, channels, half, count, f32(128), words, exceptions, unpacked)
        for pair in range(channels // 2):
            if kind == V:
                target, step = stream_offset(V, channels, half, 0) + place_of[pair], 2 * channels
            else:  # [channel pair][64 tokens]; a piece has eight pairs, two of each lane & 3
                four, in_four = pair // (2 * count), pair % (2 * count)
                target, step = 128 * (8 * (in_four >> 1) + (in_four & 1)) + 16 * (four + 4 * half), 256
            pair_up(unpacked + 2 * ROW_FLOATS * pair, out + target, step)
