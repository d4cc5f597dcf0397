"""Tokens that are cropped away: what stays is as it was, and what went is freed."""

from __future__ import annotations

import pytest
import torch

from kvcomp.errors import InvalidInput
from kvcomp.store import KVStore
from stores import fill, page_bytes, ragged, snapshot, spec_of, tokens

pytestmark = pytest.mark.usefixtures("poison")

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
