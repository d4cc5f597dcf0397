"""Rows of a batch: each is stored as if it were alone; they are selected, repeated and copied."""

from __future__ import annotations

import gc
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from kvcomp.errors import InvalidInput
from kvcomp.store import KVStore
from kvcomp.store.pages import bits_by_head
from stores import check_row, fill, page_bytes, ragged, snapshot, spec_of, tokens

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("starts", [[0, 0, 0], [0, 5, 150], [199, 64, 1], [60, 200, 0]])
def test_a_row_is_stored_as_if_it_were_alone(backend: str, starts: list[int]) -> None:
    width, more = 200, 260
    k, v = ragged(starts, width, more)
    batch = KVStore(spec_of(classes=4, r=0.5), backend)
    batch.append(k[:, :, :width], v[:, :, :width])
    batch.set_starts(starts)
    batch.seal()
    fill(batch, k[:, :, width:], v[:, :, width:], [])
    dense_k, dense_v = batch.dense()
    for row, start in enumerate(starts):
        alone = KVStore(batch.spec, backend)
        mine_k, mine_v = k[row : row + 1, :, start:], v[row : row + 1, :, start:]
        fill(alone, mine_k, mine_v, [width - start] if start < width else [])
        assert page_bytes(alone)[0] == page_bytes(batch)[row]
        assert alone.rows.books[0] == batch.rows.books[row]
        torch.testing.assert_close(alone.dense()[0][0], dense_k[row, :, start:], rtol=0, atol=0)
        torch.testing.assert_close(alone.dense()[1][0], dense_v[row, :, start:], rtol=0, atol=0)
        check_row(batch, row, k[row, :, start:], v[row, :, start:], start)
    assert batch.rows.count.min() >= 3


def test_the_values_of_the_neighbours_do_not_matter(backend: str) -> None:
    k, v = tokens(300, batch=3)
    one = fill(KVStore(spec_of(r=0.5), backend), k, v, [290])
    k2, v2 = k * torch.tensor([1.0, 50.0, torch.nan])[:, None, None, None], v.clone()
    v2[1:] = 1.0
    other = fill(KVStore(spec_of(r=0.5), backend), k2, v2, [290])
    assert page_bytes(one)[0] == page_bytes(other)[0]
    assert page_bytes(one)[1] != page_bytes(other)[1]
    assert one.rows.books[0] == other.rows.books[0]


def test_starts_may_be_set_before_sealing_and_not_after(backend: str) -> None:
    k, v = tokens(200, batch=2)
    store = KVStore(spec_of(), backend)
    store.append(k, v)
    store.set_starts([3, 180])
    store.set_starts([7, 190])
    store.seal()
    assert store.rows.count.tolist() == [2, 0]
    before = snapshot(store)
    store.set_starts([7, 190])
    assert snapshot(store) == before
    for starts in ([8, 190], [0, 190], [7], [7, 190, 0], [7, 201], [7, -1], [7, 5]):
        with pytest.raises(InvalidInput):
            store.set_starts(starts)
        assert snapshot(store) == before
    store.set_starts([7, 195])  # nothing of row 1 is sealed yet
    assert store.rows.tail_begin.tolist() == [139, 195]
    torch.testing.assert_close(store.dense()[0][1, :, 195:], k[1, :, 195:], rtol=0, atol=0)


def test_a_row_of_padding_alone_holds_nothing(backend: str) -> None:
    k, v = tokens(100, batch=2)
    store = KVStore(spec_of(), backend)
    store.append(k, v)
    store.set_starts([0, 100])
    store.seal()
    memory = store.memory()
    assert (store.rows.count.tolist(), memory.values) == ([1, 0], 100 * 2 * 2 * 16)
    more_k, more_v = tokens(90, batch=2, seed=9)
    fill(store, more_k, more_v, [])
    check_row(store, 1, more_k[1], more_v[1], start=100)
    assert store.rows.count.tolist() == [2, 1]


# Select, repeat, copy


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 1, 0], [1], [1, 1, 1, 1], [2, 0, 0, 2], [-1, 0]])
def test_select_reorders_drops_and_repeats_rows(backend: str, rows: list[int]) -> None:
    starts = [0, 40, 120]
    k, v = ragged(starts, 230, 0, torch.float32)
    store = KVStore(spec_of(), backend)
    store.append(k, v)
    store.set_starts(starts)
    store.seal()
    whole, pages = store.dense(), page_bytes(store)
    store.select(torch.tensor(rows))
    assert store.batch == len(rows)
    for a, b in zip(store.dense(), whole, strict=True):
        torch.testing.assert_close(a, b[rows], rtol=0, atol=0, equal_nan=True)
    assert page_bytes(store) == [pages[row] for row in rows]
    more = tokens(100, batch=len(rows), seed=3)
    fill(store, *more, [])
    for row, old in enumerate(rows):
        mine = [torch.cat([x[old, :, starts[old] :], y[row]], 1) for x, y in zip((k, v), more, strict=True)]
        check_row(store, row, mine[0], mine[1], starts[old])


def test_repeated_rows_share_their_pages_and_then_go_their_own_ways(backend: str) -> None:
    k, v = tokens(340)
    store = fill(KVStore(spec_of(r=0.5), backend), k, v, [340])
    one = store.memory()
    store.select(torch.zeros(4, dtype=torch.int64))
    four = store.memory()
    for name in ("codes", "lengths", "scales", "directories", "spare", "books"):
        assert getattr(four, name) == getattr(one, name)
    assert four.sealed_values == 4 * one.sealed_values
    assert four.table_entries == 4 * one.table_entries
    more = tokens(64, batch=4, seed=8)
    fill(store, *more, [])
    pages = page_bytes(store)
    assert all(row[:5] == pages[0][:5] for row in pages)
    assert len({row[5] for row in pages}) == 4
    assert len({tuple(row[:5]) for row in store.rows.pages.tolist()}) == 1


def test_bits_by_head_count_shared_pages_once(backend: str) -> None:
    store = fill(KVStore(spec_of(), backend), *tokens(200), [200])
    alone = bits_by_head(store)
    store.select(torch.tensor([0, 0, 0]))
    assert bits_by_head(store).tolist() == alone.tolist()


@pytest.mark.parametrize(
    "rows", [torch.tensor([3]), torch.tensor([-4]), torch.tensor([0, 9]), torch.tensor([], dtype=torch.int64),
             torch.tensor([True, False, True]), torch.tensor([0.0, 1.0])]
)  # fmt: skip
def test_rows_that_do_not_exist_are_refused(backend: str, rows: Tensor) -> None:
    store = fill(KVStore(spec_of(), backend), *tokens(90, batch=3), [90])
    before = snapshot(store)
    with pytest.raises(InvalidInput):
        store.select(rows)
    assert snapshot(store) == before
    with pytest.raises(InvalidInput):
        KVStore(spec_of(), backend).select(torch.tensor([0]))


@pytest.mark.parametrize("count", [3, 150, 330])
def test_a_deep_copy_is_independent_and_shares_its_pages(backend: str, count: int) -> None:
    fill(KVStore(spec_of(r=0.5), backend), *tokens(100, batch=2), [100]).dense()  # which makes the book's tables
    k, v = tokens(count, batch=2)
    store = fill(KVStore(spec_of(r=0.5), backend), k, v, [count])
    twin = deepcopy(store)
    before = snapshot(store)
    assert snapshot(twin) == before
    assert twin.rows.pages.tolist() == store.rows.pages.tolist()
    fill(twin, *tokens(100, batch=2, seed=1), [])
    twin.crop(50)
    twin.select(torch.tensor([1]))
    twin.append(*tokens(1, seed=2))
    assert snapshot(store) == before
    other = deepcopy(store)
    del store
    gc.collect()
    assert snapshot(other) == before  # the pages live as long as someone holds them


def test_a_deep_copy_keeps_its_sinks_when_the_other_begins_anew(backend: str) -> None:
    store = fill(KVStore(spec_of(), backend), *tokens(90), [90])
    twin = deepcopy(store)
    before = snapshot(twin)
    store.crop(0)
    fill(store, *tokens(90, seed=1), [90])
    assert snapshot(twin) == before


def test_a_deep_copy_of_an_empty_store_is_empty(backend: str) -> None:
    store = KVStore(spec_of(), backend)
    twin = deepcopy(store)
    twin.append(*tokens(5))
    assert (store.tokens, store.batch, twin.tokens) == (0, 0, 5)
