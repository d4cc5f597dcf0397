"""What of a cache can be computed again at little cost, to see that it is of these token ids and this model.

Embeddings, ids and positions show in the first layer, which needs no attention. Weights and adapters of all layers show
in the first token, which sees itself alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Never

import torch
from torch import Tensor
from transformers import DynamicCache

from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.integrations.transformers.layer import matched, uncompiled
from kvcomp.spec import PAGE_TOKENS
from kvcomp.store import KVStore
from kvcomp.store.pages import compare

TOKENS = 1024  # of one forward pass, which ends in the first layer
ROUNDING = {torch.float32: 2.0**-10, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
"""What other batches, devices and TF32 change in the first layer, over the largest value of a token's head."""
DEPTH = 4
"""How many times as much it may be in the last one."""


class _Found(Exception):
    """Ends the forward pass; holds K and V."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.both = k, v


class _Ending(DynamicCache):
    """A cache that takes the first layer's K and V and ends the forward pass."""

    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Never:
        raise _Found(*matched(key_states, value_states))


def check_recomputed(stores: Mapping[int, KVStore], model: Any, ids: list[int], pages: int) -> None:
    """Raise InvalidInput unless a cache of one row holds K and V of these ids under this model, within the bound.

    Compared are the sinks and the first ``pages`` pages of the first layer, and the first token of every layer if it is
    a sink.
    """
    sinks = stores[0].spec.sinks
    k, v = first_layer(model, ids[: sinks + pages * PAGE_TOKENS])
    if k.dtype != stores[0].dtype:
        raise InvalidInput(
            f"the cache holds {stores[0].dtype}, and the model computes {k.dtype}: save it as it was filled, and "
            "without autocast"
        )
    rounding = ROUNDING[k.dtype]
    found = compare(stores[0].slice(0, pages, sinks), k, v, rounding)
    if found.missed:
        raise InvalidInput(
            f"{found.missed} of {found.values} values in the first layer are not those of these token ids under this "
            "model: give the ids that filled the cache from position 0 on, not embeddings or images, and the model "
            "with the adapters that it had then"
        )
    if not sinks:
        return
    for layer, both in enumerate(first_token(model, ids[0])):
        if compare(stores[layer].slice(0, 0, 1), *both, DEPTH * rounding).missed:
            raise InvalidInput(
                f"the first token's K and V in layer {layer} are not those of this model: save a cache with the model "
                "that filled it, with the adapters that it had then"
            )


def first_layer(model: Any, ids: list[int]) -> tuple[Tensor, Tensor]:
    """K and V of a model's first layer for the token ids of a prompt, on the CPU.

    Both are (1, KV heads, tokens, head_dim). Raises UnsupportedModel if the model fills no cache, InvalidInput if it
    does not run.
    """
    parts = []
    for begin in range(0, len(ids), TOKENS):
        try:
            _run(model, ids[begin : begin + TOKENS], begin, _Ending(config=model.config))
        except _Found as found:
            parts.append([x.cpu() for x in found.both])
        else:
            raise UnsupportedModel(f"{type(model).__name__} fills no cache: no prefix of it can be stored")
    k, v = (torch.cat(of_kind, dim=2) for of_kind in zip(*parts, strict=True))
    return k, v


def first_token(model: Any, token: int) -> list[tuple[Tensor, Tensor]]:
    """K and V of each layer for one token alone, (1, KV heads, 1, head_dim) each, on the CPU."""
    cache = DynamicCache(config=model.config)
    _run(model, [token], 0, cache)
    return [matched(layer.keys.cpu(), layer.values.cpu()) for layer in cache.layers]  # type: ignore[union-attr]


def _run(model: Any, ids: list[int], begin: int, cache: DynamicCache) -> None:
    some = torch.tensor([ids], device=model.device)
    places = torch.arange(begin, begin + len(ids), device=model.device)[None]
    try:
        with torch.no_grad():
            model(input_ids=some, position_ids=places, past_key_values=cache, use_cache=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InvalidInput(f"the model does not run, to compare the cache with what it computes: {error}") from error
