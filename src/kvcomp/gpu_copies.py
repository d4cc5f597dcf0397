"""A layer's cache from the memory of a GPU to main memory, page by page as it is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvcomp.gpu_store import GPUStore
from kvcomp.store import KVStore, kept_counts


def to_main_memory(of: GPUStore) -> KVStore:
    """The same cache in main memory, for files; waits for the device."""
    store = KVStore(of.spec, "reference", of.given_books, of.given_transform)
    if not of.batch:
        return store
    of.settle()
    store.begin(of.tail_k.cpu()[:, :, :0])
    store.tokens, store.tail_base = of.tokens, of.tail_base
    held = of.tokens - of.tail_base
    store.tail_k, store.tail_v = (x[:, :, :held].cpu() for x in (of.tail_k, of.tail_v))
    store.sinks_k, store.sinks_v = of.sinks_k.cpu(), of.sinks_v.cpu()
    copies: dict[int, tuple[int, npt.NDArray[np.uint8]]] = {}
    for row in of.rows:
        for chunk in row.chunks:
            if id(chunk) not in copies:
                content = chunk.memory[: int(chunk.cursor) + of.channels].cpu().numpy()
                content[-of.channels :] = 0
                copies[id(chunk)] = chunk.memory.data_ptr(), content
    for index, (row, addresses) in enumerate(zip(of.rows, of.table.pages.tolist(), strict=True)):
        store.starts[index], store.tail_begin[index], store.sink_count[index] = row.start, row.tail_begin, row.sinks
        for address, valid in zip(addresses, row.valid, strict=False):
            begin, content = next(x for x in copies.values() if x[0] <= address < x[0] + x[1].size)
            store.enter(index, content, np.array([address - begin]))
            store.valid[index, store.count[index] - 1] = valid
        store.own_books[index] = list(row.books)
        store.pair_counts[index] = [
            None if counts is None else kept_counts(tensor, counts)
            for tensor, counts in zip((of.spec.key, of.spec.value), row.counts, strict=True)
        ]
    return store
