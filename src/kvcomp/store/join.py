"""Rows of several stores as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from kvcomp.store.checks import check_joined
from kvcomp.store.rows import Rows
from kvcomp.store.tensors import as_array, as_tensor

if TYPE_CHECKING:
    from kvcomp.store.cpu import KVStore

S = TypeVar("S", bound="KVStore")


@torch.inference_mode(False)
def join(stores: Sequence[S], tokens: int | None = None) -> S:
    """One batch of the rows of several stores of one layer, which stay as they are; pages are shared. Rows get padding
    on the left.

    tokens: positions that the batch has, not fewer than a row has tokens; None for those of the longest store.
    Raises InvalidInput unless all have the same spec, shape and dtype, and hold tokens.
    """
    check_joined(stores)
    tokens = max(store.tokens for store in stores) if tokens is None else tokens
    shifts = [tokens - store.tokens for store in stores]
    base = max(0, min(first_of_tail(store) + by for store, by in zip(stores, shifts, strict=True)))
    recent = tokens - base
    tails = [last_tokens(store, min(recent, store.tokens)) for store in stores]
    tail_k, tail_v = (
        as_tensor(np.concatenate([_padded(x, recent) for x in of_kind]), stores[0].dtype)
        for of_kind in zip(*tails, strict=True)
    )
    sinks = torch.cat([store.sinks_k for store in stores]), torch.cat([store.sinks_v for store in stores])
    return stores[0].of(Rows.joined([store.rows for store in stores], shifts), tokens, (tail_k, tail_v), sinks)


def first_of_tail(store: KVStore) -> int:
    """The first position that a row needs of the tail; of a row of which nothing is sealed also the padding, as it
    came.
    """
    begin = store.rows.tail_begin
    return int(np.where(begin == store.rows.starts, store.tail_base, begin).min())


def _padded(x: npt.NDArray[Any], tokens: int) -> npt.NDArray[Any]:
    """(rows, heads, tokens, D) with zeros before the tokens, so that there are so many."""
    return np.pad(x, ((0, 0), (0, 0), (tokens - x.shape[2], 0), (0, 0)))


def last_tokens(store: KVStore, recent: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The last ``recent`` tokens of K and of V, (rows, heads, recent, D) each; 0 where a row has them compressed or not
    at all.

    In NumPy: torch shares copies of this size among threads, and waits for them longer than the rest takes where cores
    are busy.
    """
    held = [as_array(x) for x in (store.tail_k, store.tail_v)]
    shape = store.batch, store.heads, recent
    k, v = (np.zeros((*shape, x.shape[3]), x.dtype) for x in held)
    end = store.tokens - store.tail_base
    for row, (start, begin) in enumerate(zip(store.starts.tolist(), store.rows.tail_begin.tolist(), strict=True)):
        first = store.tail_base if begin == start else begin
        kept = min(store.tokens - first, recent)
        for tail, x in zip((k, v), held, strict=True):
            tail[row, :, recent - kept :] = x[row, :, end - kept : end]
    return k, v
