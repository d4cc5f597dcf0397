"""The codebooks of a batch's rows, where the kernels of a device find them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.codec.codebook import Codebook
from kvcomp.kernels.cuda.layout import (
    BOOKS,
    Book,
    Encoder,
    describe_book,
    describe_encoder,
    encoder_words,
    index_bits,
    table_entries,
)
from kvcomp.spec import TensorSpec
from kvcomp.store.tensors import to_pinned


class DeviceBooks:
    """Four books of each row: the default and the own of K, then those of V.

    ``decoding`` and ``encoding``, uint8 (rows, bytes), hold four ``Book`` and ``Encoder`` structures for each row.
    These point to tables that are kept alive here.
    """

    def __init__(self, rows: int, tensors: tuple[TensorSpec, TensorSpec], device: torch.device) -> None:
        self._bits = tuple(index_bits(tensor) for tensor in tensors)
        self.decoding = torch.zeros((rows, BOOKS * ctypes.sizeof(Book)), dtype=torch.uint8, device=device)
        self.encoding = torch.zeros((rows, BOOKS * ctypes.sizeof(Encoder)), dtype=torch.uint8, device=device)
        self._tables: list[list[Tensor | None]] = [[None] * (2 * BOOKS) for _ in range(rows)]

    def add(self, rows: Sequence[int], kind: int, own: int, book: Codebook | None) -> None:
        """Give these rows a book of K (0) or V (1), the default (0) or the own (1): whole or not at all."""
        if book is None:
            return
        table = self._upload(table_entries(book, self._bits[kind]).view("i4"))
        described = self._described(describe_book(book, table.data_ptr()))
        self.add_encoder(rows, kind, own, book)
        self._write(rows, self.decoding, 2 * kind + own, described)
        for row in rows:
            self._tables[row][4 * kind + 2 * own] = table

    def add_encoder(self, rows: Sequence[int], kind: int, own: int, book: Codebook) -> None:
        """Give these rows a book for encoding alone."""
        words = self._upload(encoder_words(book).view("i4"))
        self._write(rows, self.encoding, 2 * kind + own, self._described(describe_encoder(book, words.data_ptr())))
        for row in rows:
            self._tables[row][4 * kind + 2 * own + 1] = words

    def _upload(self, content: npt.NDArray[Any]) -> Tensor:
        return to_pinned(content, self.decoding.device).to(self.decoding.device, non_blocking=True)

    def _described(self, described: Book | Encoder) -> Tensor:
        return self._upload(np.frombuffer(bytearray(bytes(described)), np.uint8))

    def _write(self, rows: Sequence[int], to: Tensor, index: int, content: Tensor) -> None:
        size = content.numel()
        for row in rows:
            to[row, size * index : size * (index + 1)] = content

    def _of(self, decoding: Tensor, encoding: Tensor, tables: list[list[Tensor | None]]) -> DeviceBooks:
        """Books of other rows under the same spec."""
        made = object.__new__(DeviceBooks)
        made._bits, made.decoding, made.encoding, made._tables = self._bits, decoding, encoding, tables
        return made

    def alone(self, row: int) -> DeviceBooks:
        """A copy of one row's books, made without waiting for the device."""
        decoding, encoding = (x[row : row + 1].clone() for x in (self.decoding, self.encoding))
        return self._of(decoding, encoding, [list(self._tables[row])])

    @torch.inference_mode(False)
    def select(self, rows: Sequence[int], index: Tensor) -> DeviceBooks:
        """The books of these rows, which may repeat. index: the same on the device, int64."""
        decoding, encoding = (x.index_select(0, index) for x in (self.decoding, self.encoding))
        return self._of(decoding, encoding, [list(self._tables[row]) for row in rows])

    @classmethod
    def joined(cls, books: Sequence[DeviceBooks]) -> DeviceBooks:
        """The books of all rows of several batches."""
        decoding, encoding = torch.cat([of.decoding for of in books]), torch.cat([of.encoding for of in books])
        return books[0]._of(decoding, encoding, [list(row) for of in books for row in of._tables])

    @property
    def held(self) -> list[Tensor]:
        """The structures and the tables, each once."""
        tables = {id(table): table for row in self._tables for table in row if table is not None}
        return [self.decoding, self.encoding, *tables.values()]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.held)
