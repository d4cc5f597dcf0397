"""Attention over a store, fused and in tiles, against a plain softmax in float64 over what the store holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomp.errors import InvalidInput
from kvcomp.spec import UNITS, CodecSpec, Coding, TensorSpec, Unit
from kvcomp.store import KVStore, attention
from kvcomp.store.attention import attend, attend_tiled
from kvcomp.store.tail import TILE_PAGES

pytestmark = pytest.mark.usefixtures("poison")


def spec_of(
    key: Unit = "block", value: Unit = "token", coding: Coding = "fixed", window: int = 8, sinks: int = 4
) -> CodecSpec:
    def tensor(unit: Unit, r: float) -> TensorSpec:
        return TensorSpec(unit, None, coding, steps=((r, 2 * r),)) if unit == "head" else TensorSpec(unit, r, coding)

    return CodecSpec(tensor(key, 0.4), tensor(value, 0.5), window, sinks)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def filled(
    backend: str,
    tokens: int,
    heads: int = 2,
    channels: int | tuple[int, int] = 16,
    starts: list[int] | None = None,
    spec: CodecSpec | None = None,
    dtype: torch.dtype = torch.float32,
    seal: bool = True,
) -> KVStore:
    """A store of random tokens, the padding of its rows NaN where all rows have sealed pages."""
    starts = starts or [0]
    store = KVStore(spec or spec_of(), backend)
    both = (channels, channels) if isinstance(channels, int) else channels
    k, v = (randn(len(starts), heads, tokens, width, seed=i, dtype=dtype) for i, width in enumerate(both, 1))
    for row, start in enumerate(starts):
        k[row, :, :start] = v[row, :, :start] = torch.nan
    store.append(k, v)
    store.set_starts(starts)
    if seal:
        store.seal()
    return store


def oracle(
    store: KVStore,
    q: Tensor,
    scaling: float,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> npt.NDArray[np.float64]:
    """softmax(cap(scaling q.K)) V, one query and head after the other; a query that sees nothing gives 0."""
    k, v = (x.double().numpy() for x in store.dense())
    out = np.zeros((*q.shape[:3], v.shape[3]))
    batch, heads, queries, _ = q.shape
    if mask is not None:
        seen_or_bias = mask.expand(batch, heads, queries, store.tokens).numpy()
    for row, head, i in np.ndindex(batch, heads, queries):
        position = np.arange(store.tokens)
        visible = position >= store.starts[row]
        bias = np.zeros(store.tokens)
        if mask is None:
            visible &= position <= store.tokens - queries + i
        elif mask.dtype == torch.bool:
            visible &= seen_or_bias[row, head, i]
        else:
            bias = seen_or_bias[row, head, i].astype(np.float64)
            visible &= bias > -np.inf
        if not visible.any():
            continue
        kv_head = head // (heads // store.heads)
        score = scaling * (k[row, kv_head, visible] @ q[row, head, i].double().numpy())
        if softcap:
            score = softcap * np.tanh(score / softcap)
        score = score + bias[visible]
        weight = np.exp(score - score.max())
        sink = 0.0 if sink_logits is None else np.exp(float(sink_logits[head]) - score.max())
        out[row, head, i] = weight @ v[row, kv_head, visible] / (weight.sum() + sink)
    return out


def check(found: Tensor, expected: npt.NDArray[np.float64], tolerance: float = 2e-5) -> None:
    """The largest difference, over the size of the outputs of a head."""
    assert found.shape == expected.shape
    size = np.abs(expected).max(axis=-1, keepdims=True)
    error = np.abs(found.double().numpy() - expected) / np.maximum(size, 1e-30)
    assert np.where(size > 0, error, np.abs(found.double().numpy())).max() <= tolerance


def check_both(store: KVStore, q: Tensor, scaling: float = 0.3, softcap: float = 0.0) -> None:
    expected = oracle(store, q, scaling, softcap)
    check(attend(store, q, scaling, softcap), expected)
    check(attend_tiled(store, q, scaling, softcap), expected)


@pytest.mark.parametrize("group", range(1, 17))
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_every_group_size_of_grouped_and_multi_query_attention(backend: str, kv_heads: int, group: int) -> None:
    store = filled(backend, 150, kv_heads)
    check_both(store, randn(1, kv_heads * group, 1, 16))


@pytest.mark.parametrize("coding", ["huffman", "fixed", "patched"])
@pytest.mark.parametrize("channels", [16, 64, 80, 96, 128, 256, 512])
def test_every_head_size(backend: str, channels: int, coding: Coding) -> None:
    store = filled(backend, 150, 2, channels, spec=spec_of("channel", "vector", coding))
    check_both(store, randn(1, 4, 1, channels), channels**-0.5)


@pytest.mark.parametrize("channels", [(72, 72), (8, 8), (192, 128), (40, 104), (16, 264)])
@pytest.mark.parametrize("key", ["channel", "head"])
def test_heads_of_two_widths_and_of_sizes_that_no_block_has(backend: str, channels: tuple[int, int], key: Unit) -> None:
    store = filled(backend, 150, 2, channels, starts=[0, 5], spec=spec_of(key, "token", "huffman"))
    k, v = (randn(2, 2, 150, width, seed=i) for i, width in enumerate(channels, 1))
    for exact, held in zip((k, v), store.dense(), strict=True):
        assert held.shape == exact.shape
        assert torch.equal(held[0, :, :4], exact[0, :, :4])
    check_both(store, randn(2, 4, 3, channels[0]), channels[0] ** -0.5)
    dense = 4 * 2 * (150 + 145) * sum(channels)
    assert store.memory().dense == dense


def test_sizes_that_cannot_be_held(backend: str) -> None:
    for channels in (20, 520, 1):
        with pytest.raises(InvalidInput, match="multiple of 8 from 8 to 512"):
            filled(backend, 1, channels=channels)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("channels", [64, (72, 40)])
@pytest.mark.parametrize("tokens", [5, 65, 300])
def test_a_sink_logit_of_each_head(backend: str, tokens: int, channels: int | tuple[int, int], softcap: float) -> None:
    """One takes nearly all, one nothing, one is beyond what a float can be raised to."""
    store = filled(backend, tokens, 2, channels, starts=[0, 3])
    q = randn(2, 4, 2, store.channels)
    logits = torch.tensor([8.0, -8.0, 0.5, -1e4])
    expected = oracle(store, q, 0.2, softcap, sink_logits=logits)
    check(attend(store, q, 0.2, softcap, logits), expected)
    check(attend_tiled(store, q, 0.2, softcap, sink_logits=logits), expected)
    seen = torch.rand(2, 1, 2, tokens, generator=torch.Generator().manual_seed(1)) > 0.5
    expected = oracle(store, q, 0.2, softcap, seen, logits)
    check(attend_tiled(store, q, 0.2, softcap, seen, logits), expected)
    assert not attend(store, q, 0.2, softcap, torch.full((4,), 1e4)).any()


def test_a_sink_logit_is_there_for_each_head(backend: str) -> None:
    store = filled(backend, 5)
    for logits in (torch.zeros(3), torch.zeros(1, 4), torch.zeros(())):
        with pytest.raises(InvalidInput, match="sink_logits must be"):
            attend(store, randn(1, 4, 1, 16), 0.2, 0.0, logits)


@pytest.mark.parametrize("value", UNITS)
@pytest.mark.parametrize("key", UNITS)
def test_every_unit(backend: str, key: Unit, value: Unit) -> None:
    check_both(filled(backend, 80, spec=spec_of(key, value)), randn(1, 2, 2, 16))


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 63, 64, 65, 75, 76, 77, 139, 140, 141, 1000])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (8, 4), (64, 4)])
def test_every_fill_of_the_store(backend: str, tokens: int, window: int, sinks: int) -> None:
    store = filled(backend, tokens, spec=spec_of(window=window, sinks=sinks))
    check_both(store, randn(1, 4, 1, 16))
    assert store.compressed == (tokens >= 64 + window + sinks)


def test_an_empty_window_leaves_pages_alone(backend: str) -> None:
    store = filled(backend, 128, spec=spec_of(window=0, sinks=0))
    assert int(store.rows.tail_begin[0]) == store.tokens
    check_both(store, randn(1, 4, 1, 16))


def test_without_a_seal_everything_is_raw(backend: str) -> None:
    store = filled(backend, 300, seal=False)
    assert not store.compressed
    check_both(store, randn(1, 4, 3, 16))


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_scores_are_capped_as_gemma_does(backend: str, softcap: float) -> None:
    store = filled(backend, 150)
    q = randn(1, 4, 2, 16)
    check_both(store, q, 1.0, softcap)
    assert np.abs(oracle(store, q, 1.0, softcap) - oracle(store, q, 1.0)).max() > 1e-3


@pytest.mark.parametrize("scaling", [0.0, 1e-3, 1.0, -0.5, 30.0])
def test_any_scaling(backend: str, scaling: float) -> None:
    check_both(filled(backend, 150), randn(1, 4, 1, 16), scaling)


@pytest.mark.parametrize("queries", [1, 2, 7, 9, 10, 11, 70, 150])
def test_each_of_several_queries_sees_what_is_not_after_it(backend: str, queries: int) -> None:
    store = filled(backend, 150)  # 10 tokens in the window: with 11 queries the first sees pages alone
    assert store.tokens - int(store.rows.tail_begin[0]) == 18
    check_both(store, randn(1, 4, queries, 16))


def test_each_of_several_queries_is_as_if_it_had_come_alone(backend: str) -> None:
    store = filled(backend, 150)
    q = randn(1, 4, 5, 16)
    together = attend(store, q, 0.3)
    for i in reversed(range(5)):
        torch.testing.assert_close(attend(store, q[:, :, i : i + 1], 0.3), together[:, :, i : i + 1], rtol=0, atol=1e-6)
        store.crop(store.tokens - 1)


@pytest.mark.parametrize("position", [149, 140, 133, 132, 131, 100, 69, 68, 67, 5, 4, 3, 1])
def test_a_cropped_store(backend: str, position: int) -> None:
    store = filled(backend, 150)
    store.crop(position)
    check_both(store, randn(1, 4, 1, 16))
    check_both(store, randn(1, 4, min(position, 6), 16))
    store.append(randn(1, 2, 3, 16), randn(1, 2, 3, 16, seed=1))
    check_both(store, randn(1, 4, 4, 16))


@pytest.mark.parametrize("starts", [[0, 50, 120], [140, 0, 149], [10, 10, 10]])
@pytest.mark.parametrize("queries", [1, 3, 150])
def test_a_left_padded_batch(backend: str, starts: list[int], queries: int) -> None:
    store = filled(backend, 150, starts=starts)
    check_both(store, randn(3, 4, queries, 16))


def test_a_query_in_the_padding_gives_0(backend: str) -> None:
    store = filled(backend, 150, starts=[0, 148, 150])
    q = randn(3, 4, 6, 16)
    for out in (attend(store, q, 0.3), attend_tiled(store, q, 0.3)):
        assert not out[1, :, :4].any()
        assert out[1, :, 4:].all()
        assert not out[2].any()
        assert out[0].all()


@pytest.mark.parametrize("starts", [[0, 0], [0, 60], [130, 5]])
def test_a_row_is_attended_to_as_if_it_were_alone(backend: str, starts: list[int]) -> None:
    store = filled(backend, 150, starts=starts)
    q = randn(2, 4, 3, 16)
    together = attend(store, q, 0.3), attend_tiled(store, q, 0.3)
    k, v = (randn(2, 2, 150, 16, seed=i) for i in (1, 2))
    for row, start in enumerate(starts):
        alone = KVStore(store.spec, backend)
        alone.append(k[row : row + 1, :, start:], v[row : row + 1, :, start:])
        alone.seal()
        for function, both in zip((attend, attend_tiled), together, strict=True):
            torch.testing.assert_close(function(alone, q[row : row + 1], 0.3)[0], both[row], rtol=0, atol=1e-6)


def masks(batch: int, heads: int, queries: int, tokens: int) -> dict[str, Tensor]:
    seen = torch.rand((batch, heads, queries, tokens), generator=torch.Generator().manual_seed(1)) < 0.5
    seen[..., 0] |= ~seen.any(-1)
    bias = torch.where(seen, randn(batch, heads, queries, tokens), -torch.inf)
    return {
        "bool": seen,
        "bool for all heads": seen[:, :1],
        "bool for all rows": seen[:1],
        "bool for all queries": seen[:, :, :1],
        "bool (queries, tokens)": seen[0, 0],
        "bool (tokens)": seen[0, 0, 0],
        "all": torch.ones((1, 1, 1, tokens), dtype=torch.bool),
        "additive": bias,
        "additive, nothing hidden": randn(batch, 1, queries, tokens),
        "additive, least number": torch.where(seen, 0.0, torch.finfo(torch.float32).min),
        "additive, bfloat16": bias[:, :1].bfloat16(),
    }


@pytest.mark.parametrize("name", masks(1, 1, 1, 1))
@pytest.mark.parametrize("queries", [1, 9])
def test_boolean_and_additive_masks(backend: str, name: str, queries: int) -> None:
    store = filled(backend, 150, starts=[0, 3])
    q = randn(2, 4, queries, 16)
    mask = masks(2, 4, queries, 150)[name]
    check(
        attend_tiled(store, q, 0.3, mask=mask),
        oracle(store, q, 0.3, mask=mask.float() if mask.dtype == torch.bfloat16 else mask),
    )


@pytest.mark.parametrize("hidden", [False, -torch.inf])
def test_a_query_from_which_all_is_hidden_gives_0(backend: str, hidden: Any) -> None:
    store = filled(backend, 150)
    mask = torch.full((1, 1, 3, 150), hidden)
    mask[0, 0, 1, 149] = True if hidden is False else 0.0
    out = attend_tiled(store, randn(1, 2, 3, 16), 0.3, mask=mask)
    assert not out[:, :, [0, 2]].any()
    torch.testing.assert_close(out[:, :, 1], store.dense()[1][:, :, 149], rtol=0, atol=1e-6)


def test_a_mask_that_says_causal_is_no_mask(backend: str) -> None:
    store = filled(backend, 150)
    q = randn(1, 4, 12, 16)
    causal = torch.ones(150, 150, dtype=torch.bool).tril()[-12:]
    torch.testing.assert_close(attend_tiled(store, q, 0.3, mask=causal), attend_tiled(store, q, 0.3), rtol=0, atol=1e-6)


def test_many_tiles_of_tokens_and_queries(backend: str) -> None:
    store = filled(backend, 2300, 1)
    assert int(store.rows.count[0]) > 2 * TILE_PAGES
    q = randn(1, 1, attention.TILE_QUERIES + 20, 16)
    expected = oracle(store, q, 0.3)
    check(attend_tiled(store, q, 0.3), expected)
    everything = torch.ones((1, 1, 1, 2300), dtype=torch.bool)
    check(attend_tiled(store, q, 0.3, mask=everything), oracle(store, q, 0.3, mask=everything))
    check(attend(store, q[:, :, -3:], 0.3), expected[:, :, -3:])
    raw = filled(backend, 2300, 1, seal=False)
    check(attend_tiled(raw, q, 0.3), oracle(raw, q, 0.3))


def test_one_tile_at_a_time_is_decompressed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled("reference", 2300, 1)
    tile, asked = store.tile, []

    def watched(row: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        asked.append(range(first, last))
        return tile(row, first, last)

    monkeypatch.setattr(store, "tile", watched)
    attend_tiled(store, randn(1, 1, 1, 16), 0.3)
    assert [i for part in asked for i in part] == list(range(int(store.rows.count[0])))
    assert max(map(len, asked)) <= TILE_PAGES


def test_fused_attention_decompresses_no_tile(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(backend, 300)
    q = randn(1, 2, 1, 16)
    expected = oracle(store, q, 0.3)
    monkeypatch.setattr(store, "tile", None)
    monkeypatch.setattr(store, "dense", None)
    check(attend(store, q, 0.3), expected)


def test_scores_of_any_size_do_not_overflow(backend: str) -> None:
    store = filled(backend, 150)
    for factor in (1e-20, 300.0, 1e4):
        q = randn(1, 2, 2, 16) * factor
        expected = oracle(store, q, 1.0)
        check(attend(store, q, 1.0), expected, 2e-2)  # scores of 10,000 have an error of 1e-3 in float32
        check(attend_tiled(store, q, 1.0), expected, 2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_caches_and_queries(backend: str, dtype: torch.dtype) -> None:
    store = filled(backend, 150, dtype=dtype)
    q = randn(1, 4, 2, 16, dtype=dtype)
    expected = oracle(store, q, 0.3)
    for out in (attend(store, q, 0.3), attend_tiled(store, q, 0.3)):
        assert out.dtype == dtype
        check(out, expected, 2e-2)
    assert attend(store, q.float(), 0.3).dtype == torch.float32
    check(attend_tiled(store, q.float(), 0.3), expected)


def test_the_kernel_multiplies_by_values_that_are_not_yet_rounded_to_the_dtype(backend: str) -> None:
    store = filled(backend, 150, dtype=torch.bfloat16)
    q = randn(1, 4, 1, 16)
    check(attend(store, q, 0.3), oracle(store, q, 0.3), 5e-3)


def test_queries_that_do_not_lie_together_or_want_a_gradient(backend: str) -> None:
    store = filled(backend, 150)
    q = randn(1, 5, 4, 16).transpose(1, 2).requires_grad_()
    expected = oracle(store, q.detach(), 0.3)
    for out in (attend(store, q, 0.3), attend_tiled(store, q, 0.3)):
        assert not out.requires_grad
        check(out, expected)


def test_attention_changes_nothing(backend: str) -> None:
    store = filled(backend, 150, starts=[0, 9])
    before, memory = store.dense(), store.memory()
    q = randn(2, 4, 3, 16)
    kept = q.clone()
    first = attend(store, q, 0.3), attend_tiled(store, q, 0.3)
    again = attend(store, q, 0.3), attend_tiled(store, q, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(q, kept)
    assert store.memory() == memory
    assert all(
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(store.dense(), before, strict=True)
    )


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 400),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    share=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    queries=st.integers(1, 80),
    window=st.sampled_from([0, 8, 64]),
    sinks=st.sampled_from([0, 4, 70]),
    crop=st.integers(0, 100),
    softcap=st.sampled_from([0.0, 3.0]),
)
def test_any_store_and_queries(
    tokens: int,
    kv_heads: int,
    group: int,
    share: list[float],
    queries: int,
    window: int,
    sinks: int,
    crop: int,
    softcap: float,
) -> None:
    starts = [int(tokens * part) for part in share]
    store = filled("reference", tokens, kv_heads, starts=starts, spec=spec_of(window=window, sinks=sinks))
    store.crop(max(1, tokens - crop))
    check_both(store, randn(len(starts), kv_heads * group, min(queries, store.tokens), 16), 0.3, softcap)


STORE_QUERIES = randn(2, 4, 3, 16)


@pytest.mark.parametrize(
    "q",
    [
        STORE_QUERIES[0],
        STORE_QUERIES[None],
        STORE_QUERIES[:1],
        STORE_QUERIES.repeat(2, 1, 1, 1),
        STORE_QUERIES[:, :3],
        STORE_QUERIES[:, :1],
        STORE_QUERIES[:, :, :0],
        STORE_QUERIES[..., :8],
        STORE_QUERIES.repeat(1, 1, 1, 2),
        STORE_QUERIES.repeat(1, 1, 60, 1),
        STORE_QUERIES.to("meta"),
    ],
)
def test_queries_that_do_not_fit_the_store_are_refused(q: Tensor) -> None:
    store = filled("reference", 150, starts=[0, 0])
    for function in (attend, attend_tiled):
        with pytest.raises(InvalidInput, match="queries"):
            function(store, q, 0.3)


def test_an_empty_store_is_refused() -> None:
    for function in (attend, attend_tiled):
        with pytest.raises(InvalidInput):
            function(KVStore(spec_of(), "reference"), STORE_QUERIES, 0.3)


@pytest.mark.parametrize("tokens", [149, 151, 1])
def test_a_mask_for_another_number_of_tokens_is_refused(tokens: int) -> None:
    store = filled("reference", 150, starts=[0, 0])
    with pytest.raises(InvalidInput, match="does not fit"):
        attend_tiled(store, STORE_QUERIES, 0.3, mask=torch.ones(2, 1, 3, tokens, dtype=torch.bool))
