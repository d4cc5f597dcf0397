# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Blocks of pieces with widths of their own and exceptions (docs/format.md, section 5).

A half is unpacked to pairs and its exceptions are added there, before anything is multiplied. So an exception costs
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
    I16,
    I32,
    I64,
    LANES,
    at,
    compiled,
    emitted,
    load_i8,
    load_i16,
    load_u8,
    load_u16,
    splat,
    store_u16,
    vector,
)
from kvcomp.kernels.cpu.decode import K, V
from kvcomp.kernels.cpu.fixed import GROUPS, ROW, SHORTS, WORDS, each_case, multiply_pairs, pair_up, pairs_of

i64 = np.int64
UNPACKED_BYTES = i64(2 * PIECE_CODES)  # of a piece

_position, _lane = np.divmod(np.arange(PIECE_CODES), HALF)
OFFSETS = ROW * (_position // 2) + 4 * _lane + 2 * (_position % 2)  # of the codes in an unpacked piece


def _unpack(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    """``unpack_piece(words, width, frame, out)``: the codes of a piece plus its frame, as int16 [pair][lane][2]."""
    words, width, frame, out = args
    frames = splat(builder, builder.trunc(frame, I16), 2 * LANES)

    def of_width(bits: int) -> None:
        with cgutils.for_range_slice(builder, I64(0), I64(ROW), I64(4 * LANES), I64) as (lanes, _):
            row, column = (builder.add(x, lanes) for x in (words, out))
            rows = [builder.load(at(builder, row, 4 * HALF * i), align=4, typ=WORDS) for i in range(bits // 2)]
            if bits % 2:
                last = at(builder, builder.add(words, builder.lshr(lanes, I64(1))), 4 * HALF * (bits // 2))
                rows.append(builder.zext(builder.load(last, align=2, typ=vector(I16)), vector(I32)))
            codes = pairs_of(builder, rows, 0, bits) if bits else repeat(None, PIECE // 2)
            for pair, both in enumerate(codes):
                x = frames if both is None else builder.add(builder.bitcast(both, SHORTS), frames)
                builder.store(x, at(builder, column, ROW * pair), align=4)

    each_case(builder, width, range(9), of_width)


unpack_piece = emitted(types.void, [types.int64] * 4, _unpack)


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
def unpack_half(block, channels, half, count, base, words, exceptions, out):
    """Unpack the first ``count`` pieces of a half, behind which all are empty, to codes plus ``base``.

    words, exceptions: where those of the half begin. out: int16 [piece][pair][lane][2]. Returns where words and
    exceptions end.
    """
    pieces = channels // 8
    for i in range(count):
        piece, to = half * (channels // PIECE) + i, out + UNPACKED_BYTES * i
        width, frame = i64(load_u8(block + piece)), i64(load_i8(block + pieces + piece)) + base
        unpack_piece(words, width, frame, to)
        words += PIECE_BYTES * width
        end = exceptions + 2 * i64(load_u8(block + 2 * pieces + piece))
        while exceptions < end:
            exception = i64(load_u16(exceptions))
            code = to + OFFSETS[exception & (PIECE_CODES - 1)]
            store_u16(code, load_i16(code) + (exception >> POSITION_BITS) + LEAST_OFFSET)
            exceptions += 2
    return words, exceptions


@compiled
def multiply_patched(block, kind, channels, factors, factor_bytes, steps, queries, unpacked, out, out_bytes):
    """``fixed.multiply`` for the pieces at an address; factors of K are those of ``round_factors_of_pieces``."""
    words, exceptions = block + head_bytes(channels), begin_exceptions(block, channels)
    four = i64(2 * ROW)
    for half in range(2):
        count = filled_pieces(block, channels, half)
        words, exceptions = unpack_half(block, channels, half, count, i64(0), words, exceptions, unpacked)
        fours, of_four, runs, of_run = (i64(4), four, count, UNPACKED_BYTES)
        place = channels // PIECE
        if kind == K:
            fours, of_four, runs, of_run, place = count, UNPACKED_BYTES, i64(4), four, i64(4)
        to = out + 4 * GROUPS * place * half
        multiply_pairs(unpacked, fours, of_four, runs, of_run, factors, factor_bytes, steps, queries, to, out_bytes)


@compiled
def decode_patched(block, kind, channels, unpacked, out):
    """Decode pieces to rows of wide pairs of codes plus 128, see ``decompress.to_rows``.

    block, out and unpacked are addresses; the last is scratch as in ``multiply``.
    """
    words, exceptions = block + head_bytes(channels), begin_exceptions(block, channels)
    count = channels // PIECE
    for half in range(2):
        words, exceptions = unpack_half(block, channels, half, count, i64(128), words, exceptions, unpacked)
        for pair in range(channels // 2):
            piece, of_piece = pair >> 3, pair & 7
            if kind == V:
                target, step = 8 * channels * of_piece + 16 * (piece + count * half), 2 * channels
            else:
                target, step = 128 * (8 * piece + (of_piece & 1)) + 16 * ((of_piece >> 1) + 4 * half), 256
            pair_up(unpacked + ROW * pair, out + target, step)
