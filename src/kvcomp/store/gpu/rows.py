"""What the rows of a batch hold: as the host knows it, and where the kernels of a device find it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.codec.codebook import Codebook
from kvcomp.store.gpu.arena import Chunk
from kvcomp.store.tensors import to_pinned

LEAST_PAGES = 16  # for which a table has room


@dataclass
class Row:
    """What the host knows of a sequence."""

    start: int = 0
    """Position of the first real token."""
    sinks: int = 0
    tail_begin: int = 0
    """Position from which on the row's tokens are in the tail."""
    valid: list[int] = field(default_factory=list)
    """For each page how many of its tokens count."""
    chunks: list[Chunk] = field(default_factory=list)
    """Where the pages lie."""
    books: list[Codebook | None] = field(default_factory=lambda: [None, None])
    """The row's own books of K and of V."""
    counts: list[npt.NDArray[np.uint32] | None] = field(default_factory=lambda: [None, None])
    """Pair counts of K and of V until there are such books."""

    def copy(self) -> Row:
        """An independent row; chunks, books and counts are shared."""
        return replace(
            self,
            valid=list(self.valid),
            chunks=list(self.chunks),
            books=list(self.books),
            counts=list(self.counts),
        )

    def crop(self, tokens: int) -> None:
        """Keep what is before this position."""
        if self.tail_begin <= tokens:
            return
        self.start = min(self.start, tokens)
        self.sinks = min(self.sinks, tokens - self.start)
        left, kept = tokens - self.start - self.sinks, []
        for valid in self.valid:
            if left <= 0:
                break
            kept.append(min(valid, left))
            left -= valid
        self.valid, self.tail_begin = kept, tokens


class Table:
    """Rows and pages as the attention kernel reads them.

    ``pages``, int64 (rows, capacity), holds addresses. ``numbers``, int32, holds four numbers for each row: the count
    of its pages, its sinks, where its tail begins, the place (``kvcomp.store.places``) of the tail's first token. Then
    come (rows, capacity) numbers of valid tokens of a page.
    Both stay where they are until the table grows.
    """

    def __init__(self, pages: Tensor) -> None:
        self.pages = pages
        self.numbers = torch.zeros(pages.numel() + 4 * pages.shape[0], dtype=torch.int32, device=pages.device)

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Table:
        return cls(torch.zeros((rows, LEAST_PAGES), dtype=torch.int64, device=device))

    @property
    def capacity(self) -> int:
        """Pages of a row for which there is room."""
        return self.pages.shape[1]

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        """Addresses of ``valid``, ``count``, ``sink_count`` and ``tail_begin`` for the kernel."""
        at, step = self.numbers.data_ptr(), 4 * self.pages.shape[0]
        return at + 4 * step, at, at + step, at + 2 * step

    @property
    def sinks(self) -> Tensor:
        """Of the rows, a view."""
        return self.numbers[len(self.pages) : 2 * len(self.pages)]

    @property
    def tail_places(self) -> Tensor:
        """Of the tail's first token in each row, a view."""
        return self.numbers[3 * len(self.pages) : 4 * len(self.pages)]

    @property
    def valid(self) -> Tensor:
        """Tokens of each page that count, (rows, capacity), a view."""
        return self.numbers[4 * len(self.pages) :].view(len(self.pages), -1)

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + self.numbers.nbytes

    def grown(self, pages: int) -> Table:
        """A table with room for at least so many pages of a row; ``publish`` it."""
        rows, capacity = self.pages.shape
        larger = self.pages.new_zeros((rows, max(pages, 2 * capacity)))
        larger[:, :capacity] = self.pages
        return Table(larger)

    @classmethod
    def joined(cls, tables: Sequence[Table]) -> Table:
        """The rows of several tables; ``publish`` it."""
        capacity = max(table.capacity for table in tables)
        padded = [torch.nn.functional.pad(table.pages, (0, capacity - table.capacity)) for table in tables]
        return cls(torch.cat(padded))

    def publish(self, rows: Sequence[Row], tail_base: int) -> None:
        """Tell the device what the host knows of the rows."""
        host = np.zeros((len(rows), 4 + self.capacity), np.int32)
        for numbers, row in zip(host, rows, strict=True):
            numbers[:4] = len(row.valid), row.sinks, row.tail_begin - tail_base, tail_base - row.start
            numbers[4 : 4 + len(row.valid)] = row.valid
        content = np.concatenate([host[:, :4].T.ravel(), host[:, 4:].ravel()])
        self.numbers.copy_(to_pinned(content, self.numbers.device), non_blocking=True)
