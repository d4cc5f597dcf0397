"""The layers of a KVCompCache <-> those of a .kvc file.

Layers with sliding windows go into a file too. They hold their last tokens only: compressed ones say how many are gone,
raw ones are a layer without pages whose rows begin late. Linear attention has states in place of K and V; they are in a
file as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.files import load_states, recent_only
from kvcomp.files.container import Container
from kvcomp.files.header import Header, Shapes
from kvcomp.integrations.transformers.layer import CompressedLayer, matched
from kvcomp.integrations.transformers.layers import rows_of
from kvcomp.integrations.transformers.recompute import one_token
from kvcomp.integrations.transformers.sliding import SlidingLayer
from kvcomp.integrations.transformers.stock import give_states, holds_nothing, is_linear, placed, states_of
from kvcomp.spec import CodecSpec
from kvcomp.store import KVStore
from kvcomp.store.tensors import NAMES


def stores_of(layers: list[Any], spec: CodecSpec) -> dict[int, KVStore]:
    """The stores of all layers with K and V, sealed. Raises UnsupportedModel for layers that could not go on from a
    file.
    """
    check_layers(layers)
    stores = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, CompressedLayer):
            layer.settle()
            stores[index] = layer.store.to_main_memory()
        elif holds_nothing(layer) or is_linear(layer):
            continue
        elif layer.is_initialized:
            held = _held(layer, layer.get_seq_length())
            k, v = (x[:, :, x.shape[2] - held :].cpu() for x in (layer.keys, layer.values))
            stores[index] = recent_only(k, v, layer.get_seq_length(), spec.layer(index, len(layers)))
        else:
            raise InvalidInput(f"layer {index} holds no tokens: fill the cache first")
    return stores


def linear_states(layers: list[Any]) -> dict[int, dict[str, Tensor]]:
    """The states of all layers with linear attention, by layer and name.

    Raises UnsupportedModel if there are none, because the model keeps them in itself.
    """
    found = {index: states_of(layer) for index, layer in enumerate(layers) if is_linear(layer)}
    if not all(found.values()) and any(rows_of(layer) for layer in layers):
        raise UnsupportedModel("this model keeps states in itself and not in its cache: such a cache cannot be saved")
    return found


def needed_layers(layers: list[Any]) -> tuple[list[int], list[int]]:
    """The layers with K and V of their own, and those with linear attention."""
    linear = [index for index, layer in enumerate(layers) if is_linear(layer)]
    return [index for index, layer in enumerate(layers) if not holds_nothing(layer) and index not in linear], linear


def filled_layers(model: Any, layers: list[Any], backend: str) -> list[Any] | None:
    """What the layers of a model hold and where, shown by transformers' own; None if all here are compressed, which
    find out by themselves, or if there is no model but a name.

    Raises InvalidInput if it must be known on a GPU.
    """
    if all(isinstance(layer, CompressedLayer) or holds_nothing(layer) for layer in layers):
        return None
    if isinstance(model, nn.Module):
        of: Any = getattr(model, "get_decoder", None)
        decoder = of() if of else model  # a whole model may keep what it saw of images
        return one_token(decoder if hasattr(decoder, "config") else model, 0)
    if backend == "gpu":
        raise InvalidInput(
            "sliding windows and linear attention go to the GPUs where the model has them: save and load with the "
            "model itself as model_id"
        )
    return None


def shapes_of(filled: list[Any]) -> Shapes:
    """What transformers' own layers hold."""
    attention, linear = needed_layers(filled)
    pairs = {index: matched(filled[index].keys, filled[index].values) for index in attention}
    states = {index: states_of(filled[index]) for index in linear}
    return Shapes(
        {index: (k.shape[1], k.shape[3], v.shape[3], _name(k.dtype)) for index, (k, v) in pairs.items()},
        {index: {name: (tuple(x.shape[1:]), _name(x.dtype)) for name, x in of.items()} for index, of in states.items()},
    )


def not_from_ids(header: Header) -> str | None:
    """Why a file's K and V may be others than a causal pass over the token ids gives; None if nothing says so."""
    found: str | None = (header.model or {}).get("not_from_ids", "it is of a file that does not say how it was filled")
    return found


def check_header(header: Header, layers: list[Any], spec: CodecSpec, filled: list[Any] | None) -> None:
    """Raise InvalidInput if a file holds other layers than are needed, or under another spec, or other K, V and states
    than the model's, if that is known.
    """
    there = [layer.layer for layer in header.layers], sorted({state.layer for state in header.states})
    if header.spec != spec:
        raise InvalidInput("the file was compressed under another spec than this cache's")
    if there != needed_layers(layers):
        raise InvalidInput(
            f"the file holds the layers {there[0]} and states of {there[1]}, and the model needs "
            f"{' and '.join(map(str, needed_layers(layers)))}: kvcomp.load reads single layers"
        )
    if filled is not None and header.shapes != shapes_of(filled):
        raise InvalidInput(
            "the file holds K, V or states of other shapes or types than the model computes: load it with the model "
            "that filled it, under the same autocast"
        )


def give(layers: list[Any], index: int, store: KVStore, like: Any = None, whole: bool = False) -> None:
    """Give a layer what was read from a file, where a layer of the model has its own; a compressed one finds out.

    A window that lies in the file raw stays so; one that is compressed there and not here is decompressed. whole: all
    tokens of the file were taken. Raises InvalidInput if a sliding window lacks tokens that were cut off.
    """
    layer = layers[index]
    if type(layer) is CompressedLayer:
        layer.store = store
        layer.is_initialized = True
        return
    if not store.tokens:
        return
    first = store.tokens - _held(layer, store.tokens)
    raw = bool((store.rows.tail_begin == store.starts).all())
    # Before the tail of a raw row there is padding, or what its window had left when the file was written: no file
    # says which. The next token sees none of the latter, unless the file's last tokens were cut off.
    either = raw and bool((store.starts == store.tail_base).any())
    lacking = either and store.tail_base > first and not whole
    if ((store.rows.dropped > 0) & (store.rows.begins > first)).any() or lacking:
        raise InvalidInput(
            "a layer with a sliding window holds its last tokens only, so no prefix can be cut from this file: "
            "take all of its tokens"
        )
    if isinstance(layer, SlidingLayer) and not (either and 0 < store.tail_base <= first):
        store.slide(layer.sliding_window)
        layer.store = store
        layer.is_initialized = True
        return
    if isinstance(layer, SlidingLayer):
        layer = layers[index] = DynamicSlidingWindowLayer(layer.sliding_window)
    k, v = (placed(x, like) for x in store.dense(first))
    layer.lazy_initialization(k, v)
    layer.keys, layer.values, layer.cumulative_length = k, v, store.tokens


def give_linear(
    layers: list[Any],
    containers: Sequence[Container],
    rows: Sequence[int] | None,
    tokens: int | None,
    filled: list[Any] | None,
) -> None:
    """Give layers of linear attention their states from files, whose rows become one batch, where filled ones are.

    Raises CorruptData, or InvalidInput if states do not fit each other, or are not of all tokens of a file.
    """
    parts = [load_states(container, rows) for container in containers]
    if parts[0] and any(tokens not in (None, container.header.tokens) for container in containers):
        raise InvalidInput(
            "linear attention holds one state of all tokens, so no prefix can be cut from this file: take all of its "
            "tokens"
        )
    for index, states in parts[0].items():
        try:
            joined = {name: torch.cat([part[index][name] for part in parts]) for name in states}
        except (KeyError, RuntimeError) as error:
            raise InvalidInput(f"the states of layer {index} do not fit each other: {error}") from None
        give_states(layers[index], joined, filled and filled[index])


def check_layers(layers: list[Any]) -> None:
    """Raise UnsupportedModel unless a file can hold what every layer needs to go on."""
    others = [
        index
        for index, layer in enumerate(layers)
        if not isinstance(layer, CompressedLayer)
        and type(layer) is not DynamicSlidingWindowLayer
        and not holds_nothing(layer)
        and not is_linear(layer)
    ]
    if others:
        raise UnsupportedModel(
            f"layers {others} are neither full attention nor sliding windows nor linear attention and cannot be saved "
            "in a file"
        )


def _name(dtype: torch.dtype) -> str:
    return NAMES.get(dtype, str(dtype))


def _held(layer: DynamicSlidingWindowLayer | SlidingLayer, tokens: int) -> int:
    """How many tokens a window keeps: the next one sees them and itself."""
    return min(tokens, layer.sliding_window - 1)
