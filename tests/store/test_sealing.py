"""What a store seals and when, within which bounds, and that it never changes."""

from __future__ import annotations

import itertools
from copy import deepcopy
from typing import Any

import pytest
import torch

from kvcomp.codec.page import RAW, blocks_of
from kvcomp.spec import UNITS, Unit
from kvcomp.store import KVStore
from stores import DTYPES, check_row, fill, page_bytes, spec_of, tokens

pytestmark = pytest.mark.usefixtures("poison")


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


@pytest.mark.parametrize("failing", ["encode_pages", "count_pairs"])
def test_a_seal_that_is_interrupted_in_a_later_row_is_as_if_it_had_not_begun_there(failing: str) -> None:
    k, v = tokens(300, batch=2)
    whole, store = (KVStore(spec_of("channel", "token", window=0, sinks=0)) for _ in range(2))
    whole.append(k, v)
    whole.seal()
    store.append(k[:, :, :64], v[:, :, :64])
    store.seal()
    store.append(k[:, :, 64:], v[:, :, 64:])
    before = store.view()
    kernels, calls = store.kernels, itertools.count(1)

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            if name == failing and next(calls) == (2 if name == "encode_pages" else 4):
                raise KeyboardInterrupt
            return getattr(kernels, name)

    store.kernels = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        store.seal()
    store.kernels = kernels
    assert store.rows.count.tolist() == [4, 1]
    assert store.view() is not before
    for row in range(2):
        check_row(store, row, k[row], v[row])
    store.seal()
    assert store.rows.count.tolist() == [4, 4]
    assert store.rows.books == whole.rows.books  # no pair counts twice
    assert None not in store.rows.books[1]


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


def test_sealing_an_empty_store_does_nothing(backend: str) -> None:
    store = KVStore(spec_of(), backend)
    store.seal()
    store.crop(0)
    assert (store.tokens, store.compressed) == (0, False)
