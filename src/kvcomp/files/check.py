"""Many pages one after the other: the checks that keep a fast decoder in range (docs/format.md, section 7).

The rules are those of ``page.blocks_of`` and ``block.scales_from``, which read one page at a time. Here they are
compiled, so that a long cache of foreign bytes is checked in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcomp.codec.block import length_unit
from kvcomp.codec.page import Layout
from kvcomp.errors import CorruptData

PIECE_BYTES = 1 << 19  # checked while they are still in the core's cache from being hashed

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]


def check_pages(
    arena: Bytes, begin: Places, layout: Layout, read: Callable[[Any], object] = lambda piece: None
) -> npt.NDArray[np.bool_]:
    """Check pages that fill an arena without gaps, but for the spare bytes at its end.

    Parameters
    ----------
    arena
        uint8, the pages and the spare bytes.
    begin
        Where each page begins, ascending, without repetition.
    layout
        What the sizes in the pages depend on.
    read
        Is given all bytes, piece by piece, each just before it is checked, and also where a check has failed.

    Returns
    -------
    bool (pages, 2)
        Whether a page needs the sequence's own codebook for K and for V.

    Raises
    ------
    CorruptData
        For the first page that no encoder writes.
    """
    own = np.zeros((begin.size, 2), np.bool_)
    at = 0
    try:
        sizes = _sizes(arena, begin, layout)
        bounds = np.searchsorted(begin, np.arange(PIECE_BYTES, arena.size, PIECE_BYTES)).tolist()
        for first, last in zip([0, *bounds], [*bounds, begin.size], strict=True):
            if first < last:
                end = int(begin[last - 1] + sizes[last - 1])
                read(arena[at:end].data)
                at = end
                _check_some(arena, begin[first:last], sizes[first:last], layout, own[first:last])
    finally:
        read(arena[at:].data)
    return own


def _sizes(arena: Bytes, begin: Places, layout: Layout) -> Places:
    if not begin.size:
        if arena.size:
            raise CorruptData("there are bytes of pages, and no page")
        return begin
    end = arena.size - layout.spare_bytes
    if arena.size % 16 or begin[0] != 0 or (begin % 16).any() or begin[-1] >= end:
        raise CorruptData(
            "pages do not begin at multiples of 16 from the first byte of their section to its spare bytes"
        )
    sizes: Places = np.diff(begin, append=end)
    if sizes.min() < layout.first_block:
        raise CorruptData("a page is shorter than its directory")
    return sizes


def _check_some(arena: Bytes, begin: Places, sizes: Places, layout: Layout, own: npt.NDArray[np.bool_]) -> None:
    from kvcomp.kernels.cpu import check  # not before there is something to check: it loads the compiler

    found = check.check_pages(arena, begin, sizes, layout.heads, layout.first_block, *_constants(layout), own)
    messages = {
        check.DIRECTORY: "a page's directory does not fit the page",
        check.ORDER: "the blocks of a page are not in order",
        check.SHORT: "a page's block is too short for its contents",
        check.SCALE: "a block has a scale or a zero that no encoder writes",
        check.LENGTHS: "a block is too short for the lengths of its streams",
        check.STREAM: "a block's streams are longer than the block",
        check.PIECES: "a block has a piece of more than 8 bits a code, or of codes beyond 127",
        check.CODES: "a block is too short for its codes and exceptions",
        check.EXCEPTION: "a block has an exception that no encoder writes",
    }
    if found & 255 == check.MODE:
        layout.least_block_bytes(found >> 8 & 15, found >> 12)  # says what is wrong with the mode
    if found != check.FINE:
        raise CorruptData(messages[found & 255])


@lru_cache(maxsize=64)
def _constants(layout: Layout) -> tuple[Places, Places, Places, Places, Places]:
    """Least bytes of a block of K and V by mode, -1 for no mode; scales of a block; where the token scales are; bits of
    a unit of length; pieces of a patched block.
    """

    def least(mode: int, kind: int) -> int:
        try:
            return layout.least_block_bytes(mode, kind)
        except CorruptData:
            return -1

    return (
        np.array([[least(mode, kind) for mode in range(16)] for kind in range(2)]),
        np.array([layout.block_scales(kind) for kind in range(2)]),
        np.array([-1 if offset is None else offset for offset in layout.token_scale_offsets]),
        np.array([length_unit(channels) for channels in layout.channels]),
        np.array([channels // 8 for channels in layout.channels]),
    )
