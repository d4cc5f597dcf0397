"""The codebooks of a batch's rows, where the kernels of a device find them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcomp.codebook import Codebook
from kvcomp.kernels.gpu_layout import (
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


class DeviceBooks:
    """Four books of each row: of K the default and the own, of V the same.

    decoding, encoding: uint8 (rows, bytes), what ``Book`` and ``Encoder`` say of the four, which point to tables that are kept here.
    """

    def __init__(self, rows: int, tensors: tuple[TensorSpec, TensorSpec], device: torch.device) -> None:
        self._bits = tuple(index_bits(tensor) for tensor in tensors)
        self.decoding = torch.zeros((rows, BOOKS * ctypes.sizeof(Book)), dtype=torch.uint8, device=device)
        self.encoding = torch.zeros((rows, BOOKS * ctypes.sizeof(Encoder)), dtype=torch.uint8, device=device)
        self._tables: list[list[Tensor | None]] = [[None] * (2 * BOOKS) for _ in range(rows)]

    def enter(self, rows: Sequence[int], kind: int, own: int, book: Codebook | None) -> None:
        """Put a book of K (0) or V (1), the default (0) or the own (1), where the kernels find it for these rows."""
        if book is None:
            return
        device = self.decoding.device
        table, words = (
            torch.from_numpy(x.view("i4")).to(device)
            for x in (table_entries(book, self._bits[kind]), encoder_words(book))
        )
        index = 2 * kind + own
        for described, to, size in (
            (describe_book(book, table.data_ptr()), self.decoding, ctypes.sizeof(Book)),
            (describe_encoder(book, words.data_ptr()), self.encoding, ctypes.sizeof(Encoder)),
        ):
            content = torch.frombuffer(bytearray(bytes(described)), dtype=torch.uint8).to(device)
            for row in rows:
                to[row, size * index : size * (index + 1)] = content
        for row in rows:
            self._tables[row][2 * index : 2 * index + 2] = table, words

    def select(self, rows: Sequence[int]) -> DeviceBooks:
        """The books of these rows, which may repeat."""
        chosen = object.__new__(DeviceBooks)
        index = torch.tensor(rows, device=self.decoding.device)
        chosen._bits = self._bits
        chosen.decoding, chosen.encoding = self.decoding.index_select(0, index), self.encoding.index_select(0, index)
        chosen._tables = [list(self._tables[row]) for row in rows]
        return chosen

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, each counted once, and of what is said of them."""
        tables = {id(table): table.nbytes for row in self._tables for table in row if table is not None}
        return sum(tables.values()) + self.decoding.nbytes + self.encoding.nbytes
