"""The layouts of pages that the block target decodes, with their codebooks; the same in every process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from kvcomp.codec.codebook import Codebook
from kvcomp.codec.page import Layout
from kvcomp.files.container import LayerParts
from kvcomp.files.layers import store_of
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store import KVStore
from kvcomp.store.tensors import NAMES


@dataclass(frozen=True)
class Case:
    """A spec and a shape. own_books: whether the sequence has codebooks of its own."""

    spec: CodecSpec
    heads: int
    channels: int
    dtype: torch.dtype
    own_books: bool

    @property
    def page(self) -> Layout:
        return Layout(
            self.heads, (self.channels, self.channels), (self.spec.key.unit, self.spec.value.unit), self.dtype.itemsize
        )


def case(key: TensorSpec, value: TensorSpec, heads: int, channels: int, dtype: torch.dtype, own_books: bool) -> Case:
    return Case(CodecSpec(key, value, window=0, sinks=0), heads, channels, dtype, own_books)


HEAD = TensorSpec("head", steps=((0.05, 0.4),), classes=4)
LAYOUTS = (
    case(TensorSpec("block", 0.05), TensorSpec("token", 0.1), 1, 16, torch.bfloat16, False),
    case(TensorSpec("channel", 0.02, classes=4), TensorSpec("vector", 0.3, classes=4), 1, 32, torch.float16, True),
    case(TensorSpec("token", 0.016), TensorSpec("block", 0.9), 2, 16, torch.float32, True),
    case(TensorSpec("vector", 0.1, "fixed"), TensorSpec("channel", 0.2, limit=10), 1, 80, torch.bfloat16, False),
    case(HEAD, TensorSpec("head", steps=((0.3, 0.02),), classes=4), 2, 16, torch.float16, True),
    case(TensorSpec("block", 0.03), TensorSpec("token", 0.03, "fixed"), 1, 128, torch.float16, True),
    case(TensorSpec("block", 0.03, "patched"), TensorSpec("vector", 0.02, "patched"), 1, 48, torch.bfloat16, False),
    case(
        TensorSpec("head", coding="patched", steps=((0.05, 0.4),)),
        TensorSpec("head", coding="patched", steps=((0.2, 0.03),)),
        2,
        80,
        torch.float32,
        False,
    ),
)


@lru_cache
def filled(layout: Case) -> KVStore:
    """A store of five pages, of values that make its books."""
    store = KVStore(layout.spec)
    generator = torch.Generator().manual_seed(5)
    tokens = 320 if layout.own_books else 192
    store.append(*torch.randn(2, 1, layout.heads, tokens, layout.channels, generator=generator).to(layout.dtype))
    store.seal()
    return store


@lru_cache
def books_of(layout: Case) -> tuple[list[Codebook], np.ndarray]:
    own = filled(layout).rows.books[0]
    present = [book for book in own if book is not None]
    places = [present.index(book) if book is not None else -1 for book in own]
    return present, np.array([places], np.int64)


def store_over(layout: Case, arena: np.ndarray, backend: str) -> KVStore:
    """A store whose only page lies at the start of an arena that has passed ``check_pages``, until the next call."""
    store = _store(layout, backend)
    store.rows.pages[0, 0], store.rows.owners[0][0] = arena.ctypes.data, arena
    return store


@lru_cache
def _store(layout: Case, backend: str) -> KVStore:
    books, row_books = books_of(layout)
    nothing = np.zeros((2, 1, layout.heads, 0, layout.channels), np.uint16)
    nothing = nothing.view(np.float16) if layout.dtype == torch.float16 else nothing
    nothing = nothing.astype(np.float32) if layout.dtype == torch.float32 else nothing
    parts = LayerParts(
        layer=0,
        heads=layout.heads,
        channels=(layout.channels, layout.channels),
        dtype=NAMES[layout.dtype],
        start=np.zeros(1, np.int64),
        dropped=np.zeros(1, np.int64),
        sink_count=np.zeros(1, np.int64),
        page_count=np.ones(1, np.int64),
        offsets=np.zeros(1, np.int64),
        valid=np.full(1, 64, np.int32),
        arena=[np.zeros(0, np.uint8)],
        books=books,
        row_books=row_books,
        counts=[[None, None]],
        sinks=nothing,
        tail=nothing,
    )
    return store_of(parts, layout.spec, 64, backend)
