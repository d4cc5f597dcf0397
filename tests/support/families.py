"""Tiny models of the families that people ask for, each with what is peculiar to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from tiny_models import TINY

SLIDING = ["sliding_attention", "full_attention"]
LINEAR = ["linear_attention", "full_attention"]
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": LINEAR,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "kv_lora_rank": 64, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
IMAGE, IMAGE_TOKENS, SIDE = 1, 4, 28  # the id of an image's tokens, how many one has, and its pixels
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": 14,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Qwen3-Next": ("qwen3_next", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "Qwen3.5": ("qwen3_5_text", {**DELTA, "head_dim": 64}),
    "Gemma 3": ("gemma3_text", {"layer_types": SLIDING, "sliding_window": 32}),
    "Gemma 4": (
        "gemma4_text",
        {
            "num_hidden_layers": 4, "layer_types": SLIDING * 2, "sliding_window": 32, "num_kv_shared_layers": 2,
            "global_head_dim": 128, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8,
        },
    ),
    "gpt-oss": ("gpt_oss", {**EXPERTS, "layer_types": SLIDING, "sliding_window": 32}),
    "Mistral": ("mistral", {"sliding_window": 32}),
    "Ministral": ("ministral", {"layer_types": SLIDING, "sliding_window": 32}),
    "Phi-3, Phi-4": ("phi3", {}),
    "Granite": ("granite", {}),
    "Granite 4 hybrid": (
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1,
            "mamba_d_state": 16, "mamba_expand": 2, "num_local_experts": 0, "shared_intermediate_size": 96,
            "position_embedding_type": "nope",
        },
    ),
    "OLMo 3": ("olmo3", {"layer_types": SLIDING, "sliding_window": 32}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Falcon-H1": ("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}),
    "DeepSeek-V3": ("deepseek_v3", LATENT),
    "DeepSeek-V3.2": ("deepseek_v32", LATENT),
    "GLM-4.7-Flash": ("glm4_moe_lite", LATENT),
    "LLaVA, with images": (
        "llava",
        {
            "text_config": {"model_type": "llama", **TINY}, "image_token_id": IMAGE, "image_seq_length": IMAGE_TOKENS,
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
            "vision_feature_layer": -1,
        },
    ),
    "Qwen2.5-VL, with images": (
        "qwen2_5_vl",
        {
            "text_config": {**TINY, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
            "vision_config": {
                "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 14,
                "out_hidden_size": 64, "fullatt_block_indexes": [0], "window_size": 2 * SIDE,
            },
            "image_token_id": IMAGE, "vision_start_token_id": 2, "vision_end_token_id": 96, "video_token_id": 95,
        },
    ),
    "Gemma 3, with images": (
        "gemma3",
        {
            "text_config": {"model_type": "gemma3_text", **TINY, "layer_types": SLIDING, "sliding_window": 32},
            "vision_config": {"model_type": "siglip_vision_model", **VISION}, "image_token_id": IMAGE,
            "mm_tokens_per_image": IMAGE_TOKENS,
        },
    ),
}  # fmt: skip


def config_of(family: str) -> PreTrainedConfig:
    kind, settings = FAMILIES[family]
    text = {} if "text_config" in settings else TINY
    config: PreTrainedConfig = AutoConfig.for_model(kind, **{**text, **settings})
    return config


def with_images(config: PreTrainedConfig, inputs: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The same prompts with an image in each, if the model takes images. It lies behind the longest padding."""
    if not hasattr(config, "vision_config"):
        return inputs
    ids = inputs["input_ids"].clone()
    rows, place = ids.shape[0], 40
    generator = torch.Generator().manual_seed(seed)
    ids[:, place : place + IMAGE_TOKENS] = IMAGE
    if config.model_type != "qwen2_5_vl":
        of_images = {"pixel_values": torch.randn(rows, 3, SIDE, SIDE, generator=generator)}
        if config.model_type == "gemma3":
            of_images["token_type_ids"] = (ids == IMAGE).long()
        return {**inputs, "input_ids": ids, **of_images}
    ids[:, place - 1] = 2
    return {
        **inputs,
        "input_ids": ids,
        "pixel_values": torch.randn(rows * 16, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }
