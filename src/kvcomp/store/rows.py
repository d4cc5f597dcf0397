"""Rows: what a store knows of each sequence of its batch, and where its pages lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcomp.codec.codebook import Codebook
from kvcomp.spec import PAGE_TOKENS

Longs = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.uint32]


@dataclass
class Rows:
    """A row's tokens lie in the sinks, then in its pages, then in the tail that all rows share."""

    starts: Longs
    """(rows,) position of the first real token; what is before it is padding."""
    dropped: Longs
    """(rows,) real tokens that the row does not hold any more, its first ones; one that lost some has no sinks."""
    tail_begin: Longs
    """(rows,) position of the first token in the tail."""
    sink_count: Longs
    """(rows,) tokens in the sinks."""
    count: Longs
    """(rows,) pages."""
    pages: Longs
    """(rows, capacity) addresses of pages, the first ``count`` of them used."""
    valid: npt.NDArray[np.int32]
    """(rows, capacity) how many of a page's tokens count."""
    owners: list[list[Bytes]]
    """For each row the buffer behind each page, which keeps it alive."""
    books: list[list[Codebook | None]]
    """For each row its own codebooks of K and V."""
    pair_counts: list[list[Counts | None]]
    """For each row the pair counts of K and V, as long as there is no own book."""

    @classmethod
    def empty(cls, rows: int, books: Sequence[Codebook | None] = (None, None), start: int = 0) -> Rows:
        """Rows without tokens, each with these own codebooks, that begin at position ``start``."""
        starts, dropped, tail_begin, sink_count, count = np.array([[start], [0], [start], [0], [0]]).repeat(rows, 1)
        return cls(
            starts,
            dropped,
            tail_begin,
            sink_count,
            count,
            pages=np.zeros((rows, 0), np.int64),
            valid=np.zeros((rows, 0), np.int32),
            owners=[[] for _ in range(rows)],
            books=[list(books) for _ in range(rows)],
            pair_counts=[[None, None] for _ in range(rows)],
        )

    def __len__(self) -> int:
        return self.starts.size

    @property
    def nbytes(self) -> int:
        """Bytes of the page table and the counts."""
        arrays = self.pages, self.valid, self.count, self.starts, self.dropped, self.tail_begin, self.sink_count
        return sum(x.nbytes for x in arrays)

    @property
    def begins(self) -> Longs:
        """(rows,) position of the first token held."""
        return self.starts + self.dropped

    def missing_sinks(self, row: int, sinks: int) -> int:
        """Tokens that a row still takes for its sinks, of so many in all, before its first page."""
        return 0 if self.count[row] or self.dropped[row] else sinks - int(self.sink_count[row])

    def select(self, index: Longs) -> Rows:
        """These rows, which may repeat; pages, books and counts are shared."""
        return Rows(
            starts=self.starts[index],
            dropped=self.dropped[index],
            tail_begin=self.tail_begin[index],
            sink_count=self.sink_count[index],
            count=self.count[index],
            pages=self.pages[index],
            valid=self.valid[index],
            owners=[list(self.owners[row]) for row in index],
            books=[list(self.books[row]) for row in index],
            pair_counts=[list(self.pair_counts[row]) for row in index],
        )

    @classmethod
    def joined(cls, parts: Sequence[Rows], shifts: Sequence[int]) -> Rows:
        """The rows of several batches, each moved by so many positions to the right."""

        def shifted(name: str) -> Longs:
            return np.concatenate([getattr(part, name) + by for part, by in zip(parts, shifts, strict=True)])

        def listed(name: str) -> list[Any]:
            return [list(row) for part in parts for row in getattr(part, name)]

        count = np.concatenate([part.count for part in parts])
        capacity = int(count.max())

        def table(name: str) -> npt.NDArray[Any]:
            tables = [getattr(part, name)[:, :capacity] for part in parts]
            return np.concatenate([np.pad(x, ((0, 0), (0, capacity - x.shape[1]))) for x in tables])

        return cls(
            starts=shifted("starts"),
            dropped=np.concatenate([part.dropped for part in parts]),
            tail_begin=shifted("tail_begin"),
            sink_count=np.concatenate([part.sink_count for part in parts]),
            count=count,
            pages=table("pages"),
            valid=table("valid"),
            owners=listed("owners"),
            books=listed("books"),
            pair_counts=listed("pair_counts"),
        )

    def slice(self, first: int, last: int, sinks: int) -> Rows:
        """The pages ``first`` to ``last`` of each row behind so many sinks, without padding, as rows of their own."""
        owners = [owners[first:last] for owners in self.owners]
        count = np.array([len(of_row) for of_row in owners], np.int64)
        valid = self.valid[:, first:last]
        used = np.where(np.arange(valid.shape[1]) < count[:, None], valid, 0)
        nothing: list[list[Counts | None]] = [[None, None] for _ in owners]
        return Rows(
            starts=np.zeros_like(count),
            dropped=np.zeros_like(count),
            tail_begin=sinks + used.sum(axis=1, dtype=np.int64),
            sink_count=np.full_like(count, sinks),
            count=count,
            pages=self.pages[:, first:last],
            valid=valid,
            owners=owners,
            books=self.books,
            pair_counts=nothing,
        )

    def behind(self, pages: int) -> Rows:
        """What each row holds behind its sinks and first pages, at the positions it has; those before are dropped."""
        before = self.sink_count + self.valid[:, :pages].sum(axis=1, dtype=np.int64)
        return Rows(
            starts=self.starts,
            dropped=self.dropped + before,
            tail_begin=self.tail_begin,
            sink_count=np.zeros_like(self.sink_count),
            count=self.count - pages,
            pages=self.pages[:, pages:],
            valid=self.valid[:, pages:],
            owners=[owners[pages:] for owners in self.owners],
            books=self.books,
            pair_counts=self.pair_counts,
        )

    @classmethod
    def chained(cls, parts: Sequence[Rows]) -> Rows:
        """The pages of several slices of the same rows, one after the other, behind the sinks of the first and with its
        books.
        """
        first = parts[0]
        pages = np.concatenate([part.pages[:, : part.count.max()] for part in parts], axis=1)
        valid = np.concatenate([part.valid[:, : part.count.max()] for part in parts], axis=1)
        owners = [[owner for part in parts for owner in part.owners[row]] for row in range(len(first))]
        count = sum((part.count for part in parts[1:]), first.count)
        end = first.sink_count + valid.sum(axis=1, dtype=np.int64)
        return cls(
            starts=first.starts,
            dropped=first.dropped,
            tail_begin=end,
            sink_count=first.sink_count,
            count=count,
            pages=pages,
            valid=valid,
            owners=owners,
            books=first.books,
            pair_counts=first.pair_counts,
        )

    def add_pages(self, row: int, buffer: Bytes, offsets: Longs) -> None:
        """Add the whole pages at these offsets of a buffer to a row."""
        first, last = int(self.count[row]), int(self.count[row]) + offsets.size
        if last > self.pages.shape[1]:
            more = max(last, self.pages.shape[1] * 5 // 4) - self.pages.shape[1]
            self.pages = np.pad(self.pages, ((0, 0), (0, more)))
            self.valid = np.pad(self.valid, ((0, 0), (0, more)))
        self.pages[row, first:last] = buffer.ctypes.data + offsets
        self.valid[row, first:last] = PAGE_TOKENS
        self.owners[row] += [buffer] * offsets.size
        self.count[row] = last

    def drop(self, row: int, position: int) -> bool:
        """Drop a row's sinks and pages as far as they lie before a position; says whether there were any."""
        begin, count = int(self.begins[row] + self.sink_count[row]), int(self.count[row])
        ends = begin + np.cumsum(self.valid[row, :count], dtype=np.int64)
        pages = int(np.searchsorted(ends, position, side="right"))
        if begin > position or not (pages or self.sink_count[row]):
            return False
        self.dropped[row] = (ends[pages - 1] if pages else begin) - self.starts[row]
        self.sink_count[row], self.count[row] = 0, count - pages
        for table in (self.pages, self.valid):
            table[row, : count - pages] = table[row, pages:count]
        del self.owners[row][:pages]
        return True

    def begin_at(self, row: int, position: int) -> None:
        """Drop all that a row holds before a position in the tail."""
        self.dropped[row] = position - self.starts[row]
        self.sink_count[row] = self.count[row] = 0
        self.owners[row].clear()
        self.tail_begin[row] = position

    def crop(self, tokens: int) -> None:
        """Keep what is before this position; a page that holds more counts fewer of its tokens."""
        for row in np.flatnonzero(self.tail_begin > tokens):
            self.starts[row] = min(self.starts[row], tokens)
            self.dropped[row] = min(self.dropped[row], tokens - self.starts[row])
            self.sink_count[row] = min(self.sink_count[row], tokens - self.begins[row])
            in_pages = tokens - self.begins[row] - self.sink_count[row]
            before = np.concatenate([[0], np.cumsum(self.valid[row, : self.count[row]])])
            keep = int(np.searchsorted(before, in_pages))
            if keep:
                self.valid[row, keep - 1] = in_pages - before[keep - 1]
            self.count[row] = keep
            del self.owners[row][keep:]
            self.tail_begin[row] = tokens
