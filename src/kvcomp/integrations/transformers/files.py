"""The layers of a KVCompCache <-> those of a .kvc file.

Layers with sliding windows go into a file too. They hold their last tokens only, raw: a layer without pages whose rows
begin there.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicSlidingWindowLayer

from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.files import recent_only
from kvcomp.files.header import Header
from kvcomp.integrations.transformers.layer import CompressedLayer
from kvcomp.integrations.transformers.stock import holds_nothing
from kvcomp.spec import CodecSpec
from kvcomp.store import KVStore, read


def stores_of(layers: list[Any], spec: CodecSpec) -> dict[int, KVStore]:
    """The stores of all layers, sealed. Raises UnsupportedModel for layers that could not go on from a file."""
    check_layers(layers)
    stores = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, CompressedLayer):
            layer.settle()
            stores[index] = layer.store.to_main_memory()
        elif holds_nothing(layer):
            continue
        elif layer.is_initialized:
            held = _held(layer, layer.get_seq_length())
            k, v = (x[:, :, x.shape[2] - held :] for x in (layer.keys, layer.values))
            stores[index] = recent_only(k, v, layer.get_seq_length(), spec.layer(index, len(layers)))
        else:
            raise InvalidInput(f"layer {index} holds no tokens: fill the cache first")
    return stores


def check_header(header: Header, layers: list[Any], spec: CodecSpec) -> list[int]:
    """The layers that a file must hold. Raises InvalidInput if it holds others, or under another spec."""
    needed = [index for index, layer in enumerate(layers) if not holds_nothing(layer)]
    if header.spec != spec or [layer.layer for layer in header.layers] != needed:
        raise InvalidInput(
            f"the file holds {len(header.layers)} layers under the spec {header.spec}: not what is needed here"
        )
    return needed


def give(layer: Any, store: KVStore) -> None:
    """Give a layer what was read from a file. Raises InvalidInput if a sliding window lacks tokens that
    were cut off.
    """
    if isinstance(layer, CompressedLayer):
        layer.store = store
        layer.is_initialized = True
        return
    if not store.tokens:
        return
    held, there = _held(layer, store.tokens), store.tokens - store.tail_base
    if store.compressed or there < held:
        raise InvalidInput(
            "a layer with a sliding window holds its last tokens only, so no prefix can be cut from this file: "
            "take all of its tokens"
        )
    k, v = (x[:, :, there - held : there] for x in read.undone(store.transform, store.tail_k, store.tail_v, ()))
    layer.lazy_initialization(k, v)
    layer.keys, layer.values, layer.cumulative_length = k, v, store.tokens


def check_layers(layers: list[Any]) -> None:
    """Raise UnsupportedModel unless a file can hold what every layer needs to go on."""
    others = [
        index
        for index, layer in enumerate(layers)
        if not isinstance(layer, CompressedLayer)
        and type(layer) is not DynamicSlidingWindowLayer
        and not holds_nothing(layer)
    ]
    if others:
        raise UnsupportedModel(
            f"layers {others} are neither full attention nor sliding windows and cannot be saved in a file"
        )


def _held(layer: DynamicSlidingWindowLayer, tokens: int) -> int:
    """How many tokens a window keeps: the next one sees them and itself."""
    return min(tokens, layer.sliding_window - 1)
