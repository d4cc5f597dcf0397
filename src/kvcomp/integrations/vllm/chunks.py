"""What the connector must know of a model: the shape of its chunks, and what tells its chunks from others'."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kvcomp.codec.block import check_channels
from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.serve.chunks import ChunkShape
from kvcomp.store.tensors import TYPES

KEYS_VERSION = 2  # before it, chunks of engines on a CPU had K and V mixed


def check_parallel(parallel: Any) -> None:
    """Raise UnsupportedModel for parallelism other than tensors'. parallel: vLLM's configuration of it."""
    kinds = "pipeline", "prefill_context", "decode_context"
    if any(getattr(parallel, f"{kind}_parallel_size", 1) != 1 for kind in kinds):
        raise UnsupportedModel("this connector knows tensor parallelism only: set the other parallel sizes to 1")


def chunk_shape(kv_cache_config: Any, tokens: int) -> ChunkShape:
    """What a chunk holds on one rank. Raises UnsupportedModel for caches that are not plain K and V."""
    groups = kv_cache_config.kv_cache_groups
    spec = groups[0].kv_cache_spec if len(groups) == 1 else None
    plain = (
        spec is not None
        and type(spec).__name__ == "FullAttentionSpec"
        and getattr(spec, "head_size_v", spec.head_size) == spec.head_size
        and getattr(spec, "num_head_slots", None) is None
        and getattr(spec, "state_content_bytes", None) is None
        and getattr(spec, "tokens_per_state", 1) == 1
    )
    if spec is None or not plain or spec.dtype not in TYPES.values():
        raise UnsupportedModel(
            "this connector knows caches of plain attention in float32, float16 or bfloat16, all layers in one "
            "group: use "
            "--disable-hybrid-kv-cache-manager for models with sliding windows, and kv_cache_dtype auto; not "
            "latent attention (MLA)"
        )
    try:
        check_channels(spec.head_size)
    except InvalidInput as error:
        raise UnsupportedModel(str(error)) from None
    return ChunkShape(len(groups[0].layer_names), spec.num_kv_heads, tokens, spec.head_size, spec.dtype)


def origin(vllm_config: Any, shape: ChunkShape, model_id: str | None) -> Mapping[str, Any]:
    """All that K and V depend on besides the tokens."""
    model = vllm_config.model_config
    configuration = model.hf_config.to_json_string()
    about = {
        "version": KEYS_VERSION,
        "model": model.model,
        "revision": model.revision,
        "model_id": model_id,
        "configuration": hashlib.sha256(configuration.encode()).hexdigest(),
        "ranks": vllm_config.parallel_config.tensor_parallel_size,
        "shape": [shape.layers, shape.heads, shape.tokens, shape.channels, str(shape.dtype)],
    }
    if model.quantization and "quantization_config" not in json.loads(configuration):
        about["quantization"] = model.quantization  # of plain weights, when they are loaded
    return about
