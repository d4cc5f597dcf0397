"""Which models a compressed cache can hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from kvcomp.codec.block import held_channels
from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.integrations.transformers.identity import rope_parts
from kvcomp.spec import LATENTS, PRESETS, CodecSpec

NO_POSITIONS = {"jamba", "nemotron_h"}
POSITION_BIAS = {"bloom", "inkling", "inkling2", "mpt"}
IDENTITY = (
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
FINGERPRINT = (*IDENTITY, "head_dim", "vocab_size", "rope_parameters", "layer_types", "sliding_window")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The text configuration. Raises UnsupportedModel for models whose K and V this cache cannot hold."""
    text = config.get_text_config(decoder=True)
    cross = setting(text, "cross_attention_layers") or setting(text, "add_cross_attention")
    bias = setting(text, "alibi") or setting(text, "relative_attention_num_buckets") or text.model_type in POSITION_BIAS
    reasons = {
        "is an encoder-decoder, whose cross-attention has a cache of its own": config.is_encoder_decoder,
        "has cross-attention layers, whose keys are not those of its tokens": cross,
        "adds a bias by position to its scores (as T5 and ALiBi do), which the fused kernel does not know": bias,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedModel(f"{config.model_type} cannot use a KVCompCache: it {reason}")
    return text


def check_text_only(model: Any) -> None:
    """Raise UnsupportedModel if K and V of a model depend on more than token ids, InvalidInput if it is none."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise InvalidInput(f"model must be a transformers model, not {type(model).__name__}")
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedModel(
            f"{config.model_type} takes more than text, such as images, which token ids do not tell apart: "
            "no prefix of it is stored or loaded; save whole caches with KVCompCache.save"
        )


def head_sizes(config: PreTrainedConfig, index: int) -> list[int]:
    """Channels of a layer's heads of K and V, as far as the configuration says, or of its latents."""
    own = getattr(config, "per_layer_config", None)
    config = own[index] if isinstance(own, Sequence) else config
    heads, width = setting(config, "num_attention_heads"), setting(config, "hidden_size")
    head_dim = setting(config, "head_dim") or (heads and width and width // heads)
    latent = setting(config, "kv_lora_rank")
    sizes = [latent, setting(config, "qk_rope_head_dim")] if latent else [head_dim]
    sizes += [setting(config, name) for name in ("global_head_dim", "v_head_dim") if not latent]
    return [size for size in sizes if size]


def check_layer(config: PreTrainedConfig, index: int) -> None:
    """Raise UnsupportedModel if the heads of a layer do not fit the format."""
    for size in head_sizes(config, index):
        try:
            held_channels(size)
        except InvalidInput as error:
            raise UnsupportedModel(f"{config.model_type} cannot use a KVCompCache: {error}") from None


def spec_for_latents(config: PreTrainedConfig, spec: CodecSpec) -> CodecSpec:
    """The preset ``kvcomp`` for a model with latent attention is the one made for latents; another spec is itself."""
    return LATENTS if spec == PRESETS["kvcomp"] and setting(config, "kv_lora_rank") else spec


def setting(config: PreTrainedConfig, name: str) -> Any:
    """A setting; None if there is none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' word for: ask the layer
        return None


def identity_of(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: setting(config, name) for name in IDENTITY}


def fingerprint_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What a calibration keeps of the configuration, in the form in which JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps({name: setting(config, name) for name in FINGERPRINT}, default=str))
    return found


def positions(config: PreTrainedConfig) -> int:
    """Tokens that a model's positions allow, as far as its configuration says."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 1 << 20


def position_limit(config: PreTrainedConfig) -> int | None:
    """Tokens the model's positions allow; None where rotary positions are stretched, or there are no positions."""
    if config.model_type in NO_POSITIONS or setting(config, "position_embedding_type") == "nope":
        return None
    limit = setting(config, "max_position_embeddings")
    parts = rope_parts(setting(config, "rope_parameters"))
    stretched = any(part.get("rope_type", "default") not in ("default", "proportional") for part in parts)
    return limit if isinstance(limit, int) and limit > 0 and not stretched else None
