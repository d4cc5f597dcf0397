"""Models and calls that are rare: right, or refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV4Config,
    DiffLlamaConfig,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    NemotronHConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    XGLMConfig,
)

import kvcomp
from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers.attention import kvcomp_attention
from kvcomp.integrations.transformers.models import position_limit
from tiny_models import random_model, tiny_config

LATENTS = {"kv_lora_rank": 64, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}


def made(config: PreTrainedConfig, attention: str = "kvcomp") -> PreTrainedModel:
    model = random_model(config)
    model.set_attn_implementation(attention)
    return model.requires_grad_(False)


def ids(batch: int = 1, tokens: int = 40) -> torch.Tensor:
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(1))


def logits(model: PreTrainedModel, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    found: torch.Tensor = model(tokens, past_key_values=cache).logits[:, -1]
    return found


def test_a_model_that_makes_other_values_of_those_in_the_cache() -> None:
    """DiffLlama attends twice in a layer, each time with V that it has put together anew."""
    model = made(tiny_config(DiffLlamaConfig))
    caches = DynamicCache(config=model.config), KVCompCache(model.config)
    for tokens in (ids(), ids(1, 1)):
        expected, found = (logits(model, tokens, cache) for cache in caches)
        assert torch.allclose(expected, found, atol=1e-5)


def test_a_model_that_reshapes_what_the_cache_returns() -> None:
    model = made(XGLMConfig(vocab_size=97, d_model=64, ffn_dim=96, num_layers=2, attention_heads=4), "eager")
    expected = logits(model, ids(2), DynamicCache(config=model.config))
    assert torch.allclose(logits(model, ids(2), KVCompCache(model.config)), expected, atol=1e-5)


def test_masks_that_a_model_adds_to_are_refused() -> None:
    config = tiny_config(
        DeepseekV4Config,
        head_dim=16,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        sliding_window=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        layer_types=["compressed_sparse_attention"] * 2,
    )
    model = made(config)
    with pytest.raises(UnsupportedModel, match="grows and holds more than K and V"):
        KVCompCache(config)
    with pytest.raises(UnsupportedModel, match="boolean masks"):
        model(ids(1, 80))


def test_a_model_without_positions_has_no_limit_of_them() -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    layers = {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1}
    config = NemotronHConfig(vocab_size=97, hidden_size=64, intermediate_size=96, ssm_state_size=16, **heads, **layers)
    assert position_limit(config) is None
    assert position_limit(LlamaConfig()) == 2048


def test_a_decoder_without_a_configuration_of_its_own(tmp_path: Path) -> None:
    model = made(tiny_config(ModernBertDecoderConfig))
    cache = KVCompCache(model.config)
    logits(model, ids(1, 200), cache)
    cache.save(tmp_path / "cache.kvc", model)
    loaded = KVCompCache.load(tmp_path / "cache.kvc", model.config, model)
    assert torch.equal(logits(model, ids(1, 1), loaded), logits(model, ids(1, 1), cache))


def test_states_outside_the_cache_cannot_be_saved(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 32}
    model = made(tiny_config(RecurrentGemmaConfig, **sizes))
    cache = KVCompCache(model.config)
    logits(model, ids(1, 100), cache)
    with pytest.raises((UnsupportedModel, InvalidInput), match=r"keeps states in itself|layer 0 holds no tokens"):
        cache.save(tmp_path / "cache.kvc")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(MistralConfig, sliding_window=32),
        tiny_config(DeepseekV3Config, **LATENTS, **EXPERTS),
        tiny_config(LlamaConfig, head_dim=40),
    ],
    ids=lambda config: config.model_type,
)
def test_what_has_nothing_to_calibrate_is_refused_at_once(
    config: PreTrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UnsupportedModel, match="use the preset kvcomp"):
        kvcomp.calibrate(made(config))
    assert not [*tmp_path.rglob("*.partial")]


def test_what_the_cache_returned_cannot_be_changed() -> None:
    model = made(tiny_config(LlamaConfig))
    cache = KVCompCache(model.config)
    logits(model, ids(), cache)
    held: Any = cache.layers[0].values
    with pytest.raises(InvalidInput, match="aten::mul_ cannot change"):
        held.mul_(0)
    with pytest.raises(InvalidInput, match="aten::add cannot change"):
        torch.add(held.clone(), 1, out=held)
    with pytest.raises(InvalidInput, match="cannot change: they are compressed"):
        held[:, :, :4] = 0


def test_what_the_cache_returned_goes_to_other_libraries() -> None:
    model = made(tiny_config(LlamaConfig))
    cache = KVCompCache(model.config)
    logits(model, ids(), cache)
    held: Any = cache.layers[0].values
    assert torch.equal(torch.from_dlpack(held), held)
    assert torch.equal(torch.from_numpy(np.from_dlpack(held).copy()), held)


@torch.no_grad()
def test_keys_that_are_taken_for_values_are_read_as_keys() -> None:
    config = tiny_config(LlamaConfig)
    module = made(config).model.layers[0].self_attn
    q = torch.randn(1, config.num_attention_heads, 90, config.head_dim)
    k, v = torch.randn(2, 1, config.num_key_value_heads, 90, config.head_dim)
    keys, values = KVCompCache(config).update(k, v, 0)
    for taken, plain in (((keys, keys), (k, k)), ((values, keys), (v, k))):
        found, expected = (kvcomp_attention(module, q, *pair, None)[0] for pair in (taken, plain))
        torch.testing.assert_close(found, expected)


def test_a_default_device_is_for_other_tensors() -> None:
    model, tokens = made(tiny_config(LlamaConfig)), ids(1, 300)
    expected = logits(model, tokens, KVCompCache(model.config))
    try:
        torch.set_default_device("meta")
        found = logits(model, tokens, KVCompCache(model.config))
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


def test_ctrl_c_while_the_tail_moves() -> None:
    """The pass is taken back, and the next one is as if it had not been."""
    model, tokens = made(tiny_config(LlamaConfig)), ids(1, 400)
    caches = KVCompCache(model.config), KVCompCache(model.config)
    for cache in caches:
        logits(model, tokens[:, :300], cache)

    def ctrl_c(frame: Any, event: str, argument: Any) -> Any:
        if event == "line" and frame.f_code.co_name == "_move_tail" and "k" in frame.f_locals:
            sys.settrace(before)
            raise KeyboardInterrupt
        return ctrl_c

    before = sys.gettrace()
    sys.settrace(ctrl_c)
    try:
        with pytest.raises(KeyboardInterrupt):
            logits(model, tokens[:, 300:], caches[0])
    finally:
        sys.settrace(before)
    first, second = (logits(model, tokens[:, 300:], cache) for cache in caches)
    assert torch.equal(first, second)


def test_a_cache_that_compresses_nothing_says_how_much_it_holds() -> None:
    model = made(tiny_config(MistralConfig, sliding_window=32))
    cache = KVCompCache(model.config)
    logits(model, ids(1, 100), cache)
    assert "0 compressed layers, 2 DynamicSlidingWindowLayer, 100 tokens" in repr(cache)
