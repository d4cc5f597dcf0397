"""Transformers' own cache layers, beside the compressed ones."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.store import Memory


def check_stock(layer: Any, index: int) -> None:
    """Raise UnsupportedModel for a layer whose K and V grow, and that cannot be compressed: also a model's own."""
    own = type(layer).__module__ != DynamicLayer.__module__
    if isinstance(layer, DynamicLayer) and (own or not isinstance(layer, DynamicSlidingWindowLayer)):
        raise UnsupportedModel(
            f"layer {index} has a {type(layer).__name__}, which grows and holds more than K and V: "
            "kvcomp cannot compress it, use a DynamicCache"
        )


def holds_nothing(layer: Any) -> bool:
    """Whether a layer has no cache of its own: it reads another layer's K and V, or has no attention."""
    return not isinstance(layer, CacheLayerMixin | LinearAttentionCacheLayerMixin)


def has_state(layer: Any) -> bool:
    """Whether a layer has summed up its tokens in a recurrent state."""
    linear = isinstance(layer, LinearAttentionCacheLayerMixin)
    return linear and any(x is not None for x in layer.recurrent_states.values())


def is_linear(layer: Any) -> bool:
    """Whether a layer has linear attention alone: states of a fixed size, and no K and V."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, CacheLayerMixin)


def states_of(layer: Any) -> dict[str, Tensor]:
    """The states of linear attention by name, (rows, ...) each; of convolutions what the next token needs."""
    found: dict[str, Tensor] = {}
    for index, x in layer.conv_states.items():
        if x is not None:
            width = layer.conv_kernel_size[index]
            found[f"conv_states.{index}"] = torch.nn.functional.pad(x, (max(0, width - x.shape[-1]), 0))[..., -width:]
    for index, x in layer.recurrent_states.items():
        if x is not None:
            found[f"recurrent_states.{index}"] = x
    return found


def placed(x: Tensor, like: Any) -> Tensor:
    """A tensor where a layer that has seen a token keeps its own; as it is if there is no such layer."""
    if like is None:
        return x
    return x.to(next(iter(states_of(like).values())).device if is_linear(like) else like.keys.device)


def give_states(layer: Any, states: Mapping[str, Tensor], like: Any) -> None:
    """Give a layer of linear attention the states that it goes on from, where a layer of the model has its own.

    Raises InvalidInput for names that it has not.
    """
    for name, x in states.items():
        kind, _, index = name.partition(".")
        places = {str(place): place for place in range(layer.number_of_states)}
        if kind not in ("conv_states", "recurrent_states") or index not in places:
            raise InvalidInput(f"a {type(layer).__name__} has no state {name!r}: the file is of another model")
        x = placed(x, like)
        layer.lazy_initialization(**{kind: x}, state_idx=places[index])
        getattr(layer, kind)[places[index]].copy_(x)
        if kind == "conv_states":
            layer.has_previous_state[places[index]] = True


def stock_rows(layer: Any) -> int:
    """The batch of one of transformers' own cache layers; 0 if it is empty."""
    keys = getattr(layer, "keys", None)
    return keys.shape[0] if isinstance(keys, Tensor) and keys.numel() else 0


def stock_memory(layer: Any) -> Memory:
    """The memory of one of transformers' own cache layers: what its tensors of values keep allocated."""
    found: list[Tensor] = []
    for value in vars(layer).values():
        inside = value.values() if isinstance(value, dict) else [value]
        found += [x for x in inside if isinstance(x, Tensor) and x.is_floating_point()]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
    return Memory(
        other=sum(storages.values()),
        values=sum(x.numel() for x in found),
        dense=sum(x.numel() * x.itemsize for x in found),
    )


def join_stock(one: Any, other: Any, tokens: int) -> Any:
    """A layer with the rows of two that end at the same of ``tokens`` positions; both stay as they are.

    Raises UnsupportedModel for layers other than sliding windows and linear attention, InvalidInput where one is empty.
    """
    if holds_nothing(one):
        return one
    joined = copy(one)
    if type(one) is DynamicSlidingWindowLayer:
        if not one.is_initialized or not other.is_initialized:
            raise InvalidInput("only caches that hold tokens can be joined")
        held = min(one.sliding_window - 1, tokens)
        joined.keys = torch.cat([_last(x, held) for x in (one.keys, other.keys)])  # type: ignore[arg-type]
        joined.values = torch.cat([_last(x, held) for x in (one.values, other.values)])  # type: ignore[arg-type]
        joined.cumulative_length = tokens
        return joined
    if is_linear(one):
        for name in ("conv_states", "recurrent_states"):
            mine, theirs = getattr(one, name), getattr(other, name)
            states = {i: x if x is None else torch.cat([x, theirs[i]]) for i, x in mine.items()}
            setattr(joined, name, states)
        return joined
    raise UnsupportedModel(f"rows of a {type(one).__name__} cannot be joined")


def _last(x: Tensor, tokens: int) -> Tensor:
    """The last tokens of (batch, KV heads, tokens, head_dim), behind padding if there are fewer."""
    return torch.nn.functional.pad(x, (0, 0, max(0, tokens - x.shape[2]), 0))[:, :, -tokens:]
