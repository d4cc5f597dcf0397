# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Codes -> pieces with widths of their own and exceptions (docs/format.md, section 5)."""

from __future__ import annotations

import numpy as np

from kvcomp.codec.dtypes import HEAD
from kvcomp.codec.patched import (
    EXCEPTION_BITS,
    HALF,
    LEAST_CODE,
    LEAST_OFFSET,
    MOST_CODE,
    MOST_EXCEPTIONS,
    MOST_OFFSET,
    PIECE,
    PIECE_BYTES,
    PIECE_CODES,
    POSITION_BITS,
)
from kvcomp.codec.quantise import HEAD_ZERO
from kvcomp.kernels.cpu.bits import clear_bytes, compiled, store_u8, store_u16, store_u32
from kvcomp.kernels.cpu.decode import K
from kvcomp.kernels.cpu.patched import head_bytes

WIDTH, FRAME, EXCEPTIONS = range(3)  # columns of a piece


@compiled
def order_pieces(kind, unit, codes, pieces):
    """codes [64, D] -> int64 [D/8 pieces, 512] (``codec.patched.piece_order``), signed for the unit ``head``."""
    channels, zero = codes.shape[1], HEAD_ZERO if unit == HEAD else 0
    for piece in range(pieces.shape[0]):
        half, i = divmod(piece, channels // PIECE)
        for place in range(PIECE_CODES):
            position, g, j = place >> 5, place >> 2 & 7, place & 3
            if kind == K:
                token, channel = 8 * (position // 4 + 4 * half) + g, PIECE * i + 4 * j + position % 4
            else:
                token = 16 * (position >> 2) + 8 * (position >> 1 & 1) + 2 * j + (position & 1)
                channel = 8 * piece + g
            pieces[piece, place] = np.int64(codes[token, channel]) + zero


@compiled
def choose(codes, below, chosen):
    """``codec.patched.choose``, and how many exceptions that has; below: scratch, int64 [257]."""
    low, high = codes.min(), codes.max()
    below[:] = 0
    for code in codes:
        below[code - LEAST_CODE + 1] += 1
    for i in range(1, below.size):
        below[i] += below[i - 1]
    least = np.int64(PIECE_CODES * EXCEPTION_BITS)
    for width in range(9):
        last = MOST_CODE + 1 - (1 << width)
        for frame in range(min(low, last), min(high, last) + 1):
            end = frame + (1 << width)
            outside = PIECE_CODES - below[end - LEAST_CODE] + below[frame - LEAST_CODE]
            cost = PIECE_CODES * width + EXCEPTION_BITS * outside
            fits = outside <= MOST_EXCEPTIONS and low - frame >= LEAST_OFFSET and high - end < MOST_OFFSET
            if fits and cost < least:
                least = cost
                chosen[WIDTH], chosen[FRAME], chosen[EXCEPTIONS] = width, frame, outside


@compiled
def choose_all(pieces, below, chosen):
    """Choose for all pieces of a block, int64 [pieces, 3]. Returns the bytes of the block without its scales."""
    size = head_bytes(8 * chosen.shape[0])
    for piece in range(chosen.shape[0]):
        choose(pieces[piece], below, chosen[piece])
        size += PIECE_BYTES * chosen[piece, WIDTH] + EXCEPTION_BITS // 8 * chosen[piece, EXCEPTIONS]
    return size


@compiled
def pack_piece(codes, width, frame, to):
    """Pack the codes of a piece at an address. Returns the end."""
    most, words = (1 << width) - 1, width // 2
    for lane in range(HALF):
        waiting, held, place = np.uint64(0), np.uint64(0), to + 4 * lane
        for position in range(PIECE):
            field = min(max(codes[HALF * position + lane] - frame, 0), most)
            waiting |= np.uint64(field) << held
            held += np.uint64(width)
            if held >= np.uint64(32):
                store_u32(place, np.uint32(waiting & np.uint64(0xFFFFFFFF)))
                place += 4 * HALF
                waiting >>= np.uint64(32)
                held -= np.uint64(32)
        if held:
            store_u16(to + 4 * HALF * words + 2 * lane, np.uint16(waiting))
    return to + PIECE_BYTES * width


@compiled
def pack_patched(pieces, chosen, to):
    """Pack the pieces of a block at an address. Returns the end."""
    count = chosen.shape[0]
    head = head_bytes(8 * count)
    clear_bytes(to, head)
    for piece in range(count):
        for column in range(3):
            store_u8(to + column * count + piece, np.uint8(chosen[piece, column] & 255))
    to += head
    for piece in range(count):
        to = pack_piece(pieces[piece], chosen[piece, WIDTH], chosen[piece, FRAME], to)
    for piece in range(count):
        frame = chosen[piece, FRAME]
        end = frame + (1 << chosen[piece, WIDTH]) - 1
        for place in range(PIECE_CODES if chosen[piece, EXCEPTIONS] else 0):
            code = pieces[piece, place]
            offset = code - min(max(code, frame), end)
            if offset:
                store_u16(to, np.uint16(place | (offset - LEAST_OFFSET) << POSITION_BITS))
                to += 2
    return to
