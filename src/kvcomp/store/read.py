"""How a KVStore is read: page by page, tile by tile, whole; and what any store does so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvcomp.calibration.transform import Transform
from kvcomp.kernels import CacheView
from kvcomp.spec import PAGE_TOKENS
from kvcomp.store.fused import attend_fused
from kvcomp.store.padding import Padding
from kvcomp.store.sink_logits import take_share
from kvcomp.store.tail import TILE_PAGES
from kvcomp.store.tensors import as_array

if TYPE_CHECKING:
    from kvcomp.store.cpu import KVStore

Pair = tuple[Tensor, Tensor]


def view(store: KVStore) -> CacheView:
    """``KVStore.view``."""
    rows = store.rows
    return CacheView(
        pages=rows.pages,
        valid=rows.valid,
        count=rows.count,
        units=store.units,
        books=[store.books(row) for row in range(store.batch)],
        sinks_k=as_array(store.sinks_k),
        sinks_v=as_array(store.sinks_v),
        sink_count=rows.sink_count,
        tail_k=as_array(store.tail_k),
        tail_v=as_array(store.tail_v),
        tail_begin=rows.tail_begin - store.tail_base,
        steps=store.steps,
    )


def attend(store: KVStore, q: Tensor, scaling: float, softcap: float, sink_logits: Tensor | None) -> Tensor:
    """``Store.attend``."""
    last = np.arange(store.tokens - q.shape[2] + 1, store.tokens + 1)  # of the queries: where what they see ends
    hidden = None
    if store.sliding_window is not None and store.tokens >= store.sliding_window:
        hidden = np.maximum(0, last - store.sliding_window - store.rows.begins[:, None])
    out, lse = attend_fused(
        store.kernels, store.view(), store.transform, q, last - store.tail_base, scaling, softcap, hidden
    )
    if sink_logits is not None:
        out = take_share(out, lse, sink_logits, q, scaling, store.transform)
    return out.to(q.dtype)


def tiles(store: KVStore, row: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """``Store.tiles``."""
    begin, sinks, count = (int(x[row]) for x in (store.rows.begins, store.rows.sink_count, store.rows.count))
    first = store.sinks_k[row, :, :sinks], store.sinks_v[row, :, :sinks]
    recent = slice(store.tokens - store.tail_base)
    last = store.tail_k[row, :, recent], store.tail_v[row, :, recent]
    return in_order(begin, first, count, partial(store.tile, row), store.tail_base, last)


def in_order(
    position: int, sinks: Pair, pages: int, tile: Callable[[int, int], Pair], base: int, tail: Pair
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """``Store.tiles`` of what a row has: sinks from ``position`` on, pages, of which ``tile`` gives some, and the tail,
    which begins at ``base``.
    """
    if sinks[0].shape[1]:
        yield position, *sinks
        position += sinks[0].shape[1]
    for first in range(0, pages, TILE_PAGES):
        k, v = tile(first, min(first + TILE_PAGES, pages))
        yield position, k, v
        position += k.shape[1]
    for at in range(position - base, tail[0].shape[1], TILE_PAGES * PAGE_TOKENS):
        part = slice(at, at + TILE_PAGES * PAGE_TOKENS)
        yield base + at, tail[0][:, part], tail[1][:, part]


def undone(
    transform: Transform | Padding | None, k: Tensor, v: Tensor, padding: Sequence[int], places: Tensor | None
) -> Pair:
    """``Store.dense`` of K and V as held. padding: of each row with sealed pages, how many positions it has. places: of
    the tokens, (rows, tokens); None where no mean turns.
    """
    if transform is None:
        return k, v
    k, v = transform.key.undo(k, places), transform.value.undo(v)
    for row, start in enumerate(padding):
        k[row, :, :start] = v[row, :, :start] = 0
    return k, v


def tile(store: KVStore, row: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """What the pages ``first`` to ``last`` of a row hold, K' and V' where there is a transform: (KV heads, tokens,
    head_dim) in the dtype.
    """
    shape = store.heads, (last - first) * PAGE_TOKENS
    k, v = (torch.empty((*shape, held), dtype=store.dtype, device=store.device) for held in store.held_channels)
    pages = store.rows.pages[row, first:last]
    store.kernels.decompress(pages, store.units, *store.books(row), as_array(k), as_array(v), store.steps)
    valid = torch.from_numpy(store.rows.valid[row, first:last])
    if int(valid.sum()) == k.shape[1]:
        return k, v
    used = (torch.arange(PAGE_TOKENS, device=store.device)[None] < valid[:, None]).ravel()
    return k[:, used], v[:, used]


def held(store: KVStore, first: int) -> tuple[Tensor, Tensor]:
    """``KVStore.held``."""
    shape = store.batch, store.heads, store.tokens - first
    k, v = (torch.zeros((*shape, held), dtype=store.dtype, device=store.device) for held in store.held_channels)
    for row, (start, begin) in enumerate(zip(store.starts.tolist(), store.rows.tail_begin.tolist(), strict=True)):
        # nothing sealed: the padding as it came
        padding = slice(0, start - store.tail_base if begin == start else 0)
        came = store.tail_base, store.tail_k[row, :, padding], store.tail_v[row, :, padding]
        for at, tile_k, tile_v in (came, *tiles(store, row)):
            cut = max(0, first - at)
            part = slice(max(at, first) - first, max(at + tile_k.shape[1], first) - first)
            k[row, :, part], v[row, :, part] = tile_k[:, cut:], tile_v[:, cut:]
    return k, v
