"""Many pages one after the other: the checks that keep a fast decoder in range, on all of them at once (docs/format.md, section 7).

The same rules as ``page.blocks_of`` and ``block.scales_from``, which read one page at a time, so that a long cache of foreign bytes is
checked in milliseconds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcomp.block import LEAST_LENGTHS, MAX_BASE, MAX_DIFFERENCE_BITS, STREAMS, length_unit, scales_size
from kvcomp.errors import CorruptData
from kvcomp.page import DEFAULT_BOOK, OWN_BOOK, RAW, Layout
from kvcomp.quantise import MAX_ZERO, SCALE_RANGE
from kvcomp.spec import PAGE_TOKENS

BLOCKS_AT_A_TIME = 1 << 14  # bounds the scratch memory to some tens of megabytes
UNKNOWN_MODE = -1

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]


def check_pages(arena: Bytes, begin: Places, layout: Layout) -> npt.NDArray[np.bool_]:
    """Check pages that fill an arena without gaps, but for the D spare bytes at its end.

    arena: uint8. begin: where each page begins, ascending, without repetition.
    Returns bool (pages, 2): whether a page needs the sequence's own codebook for K and for V. Raises CorruptData.
    """
    if not begin.size:
        if arena.size:
            raise CorruptData("there are bytes of pages, and no page")
        return np.zeros((0, 2), np.bool_)
    end = arena.size - layout.channels
    if arena.size % 16 or begin[0] != 0 or (begin % 16).any() or begin[-1] >= end:
        raise CorruptData(
            "pages do not begin at multiples of 16 from the first byte of their section to its spare bytes"
        )
    sizes = np.diff(begin, append=end)
    if sizes.min() < layout.first_block:
        raise CorruptData("a page is shorter than its directory")
    own = np.empty((begin.size, 2), np.bool_)
    step = max(1, BLOCKS_AT_A_TIME // (2 * layout.heads))
    for first in range(0, begin.size, step):
        part = slice(first, first + step)
        own[part] = _check_some(arena, begin[part], sizes[part], layout)
    return own


def _check_some(arena: Bytes, begin: Places, sizes: Places, layout: Layout) -> npt.NDArray[np.bool_]:
    words = 2 * layout.heads + 1
    directory = _windows(arena, begin, 4 * words).view("<u4").astype(np.int64)
    modes, offsets = directory & 15, directory & ~15
    if modes[:, -1].any() or (offsets[:, -1] != sizes).any() or (offsets[:, 0] != layout.first_block).any():
        raise CorruptData("a page's directory does not fit the page")
    room = np.diff(offsets)
    if room.min() < 0:
        raise CorruptData("the blocks of a page are not in order")
    own = np.empty((begin.size, 2), np.bool_)
    for kind in range(2):
        heads = slice(kind * layout.heads, (kind + 1) * layout.heads)
        mode = modes[:, heads].ravel()
        own[:, kind] = (modes[:, heads] == OWN_BOOK).any(axis=1)
        least = _least_sizes(layout, kind)[mode]
        if (least == UNKNOWN_MODE).any():
            raise CorruptData(f"a page has a block of the unknown mode {mode[least == UNKNOWN_MODE][0]}")
        left = room[:, heads].ravel()
        if (left < least).any():
            raise CorruptData("a page's block is too short for its contents")
        at = (begin[:, None] + offsets[:, heads]).ravel()
        count, shared = layout.block_scales(kind), layout.token_scale_offsets[kind]
        scales = scales_size(count) if count else 0
        if shared is not None:
            _check_scales(_windows(arena, begin + shared, scales_size(PAGE_TOKENS)), PAGE_TOKENS)
        huffman = (mode == DEFAULT_BOOK) | (mode == OWN_BOOK)
        heads_of_blocks = _windows(
            arena, at[huffman], scales + LEAST_LENGTHS
        )  # once: most of the time goes to cache misses
        lengths = heads_of_blocks[:, scales:].copy().view("<u4")[:, 0].astype(np.int64)
        _check_streams(arena, at[huffman] + scales, lengths, left[huffman] - scales, layout.channels)
        if count:
            _check_scales(heads_of_blocks[:, :scales], count)
            _check_scales(_windows(arena, at[~huffman & (mode != RAW)], scales), count)
    return own


@lru_cache(maxsize=64)
def _least_sizes(layout: Layout, kind: int) -> Places:
    """``Layout.least_block_bytes`` of the sixteen modes, ``UNKNOWN_MODE`` for those that do not exist."""

    def least(mode: int) -> int:
        try:
            return layout.least_block_bytes(mode, kind)
        except CorruptData:
            return UNKNOWN_MODE

    return np.array([least(mode) for mode in range(16)])


def _check_scales(found: Bytes, count: int) -> None:
    """found: (sets, bytes of one set of ``count`` scales and zeros).

    Positive floats sort as their bits do, and what is negative, infinite or NaN has larger bits than any scale.
    """
    if not found.size:
        return
    least, most = np.array(SCALE_RANGE, np.float32).view(np.uint32).tolist()
    scale: npt.NDArray[Any]
    if count == 1:
        scale, zero = found.view("<u4")[:, 0], found.view("<i4")[:, 1]
    else:
        scale, zero = found.view("<u2")[:, :count], found.view("<i2")[:, count:]
        least, most = least >> 16, most >> 16
    if scale.min() < least or scale.max() > most or zero.min() < -MAX_ZERO or zero.max() > MAX_ZERO:
        raise CorruptData("a block has a scale or a zero that no encoder writes")


def _check_streams(arena: Bytes, at: Places, heads: Places, room: Places, channels: int) -> None:
    """at: where the lengths of each block begin. heads: their first words. room: bytes from there to the end of the block."""
    width = heads & 15
    sizes = LEAST_LENGTHS + 8 * width
    if (width > MAX_DIFFERENCE_BITS).any() or (sizes > room).any():
        raise CorruptData("a block is too short for the lengths of its streams")
    total = STREAMS // 4 * np.sum([heads >> (4 + 7 * group) & MAX_BASE for group in range(4)], axis=0)
    for bits in np.unique(width[width > 0]).tolist():
        some = width == bits
        words = _windows(arena, at[some] + LEAST_LENGTHS, 8 * bits).view("<u8")
        for bit, masks in enumerate(_bits_of_differences(bits)):
            total[some] += np.bitwise_count(words & masks).sum(axis=1, dtype=np.int64) << bit
    if (total * length_unit(channels) > 8 * (room - sizes)).any():
        raise CorruptData("a block's streams are longer than the block")


@lru_cache
def _bits_of_differences(width: int) -> npt.NDArray[np.uint64]:
    """Masks (bits of a difference, words of 64 bits): where that bit of each of 64 differences of ``width`` bits lies."""
    place = np.arange(STREAMS * width)
    masks = [np.packbits(place % width == bit, bitorder="little").view("<u8") for bit in range(width)]
    return np.stack(masks)


def _windows(arena: Bytes, at: Places, size: int) -> Bytes:
    """(places, size): the bytes from each place on."""
    every: Bytes = np.ndarray((arena.size - size + 1, size), np.uint8, arena, strides=(1, 1))
    return every[at]
