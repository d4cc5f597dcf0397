"""The checks that keep a decoder in range, compiled: what ``kvcomp.files.check`` asks of every page of foreign bytes.

A byte is read only where it was found to lie within its page, or within the spare bytes behind the last one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcomp.codec.block import LEAST_LENGTHS, MAX_BASE, MAX_DIFFERENCE_BITS, STREAMS
from kvcomp.codec.dtypes import DEFAULT_BOOK, OWN_BOOK, PATCHED, RAW
from kvcomp.codec.patched import HALF, LEAST_CODE, LEAST_OFFSET, MOST_CODE, PIECE_BYTES, PIECE_CODES, POSITION_BITS
from kvcomp.codec.quantise import MAX_ZERO
from kvcomp.kernels.cpu.bits import address_of, compiled, load_u32, load_u64
from kvcomp.spec import PAGE_TOKENS, SCALE_RANGE

FINE, DIRECTORY, ORDER, MODE, SHORT, SCALE, LENGTHS, STREAM, PIECES, CODES, EXCEPTION = range(11)
LEAST_SCALE, MOST_SCALE = (int(x) for x in np.array(SCALE_RANGE, np.float32).view(np.uint32))


@compiled
def _word(data: Any, at: int) -> Any:
    return (
        np.int64(data[at]) | np.int64(data[at + 1]) << 8 | np.int64(data[at + 2]) << 16 | np.int64(data[at + 3]) << 24
    )


@compiled
def _half(data: Any, at: int) -> Any:
    return np.int64(data[at]) | np.int64(data[at + 1]) << 8


@compiled
def _scales_are_fine(data: Any, at: int, count: int) -> Any:
    """Whether ``count`` scales and then as many zeros are in range: f32 and i32 if there is one, else bf16 and i16.

    Positive floats sort as their bits do, and what is negative, infinite or NaN has larger bits than any scale.
    """
    if count == 1:
        zero = _word(data, at + 4)
        zero = zero - (zero >> 31 << 32)
        return LEAST_SCALE <= _word(data, at) <= MOST_SCALE and -MAX_ZERO <= zero <= MAX_ZERO
    wrong = 0
    for index in range(count):
        scale, zero = _half(data, at + 2 * index), _half(data, at + 2 * (count + index))
        zero = zero - (zero >> 15 << 16)
        wrong |= (scale < LEAST_SCALE >> 16) | (scale > MOST_SCALE >> 16) | (zero < -MAX_ZERO) | (zero > MAX_ZERO)
    return wrong == 0


@compiled
def _stream_units(address: int, width: int) -> Any:
    """Lengths of all 64 streams together, from the word with the bases on; reads up to 8 bytes behind them."""
    bases = np.int64(load_u32(address)) >> 4
    total = (
        STREAMS
        // 4
        * ((bases & MAX_BASE) + (bases >> 7 & MAX_BASE) + (bases >> 14 & MAX_BASE) + (bases >> 21 & MAX_BASE))
    )
    mask, half = np.uint64((1 << width) - 1), 4 * width
    for eight in range(STREAMS // 8):  # eight differences fill ``width`` bytes
        at = address + LEAST_LENGTHS + eight * width
        first = load_u64(at)
        second = load_u64(at + (half >> 3)) >> np.uint64(half & 7)
        for index in range(4):
            by = np.uint64(index * width)
            total += np.int64((first >> by & mask) + (second >> by & mask))
    return total


@compiled
def _field(data: Any, words: Any, width: Any, place: Any) -> Any:
    """A field of a piece whose words begin here."""
    lane, field = place % HALF, np.int64(0)
    for i in range(width):
        bit = place // HALF * width + i
        whole = bit < 32 * (width // 2)
        row = words + 4 * HALF * (bit >> 5) + (4 if whole else 2) * lane
        field |= (np.int64(data[row + (bit >> 3 & 3)]) >> (bit & 7) & 1) << i
    return field


@compiled
def _check_patched(data: Any, at: int, room: int, pieces: int) -> Any:
    """What is wrong with a block of pieces, whose widths, frames and counts lie within its room: a number as
    ``check_pages`` gives.
    """
    words, exceptions = np.int64(at + ((3 * pieces + 3) & ~3)), np.int64(0)
    place = words
    for piece in range(pieces):
        width, frame = np.int64(data[at + piece]), np.int64(np.int8(data[at + pieces + piece]))
        if width > 8 or frame + (1 << width) - 1 > MOST_CODE:
            return PIECES
        place += PIECE_BYTES * width
        exceptions += np.int64(data[at + 2 * pieces + piece])
    if place + 2 * exceptions > at + room:
        return CODES
    for piece in range(pieces):
        width, frame = np.int64(data[at + piece]), np.int64(np.int8(data[at + pieces + piece]))
        before = np.int64(-1)
        for _ in range(data[at + 2 * pieces + piece]):
            exception = _half(data, place)
            position, offset = exception & (PIECE_CODES - 1), (exception >> POSITION_BITS) + LEAST_OFFSET
            stored, nearer = _field(data, words, width, position), (1 << width) - 1 if offset > 0 else 0
            if position <= before or offset == 0 or stored != nearer:
                return EXCEPTION
            if not LEAST_CODE <= frame + stored + offset <= MOST_CODE:
                return EXCEPTION
            before, place = position, place + 2
        words += PIECE_BYTES * width
    return FINE


@compiled(entry=True)
def check_pages(
    data: Any,
    begin: Any,
    sizes: Any,
    heads: int,
    first_block: int,
    least: Any,
    scale_counts: Any,
    shared: Any,
    units: Any,
    pieces: Any,
    own: Any,
) -> Any:
    """Check pages up to the first that is wrong.

    Parameters
    ----------
    data
        uint8: the pages and at least 16 spare bytes.
    begin, sizes
        int64, of each page: multiples of 16 within the data, no size below ``first_block``.
    heads
        KV heads.
    first_block
        Bytes before the first block of a page.
    least
        int64 (2, 16): bytes that a block of K or V of each mode needs, -1 for no mode.
    scale_counts
        int64 (2,): scales at the head of a block.
    shared
        int64 (2,): where the token scales of K and V are, -1 for none.
    units
        int64 (2,): bits of a unit of length.
    pieces
        int64 (2,): pieces of a patched block.
    own
        bool (pages, 2): set where a block needs the sequence's own codebook.

    Returns
    -------
    int
        ``FINE``, or what is wrong. ``MODE`` comes with kind and mode in the bits from 12 and 8 on.
    """
    base = address_of(data)
    for page in range(begin.size):
        start, size = begin[page], sizes[page]
        if _word(data, start + 8 * heads) != size or _word(data, start) & ~15 != first_block:
            return DIRECTORY
        for index in range(2 * heads):
            kind = 1 if index >= heads else 0
            word = _word(data, start + 4 * index)
            mode, offset, end = word & 15, word & ~15, _word(data, start + 4 * index + 4) & ~15
            if end < offset or end > size:
                return ORDER
            if least[kind, mode] < 0:
                return MODE | mode << 8 | kind << 12
            room = end - offset
            if room < least[kind, mode]:
                return SHORT
            at = start + offset
            count = scale_counts[kind]
            if count > 0 and mode != RAW:
                if not _scales_are_fine(data, at, count):
                    return SCALE
                scale_bytes = 8 if count == 1 else 4 * count
                at += scale_bytes
                room -= scale_bytes
            if mode in (DEFAULT_BOOK, OWN_BOOK):
                own[page, kind] |= mode == OWN_BOOK
                width = _half(data, at) & 15
                room -= LEAST_LENGTHS + 8 * width
                if width > MAX_DIFFERENCE_BITS or room < 0:
                    return LENGTHS
                if _stream_units(base + at, width) * units[kind] > 8 * room:
                    return STREAM
            elif mode == PATCHED:
                found = _check_patched(data, at, room, pieces[kind])
                if found != FINE:
                    return found
        for kind in range(2):
            if shared[kind] >= 0 and not _scales_are_fine(data, start + shared[kind], PAGE_TOKENS):
                return SCALE
    return FINE
