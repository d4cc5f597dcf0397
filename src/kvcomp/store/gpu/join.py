"""Rows of several stores of one layer on a GPU as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvcomp.store.checks import check_joined
from kvcomp.store.gpu.arena import enough_memory
from kvcomp.store.gpu.books import DeviceBooks
from kvcomp.store.gpu.rows import Table
from kvcomp.store.gpu.store import GPUStore
from kvcomp.store.gpu.tail import Tail


@torch.inference_mode(False)
def join(stores: Sequence[GPUStore], tokens: int | None = None) -> GPUStore:
    """One batch of the rows of several stores, which stay as they are; pages are shared. Rows get padding on the left.

    Parameters
    ----------
    stores
        All of the same spec, shape, dtype and device.
    tokens
        Positions that the batch has, not fewer than a row has tokens; those of the longest store if None.

    Raises
    ------
    InvalidInput
        If the stores do not belong together or hold no tokens.
    LimitExceeded
        If memory ends.
    """
    check_joined(stores)
    tokens = max(store.tokens for store in stores) if tokens is None else tokens
    rows = []
    for store in stores:
        store.sync()
        by = tokens - store.tokens
        rows += [replace(row.copy(), start=row.start + by, tail_begin=row.tail_begin + by) for row in store.rows]
    with enough_memory():
        joined = stores[0].empty_twin()
        sinks = torch.cat([store.sinks_k for store in stores]), torch.cat([store.sinks_v for store in stores])
        held = [(store.tail, store.tokens - store.tail.base) for store in stores]
        base = max(0, min(row.tail_begin for row in rows))
        books = DeviceBooks.joined([store.device_books for store in stores])
        table = Table.joined([store.table for store in stores])
        joined.batch = len(rows)  # which the room of the tail depends on
        tail = Tail.joined(held, tokens, base, joined.tail_room())
        joined.hold(rows, tokens, sinks, tail, table, books)
    return joined
