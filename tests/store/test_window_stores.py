"""A store whose tokens see a window of the last ones, beside all of its tokens: what the window has left is dropped."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomp.errors import InvalidInput
from kvcomp.spec import PAGE_TOKENS, PRESETS, CodecSpec
from kvcomp.store import KVStore
from kvcomp.store.attention import attend, attend_tiled

WINDOW = 200
LOSSY = replace(PRESETS["kvcomp"], window=20)
# every block has more codes than a block can code, and is kept as it came
EXACT = replace(
    LOSSY, key=replace(LOSSY.key, relative_scale=2.0**-9), value=replace(LOSSY.value, relative_scale=2.0**-9)
)
HEADS, GROUP, CHANNELS = 2, 2, 16


def values(batch: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    k, v = torch.randn((2, batch, HEADS, tokens, CHANNELS), generator=torch.Generator().manual_seed(seed))
    return k, v


def expected(q: Tensor, k: Tensor, v: Tensor, starts: list[int], window: int) -> Tensor:
    """Attention of the last tokens in float64, by the formula."""
    tokens, queries = k.shape[2], q.shape[2]
    k, v = (x.repeat_interleave(GROUP, 1).double() for x in (k, v))
    token, query = torch.arange(tokens), torch.arange(tokens - queries, tokens)[:, None]
    sees = (token <= query) & (token > query - window) & (token >= torch.tensor(starts)[:, None, None, None])
    score = (q.double() @ k.mT * 0.25).masked_fill(~sees, -torch.inf)
    return score.softmax(-1).nan_to_num(0) @ v


class Beside:
    """A store and all tokens that it was ever given."""

    def __init__(self, spec: CodecSpec, starts: list[int], first: int) -> None:
        self.store = KVStore(spec, sliding_window=WINDOW)
        self.starts = starts
        self.k, self.v = values(len(starts), first, 0)
        self.store.append(self.k, self.v)
        self.store.set_starts(starts)
        self.store.seal()

    def append(self, new: int) -> None:
        k, v = values(len(self.starts), new, self.store.tokens)
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.store.append(k, v)

    def check(self, queries: int) -> None:
        q = torch.randn(len(self.starts), HEADS * GROUP, queries, CHANNELS)
        want = expected(q, self.k, self.v, self.starts, WINDOW)
        for found in (attend(self.store, q, 0.25), attend_tiled(self.store, q, 0.25)):
            torch.testing.assert_close(found.double(), want, atol=2e-5, rtol=0)
        seen = min(self.store.tokens, WINDOW - 1 + queries)
        token, query = torch.arange(self.store.tokens)[-seen:], torch.arange(self.store.tokens)[-queries:, None]
        mask = (token <= query) & (token > query - WINDOW)
        mask = mask & (token >= torch.tensor(self.starts)[:, None, None, None])
        found = attend_tiled(self.store, q, 0.25, mask=mask)
        torch.testing.assert_close(found.double(), want, atol=2e-5, rtol=0)
        for x, y in zip(self.store.dense(self.store.tokens - seen), (self.k, self.v), strict=True):
            for row, start in enumerate(self.starts):
                first = max(0, start - (self.store.tokens - seen))
                assert torch.equal(x[row, :, first:], y[row, :, self.store.tokens - seen :][:, first:])

    def check_dropped(self) -> None:
        """No page lies wholly before what the next token sees, and nothing of the rest is missing."""
        rows, needed = self.store.rows, max(0, self.store.tokens + 1 - WINDOW)
        assert rows.starts.tolist() == self.starts
        for row in range(len(self.starts)):
            assert not rows.dropped[row] or rows.begins[row] <= needed
            assert not rows.dropped[row] or not rows.sink_count[row]
            assert len(rows.owners[row]) == rows.count[row]
            if rows.count[row]:
                assert rows.begins[row] + rows.sink_count[row] + rows.valid[row, 0] > needed


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_a_window_sees_is_there(data: st.DataObject) -> None:
    starts = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=3))
    beside = Beside(EXACT, starts, data.draw(st.sampled_from([61, 150, 320, 700])))
    recording = False
    for _ in range(data.draw(st.integers(2, 6))):
        move = data.draw(st.sampled_from(["append", "append", "crop", "select", "record", "copy"]))
        store = beside.store
        if move == "append":
            new = data.draw(st.sampled_from([1, 1, 3, 63, 65, 150, 400]))
            beside.append(new)
            beside.check(new)
            store.seal(drops=not recording)
        elif move == "record":
            recording = True
        elif move == "copy":
            beside.store = deepcopy(store)
        elif move == "select":
            rows = data.draw(st.lists(st.integers(0, len(beside.starts) - 1), min_size=1, max_size=3))
            beside.k, beside.v, beside.starts = beside.k[rows], beside.v[rows], [beside.starts[row] for row in rows]
            store.select(rows)
        else:
            tokens = max(61, store.tokens - data.draw(st.integers(0, 130)))
            first, rows_ = max(0, tokens + 1 - WINDOW), store.rows
            if ((rows_.dropped > 0) & (rows_.begins > first)).any():
                with pytest.raises(InvalidInput, match="a sliding window has left"):
                    store.crop(tokens)
            else:
                store.crop(tokens)
                store.drop()
                beside.k, beside.v, recording = beside.k[:, :, :tokens], beside.v[:, :, :tokens], False
        if not recording:
            beside.check_dropped()
    beside.append(1)
    beside.check(1)


@pytest.mark.parametrize("pieces", [(900,), (300, 600), (64,) * 14 + (4,), (9, 503, 388), (450, 450)])
def test_pages_lie_where_they_lie_whatever_the_passes(pieces: tuple[int, ...]) -> None:
    beside = Beside(EXACT, [0, 7], pieces[0])
    for new in pieces[1:]:
        beside.append(new)
        beside.store.seal()
    rows = beside.store.rows
    assert rows.tail_begin.tolist() == [4 + 64 * 13, 11 + 64 * 13]
    assert rows.begins.tolist() == [4 + 64 * 10, 11 + 64 * 10]
    assert (rows.valid[:, :3] == PAGE_TOKENS).all()
    beside.check(1)


def test_a_page_leaves_with_the_last_token_that_sees_it() -> None:
    end = 4 + PAGE_TOKENS
    beside = Beside(EXACT, [0], end + WINDOW - 2)
    assert beside.store.rows.begins.tolist() == [4]  # its sinks have left
    beside.append(1)
    beside.store.seal()
    beside.check_dropped()
    assert beside.store.rows.begins.tolist() == [end]


def test_what_leaves_the_window_before_it_is_sealed_is_not_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Beside(LOSSY, [0], 20)
    encoded = []
    real = beside.store.kernels.encode_pages

    def noted(k: object, *args: object) -> object:
        encoded.append(k.shape[1])  # type: ignore[attr-defined]
        return real(k, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(beside.store.kernels, "encode_pages", noted)
    beside.append(3000)
    beside.store.seal()
    assert encoded == [2 * PAGE_TOKENS]
    assert beside.store.rows.dropped[0] > 2700


def test_the_memory_of_dropped_pages_is_free() -> None:
    """Of pages that were sealed together too; sinks go with them."""
    beside = Beside(LOSSY, [0, 0], 190)
    store = beside.store
    pages = [weakref.ref(buffer) for owners in store.rows.owners for buffer in owners]
    assert len(pages) == 4
    sizes = []
    for step in range(200):
        beside.append(1)
        store.seal()
        sizes.append(store.memory().total)
        if step % PAGE_TOKENS:
            continue
        gc.collect()
        held = {id(buffer): buffer.nbytes for owners in store.rows.owners for buffer in owners}
        assert {id(page()) for page in pages if page() is not None} <= set(held)
        memory = store.memory()
        assert memory.pages + memory.spare == sum(held.values())
    assert not any(page() is not None for page in pages)
    assert max(sizes[100:]) == max(sizes[140:])


def test_rows_of_windows_join_and_go_alone() -> None:
    one, other = Beside(EXACT, [0], 700), Beside(EXACT, [3], 430)
    both = one.store.join([other.store])
    assert both.sliding_window == WINDOW
    assert both.starts.tolist() == [0, 273]
    assert both.rows.begins.tolist() == [int(one.store.rows.begins[0]), int(other.store.rows.begins[0]) + 270]
    q = torch.randn(2, HEADS * GROUP, 1, CHANNELS)
    found = attend(both, q, 0.25)
    for row, beside in enumerate((one, other)):
        want = expected(q[row : row + 1], beside.k, beside.v, beside.starts, WINDOW)
        torch.testing.assert_close(found[row : row + 1].double(), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends_agree(backend: str) -> None:
    beside = Beside(LOSSY, [0, 5, 60], 640)
    beside.append(1)
    store, q = beside.store.on(backend), torch.randn(3, HEADS * GROUP, 1, CHANNELS)
    k, v = store.dense()
    torch.testing.assert_close(
        attend(store, q, 0.25).double(), expected(q, k, v, beside.starts, WINDOW), atol=2e-5, rtol=0
    )
