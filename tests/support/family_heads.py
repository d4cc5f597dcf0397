"""The heads that a family has outside of tests: those of transformers' default configuration, which are a real model's.

The model is made without memory and sees one token, so that a cache and attention themselves say what they are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModel, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from families import FAMILIES
from kvcomp.bench.cases import tensors
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.spec import CodecSpec
from kvcomp.store import KVStore, sealed

LAYERS = "num_hidden_layers", "layer_types", "num_kv_shared_layers", "no_rope_layers", "first_k_dense_replace"
CONTEXT = 8192


@dataclass(frozen=True)
class Heads:
    """One growing layer. queries: attention heads, or 0 where attention is given other K and V than the cache has."""

    heads: int
    channels: int
    value_channels: int
    queries: int
    scaling: float
    softcap: float
    sinks: bool
    spec: CodecSpec
    """What the preset ``kvcomp`` is for the model."""

    def tensors(self, tokens: int, batch: int = 1) -> tuple[Tensor, Tensor]:
        """K and V as ``kvcomp bench`` draws them."""
        k, _ = tensors(batch, self.heads, tokens, self.channels)
        _, v = tensors(batch, self.heads, tokens, self.value_channels)
        return k, v

    def sealed(self) -> KVStore:
        """A layer of ``CONTEXT`` tokens under the preset ``kvcomp``."""
        return sealed(self.spec, *self.tensors(CONTEXT))


def usual_config(family: str) -> PreTrainedConfig:
    """Transformers' default configuration of a family's text model, with a layer or two of each kind."""
    kind, settings = FAMILIES[family]
    text = settings.get("text_config")
    few = {"num_hidden_layers": 2, **{name: x for name, x in (text or settings).items() if name in LAYERS}}
    if kind == "ministral":
        few["head_dim"] = 128  # which transformers leaves open, and Ministral-8B has
    if text is None:
        return AutoConfig.for_model(kind, **few)
    of_text = {"model_type": text["model_type"]} if "model_type" in text else {}
    return AutoConfig.for_model(kind, text_config={**of_text, **few}).get_text_config()


@cache
def heads_of(family: str) -> Heads | None:
    """The heads of a family's last growing layer; None if no layer grows."""
    seen: dict[int, tuple[tuple[int, ...], float, float, bool]] = {}

    def noted(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> tuple[Tensor, None]:
        given_shapes = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
        cap, sinks = given.get("softcap") or 0.0, given.get("s_aux") is not None
        seen[module.layer_idx] = given_shapes, given["scaling"], cap, sinks
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register("noted", noted)
    config = usual_config(family)
    with torch.device("meta"), torch.no_grad():
        model = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="noted").eval()
        held = DynamicCache(config=config)
        with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
            model(input_ids=torch.zeros((1, 1), dtype=torch.int64), past_key_values=held)
    growing = [(index, layer) for index, layer in enumerate(held.layers) if type(layer) is DynamicLayer]
    if not growing:
        return None
    index, layer = growing[-1]
    shapes = layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]
    (queries, *given), scaling, cap, sinks = seen[index]
    return Heads(*shapes, queries if tuple(given) == shapes else 0, scaling, cap, sinks, KVCompCache(config).spec)
