"""The models whose caches are compressed, in all their forms, and those that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    DeepseekV32Config,
    DynamicCache,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    MllamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
    T5Config,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from families import config_of
from generating import LOSSLESS, assert_same, attend_densely, forward, generate, prompt
from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers.layer import CompressedLayer
from kvcomp.spec import LATENTS, PRESETS, CodecSpec, TensorSpec
from tiny_models import LOSSY, random_model, tiny_config, tiny_model

MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "one KV head": (LlamaConfig, {"num_key_value_heads": 1}),
    "as many KV heads": (LlamaConfig, {"num_key_value_heads": 4}),
    "64": (LlamaConfig, {"head_dim": 64}),
    "80": (LlamaConfig, {"head_dim": 80}),
    "96": (LlamaConfig, {"head_dim": 96}),
    "128": (LlamaConfig, {"head_dim": 128}),
    "256": (LlamaConfig, {"head_dim": 256}),
    "qwen2": (Qwen2Config, {}),
    "qwen2, some layers sliding": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral, sliding": (MistralConfig, {"sliding_window": 32}),
    "phi3": (Phi3Config, {}),
    "gemma2": (Gemma2Config, {"sliding_window": 32, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3n": (
        Gemma3nTextConfig,
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 32,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings = MODELS[name]
    model = tiny_model(kind, **settings)
    inputs = prompt(150, 90)
    expected = generate(model, inputs, DynamicCache(config=model.config), "eager")
    assert_same(generate(model, inputs, KVCompCache(model.config, LOSSLESS)), expected)

    cache = KVCompCache(model.config, LOSSY)
    lossy = generate(model, inputs, cache)
    stores = [layer.store for layer in cache.layers if isinstance(layer, CompressedLayer)]
    assert all(store.compressed for store in stores)
    assert bool(stores) == (name != "mistral, sliding")
    attend_densely(monkeypatch)
    assert_same(lossy, generate(model, inputs, KVCompCache(model.config, LOSSY)), 2e-3)


def test_short_windows_keep_their_own_cache() -> None:
    kinds = ["sliding_attention", "full_attention"]
    cache = KVCompCache(tiny_config(Gemma3TextConfig, layer_types=kinds, sliding_window=32))
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, CompressedLayer]
    assert cache.is_sliding == [True, False]
    assert not cache.is_compileable
    assert cache.layers[1].is_croppable


def test_the_text_part_of_a_multi_modal_configuration_counts() -> None:
    cache = KVCompCache(LlavaConfig(text_config=tiny_config().to_dict()))
    assert len(cache.layers) == 2


def test_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dtype=torch.bfloat16, head_dim=64)
    cache = KVCompCache(model.config, LOSSY)
    got = torch.cat(
        [forward(model, cache, **prompt(150, 120)), forward(model, cache, input_ids=torch.full((2, 1), 7))], dim=1
    )
    assert cache.layers[0].store.dtype == torch.bfloat16
    attend_densely(monkeypatch)
    cache = KVCompCache(model.config, LOSSY)
    want = torch.cat(
        [forward(model, cache, **prompt(150, 120)), forward(model, cache, input_ids=torch.full((2, 1), 7))], dim=1
    )
    torch.testing.assert_close(got, want, atol=0.02 * float(want.abs().max()), rtol=0)


def test_a_soft_cap_is_not_forgotten_on_plain_tensors() -> None:
    model = tiny_model(Gemma2Config, sliding_window=32, attn_logit_softcapping=2.0)
    inputs = prompt(150, 90)
    assert_same(generate(model, inputs, None, "kvcomp"), generate(model, inputs, None, "eager"))


@pytest.mark.parametrize("kind", [LlamaConfig, Gemma2Config])
def test_a_static_cache_is_longer_than_what_it_holds(kind: type[PreTrainedConfig]) -> None:
    model = tiny_model(kind)
    outputs = [
        forward(model, StaticCache(config=model.config, max_cache_len=200), attention, **prompt(150))
        for attention in ("kvcomp", "eager")
    ]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=0)


def test_each_layer_has_its_scale() -> None:
    spec = CodecSpec(TensorSpec("block", (0.05, 0.02)), TensorSpec("token", 0.1))
    cache = KVCompCache(tiny_config(), spec)
    assert [layer.spec.key.scale for layer in cache.layers] == [0.05, 0.02]
    with pytest.raises(InvalidInput, match="2 layers, the model has 3"):
        KVCompCache(tiny_config(num_hidden_layers=3), spec)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (MllamaConfig(), "cross-attention layers"),
        (BertConfig(is_decoder=True, add_cross_attention=True), "cross-attention layers"),
        (DeepseekV32Config(), "DynamicIndexedLayer"),
        (FalconH1Config(), "LinearAttentionAndFullAttentionLayer"),
        (BloomConfig(), "bias by position"),
        (FalconConfig(alibi=True), "bias by position"),
        (tiny_config(head_dim=20), "multiple of 8 from 8 to 512, not 20"),
        (tiny_config(head_dim=520), "multiple of 8 from 8 to 512, not 520"),
        (tiny_config(v_head_dim=20), "multiple of 8 from 8 to 512, not 20"),
        (DeepseekV3Config(kv_lora_rank=1024), "multiple of 8 from 8 to 512, not 1024"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_models_that_are_refused(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        KVCompCache(config)


def test_the_default_codes_latents_at_their_own_scale(tmp_path: Path) -> None:
    config = config_of("DeepSeek-V3")
    cache = KVCompCache(config)
    assert cache.spec == KVCompCache(config, PRESETS["kvcomp"]).spec == LATENTS
    assert KVCompCache(config, "kvcomp:paper").spec == PRESETS["kvcomp:paper"]
    assert KVCompCache(LlamaConfig()).spec == PRESETS["kvcomp"]
    forward(random_model(config), cache, **prompt(200))
    cache.save(tmp_path / "a.kvc")
    assert KVCompCache.load(tmp_path / "a.kvc", config).spec == LATENTS
