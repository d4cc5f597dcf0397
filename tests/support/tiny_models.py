"""Small random models of every kind, and how to run them step by step."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from kvcomp.integrations.transformers import KVCompCache
from kvcomp.spec import PRESETS

LOSSY = replace(PRESETS["kvcomp"], window=16)


TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The model whose random weights belong to this seed, three times as large as usual, so that K and V depend on
    everything.
    """
    torch.manual_seed(seed)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
                if kind is AutoModelForImageTextToText and not parameter.any():  # Gemma 3 begins to see by training
                    parameter.normal_(std=0.1)
    return model


def tiny_config(kind: type[PreTrainedConfig] = LlamaConfig, **settings: object) -> PreTrainedConfig:
    return kind(**{**TINY, **settings})


def tiny_model(kind: type[PreTrainedConfig] = LlamaConfig, seed: int = 0, **settings: Any) -> PreTrainedModel:
    dtype = settings.pop("dtype", torch.float32)
    return random_model(tiny_config(kind, **settings), seed).to(dtype)


def exact(model: PreTrainedModel, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of each layer, uncompressed, of one forward pass."""
    cache = DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def run(
    model: PreTrainedModel, cache: KVCompCache, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of the last token."""
    model.set_attn_implementation("kvcomp")
    mask = (
        torch.ones((ids.shape[0], cache.get_seq_length() + ids.shape[1]), dtype=torch.int64) if mask is None else mask
    )
    position = mask.cumsum(1)[:, -ids.shape[1] :] - 1
    with torch.inference_mode():
        return model(ids, attention_mask=mask, position_ids=position.clamp(min=0), past_key_values=cache).logits[:, -1]


def steps(
    model: PreTrainedModel, cache: KVCompCache, token: torch.Tensor, count: int
) -> tuple[list[torch.Tensor], list[list[int]]]:
    logits, tokens = [], []
    for _ in range(count):
        logits.append(run(model, cache, token))
        token = logits[-1].argmax(-1, keepdim=True)
        tokens.append(token.ravel().tolist())
    return logits, tokens


HYBRIDS = {
    "gemma2": Gemma2Config(**TINY, query_pre_attn_scalar=16, sliding_window=40),
    "gemma3": Gemma3TextConfig(**TINY, layer_types=["sliding_attention", "full_attention"], sliding_window=40),
}
