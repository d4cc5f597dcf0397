"""What of a cache can be computed again at little cost, to see that it is of these token ids and this model.

Embeddings, ids and positions show in the first layer, which needs no attention; where it is not compressed, in the
first one that is, at the price of those before it. Weights and adapters of all layers show in the first token, which
sees itself alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.integrations.transformers.handle import uncompiled
from kvcomp.integrations.transformers.layer import matched
from kvcomp.store import KVStore
from kvcomp.store.pages import compare

TOKENS = 1024  # of one forward pass, which ends in the first layer
ROUNDING = {torch.float32: 2.0**-10, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
"""What other batches, devices and TF32 change in the first layer, over the largest value of a token's head."""
DEPTH = 4
"""How many times as much it may be in the last one."""


class _Ended(Exception):
    """Ends the forward pass."""


class _Ending(DynamicCache):
    """A cache that ends the forward pass once a layer has its K and V."""

    def __init__(self, config: Any, last: int) -> None:
        super().__init__(config=config)
        self.last = last

    @uncompiled
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        both = super().update(*matched(key_states, value_states), layer_idx, *args, **kwargs)
        if layer_idx == self.last:
            raise _Ended
        return both


def check_recomputed(stores: Mapping[int, KVStore], model: Any, ids: list[int], pages: int | None) -> None:
    """Raise InvalidInput unless a cache of one row holds K and V of these ids under this model, within the bound.

    Compared are the first compressed layer, all of it or its sinks and first ``pages`` pages, and the first token of
    every compressed layer if it is a sink.
    """
    layer, store = min(stores.items())
    sinks = store.spec.sinks
    part = store if pages is None else store.slice(0, pages, sinks)
    k, v = layer_of(model, ids[: part.tokens], layer)
    if k.dtype != store.dtype:
        raise InvalidInput(
            f"the cache holds {store.dtype}, and the model computes {k.dtype}: save it as it was filled, and "
            "without autocast"
        )
    rounding = ROUNDING[k.dtype]
    found = compare(part, k, v, DEPTH * rounding if layer else rounding)
    if found.missed:
        raise InvalidInput(
            f"{found.missed} of {found.values} values in layer {layer} are not those of these token ids under this "
            "model: give the ids that filled the cache from position 0 on, not embeddings or images, and the model "
            "with the adapters that it had then, and a cache that the store's load gave, even an empty one: where "
            "sliding windows before this layer are compressed, its K and V depend on the passes that a prompt came in"
        )
    if not sinks:
        return
    token = first_token(model, ids[0])
    for layer, store in stores.items():
        if compare(store.slice(0, 0, 1), *token[layer], DEPTH * rounding).missed:
            raise InvalidInput(
                f"the first token's K and V in layer {layer} are not those of this model: save a cache with the model "
                "that filled it, with the adapters that it had then"
            )


def layer_of(model: Any, ids: list[int], layer: int) -> tuple[Tensor, Tensor]:
    """K and V of a model's layer for the token ids of a prompt, on the CPU; later layers are not computed.

    Both are (1, KV heads, tokens, head_dim). Raises UnsupportedModel if the layer gets none, InvalidInput if the model
    does not run.
    """
    cache = _Ending(model.config, layer)
    for begin in range(0, len(ids), TOKENS):
        try:
            forward(model, ids[begin : begin + TOKENS], begin, cache)
        except _Ended:
            continue
        raise UnsupportedModel(f"{type(model).__name__} fills no cache: no prefix of it can be stored")
    k, v = cache.layers[layer].keys.cpu(), cache.layers[layer].values.cpu()  # type: ignore[union-attr]
    return k, v


def first_token(model: Any, token: int) -> dict[int, tuple[Tensor, Tensor]]:
    """K and V of each layer that has some for one token alone, (1, KV heads, 1, head_dim) each, on the CPU."""
    return {
        index: matched(layer.keys.cpu(), layer.values.cpu())
        for index, layer in enumerate(one_token(model, token))
        if isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None
    }


def one_token(model: Any, token: int) -> list[Any]:
    """Transformers' own cache layers with one token. Raises InvalidInput if the model does not run."""
    cache = DynamicCache(config=model.config)
    forward(model, [token], 0, cache)
    return cache.layers


def forward(model: Any, ids: list[int], begin: int, cache: Cache) -> None:
    """One forward pass over a prompt's ids from position ``begin`` on, which computes as few logits as the model can.

    Raises InvalidInput if the model does not run.
    """
    some = torch.tensor([ids], device=model.device)
    places = torch.arange(begin, begin + len(ids), device=model.device)[None]
    few = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    try:
        with torch.no_grad():
            model(input_ids=some, position_ids=places, past_key_values=cache, use_cache=True, **few)
    except InvalidInput:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InvalidInput(f"the model does not run over these token ids: {error}") from error
