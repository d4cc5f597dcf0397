"""Rows of several stores as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvcomp.errors import InvalidInput
from kvcomp.store import KVStore
from kvcomp.store.tensors import as_array, as_tensor


@torch.inference_mode(False)
def join(stores: Sequence[KVStore], tokens: int | None = None) -> KVStore:
    """One batch of the rows of several stores of one layer, which stay as they are; pages are shared. Rows get padding on the left.

    tokens: positions that the batch has, not fewer than a row has tokens; None for those of the longest store.
    Raises InvalidInput unless all have the same spec, shape and dtype, and hold tokens.
    """
    first = stores[0] if stores else None
    if first is None or not all(store.batch for store in stores):
        raise InvalidInput("only stores that hold tokens can be joined")
    for store in stores:
        if (store.spec, store.heads, store.channels, store.dtype) != (
            first.spec,
            first.heads,
            first.channels,
            first.dtype,
        ):
            raise InvalidInput("only rows of one spec, shape and dtype can be joined")
    joined = deepcopy(first)
    joined.tokens = max(store.tokens for store in stores) if tokens is None else tokens
    shift = [joined.tokens - store.tokens for store in stores]
    joined.batch = sum(store.batch for store in stores)
    for name in ("starts", "tail_begin"):
        shifted = [getattr(store, name) + by for store, by in zip(stores, shift, strict=True)]
        setattr(joined, name, np.concatenate(shifted))
    for name in ("sink_count", "count"):
        setattr(joined, name, np.concatenate([getattr(store, name) for store in stores]))
    capacity = int(joined.count.max())
    for name in ("pages", "valid"):
        tables = [getattr(store, name)[:, :capacity] for store in stores]
        setattr(joined, name, np.concatenate([np.pad(x, ((0, 0), (0, capacity - x.shape[1]))) for x in tables]))
    for name in ("owners", "own_books", "pair_counts"):
        setattr(joined, name, [list(row) for store in stores for row in getattr(store, name)])
    joined.tail_base = max(0, min(first_of_tail(store) + by for store, by in zip(stores, shift, strict=True)))
    recent = joined.tokens - joined.tail_base
    for name in ("sinks_k", "sinks_v"):
        setattr(joined, name, torch.cat([getattr(store, name) for store in stores]))
    tails = [last_tokens(store, min(recent, store.tokens)) for store in stores]
    padded = [np.pad(x, ((0, 0), (0, 0), (0, 0), (recent - x.shape[3], 0), (0, 0))) for x in tails]
    joined.tail_k, joined.tail_v = (as_tensor(x, joined.dtype) for x in np.concatenate(padded, axis=1))
    return joined


def first_of_tail(store: KVStore) -> int:
    """The first position that a row needs of the tail; of a row of which nothing is sealed also the padding, as it came."""
    return int(np.where(store.tail_begin == store.starts, store.tail_base, store.tail_begin).min())


def last_tokens(store: KVStore, recent: int) -> npt.NDArray[Any]:
    """The last ``recent`` tokens of K and V, (2, rows, heads, recent, D); 0 where a row has them compressed or not at all.

    In NumPy: torch shares copies of this size among threads, and waits for them longer than the rest takes where cores are busy.
    """
    held = [as_array(x) for x in (store.tail_k, store.tail_v)]
    tail = np.zeros((2, store.batch, store.heads, recent, store.channels), held[0].dtype)
    end = store.tokens - store.tail_base
    for row, begin in enumerate(store.tail_begin.tolist()):
        first = store.tail_base if begin == store.starts[row] else begin
        kept = min(store.tokens - first, recent)
        for kind in (0, 1):
            tail[kind, row, :, recent - kept :] = held[kind][row, :, end - kept : end]
    return tail
