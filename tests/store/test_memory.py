"""Every byte that a store holds is counted, and an append moves few of them."""

from __future__ import annotations

import gc
import tracemalloc
from copy import deepcopy
from dataclasses import fields

import pytest
import torch

from kvcomp.codec.page import blocks_of
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store import KVStore, Memory
from stores import DTYPES, allocated, fill, page_bytes, spec_of, tokens

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 63, 132, 200, 340])
@pytest.mark.parametrize("starts", [[0], [0, 20, 70]])
def test_memory_counts_every_array_and_storage_that_the_store_holds(
    backend: str, count: int, starts: list[int], dtype: torch.dtype
) -> None:
    k, v = tokens(count, batch=len(starts), dtype=dtype)
    store = KVStore(spec_of(classes=4, r=0.5), backend)
    assert store.memory() == Memory()
    half = (count + 1) // 2
    store.append(k[:, :, :half], v[:, :, :half])
    store.set_starts([min(start, half) for start in starts])
    fill(store, k[:, :, half:], v[:, :, half:], [3])
    assert store.memory().total == allocated(store)
    store.crop(count * 3 // 4)
    assert store.memory().total == allocated(store)
    store.append(*tokens(2, batch=len(starts), dtype=dtype))
    store.select(torch.tensor([0, 0]))
    assert store.memory().total == allocated(store)
    assert deepcopy(store).memory().total == allocated(store)


def test_a_default_book_that_k_and_v_share_counts_once() -> None:
    same = TensorSpec("block", 0.5)
    store = fill(KVStore(CodecSpec(same, same), "reference"), *tokens(5), [5])
    assert store.default_books[0] is store.default_books[1]
    assert store.memory().total == allocated(store)


def test_the_bytes_of_the_pages_and_tables_are_what_the_allocator_gave(backend: str) -> None:
    k, v = tokens(2000, heads=4, channels=64)
    spec = spec_of("channel", "token", coding="fixed", r=0.1)
    fill(KVStore(spec, backend), k[:, :, :100], v[:, :, :100], [100])  # compile and cache whatever there is
    gc.collect()
    tracemalloc.start()
    try:
        store = fill(KVStore(spec, backend), k, v, [1500, 200, 299])
        gc.collect()
        traced = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    memory = store.memory()
    expected = (
        memory.total - memory.window - memory.sinks - memory.books
    )  # torch's memory and cached books are not traced
    assert expected > 300_000
    assert expected <= traced <= expected * 1.02 + 20_000


def test_the_window_is_what_torch_allocated(backend: str) -> None:
    k, v = tokens(500, batch=2, dtype=torch.bfloat16)
    store = KVStore(spec_of(coding="fixed", window=64), backend)
    for i in range(500):
        store.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        store.seal()
        memory = store.memory()
        token = 2 * 2 * 2 * 16 * 2
        assert memory.window == store.tail_k.untyped_storage().nbytes() + store.tail_v.untyped_storage().nbytes()
        assert (store.tokens - store.tail_base) * token <= memory.window <= (64 + 64 + 63 + 4) * token
        assert memory.sinks == 4 * token


def test_after_a_long_prefill_the_window_gives_back_what_is_sealed(backend: str) -> None:
    store = fill(KVStore(spec_of(coding="fixed", window=64), backend), *tokens(1000), [1000])
    assert store.memory().window <= (64 + 64 + 4) * 2 * 2 * 16 * 4


def test_the_parts_of_the_pages_are_those_of_the_format(backend: str) -> None:
    k, v = tokens(4 + 128 + 8, heads=3, channels=48, dtype=torch.float16)
    k[0, 2, 30, 0] = torch.inf
    store = fill(KVStore(spec_of("channel", "token", coding="fixed", r=0.2), backend), k, v, [140])
    parts = dict.fromkeys(("codes", "raw_blocks"), 0)
    for page in page_bytes(store)[0]:
        for index, (mode, data) in enumerate(blocks_of(page, store.layout)):
            scales = 4 * 48 if index < 3 and mode else 0
            parts["codes" if mode else "raw_blocks"] += len(data) - scales
    memory = store.memory()
    assert (memory.codes, memory.raw_blocks) == (parts["codes"], parts["raw_blocks"]) == (parts["codes"], 64 * 48 * 2)
    assert memory.lengths == 0
    assert memory.directories == 2 * 32
    assert memory.scales == 2 * 256 + 5 * 4 * 48
    assert memory.pages == sum(len(page) for page in page_bytes(store)[0])
    assert memory.spare == 48
    assert memory.table_entries == 2 * 12
    assert memory.values == 2 * 3 * 140 * 48
    assert memory.sealed_values == 2 * 3 * 128 * 48
    assert memory.dense == memory.values * 2
    assert memory.coded_bits == 8 * (memory.pages + 24) / memory.sealed_values
    assert memory.total_bits == 8 * memory.total / memory.values
    assert memory.ratio == memory.dense / memory.total


def test_huffman_blocks_say_how_long_their_streams_are(backend: str) -> None:
    store = fill(KVStore(spec_of("block", "vector", r=0.5), backend), *tokens(4 + 64 + 8), [76])
    memory = store.memory()
    blocks = blocks_of(page_bytes(store)[0][0], store.layout)
    scales = [8, 8, 256, 256]
    widths = [data[at] & 15 for (_, data), at in zip(blocks, scales, strict=True)]
    assert memory.lengths == sum(4 + 8 * width for width in widths)  # a word, and 64 differences of so many bits
    assert max(widths) <= 9
    assert memory.scales == 2 * 8 + 2 * 256
    assert memory.coded_bits < 16


def test_memory_adds_up() -> None:
    one = Memory(**{f.name: i for i, f in enumerate(fields(Memory))})
    assert one + one == Memory(**{f.name: 2 * i for i, f in enumerate(fields(Memory))})
    assert (Memory().coded_bits, Memory().total_bits, Memory().ratio) == (0.0, 0.0, 1.0)


def work(spec: CodecSpec, backend: str, count: int, batch: int = 1, seal: bool = True) -> tuple[int, int]:
    """Reallocations of the tail and the table, and the entries that they moved, over ``count`` appends of a token."""
    k, v = tokens(1, batch=batch, heads=1)
    store = KVStore(spec, backend)
    moves = moved = 0
    tail = table = None
    for _ in range(count):
        store.append(k, v)
        if seal:
            store.seal()
        if store.tail_k is not tail:
            moves, moved = moves + 1, moved + store.tail_k.shape[2]
        if store.rows.pages is not table:
            moves, moved = moves + 1, moved + store.rows.pages.shape[1]
        tail, table = store.tail_k, store.rows.pages
    return moves, moved


@pytest.mark.parametrize(
    ("window", "sinks", "batch", "seal"),
    [(64, 4, 1, True), (0, 0, 1, True), (64, 4, 3, True), (64, 1024, 1, True), (1500, 4, 1, True), (64, 4, 1, False)],
)
def test_appending_moves_a_bounded_number_of_tokens_for_each_token(
    backend: str, window: int, sinks: int, batch: int, seal: bool
) -> None:
    spec = spec_of(coding="fixed", window=window, sinks=sinks)
    for count in (1000, 2000):
        moves, moved = work(spec, backend, count, batch, seal)
        assert moves <= count * 0.13
        assert moved <= count * 7
