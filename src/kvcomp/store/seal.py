"""How a row's whole pages beyond the window are compressed, and when it trains its own codebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcomp.spec import KINDS, PAGE_TOKENS
from kvcomp.store.tensors import as_array
from kvcomp.store.training import learn, learns

if TYPE_CHECKING:
    from kvcomp.store.cpu import KVStore


def seal_row(store: KVStore, row: int) -> bool:
    """Compress what is ready of a row; says whether anything was."""
    rows, tensors = store.rows, (store.spec.key, store.spec.value)
    missing_sinks = store.spec.sinks - int(rows.sink_count[row]) if not rows.count[row] else 0
    begin = int(rows.tail_begin[row]) + missing_sinks
    pages = (store.tokens - store.spec.window - begin) // PAGE_TOKENS
    if pages < 1:
        return False
    at = begin - store.tail_base
    k, v = (as_array(x[row, :, at : at + pages * PAGE_TOKENS]) for x in (store.tail_k, store.tail_v))
    kq, vq = (store.kernels.quantise(x, tensor.unit, tensor.scale) for x, tensor in zip((k, v), tensors, strict=True))
    for index, (tensor, q) in enumerate(zip(tensors, (kq, vq), strict=True)):
        if learns(tensor, store.given_books is not None, rows.books[row][index]):
            counts = store.kernels.count_pairs(q, KINDS[index], tensor.classes)
            tokens = (int(rows.count[row]) + pages) * PAGE_TOKENS
            rows.books[row][index], rows.pair_counts[row][index] = learn(
                tensor, rows.pair_counts[row][index], counts, tokens
            )
    coding = store.spec.key.coding, store.spec.value.coding
    buffer, offsets = store.kernels.encode_pages(k, v, kq, vq, coding, store.units, *store.books(row))
    if missing_sinks:
        for sinks, tail in ((store.sinks_k, store.tail_k), (store.sinks_v, store.tail_v)):
            sinks[row, :, rows.sink_count[row] :] = tail[row, :, at - missing_sinks : at]
        rows.sink_count[row] = store.spec.sinks
    rows.add_pages(row, buffer, offsets[:-1])
    rows.tail_begin[row] = begin + pages * PAGE_TOKENS
    return True
