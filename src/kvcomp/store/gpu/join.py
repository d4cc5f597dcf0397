"""Rows of several stores of one layer on a GPU as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch

from kvcomp.errors import InvalidInput
from kvcomp.store.gpu.arena import enough_memory
from kvcomp.store.gpu.books import DeviceBooks
from kvcomp.store.gpu.rows import Table
from kvcomp.store.gpu.store import GPUStore
from kvcomp.store.gpu.tail import Tail


@torch.inference_mode(False)
def join(stores: Sequence[GPUStore], tokens: int | None = None) -> GPUStore:
    """One batch of the rows of several stores, which stay as they are; pages are shared. Rows get padding on the left.

    tokens: positions that the batch has, not fewer than a row has tokens.
    Raises InvalidInput unless all have the same spec, shape, dtype and device, and hold tokens, and LimitExceeded if memory ends.
    """
    first = stores[0]
    if not all(store.batch for store in stores):
        raise InvalidInput("only stores that hold tokens can be joined")
    tokens = max(store.tokens for store in stores) if tokens is None else tokens
    kinds = {(store.spec, store.heads, store.channels, store.dtype, store.device) for store in stores}
    if len(kinds) > 1:
        raise InvalidInput("only rows of one spec, shape, dtype and device can be joined")
    with enough_memory():
        joined = deepcopy(first)
        rows = []
        for store in stores:
            store.settle()
            for row in store.rows:
                rows.append(row.copy())
                rows[-1].start += tokens - store.tokens
                rows[-1].tail_begin += tokens - store.tokens
        joined.rows, joined.tokens, joined.batch = rows, tokens, len(rows)
        joined.table = Table.joined([store.table for store in stores])
        joined.device_books = DeviceBooks.joined([store.device_books for store in stores])
        for name in ("sinks_k", "sinks_v"):
            setattr(joined, name, torch.cat([getattr(store, name) for store in stores]))
        held = [(store.tail, store.tokens - store.tail.base) for store in stores]
        base = max(0, min(row.tail_begin for row in rows))
        joined.tail = Tail.joined(held, tokens, base, joined.tail_room())
        joined.publish()
    return joined
