"""How a KVStore is read: page by page, tile by tile, whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp.spec import PAGE_TOKENS
from kvcomp.store.tail import TILE_PAGES
from kvcomp.store.tensors import as_array

if TYPE_CHECKING:
    from kvcomp.store.cpu import KVStore


def tiles(store: KVStore, row: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A row's tokens in order: position of the first, and K and V as held, (KV heads, tokens, head_dim) each."""
    position, sinks, count = (int(x[row]) for x in (store.rows.starts, store.rows.sink_count, store.rows.count))
    if sinks:
        yield position, store.sinks_k[row, :, :sinks], store.sinks_v[row, :, :sinks]
        position += sinks
    for first in range(0, count, TILE_PAGES):
        k, v = store.tile(row, first, min(first + TILE_PAGES, count))
        yield position, k, v
        position += k.shape[1]
    last = store.tokens - store.tail_base
    for at in range(position - store.tail_base, last, TILE_PAGES * PAGE_TOKENS):
        part = slice(at, min(at + TILE_PAGES * PAGE_TOKENS, last))
        yield store.tail_base + at, store.tail_k[row, :, part], store.tail_v[row, :, part]


def tile(store: KVStore, row: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """What the pages ``first`` to ``last`` of a row hold, K' and V' where there is a transform: (KV heads, tokens,
    head_dim) in the dtype.
    """
    k = torch.empty((store.heads, (last - first) * PAGE_TOKENS, store.channels), dtype=store.dtype)
    v = torch.empty_like(k)
    pages = store.rows.pages[row, first:last].copy()
    store.kernels.decompress(pages, store.units, *store.books(row), as_array(k), as_array(v), store.steps)
    valid = torch.from_numpy(store.rows.valid[row, first:last])
    if int(valid.sum()) == k.shape[1]:
        return k, v
    used = (torch.arange(PAGE_TOKENS)[None] < valid[:, None]).ravel()
    return k[:, used], v[:, used]


def held(store: KVStore) -> tuple[Tensor, Tensor]:
    """The same as it is held: K' and V' where there is a transform."""
    k = torch.zeros((store.batch, store.heads, store.tokens, store.channels), dtype=store.dtype)
    v = torch.zeros_like(k)
    for row, (start, begin) in enumerate(zip(store.starts.tolist(), store.rows.tail_begin.tolist(), strict=True)):
        first = store.tail_base if begin == start else start  # nothing sealed: give the padding as it came
        if first < start:
            part = slice(0, start - store.tail_base)
            k[row, :, first:start], v[row, :, first:start] = store.tail_k[row, :, part], store.tail_v[row, :, part]
        for at, tile_k, tile_v in tiles(store, row):
            part = slice(at, at + tile_k.shape[1])
            k[row, :, part], v[row, :, part] = tile_k, tile_v
    return k, v
