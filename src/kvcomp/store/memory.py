"""Memory: where the bytes of a cache are."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvcomp.codec.block import scales_size
from kvcomp.codec.dtypes import OWN_BOOK, RAW
from kvcomp.codec.page import Layout, directory_of

if TYPE_CHECKING:
    from kvcomp.store.cpu import KVStore

PAGE_PARTS = "codes", "lengths", "scales", "directories", "raw_blocks"
PARTS = *PAGE_PARTS, "spare", "table", "books", "window", "sinks", "other"


@dataclass(frozen=True)
class Memory:
    """Where the bytes of a cache are. The parts are what is allocated; bytes shared by several rows count once."""

    codes: int = 0
    """Codes of sealed pages, padding included."""
    lengths: int = 0
    """Lengths of their bit streams."""
    scales: int = 0
    """Their scales and zeros."""
    directories: int = 0
    """Their directories."""
    raw_blocks: int = 0
    """Their blocks that are kept as they came."""
    spare: int = 0
    """Readable bytes that must follow pages."""
    table: int = 0
    """Page addresses and counts."""
    table_entries: int = 0
    """The share of ``table`` that the pages use; no part of its own."""
    books: int = 0
    """Codebooks, and pair counts that wait for one."""
    window: int = 0
    """Raw recent tokens."""
    sinks: int = 0
    """Raw first tokens."""
    other: int = 0
    """Caches of layers that kvcomp does not compress."""
    sealed_values: int = 0
    """K and V values that the rows hold in pages."""
    values: int = 0
    """K and V values that the rows hold; of a sliding window those that the next token sees."""
    dense: int = 0
    """Bytes of a dense cache of the same tokens."""

    def parts(self) -> dict[str, int]:
        """Bytes by part; they add up to ``total``."""
        return {name: getattr(self, name) for name in PARTS}

    def __add__(self, other: Memory) -> Memory:
        return Memory(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def pages(self) -> int:
        """Bytes of the sealed pages."""
        return sum(getattr(self, name) for name in PAGE_PARTS)

    @property
    def total(self) -> int:
        """Bytes allocated in all."""
        return sum(self.parts().values())

    @property
    def coded_bits(self) -> float:
        """Bits for each sealed value: the pages with all their metadata, and their entries in the page table."""
        return 8 * (self.pages + self.table_entries) / self.sealed_values if self.sealed_values else 0.0

    @property
    def total_bits(self) -> float:
        """Bits for each value that the cache holds, everything counted."""
        return 8 * self.total / self.values if self.values else 0.0

    @property
    def ratio(self) -> float:
        """Bytes of a dense cache of the same tokens over the bytes allocated."""
        return self.dense / self.total if self.total else 1.0


def add_page(parts: dict[str, int], buffer: npt.NDArray[np.uint8], at: int, layout: Layout) -> None:
    """Add the bytes by part of the page that begins here in a buffer."""
    modes, offsets = directory_of(buffer, at, layout.heads)
    parts["directories"] += layout.directory_bytes
    parts["scales"] += layout.first_block - layout.directory_bytes
    sizes = np.diff(offsets).tolist()
    for index, (mode, size) in enumerate(zip(modes.tolist(), sizes, strict=False)):
        count = layout.block_scales(index // layout.heads)
        scales = scales_size(count) if count and mode != RAW else 0
        lengths = 0
        if RAW < mode <= OWN_BOOK:
            lengths = 4 + 8 * int(buffer[at + int(offsets[index]) + scales] & 15)
        parts["scales"] += scales
        parts["lengths"] += lengths
        parts["raw_blocks" if mode == RAW else "codes"] += size - scales - lengths


def memory_of(store: KVStore) -> Memory:
    """Bytes by part; a test holds them against what is allocated."""
    rows, parts, buffers, seen = store.rows, dict.fromkeys(PAGE_PARTS, 0), {}, set()
    for owners, addresses in zip(rows.owners, rows.pages, strict=True):
        for buffer, address in zip(owners, addresses.tolist(), strict=False):
            buffers[id(buffer)] = buffer
            if address not in seen:
                seen.add(address)
                add_page(parts, buffer, address - buffer.ctypes.data, store.layout)
    books = {id(book): book.nbytes for pair in [*rows.books, store.default_books] for book in pair if book}
    waiting = {id(counts): counts.nbytes for pair in rows.pair_counts for counts in pair if counts is not None}
    token_values = store.heads * (store.channels + store.value_channels)
    window = store.tokens if store.sliding_window is None else store.sliding_window - 1
    held = int(np.minimum(store.tokens - rows.begins, window).sum())
    return Memory(
        **parts,
        spare=sum(buffer.nbytes for buffer in buffers.values()) - sum(parts.values()),
        table=rows.nbytes,
        table_entries=int(rows.count.sum()) * (rows.pages.itemsize + rows.valid.itemsize),
        books=sum(books.values()) + sum(waiting.values()),
        window=sum(x.untyped_storage().nbytes() for x in (store.tail_k, store.tail_v)),
        sinks=sum(x.untyped_storage().nbytes() for x in (store.sinks_k, store.sinks_v)),
        sealed_values=int((rows.tail_begin - rows.begins - rows.sink_count).sum()) * token_values,
        values=held * token_values,
        dense=held * token_values * store.dtype.itemsize,
    )
