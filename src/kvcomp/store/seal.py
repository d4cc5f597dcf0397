"""How a row's whole pages beyond the window are compressed, and when it trains its own codebooks."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from kvcomp.spec import KINDS, PAGE_TOKENS
from kvcomp.store.tensors import as_array
from kvcomp.store.training import learn, learns

if TYPE_CHECKING:
    from kvcomp.store.cpu import KVStore


def seal_row(store: KVStore, row: int, needed: int) -> bool:
    """Compress what is ready of a row, and drop what lies before the position ``needed``; says whether there was
    anything to do.

    What was not compressed when it left the window never is. Pages lie where they would lie with it.
    """
    rows, tensors = store.rows, (store.spec.key, store.spec.value)
    missing_sinks = rows.missing_sinks(row, store.spec.sinks)
    begin = int(rows.tail_begin[row]) + missing_sinks
    pages = (store.tokens - store.spec.window - begin) // PAGE_TOKENS
    left = max(0, min(pages, (needed - begin) // PAGE_TOKENS))
    if left > 0:
        rows.begin_at(row, begin + left * PAGE_TOKENS)
        begin, pages, missing_sinks = begin + left * PAGE_TOKENS, pages - left, 0
    if pages < 1:
        return left > 0 or (needed > 0 and rows.drop(row, needed))
    at = begin - store.tail_base
    k, v = (as_array(x[row, :, at : at + pages * PAGE_TOKENS]) for x in (store.tail_k, store.tail_v))
    kq, vq = (store.kernels.quantise(x, tensor.unit, tensor.scale) for x, tensor in zip((k, v), tensors, strict=True))
    own, pair_counts = list(rows.books[row]), list(rows.pair_counts[row])  # the row's once its pages are there
    for index, (tensor, q) in enumerate(zip(tensors, (kq, vq), strict=True)):
        if learns(tensor, store.given_books is not None, own[index]):
            counts = store.kernels.count_pairs(q, KINDS[index], tensor.classes)
            tokens = (int(rows.count[row]) + pages) * PAGE_TOKENS
            own[index], pair_counts[index] = learn(tensor, pair_counts[index], counts, tokens)
    coding, books = (store.spec.key.coding, store.spec.value.coding), zip(store.default_books, own, strict=True)
    buffer, offsets = store.kernels.encode_pages(k, v, kq, vq, coding, store.units, *books)
    rows.books[row], rows.pair_counts[row] = own, pair_counts
    if missing_sinks:
        for sinks, tail in ((store.sinks_k, store.tail_k), (store.sinks_v, store.tail_v)):
            sinks[row, :, rows.sink_count[row] :] = tail[row, :, at - missing_sinks : at]
        rows.sink_count[row] = store.spec.sinks
    if store.sliding_window is None:
        rows.add_pages(row, buffer, offsets[:-1])
    else:  # a page that is dropped shall free its memory, whatever pages were sealed with it
        spare = np.zeros(store.layout.spare_bytes, np.uint8)
        for first, last in pairwise(offsets.tolist()):
            rows.add_pages(row, np.append(buffer[first:last], spare), np.zeros(1, np.int64))
    rows.tail_begin[row] = begin + pages * PAGE_TOKENS
    rows.drop(row, needed)
    return True


def until_seal(store: KVStore) -> int:
    """``Store.until_seal``."""
    spec, rows = store.spec, store.rows
    if not store.batch:
        return spec.sinks + spec.window + PAGE_TOKENS
    begin = min(int(rows.tail_begin[row]) + rows.missing_sinks(row, spec.sinks) for row in range(store.batch))
    return max(1, begin + spec.window + PAGE_TOKENS - store.tokens)
