"""A page: K and V of 64 tokens, all heads of one layer and sequence (docs/format.md, section 2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcomp.codec.block import LEAST_LENGTHS, STREAMS, fixed_words, scales_from, scales_size
from kvcomp.codec.dtypes import DEFAULT_BOOK, FIXED, OWN_BOOK, PATCHED, RAW
from kvcomp.codec.patched import head_bytes
from kvcomp.errors import CorruptData
from kvcomp.spec import PAGE_TOKENS, Unit

MAX_WIDTH = 8

Buffer = bytes | memoryview | npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """What the sizes in a page depend on."""

    heads: int
    """KV heads."""
    channels: tuple[int, int]
    """Channels of a head, of K and of V."""
    units: tuple[Unit, Unit]
    """Units of K and of V."""
    value_bytes: int
    """Bytes of one value of the dtype."""
    default_books: tuple[bool, bool] = (True, True)
    """Whether K and V have default codebooks: without a calibration the unit ``head`` has none."""

    @property
    def directory_bytes(self) -> int:
        return ceil16(words_bytes(self.heads))

    @property
    def token_scale_offsets(self) -> tuple[int | None, int | None]:
        """Offsets of the K and V token scales in the page; None where the unit is not ``token``."""
        key, value = (unit == "token" for unit in self.units)
        size = scales_size(PAGE_TOKENS)
        return self.directory_bytes if key else None, self.directory_bytes + size * key if value else None

    @property
    def first_block(self) -> int:
        return self.directory_bytes + scales_size(PAGE_TOKENS) * sum(unit == "token" for unit in self.units)

    @property
    def spare_bytes(self) -> int:
        """Readable bytes that must follow pages."""
        return max(self.channels)

    @property
    def raw_bytes(self) -> int:
        """Bytes of a page all of whose blocks are raw."""
        return self.first_block + self.heads * PAGE_TOKENS * sum(self.channels) * self.value_bytes

    def block_scales(self, kind_index: int) -> int:
        """How many scales stand at the head of a block of K (0) or V (1)."""
        return {"block": 1, "channel": self.channels[kind_index], "vector": PAGE_TOKENS, "token": 0, "head": 0}[
            self.units[kind_index]
        ]

    def least_block_bytes(self, mode: int, kind_index: int) -> int:
        """Bytes that a block of this mode needs at the least. Raises CorruptData for a mode that does not exist."""
        count = self.block_scales(kind_index)
        scales = scales_size(count) if count else 0
        if mode == RAW:
            return PAGE_TOKENS * self.channels[kind_index] * self.value_bytes
        if mode == OWN_BOOK or (mode == DEFAULT_BOOK and self.default_books[kind_index]):
            return scales + LEAST_LENGTHS
        if mode == PATCHED:
            return scales + head_bytes(self.channels[kind_index])
        if FIXED <= mode < FIXED + MAX_WIDTH:
            return scales + 4 * STREAMS * fixed_words(self.channels[kind_index], width_of(mode))
        if mode == DEFAULT_BOOK:
            raise CorruptData("a block needs the default codebook, and there is none")
        raise CorruptData(f"a page has a block of the unknown mode {mode}")


def words_bytes(heads: int) -> int:
    """Bytes of a directory without its padding: a word for each block and one for the end."""
    return 4 * (2 * heads + 1)


def directory_of(buffer: Buffer, at: int, heads: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Modes and offsets of the blocks of the page that begins at a place; the last offset is the size of the page."""
    words = np.frombuffer(buffer, "<u4", words_bytes(heads) // 4, at).astype(np.int64)
    return words & 15, words & ~15


def size_of(buffer: Buffer, at: int, heads: int) -> int:
    """Bytes of the page that begins at a place."""
    end = at + words_bytes(heads)
    return int.from_bytes(buffer[end - 4 : end], "little")


def fixed_mode(width: int) -> int:
    """The mode of a block of codes of a fixed width, 1 to 8."""
    return FIXED + width % MAX_WIDTH


def width_of(mode: int) -> int:
    """Inverse of ``fixed_mode``."""
    return mode - FIXED or MAX_WIDTH


def fixed_zero(width: int) -> int:
    """The zero of a block of this fixed width where the unit is ``head``."""
    return -(1 << (width - 1))


def ceil16(size: int) -> int:
    return -(-size // 16) * 16


def assemble(layout: Layout, token_scales: Iterable[bytes], blocks: Iterable[tuple[int, bytes]]) -> bytes:
    """Assemble a page from its token scales (those that exist) and its blocks as (mode, bytes), K heads first."""
    directory, offset, body = [], layout.first_block, b""
    for mode, block in blocks:
        directory.append(offset | mode)
        body += block.ljust(ceil16(len(block)), b"\0")
        offset = layout.first_block + len(body)
    directory.append(offset)
    head = np.array(directory, "<u4").tobytes().ljust(layout.directory_bytes, b"\0")
    return head + b"".join(token_scales) + body


def raw_header(layout: Layout) -> npt.NDArray[np.uint8]:
    """What precedes the blocks of a page all of whose blocks are raw; token scales, which nobody reads, are 0."""
    header = np.zeros(layout.first_block, np.uint8)
    blocks = np.repeat(layout.channels, layout.heads) * (PAGE_TOKENS * layout.value_bytes)
    ends = layout.first_block + np.cumsum([0, *blocks])
    header[: words_bytes(layout.heads)] = ends.astype("<u4").view(np.uint8)
    return header


def blocks_of(page: bytes, layout: Layout) -> list[tuple[int, bytes]]:
    """Split a page into (mode, bytes) of every block, K heads first, after the checks of section 5.

    Raises CorruptData.
    """
    if len(page) < layout.first_block:
        raise CorruptData("a page is shorter than its directory")
    modes, offsets = directory_of(page, 0, layout.heads)
    if modes[-1] or offsets[-1] > len(page) or offsets[0] != layout.first_block:
        raise CorruptData("a page's directory does not fit the page")
    blocks = []
    for index in range(2 * layout.heads):
        begin, end, mode = int(offsets[index]), int(offsets[index + 1]), int(modes[index])
        if end - begin < layout.least_block_bytes(mode, index // layout.heads):
            raise CorruptData("a page's block is too short for its contents")
        blocks.append((mode, page[begin:end]))
    return blocks


def token_scales_of(
    page: bytes, layout: Layout, kind_index: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]] | None:
    """Token scales and zeros of K (0) or V (1), 64 each; None where the unit is not ``token``."""
    offset = layout.token_scale_offsets[kind_index]
    return None if offset is None else scales_from(page[offset:], PAGE_TOKENS)
