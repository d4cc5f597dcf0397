"""How whole pages of a row get from the tail into compressed pages, while the device does other work."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvcomp.codec.codebook import Codebook
from kvcomp.spec import PAGE_TOKENS
from kvcomp.store.gpu.arena import Chunk, Readback
from kvcomp.store.gpu.encode import Encoding
from kvcomp.store.training import learn, learns

if TYPE_CHECKING:
    from kvcomp.store.gpu.store import GPUStore


class SideStream:
    """The CUDA stream that pages are sealed on, beside the current one. Without CUDA everything runs in order."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def use(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait_for_current(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def keep(self, *tensors: Tensor) -> None:
        """Free these only after the work queued here, which reads or writes them."""
        if self._stream is not None:
            for x in tensors:
                x.record_stream(self._stream)

    def hand_over(self, x: Tensor) -> None:
        """Free this tensor, allocated here, only after the work that the current stream has by then."""
        if self._stream is not None:
            x.record_stream(torch.cuda.current_stream(self._stream.device))

    def mark(self) -> torch.cuda.Event | None:
        """An event behind the work queued here."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event


class Sealing:
    """One row's pages on their way: ``start``, then ``learn`` if the row trains books, ``place``, ``commit``.

    The row changes in ``commit`` only. ``learn``, and ``place`` for a prompt, wait for the device: ``step`` returns
    before them.
    """

    def __init__(self, store: GPUStore, index: int) -> None:
        self._store, self._index = store, index
        self._row = row = store.rows[index]
        self._sinks = 0 if row.valid else store.spec.sinks - row.sinks  # which the row still lacks
        self._begin = row.tail_begin + self._sinks
        self.pages = max(0, (store.tokens - store.spec.window - self._begin) // PAGE_TOKENS)
        self._tensors = store.spec.key, store.spec.value
        self._books, self._counts = list(row.books), list(row.counts)
        self._learning = [
            kind for kind in (0, 1) if learns(self._tensors[kind], store.given_books is not None, row.books[kind])
        ]
        self._prompt = bool(self._learning) or self.pages > 1  # whose pages get exactly the memory they need
        self._started = False
        self._found: list[Readback] = []

    @property
    def end(self) -> int:
        """Pages that the row has afterwards."""
        return len(self._row.valid) + self.pages

    def step(self) -> bool:
        """Go on to where the host must wait for the device. Says whether the row is sealed."""
        if not self._started:
            self.start()
            if self._prompt:
                return False
        elif self._found:
            self.learn()
            return False
        self.place()
        self.commit()
        return True

    def start(self) -> None:
        """Copy sinks and quantise; then count pairs if the row trains books, else measure the pages."""
        store, index = self._store, self._index
        at = self._begin - store.tail.base
        store.kernels.side.wait_for_current()
        with store.kernels.side.use():
            store.kernels.side.keep(store.tail.k, store.tail.v, store.sinks_k, store.sinks_v)
            store.kernels.side.keep(store.device_books.decoding, store.device_books.encoding)
            store.kernels.side.keep(*(steps for steps in store.kernels.steps if steps is not None))
            if self._sinks:
                for sinks, tail in ((store.sinks_k, store.tail.k), (store.sinks_v, store.tail.v)):
                    sinks[index, :, self._row.sinks :] = tail[index, :, at - self._sinks : at]
            k, v = (x[index, :, at : at + self.pages * PAGE_TOKENS] for x in (store.tail.k, store.tail.v))
            self._encoding = Encoding(
                store.kernels.on, store.kernels.page_build, self._tensors, store.kernels.steps, k, v
            )
            self._encoding.quantise()
            self._row_books = store.device_books.alone(index)
            store.kernels.side.keep(*self._row_books.held)
            if self._learning:
                self._encoding.count_pairs()
                self._found = [Readback(self._encoding.counts[kind]) for kind in self._learning]
            else:
                self._measure()
        self._started = True

    def learn(self) -> None:
        """Train the row's own books if it has tokens enough, and measure the pages."""
        for kind, found in zip(self._learning, self._found, strict=True):
            pairs = found.wait().view(np.uint32).astype(np.uint64)
            self._books[kind], self._counts[kind] = learn(
                self._tensors[kind], self._counts[kind], pairs, self.end * PAGE_TOKENS
            )
        self._found = []
        with self._store.kernels.side.use():
            for kind, book in self._trained():
                self._row_books.add_encoder([0], kind, 1, book)
            self._measure()

    def _trained(self) -> list[tuple[int, Codebook]]:
        books = ((kind, self._books[kind]) for kind in self._learning)
        return [(kind, book) for kind, book in books if book is not None]

    def _measure(self) -> None:
        """Find the sizes of the pages. A prompt's go to the host, which allocates what they need."""
        store = self._store
        if self._prompt:
            self._cursor = torch.zeros(1, dtype=torch.int64, device=store.device)
            self._encoding.measure(self._row_books.encoding[0], self._cursor)
            self._size = Readback(self._encoding.offsets[-1:])
        else:
            self._chunk = store.arena.chunk_for(store.kernels.largest_page)
            self._encoding.measure(self._row_books.encoding[0], self._chunk.cursor)

    def place(self) -> None:
        """Write the pages, and their addresses into the table."""
        store = self._store
        with store.kernels.side.use():
            if self._prompt:
                size = int(self._size.wait()[0]) + store.channels
                self._chunk = Chunk(torch.empty(size, dtype=torch.uint8, device=store.device), self._cursor)
            store.kernels.side.keep(store.table.pages)
            store.table.pages[self._index, len(self._row.valid) : self.end] = self._encoding.pack(self._chunk)
            store.arena.ask()

    def commit(self) -> None:
        """Give the row its pages, books and counts."""
        store, row = self._store, self._row
        for kind, book in self._trained():
            store.device_books.add([self._index], kind, 1, book)
        store.kernels.side.hand_over(self._chunk.memory)
        if self._chunk not in row.chunks:
            row.chunks.append(self._chunk)
        row.books, row.counts = self._books, self._counts
        row.sinks += self._sinks
        row.valid += [PAGE_TOKENS] * self.pages
        row.tail_begin = self._begin + self.pages * PAGE_TOKENS
