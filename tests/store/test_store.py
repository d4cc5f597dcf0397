"""KVStore: what is sealed when, that it never changes, that rows are alone, and that every byte is counted."""

from __future__ import annotations

import gc
import itertools
import pickle
import tracemalloc
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from kvcomp.codec.codebook import Codebook, default, train
from kvcomp.codec.page import DEFAULT_BOOK, FIXED, OWN_BOOK, RAW, blocks_of
from kvcomp.errors import BackendUnavailable, InvalidInput, KVCompError
from kvcomp.kernels import reference
from kvcomp.spec import UNITS, CodecSpec, Coding, TensorSpec, Unit
from kvcomp.store import KVStore, Memory
from kvcomp.store.tensors import as_array

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STATE = ("starts", "tail_begin", "sink_count", "count", "pages", "valid")


def spec_of(
    key: Unit = "block",
    value: Unit = "token",
    r: float = 0.4,
    coding: Coding = "huffman",
    window: int = 8,
    sinks: int = 4,
    classes: int = 1,
    heads: int = 2,
) -> CodecSpec:
    """A spec of few levels, so that the reference is fast; K and V have books of their own."""

    def tensor(unit: Unit, limit: int) -> TensorSpec:
        if unit == "head":
            return TensorSpec(unit, None, coding, limit, classes, (tuple(2 * r + head / 4 for head in range(heads)),))
        return TensorSpec(unit, r, coding, limit, classes)

    return CodecSpec(tensor(key, 12), tensor(value, 11), window, sinks)


def tokens(
    count: int, batch: int = 1, heads: int = 2, channels: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """Random K and V, (batch, heads, count, channels)."""
    generator = torch.Generator().manual_seed(seed + 1000 * count)
    return tuple(torch.randn((batch, heads, count, channels), generator=generator).to(dtype) for _ in "kv")


def fill(store: KVStore, k: Tensor, v: Tensor, chunks: list[int]) -> KVStore:
    """Append in chunks, sealing after each; what remains one by one."""
    at = 0
    for chunk in itertools.chain(chunks, itertools.repeat(1)):
        if at >= k.shape[2]:
            return store
        store.append(k[:, :, at : at + chunk], v[:, :, at : at + chunk])
        store.seal()
        at += chunk
    raise AssertionError


def page_bytes(store: KVStore) -> list[list[bytes]]:
    """The pages of every row."""
    return [
        [
            reference.page_bytes(address, store.heads)
            for address in store.rows.pages[row, : store.rows.count[row]].tolist()
        ]
        for row in range(store.batch)
    ]


def snapshot(store: KVStore) -> dict[str, Any]:
    """All that a store holds, copied."""
    if not store.batch:
        return {"tokens": store.tokens, "batch": store.batch, "heads": store.heads, "dtype": store.dtype}
    return {
        "tokens": store.tokens,
        "tail_base": store.tail_base,
        **{name: getattr(store.rows, name).tolist() for name in STATE},
        "dense": [x.tolist() for x in store.dense()],
        "pages": page_bytes(store),
        "memory": store.memory(),
        "books": [list(books) for books in store.rows.books],
        "counts": [[None if c is None else c.tolist() for c in counts] for counts in store.rows.pair_counts],
    }


def bound_of(page: Tensor, unit: Unit, r: float | tuple[float, ...]) -> Tensor:
    """r (max - min) / 2 for the values (heads, 64, channels) of a page; of the unit ``head`` half a step and half a
    unit in the last place.
    """
    if isinstance(r, tuple):
        step = torch.tensor(r, dtype=torch.float64)[:, None, None]
        top = (page.double().abs() + step / 2).log2().floor().exp2()
        return step / 2 + top * torch.finfo(page.dtype).eps / 2
    axes = {"block": (1, 2), "channel": (1,), "vector": (2,), "token": (0, 2)}[unit]
    x = page.double()
    return (r * (x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True)) / 2).expand(x.shape)


def check_row(store: KVStore, row: int, k: Tensor, v: Tensor, start: int = 0) -> None:
    """Row ``row`` holds k and v, (heads, tokens, channels) from its first real token on: raw or within the bound.

    Only for a row that was never cropped: its pages follow its sinks.
    """
    count, sinks = int(store.rows.count[row]), int(store.rows.sink_count[row])
    sealed = slice(sinks, sinks + 64 * count)
    for found, given, tensor in zip(store.dense(), (k, v), (store.spec.key, store.spec.value), strict=True):
        mine = found[row, :, start:]
        assert mine.shape == given.shape
        torch.testing.assert_close(mine[:, :sinks], given[:, :sinks], rtol=0, atol=0)
        torch.testing.assert_close(mine[:, sealed.stop :], given[:, sealed.stop :], rtol=0, atol=0)
        for page in range(count):
            part = slice(sinks + 64 * page, sinks + 64 * page + 64)
            error = (mine[:, part].double() - given[:, part].double()).abs()
            assert (error <= bound_of(given[:, part], tensor.unit, tensor.scale)).all()
        if count:
            assert not torch.equal(mine[:, sealed], given[:, sealed])  # it is compressed after all


# When tokens are sealed


@pytest.mark.parametrize("count", [1, 4, 63, 64, 65, 131, 132, 133, 195, 196, 197, 460])
def test_pages_seal_when_64_tokens_have_gathered_beyond_sinks_and_window(backend: str, count: int) -> None:
    k, v = tokens(count)
    store = KVStore(spec_of(window=64, sinks=4), backend)
    store.append(k, v)
    assert not store.compressed
    store.seal()
    pages = max(0, count - 4 - 64) // 64
    assert store.rows.count.tolist() == [pages]
    assert store.rows.sink_count.tolist() == [4 if pages else 0]
    assert store.rows.tail_begin.tolist() == [4 + 64 * pages if pages else 0]
    assert store.compressed == (pages > 0)
    check_row(store, 0, k[0], v[0])


@pytest.mark.parametrize("sinks", [0, 1, 70])
@pytest.mark.parametrize("window", [0, 1, 63, 64, 200])
def test_one_token_at_a_time_the_same_tokens_are_sealed_as_all_at_once(backend: str, window: int, sinks: int) -> None:
    k, v = tokens(340)
    single = KVStore(spec_of("channel", "vector", coding="fixed", window=window, sinks=sinks), backend)
    for i in range(340):
        single.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        single.seal()
        assert single.tokens == i + 1
        assert int(single.rows.count[0]) == max(0, i + 1 - window - sinks) // 64
    whole = KVStore(single.spec, backend)
    whole.append(k, v)
    whole.seal()
    assert page_bytes(single) == page_bytes(whole)
    for a, b in zip(single.dense(), whole.dense(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    check_row(single, 0, k[0], v[0])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_unit_and_dtype_is_within_its_bound(backend: str, unit: Unit, dtype: torch.dtype) -> None:
    k, v = tokens(150, heads=3, channels=32, dtype=dtype)
    other: Unit = UNITS[UNITS.index(unit) - 1]
    store = fill(KVStore(spec_of(unit, other, r=0.3, classes=4, heads=3), backend), k, v, [100])
    assert store.dtype == dtype
    assert store.rows.count.tolist() == [2]
    assert store.dense()[0].dtype == dtype
    check_row(store, 0, k[0], v[0])
    layout = store.layout
    assert all(mode != RAW for page in page_bytes(store)[0] for mode, _ in blocks_of(page, layout))


def test_values_that_are_not_finite_survive(backend: str) -> None:
    k, v = tokens(80, dtype=torch.bfloat16)
    k[0, 1, 20, 3] = torch.nan
    v[0, 0, 30, 5] = -torch.inf
    store = fill(KVStore(spec_of("block", "block"), backend), k, v, [80])
    assert store.rows.count.tolist() == [1]
    found_k, found_v = store.dense()
    torch.testing.assert_close(found_k[0, 1], k[0, 1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found_v[0, 0], v[0, 0], rtol=0, atol=0)
    assert not torch.equal(found_k[0, 0], k[0, 0])
    assert [mode == RAW for mode, _ in blocks_of(page_bytes(store)[0][0], store.layout)] == [False, True, True, False]


# What is sealed never changes


def test_sealed_bytes_stay_where_and_as_they_are(backend: str) -> None:
    k, v = tokens(700)
    store = fill(KVStore(spec_of(), backend), k[:, :, :150], v[:, :, :150], [150])
    seen: list[tuple[int, bytes]] = []
    for at in range(150, 700, 25):
        now = list(zip(store.rows.pages[0, : store.rows.count[0]].tolist(), page_bytes(store)[0], strict=True))
        assert now[: len(seen)] == seen
        seen = now
        store.append(k[:, :, at : at + 25], v[:, :, at : at + 25])
        store.seal()
    assert len(seen) == 10
    check_row(store, 0, k[0], v[0])


def test_the_store_keeps_copies_of_what_it_is_given(backend: str) -> None:
    k, v = tokens(100)
    kept = k.clone(), v.clone()
    store = fill(KVStore(spec_of(), backend), k, v, [50, 50])
    before = store.dense()
    k.fill_(torch.nan)
    v.zero_()
    for a, b in zip(store.dense(), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    check_row(store, 0, kept[0][0], kept[1][0])


def test_tensors_that_do_not_lie_together_or_want_a_gradient_are_stored_alike(backend: str) -> None:
    k, v = tokens(150)
    plain = fill(KVStore(spec_of(), backend), k, v, [140])
    odd = KVStore(spec_of(), backend)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (k, v)]
    fill(odd, strided[0], strided[1], [140])
    assert page_bytes(odd) == page_bytes(plain)
    assert not odd.dense()[0].requires_grad
    assert not odd.tail_k.requires_grad


def test_a_store_filled_in_inference_mode_goes_on_outside_it(backend: str) -> None:
    k, v = tokens(200)
    store = KVStore(spec_of(), backend)
    with torch.inference_mode():
        fill(store, k[:, :, :90], v[:, :, :90], [90])
        twin = deepcopy(store)
    for one in (store, twin):
        fill(one, k[:, :, 90:], v[:, :, 90:], [30, 1])
        one.crop(195)
        one.append(k[:, :, 195:], v[:, :, 195:])
        check_row(one, 0, k[0], v[0])


# Rows


def ragged(starts: list[int], width: int, more: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """K and V of a left-padded batch; the padding is NaN, so that whoever reads it is found out."""
    k, v = tokens(width + more, batch=len(starts), dtype=dtype)
    for row, start in enumerate(starts):
        k[row, :, :start] = v[row, :, :start] = torch.nan
    return k, v


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


# Crop


POSITIONS = [0, 1, 3, 4, 5, 67, 68, 69, 100, 131, 132, 133, 195, 196, 197, 203, 204, 205, 209, 210]


@pytest.mark.parametrize("position", POSITIONS)
def test_a_crop_keeps_the_first_tokens_as_they_are_and_more_can_follow(backend: str, position: int) -> None:
    k, v = tokens(210)
    store = fill(KVStore(spec_of(), backend), k, v, [205])
    assert store.rows.count.tolist() == [3]
    before = [x[:, :, :position].clone() for x in store.dense()]
    store.crop(position)
    assert store.tokens == position
    for a, b in zip(store.dense(), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    more_k, more_v = tokens(300, seed=5)
    fill(store, more_k, more_v, [7, 100])
    kept = [x[:, :, :position] for x in store.dense()]
    for a, b in zip(kept, before, strict=True):
        torch.testing.assert_close(a[:, :, : 4 + 192], b[:, :, : 4 + 192], rtol=0, atol=0)
    sealed = int(store.rows.tail_begin[0])
    assert store.tokens - sealed < 64 + 8
    for found, given, old, tensor in zip(
        store.dense(), (more_k, more_v), before, (store.spec.key, store.spec.value), strict=True
    ):
        new = found[0, :, max(sealed, position) :]
        torch.testing.assert_close(new, given[0, :, max(sealed, position) - position :], rtol=0, atol=0)
        everything = torch.cat([old[0], given[0]], 1).double()
        loosest = tensor.scale * float(everything.max() - everything.min()) / 2
        assert float((found[0].double() - everything).abs().max()) <= loosest


@pytest.mark.parametrize("positions", [[200, 150, 70, 69, 3], [209, 208, 207], [131, 132 - 4, 5, 1, 0]])
def test_crops_follow_each_other(backend: str, positions: list[int]) -> None:
    k, v = tokens(210)
    store = fill(KVStore(spec_of(), backend), k, v, [205])
    whole = store.dense()
    for position in positions:
        store.crop(position)
        for a, b in zip(store.dense(), whole, strict=True):
            torch.testing.assert_close(a, b[:, :, :position], rtol=0, atol=0)
        assert store.memory().values == position * 2 * 2 * 16


def test_a_crop_of_ragged_rows_takes_from_each_what_lies_behind(backend: str) -> None:
    starts = [0, 30, 170]
    k, v = ragged(starts, 230, 0, torch.float32)
    store = KVStore(spec_of(), backend)
    store.append(k, v)
    store.set_starts(starts)
    store.seal()
    assert store.rows.count.tolist() == [3, 2, 0]
    whole = store.dense()
    for position in (220, 160, 100, 31, 20):
        store.crop(position)
        for a, b in zip(store.dense(), whole, strict=True):
            for row, start in enumerate(starts):
                torch.testing.assert_close(a[row, :, start:], b[row, :, start:position], rtol=0, atol=0)
        assert store.memory().values == sum(max(0, position - start) for start in starts) * 2 * 2 * 16


def test_pages_cropped_away_are_freed(backend: str) -> None:
    k, v = tokens(210)
    store = fill(KVStore(spec_of(coding="fixed"), backend), k, v, [])
    three = store.memory()
    store.crop(100)
    two = store.memory()
    assert 0 < two.pages < three.pages
    assert two.spare == 2 * 16  # those of the pages left
    store.crop(4)
    none = store.memory()
    assert (none.pages, none.spare) == (0, 0)
    fill(store, k, v, [])
    memory = store.memory()
    assert memory.pages == sum(len(page) for page in page_bytes(store)[0])
    assert memory.spare == 3 * 16


def test_a_crop_beyond_the_tokens_or_below_0_is_refused(backend: str) -> None:
    store = fill(KVStore(spec_of(), backend), *tokens(90), [90])
    before = snapshot(store)
    for position in (91, -1, 1000):
        with pytest.raises(InvalidInput, match="90 tokens"):
            store.crop(position)
    store.crop(90)
    assert snapshot(store) == before


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


def test_a_deep_copy_of_an_empty_store_is_empty(backend: str) -> None:
    store = KVStore(spec_of(), backend)
    twin = deepcopy(store)
    twin.append(*tokens(5))
    assert (store.tokens, store.batch, twin.tokens) == (0, 0, 5)


# Codebooks


def counted(store: KVStore, k: Tensor, v: Tensor, row: int = 0) -> list[Codebook]:
    """The books that the sealed tokens of a row train, by the reference."""
    books = []
    begin = int(store.rows.sink_count[row])
    part = slice(begin, begin + 64 * int(store.rows.count[row]))
    kinds: Any = ("K", "V")
    for kind, x, tensor in zip(kinds, (k, v), (store.spec.key, store.spec.value), strict=True):
        q = reference.quantise(as_array(x[row, :, part]), tensor.unit, tensor.scale)
        books.append(train(reference.count_pairs(q, kind, tensor.classes), tensor.limit))
    return books


def modes(store: KVStore, row: int = 0) -> list[set[int]]:
    return [{mode for mode, _ in blocks_of(page, store.layout)} for page in page_bytes(store)[row]]


@pytest.mark.parametrize("chunks", [[], [80, 70, 200], [268]])
def test_a_row_learns_its_books_at_256_sealed_tokens_and_keeps_them(backend: str, chunks: list[int]) -> None:
    k, v = tokens(600)
    spec = spec_of(classes=4, r=0.5)
    store = KVStore(spec, backend)
    at = 0
    for chunk in [*chunks, *[1] * (268 - sum(chunks))]:
        assert store.rows.books == ([[None, None]] if at else [])
        fill(store, k[:, :, at : at + chunk], v[:, :, at : at + chunk], [chunk])
        at += chunk
    learned = store.rows.books[0]
    assert store.rows.count.tolist() == [(at - 12) // 64]
    assert learned == counted(store, k, v)
    assert store.rows.pair_counts == [[None, None]]
    # the pages before are coded with the default book, those of the call that reached 256 tokens with the new one
    earlier = max(0, sum(chunks[:-1]) - 12) // 64 if sum(chunks) >= 268 else 3
    assert modes(store) == [{DEFAULT_BOOK}] * earlier + [{OWN_BOOK}] * (int(store.rows.count[0]) - earlier)
    fill(store, k[:, :, at:], v[:, :, at:], [])
    assert all(a is b for a, b in zip(store.rows.books[0], learned, strict=True))
    check_row(store, 0, k[0], v[0])


def test_before_256_tokens_the_default_book_serves(backend: str) -> None:
    store = fill(KVStore(spec_of(classes=4, r=0.5), backend), *tokens(267), [250])
    assert store.rows.count.tolist() == [3]
    assert store.rows.books == [[None, None]]
    assert store.books(0) == ((default(0.5, 4, 12), None), (default(0.5, 4, 11), None))
    assert modes(store) == [{DEFAULT_BOOK}] * 3


def test_a_block_whose_codes_the_own_book_lacks_takes_the_default_book(backend: str) -> None:
    k, v = tokens(400)
    k[:, :, :330] = 3.0  # constants: their only code is 0
    store = fill(KVStore(spec_of("block", "token", r=0.5), backend), k, v, [268])
    book = store.rows.books[0][0]
    assert book is not None
    assert book.levels == (1,)
    assert [mode for mode, _ in blocks_of(page_bytes(store)[0][-1], store.layout)] == [DEFAULT_BOOK] * 2 + [
        OWN_BOOK
    ] * 2
    check_row(store, 0, k[0], v[0])


@pytest.mark.parametrize("steps", [(0.5, 0.25), (0.1, 0.002)])
def test_the_unit_head_learns_its_book_over_several_seals_as_at_once(backend: str, steps: tuple[float, ...]) -> None:
    tensor = TensorSpec("head", classes=4, steps=(steps,))
    spec = CodecSpec(tensor, tensor, window=0, sinks=0)
    k, v = tokens(384)
    slow = fill(KVStore(spec, backend), k, v, [100])
    at_once = fill(KVStore(spec, backend), k[:, :, :256], v[:, :, :256], [256])
    assert slow.rows.books == at_once.rows.books
    assert [{mode >= FIXED or mode == RAW for mode in of_page} for of_page in modes(slow)[:3]] == [{True}] * 3
    assert OWN_BOOK in modes(slow)[-1]
    check_row(slow, 0, k[0], v[0])


def test_counts_of_the_unit_head_are_kept_around_0(backend: str) -> None:
    tensor = TensorSpec("head", steps=((1.0, 1.0),))
    k, v = torch.zeros(1, 2, 64, 16), torch.zeros(1, 2, 64, 16)
    k[0, 0, 3, 4], v[0, 1, 5, 5] = -7, 9
    store = fill(KVStore(CodecSpec(tensor, tensor, window=0, sinks=0), backend), k, v, [64])
    for counts, (n, code) in zip(store.rows.pair_counts[0], ((14, -7), (20, 9)), strict=True):
        assert counts is not None
        assert counts.shape == (1, n, n)
        assert counts.sum() == 2 * 64 * 8
        assert counts[0].sum(axis=1)[n // 2 + code] + counts[0].sum(axis=0)[n // 2 + code] == 1


def test_books_that_are_given_serve_from_the_first_page_and_none_is_trained(backend: str) -> None:
    tensor = TensorSpec("head", classes=4, steps=((0.5, 0.5),))
    spec = CodecSpec(tensor, tensor, window=0, sinks=0)
    k, v = tokens(640)
    wide = fill(KVStore(spec, backend), 4 * k, 4 * v, [640]).rows.books[0]
    narrow = fill(KVStore(spec, backend), k, v, [640]).rows.books[0]
    books = (wide[0], narrow[0]), (wide[1], narrow[1])
    k[:, 0, 64:] *= 3  # what the narrow book lacks
    store = fill(KVStore(spec, backend, books), k[:, :, :384], v[:, :, :384], [64])
    assert store.rows.books == [narrow]
    assert store.books(0) == books
    assert store.rows.pair_counts == [[None, None]]
    assert modes(store)[0] == {OWN_BOOK}
    assert {DEFAULT_BOOK, OWN_BOOK} <= set().union(*modes(store)[1:])
    check_row(store, 0, k[0, :, :384], v[0, :, :384])
    store.select(torch.tensor([0, 0]))
    assert store.rows.books == [narrow] * 2


def test_books_that_do_not_fit_the_spec_are_refused(backend: str) -> None:
    tensor = TensorSpec("head", classes=4, steps=((0.5, 0.5),))
    book = default(0.5, 1, 12)
    with pytest.raises(InvalidInput, match="1 classes"):
        KVStore(CodecSpec(tensor, tensor), backend, ((None, None), (None, book)))
    with pytest.raises(InvalidInput, match="by its relative scale"):
        KVStore(CodecSpec(TensorSpec("block", 0.1), tensor), backend, ((None, None), (None, None)))


def test_steps_must_be_for_the_heads_of_the_tensors(backend: str) -> None:
    tensor = TensorSpec("head", steps=((0.5, 0.5, 1.0),))
    with pytest.raises(InvalidInput, match="3 KV heads"):
        KVStore(CodecSpec(tensor, TensorSpec("block", 0.1)), backend).append(*tokens(10))


def test_each_row_learns_its_own_books(backend: str) -> None:
    starts = [0, 100]
    k, v = ragged(starts, 300, 0)
    store = KVStore(spec_of(r=0.5), backend)
    store.append(k, v)
    store.set_starts(starts)
    store.seal()
    assert store.rows.books[0] == counted(store, k, v)
    assert store.rows.books[1] == [None, None]


def test_fixed_width_needs_no_books(backend: str) -> None:
    store = fill(KVStore(spec_of(coding="fixed"), backend), *tokens(300), [300])
    assert store.rows.books == [[None, None]]
    assert store.rows.pair_counts == [[None, None]]
    assert all(mode > 8 for page in modes(store) for mode in page)


# Bytes


def held(thing: Any, seen: dict[Any, int]) -> None:
    """Gather the bytes of every array and tensor storage that an object reaches, each once."""
    if isinstance(thing, Tensor):
        storage = thing.untyped_storage()
        seen["tensor", storage.data_ptr() or id(thing)] = storage.nbytes()
    elif isinstance(thing, np.ndarray):
        while isinstance(thing.base, np.ndarray):
            thing = thing.base
        seen["array", id(thing)] = thing.nbytes
    elif isinstance(thing, list | tuple | set):
        for part in thing:
            held(part, seen)
    elif isinstance(thing, dict):
        held(list(thing.values()), seen)
    elif type(thing).__module__.startswith("kvcomp"):
        names = {field.name for field in fields(thing)} if is_dataclass(thing) else set()
        names |= set(getattr(thing, "__dict__", {}))  # whatever an object keeps for later counts too
        held([getattr(thing, name) for name in names], seen)


def allocated(store: KVStore) -> int:
    seen: dict[Any, int] = {}
    held(store, seen)
    return sum(seen.values())


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


# Refusals


K, V = tokens(3, batch=2)
BAD: dict[str, tuple[Any, Any]] = {
    "rank": (K[0], V[0]),
    "rank 5": (K[None], V[None]),
    "unlike shapes": (K, V[:, :, :2]),
    "unlike heads": (K, V[:, :1]),
    "unlike types": (K, V.half()),
    "float64": (K.double(), V.double()),
    "integers": (K.int(), V.int()),
    "no tokens": (K[:, :, :0], V[:, :, :0]),
    "no rows": (K[:0], V[:0]),
    "no heads": (K[:, :0], V[:, :0]),
    "no channels": (K[..., :0], V[..., :0]),
    "channels": (K[..., :8], V[..., :8]),
    "many channels": (K.repeat(1, 1, 1, 17), V.repeat(1, 1, 1, 17)),
    "device": (K.to("meta"), V.to("meta")),
    "one device": (K, V.to("meta")),
}
UNLIKE = {
    "batch": (K[:1], V[:1]),
    "heads": (K[:, :1], V[:, :1]),
    "head_dim": (K.repeat(1, 1, 1, 2), V.repeat(1, 1, 1, 2)),
    "dtype": (K.bfloat16(), V.bfloat16()),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_append_is_refused_and_changes_nothing(backend: str, name: str) -> None:
    for count in (0, 5, 90):
        store = KVStore(spec_of(), backend)
        if count:
            fill(store, *tokens(count, batch=2), [count])
        before = snapshot(store)
        with pytest.raises(BackendUnavailable if "device" in name else InvalidInput):
            store.append(*BAD[name])
        assert snapshot(store) == before
        store.append(K, V)


@pytest.mark.parametrize("name", UNLIKE)
def test_an_append_unlike_what_is_stored_is_refused_and_changes_nothing(backend: str, name: str) -> None:
    store = fill(KVStore(spec_of(), backend), *tokens(90, batch=2), [90])
    before = snapshot(store)
    with pytest.raises(InvalidInput, match="this cache holds"):
        store.append(*UNLIKE[name])
    assert snapshot(store) == before


def test_a_spec_of_many_layers_and_an_unknown_backend_are_refused() -> None:
    listed = TensorSpec("block", (0.1, 0.2))
    with pytest.raises(InvalidInput, match="layer"):
        KVStore(CodecSpec(listed, listed), "reference")
    with pytest.raises(BackendUnavailable, match="'cpu'"):
        KVStore(spec_of(), "gpu")
    assert issubclass(BackendUnavailable, KVCompError)


def test_sealing_an_empty_store_does_nothing(backend: str) -> None:
    store = KVStore(spec_of(), backend)
    store.seal()
    store.crop(0)
    assert (store.tokens, store.compressed) == (0, False)


# Everything at once


class Row:
    """The plain model of a row: its tokens as given, and for each value how far the stored one may be off."""

    def __init__(self, start: int, new: npt.NDArray[np.float64]) -> None:
        self.start = start  # padding before the first token
        self.values = new[:, :, start:]
        self.bounds = np.zeros_like(self.values)
        self.sealed = 0  # tokens that are sinks or lie in pages
        self.pages = 0

    def append(self, new: npt.NDArray[np.float64]) -> None:
        self.values = np.concatenate([self.values, new], axis=2)
        self.bounds = np.concatenate([self.bounds, np.zeros_like(new)], axis=2)

    def seal(self, spec: CodecSpec) -> None:
        begin = self.sealed if self.pages else spec.sinks
        while self.values.shape[2] - begin >= 64 + spec.window:
            for kind, tensor in enumerate((spec.key, spec.value)):
                page = torch.from_numpy(self.values[kind, :, begin : begin + 64])
                self.bounds[kind, :, begin : begin + 64] = bound_of(page, tensor.unit, tensor.scale).numpy()
            begin += 64
            self.sealed = begin
            self.pages += 1

    def crop(self, count: int, spec: CodecSpec) -> None:
        self.start = min(self.start, count)
        count -= self.start
        self.values, self.bounds = self.values[:, :, :count], self.bounds[:, :, :count]
        self.sealed = min(self.sealed, count)
        if self.sealed <= spec.sinks:
            self.pages = 0


class StoreMachine(RuleBasedStateMachine):
    """A KVStore and plain rows go through the same appends, seals, crops, selections and copies."""

    backend = "reference"

    @initialize(
        units=st.tuples(st.sampled_from(UNITS), st.sampled_from(UNITS)),
        window=st.sampled_from([0, 5, 64]),
        sinks=st.sampled_from([0, 4, 70]),
        coding=st.sampled_from(["huffman", "fixed"]),
        dtype=st.sampled_from(DTYPES),
        first=st.sampled_from([1, 90, 340]),
        padding=st.lists(st.floats(0, 1) | st.just(0.0), min_size=1, max_size=3),
        seed=st.integers(0, 99),
    )
    def begin(
        self,
        units: tuple[Unit, Unit],
        window: int,
        sinks: int,
        coding: Coding,
        dtype: torch.dtype,
        first: int,
        padding: list[float],
        seed: int,
    ) -> None:
        self.spec = spec_of(*units, coding=coding, window=window, sinks=sinks, r=0.5)
        self.store = KVStore(self.spec, self.backend)
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.copies: list[tuple[KVStore, dict[str, Any]]] = []
        self.length = first
        starts = [int(share * first) for share in padding]
        self.rows = [
            Row(start, new) for start, new in zip(starts, self.append_to_store(len(padding), first), strict=True)
        ]
        self.store.set_starts(starts)

    def append_to_store(self, batch: int, count: int) -> npt.NDArray[np.float64]:
        k, v = ((torch.randn((batch, 2, count, 16), generator=self.generator) * 3).to(self.dtype) for _ in "kv")
        self.store.append(k, v)
        return torch.stack([k, v], 1).double().numpy()

    @rule(count=st.sampled_from([1, 2, 7, 63, 64, 65, 130, 300]), seal=st.booleans())
    @precondition(lambda self: self.length < 450)
    def append(self, count: int, seal: bool) -> None:
        for row, new in zip(self.rows, self.append_to_store(len(self.rows), count), strict=True):
            row.append(new)
        self.length += count
        if seal:
            self.seal()

    @rule()
    def seal(self) -> None:
        self.store.seal()
        for row in self.rows:
            row.seal(self.spec)

    @rule(back=st.sampled_from([0, 1, 5, 63, 64, 65, 150]))
    def crop_the_end(self, back: int) -> None:
        self.crop(max(0, self.length - back))

    @rule(share=st.floats(0, 1))
    def crop_anywhere(self, share: float) -> None:
        self.crop(int(share * self.length))

    def crop(self, count: int) -> None:
        self.store.crop(count)
        self.length = count
        for row in self.rows:
            row.crop(count, self.spec)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=3))
        self.store.select(torch.tensor(chosen))
        self.rows = [deepcopy(self.rows[row]) for row in chosen]

    @rule()
    @precondition(lambda self: len(self.copies) < 2)
    def copy(self) -> None:
        kept = self.store
        self.store = deepcopy(kept)
        self.copies.append((kept, snapshot(kept)))

    @invariant()
    def the_store_holds_the_tokens(self) -> None:
        if not hasattr(self, "store"):
            return
        assert (self.store.tokens, self.store.batch) == (self.length, len(self.rows))
        dense = torch.stack(self.store.dense(), 1).double().numpy()
        for index, row in enumerate(self.rows):
            error = np.abs(dense[index, :, :, row.start :] - row.values)
            assert (error <= row.bounds).all()
            assert int(self.store.starts[index]) == row.start
            assert int(self.store.rows.tail_begin[index]) == row.start + row.sealed
        memory = self.store.memory()
        assert memory.total == allocated(self.store)
        pages = [self.store.rows.pages[row, : self.store.rows.count[row]].tolist() for row in range(self.store.batch)]
        sizes = {
            a: len(b)
            for row, old in zip(pages, page_bytes(self.store), strict=True)
            for a, b in zip(row, old, strict=True)
        }
        assert memory.pages == sum(sizes.values())

    def teardown(self) -> None:
        for kept, before in getattr(self, "copies", []):
            assert snapshot(kept) == before


def test_a_store_behaves_like_plain_rows_whatever_is_done_to_it(backend: str) -> None:
    machine = type("Machine", (StoreMachine,), {"backend": backend})
    run_state_machine_as_test(machine, settings=settings(max_examples=settings().max_examples, stateful_step_count=12))


def test_a_store_is_not_pickled(backend: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be pickled"):
        pickle.dumps(KVStore(CodecSpec.resolve("kvcomp"), backend))
