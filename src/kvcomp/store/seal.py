"""How a row's whole pages beyond the window are compressed, and when it trains its own codebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvcomp.codec import codebook
from kvcomp.codec.codebook import TRAINING_TOKENS
from kvcomp.spec import KINDS, PAGE_TOKENS
from kvcomp.store.tensors import as_array
from kvcomp.store.training import counted, kept_counts

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
        if tensor.coding == "huffman" and store.given_books is None and rows.books[row][index] is None:
            _learn(store, row, index, store.kernels.count_pairs(q, KINDS[index], tensor.classes), pages)
    coding = store.spec.key.coding, store.spec.value.coding
    buffer, offsets = store.kernels.encode_pages(k, v, kq, vq, coding, store.units, *store.books(row))
    if missing_sinks:
        for sinks, tail in ((store.sinks_k, store.tail_k), (store.sinks_v, store.tail_v)):
            sinks[row, :, rows.sink_count[row] :] = tail[row, :, at - missing_sinks : at]
        rows.sink_count[row] = store.spec.sinks
    rows.add_pages(row, buffer, offsets[:-1])
    rows.tail_begin[row] = begin + pages * PAGE_TOKENS
    return True


def _learn(store: KVStore, row: int, index: int, counts: npt.NDArray[np.uint64], pages: int) -> None:
    """Gather pair counts until the row has sealed enough tokens to train its own book."""
    tensor, rows = (store.spec.key, store.spec.value)[index], store.rows
    earlier = rows.pair_counts[row][index]
    if earlier is not None:
        some = counted(tensor, earlier.shape[1])
        counts[:, some, some] += earlier
    if (int(rows.count[row]) + pages) * PAGE_TOKENS >= TRAINING_TOKENS and counts.any():
        rows.books[row][index] = codebook.train(counts, tensor.limit)
        rows.pair_counts[row][index] = None
    else:
        rows.pair_counts[row][index] = kept_counts(tensor, counts)
