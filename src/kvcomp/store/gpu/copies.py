"""A layer's cache from the memory of a GPU to main memory and back, page by page as it is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from kvcomp.codec.page import size_of
from kvcomp.errors import BackendUnavailable
from kvcomp.kernels.cuda.launch import Launcher
from kvcomp.store import KVStore
from kvcomp.store.gpu.arena import Chunk, enough_memory
from kvcomp.store.gpu.rows import Table
from kvcomp.store.gpu.store import GPUStore
from kvcomp.store.gpu.tail import Tail
from kvcomp.store.rows import Rows


def to_main_memory(of: GPUStore) -> KVStore:
    """The same cache in main memory, for files; waits for the device."""
    empty = KVStore(of.spec, "cpu", of.given_books, of.given_transform)
    if not of.batch:
        return empty
    of.sync()
    contents = {id(chunk): _content(chunk, of.channels) for row in of.rows for chunk in row.chunks}
    rows = Rows.empty(of.batch)
    for index, (row, addresses) in enumerate(zip(of.rows, of.table.pages.tolist(), strict=True)):
        rows.starts[index], rows.tail_begin[index], rows.sink_count[index] = row.start, row.tail_begin, row.sinks
        spans = sorted((chunk.memory.data_ptr(), contents[id(chunk)]) for chunk in row.chunks)
        starts = [begin for begin, _ in spans]
        for address in addresses[: len(row.valid)]:
            begin, content = spans[bisect_right(starts, address) - 1]
            rows.add_pages(index, content, np.array([address - begin]))
        rows.valid[index, : len(row.valid)] = row.valid
        rows.books[index], rows.pair_counts[index] = list(row.books), list(row.counts)
    held = of.tokens - of.tail.base
    tail_k, tail_v = (x[:, :, :held].cpu() for x in (of.tail.k, of.tail.v))
    sinks = of.sinks_k.cpu(), of.sinks_v.cpu()
    return empty.of(rows, of.tokens, (tail_k, tail_v), sinks, of.held_channels)


def _content(chunk: Chunk, spare: int) -> npt.NDArray[np.uint8]:
    """What a chunk holds, with so many readable bytes behind it."""
    content: npt.NDArray[np.uint8] = chunk.memory[: int(chunk.cursor) + spare].cpu().numpy()
    content[-spare:] = 0
    return content


@torch.inference_mode(False)
def to_device(
    of: KVStore, device: torch.device, launcher: Callable[[torch.device], Launcher] | None = None
) -> GPUStore:
    """The same cache in the memory of a GPU. A row's pages lie in one chunk, those that an earlier row has too in that
    one's.

    Raises BackendUnavailable if the kernels cannot run there, LimitExceeded if memory ends.
    """
    if of.sliding_window is not None or of.rows.dropped.any():
        raise BackendUnavailable("the GPU kernels know no sliding window: use backend='cpu'")
    if of.value_channels != of.channels or of.held_channels[0] != of.channels:
        raise BackendUnavailable(
            f"the GPU kernels take one head_dim for K and V, a multiple of 16, not {of.channels} and "
            f"{of.value_channels}: use backend='cpu'"
        )
    store = GPUStore(of.spec, of.given_books, of.given_transform, launcher)
    with enough_memory():
        store.allocate(torch.empty((of.batch, of.heads, 0, of.channels), dtype=of.dtype, device=device))
        addresses = np.zeros((of.batch, max(store.table.capacity, int(of.rows.count.max()))), np.int64)
        places: dict[int, tuple[Chunk, int]] = {}
        for index, row in enumerate(store.rows):
            count = int(of.rows.count[index])
            pages = of.rows.pages[index, :count].tolist()
            fresh = [page for page in dict.fromkeys(pages) if page not in places]
            chunk, offsets = _upload(of, index, fresh, device)
            places |= {page: (chunk, offset) for page, offset in zip(fresh, offsets, strict=True)}
            row.chunks = list(dict.fromkeys(places[page][0] for page in pages))
            addresses[index, :count] = [places[page][0].memory.data_ptr() + places[page][1] for page in pages]
            row.start, row.sinks = int(of.rows.starts[index]), int(of.rows.sink_count[index])
            row.tail_begin, row.valid = int(of.rows.tail_begin[index]), of.rows.valid[index, :count].tolist()
            row.books, row.counts = list(of.rows.books[index]), list(of.rows.pair_counts[index])
            for kind in (0, 1):
                store.device_books.add([index], kind, 1, row.books[kind])
        sinks = of.sinks_k.to(device, copy=True), of.sinks_v.to(device, copy=True)
        held = of.tokens - of.tail_base
        tail_k, tail_v = (x[:, :, :held].to(device, copy=True) for x in (of.tail_k, of.tail_v))
        table = Table(torch.from_numpy(addresses).to(device))
        store.hold(store.rows, of.tokens, sinks, Tail(tail_k, tail_v, of.tail_base), table, store.device_books)
    return store


def _upload(of: KVStore, row: int, pages: list[int], device: torch.device) -> tuple[Chunk, list[int]]:
    """A chunk with these pages of a row, and where they lie in it. They may come from a file: behind them it can be
    read as far as docs/format.md, section 2, asks.
    """
    buffers = dict(zip(of.rows.pages[row].tolist(), of.rows.owners[row], strict=False))
    parts, offsets, end = [], [], 0
    for page in pages:
        at = page - buffers[page].ctypes.data
        parts.append(buffers[page][at : at + size_of(buffers[page], at, of.heads)])
        offsets.append(end)
        end += parts[-1].size
    content = np.concatenate([*parts, np.zeros(9 * of.channels // 8 + 8, np.uint8)])
    return Chunk(torch.from_numpy(content).to(device), torch.tensor([end], device=device)), offsets
