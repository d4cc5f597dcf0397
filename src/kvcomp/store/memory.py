"""Memory: where the bytes of a cache are."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Memory:
    """Where the bytes of a cache are. The parts are what is allocated; bytes shared by several rows count once.

    codes, lengths, scales, directories, raw_blocks: parts of the sealed pages, padding with the codes.
    spare: readable bytes that must follow pages. table: page addresses and counts. books: codebooks.
    window, sinks: raw recent and first tokens. other: caches of layers that kvcomp does not compress.
    sealed_values: K and V values that the rows hold in pages; values: all they hold. dense: bytes of a dense cache of the same tokens.
    """

    codes: int = 0
    lengths: int = 0
    scales: int = 0
    directories: int = 0
    raw_blocks: int = 0
    spare: int = 0
    table: int = 0
    table_entries: int = 0
    books: int = 0
    window: int = 0
    sinks: int = 0
    other: int = 0
    sealed_values: int = 0
    values: int = 0
    dense: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def pages(self) -> int:
        """Bytes of the sealed pages."""
        return self.codes + self.lengths + self.scales + self.directories + self.raw_blocks

    @property
    def total(self) -> int:
        """Bytes allocated in all."""
        return self.pages + self.spare + self.table + self.books + self.window + self.sinks + self.other

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
