"""Masks of any pattern, none, and padding."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, PreTrainedModel

from generating import LOSSLESS, assert_same, filled, forward, generate, prompt
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers import attention as transformers_attention
from kvcomp.integrations.transformers import session as transformers_session
from kvcomp.spec import CodecSpec
from kvcomp.store import KVStore
from tiny_models import LOSSY, tiny_model


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("spec", [LOSSLESS, LOSSY], ids=["lossless", "lossy"])
def test_attention_without_a_mask(spec: CodecSpec, causal: bool) -> None:
    """Causal queries are the last tokens; with is_causal=False every query sees every token."""
    torch.manual_seed(0)
    k, v, q = torch.randn(1, 2, 230, 16), torch.randn(1, 2, 230, 16), torch.randn(1, 4, 80, 16)
    model = tiny_model(num_hidden_layers=1)
    cache, module = KVCompCache(model.config, spec), model.model.layers[0].self_attn
    for tokens in (slice(0, 150), slice(150, 230)):
        keys, values = cache.update(k[:, :, tokens], v[:, :, tokens], 0)
        dense = cache.layers[0].store.dense()
        queries = q if tokens.start else q.repeat(1, 1, 2, 1)[:, :, :150]
        ours = transformers_attention.kvcomp_attention(module, queries, keys, values, None, is_causal=causal)[0]
    mask = torch.ones(80, 230, dtype=torch.bool).tril(150) if causal else None
    expected = torch.nn.functional.scaled_dot_product_attention(q, *dense, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(ours.transpose(1, 2), expected, atol=1e-4, rtol=0)


def test_a_mask_of_any_pattern_is_honoured(llama: PreTrainedModel) -> None:
    """Holes in the middle, boolean or additive, over a dense and over a compressed past."""
    ids = prompt(150)["input_ids"]
    mask = torch.ones((1, 1, 150, 150), dtype=torch.bool).tril()
    mask[..., 20:30] = False
    mask[..., range(20, 30), range(20, 30)] = True
    expected = forward(llama, DynamicCache(config=llama.config), "sdpa", input_ids=ids, attention_mask=mask)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for given in (mask, additive):
        cache = KVCompCache(llama.config, LOSSLESS)
        got = [forward(llama, cache, input_ids=ids[:, :100], attention_mask=given[:, :, :100, :100])]
        got += [forward(llama, cache, input_ids=ids[:, 100:], attention_mask=given[:, :, 100:])]
        torch.testing.assert_close(torch.cat(got, dim=1), expected, atol=1e-4, rtol=0)


def hiding(tokens: int, hidden: slice) -> torch.Tensor:
    """A mask over this many tokens that hides some."""
    mask = torch.ones((1, tokens), dtype=torch.long)
    mask[:, hidden] = 0
    return mask


DISTANCE = torch.arange(151).flip(0)
STEP_MASKS = {
    "a hole": hiding(151, slice(40, 90)),
    "a window": hiding(151, slice(0, 60)),
    "a bias by distance": -0.2 * DISTANCE[None, None, None].float(),
    "one mask for each head": (torch.tensor([20, 60, 100, 140])[:, None, None] > DISTANCE)[None],
}


@pytest.mark.parametrize("mask", STEP_MASKS.values(), ids=STEP_MASKS)
def test_masks_over_compressed_pages(llama: PreTrainedModel, mask: torch.Tensor) -> None:
    """As sdpa, on the decompressed cache, has it; and no window is taken for padding."""
    logits = []
    for attention in ("kvcomp", "sdpa"):
        cache = KVCompCache(llama.config, LOSSY)
        forward(llama, cache, attention, **prompt(150))
        logits.append(forward(llama, cache, attention, input_ids=torch.full((1, 1), 5), attention_mask=mask))
        assert cache.layers[0].store.starts.tolist() == [0]
        assert cache.layers[0].store.compressed
    torch.testing.assert_close(*logits, atol=2e-3, rtol=0)


def test_a_mask_may_change_in_place(llama: PreTrainedModel) -> None:
    cache, step = filled(llama), torch.full((1, 1), 5)
    mask = torch.ones((1, 1, 1, 151), dtype=torch.bool)
    forward(llama, cache, input_ids=step, attention_mask=mask)
    cache.crop(-1)
    mask[..., 40:90] = False
    got = forward(llama, cache, input_ids=step, attention_mask=mask)
    torch.testing.assert_close(got, forward(llama, filled(llama), input_ids=step, attention_mask=mask), atol=0, rtol=0)


def test_a_mask_is_read_once_for_all_layers(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = transformers_session.read_mask
    monkeypatch.setattr(transformers_session, "read_mask", lambda *args: read.append(1) or real(*args))
    generate(llama, prompt(150, 90), KVCompCache(llama.config, LOSSY), max_new_tokens=5)
    assert len(read) == 5
    session = KVCompCache(llama.config).session
    masks = torch.ones((1, 1, 1, 9), dtype=torch.bool), torch.eye(9, dtype=torch.bool)[None, None, :1]
    store = KVStore(LOSSY)
    store.append(*torch.randn(2, 1, 2, 9, 16))
    assert [session.plan_for(mask, 1, store, 9).causal for mask in masks] == [True, False]


def test_rows_that_begin_in_a_later_chunk(llama: PreTrainedModel) -> None:
    inputs = prompt(200, 40)
    cache = KVCompCache(llama.config, LOSSY)
    expected = generate(llama, inputs, DynamicCache(config=llama.config), "sdpa")
    generate(llama, inputs, cache, prefill_chunk_size=64)
    assert cache.layers[0].store.starts.tolist() == [0, 160]
    lossless = generate(llama, inputs, KVCompCache(llama.config, LOSSLESS), prefill_chunk_size=64)
    assert_same(lossless, expected)


def test_a_mask_of_each_kind_of_layer_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["sliding_attention", "full_attention"]
    model = tiny_model(
        Gemma3TextConfig, layer_types=kinds * 2, num_hidden_layers=4, sliding_window=512, max_position_embeddings=2048
    )
    cache, read = KVCompCache(model.config, LOSSY), []
    real = transformers_session.read_mask
    monkeypatch.setattr(transformers_session, "read_mask", lambda *args: read.append(args[-1]) or real(*args))
    forward(model, cache, **prompt(600, 530))
    assert sorted(read, key=str) == [512, None]
