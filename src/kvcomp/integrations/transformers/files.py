"""The layers of a KVCompCache <-> those of a .kvc file, and which weights a file belongs to.

Layers with sliding windows go into a file too: they hold their last tokens only, raw, which is a layer without pages whose rows begin there.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer
from xxhash import xxh3_128

from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.files import recent_only
from kvcomp.integrations.transformers.layer import CompressedLayer
from kvcomp.spec import CodecSpec
from kvcomp.store import KVStore
from kvcomp.store.gpu.copies import to_main_memory

HASH_BYTES = 1 << 24

_hashes: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


def weights_id(model: str | nn.Module | None) -> str | None:
    """What stands for the weights of a model: a name as it is, of a module the hash of every weight.

    XXH3 of 128 bits over the names, types, shapes and bytes of the state: a second for some ten gigabytes. The hash is kept as long as
    no weight is replaced or written to by a torch operation; writing through ``.data`` or NumPy goes unnoticed, and so do adapters
    that are switched off. Raises InvalidInput for weights that are not in memory.
    """
    if model is None or isinstance(model, str):
        return model
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model_id must be a name or the model itself, not {type(model).__name__}")
    state = model.state_dict(keep_vars=True)
    weights = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    stamp = tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in weights.values())
    kept = _hashes.get(model)
    if kept is None or kept[0] != stamp:
        kept = _hashes[model] = stamp, _hash(weights)
    return kept[1]


def _hash(weights: dict[str, Tensor]) -> str:
    found, seen = xxh3_128(), set()
    for name, x in sorted(weights.items()):
        if x.device.type == "meta":
            raise InvalidInput(f"the weight {name} is not in memory: give model_id a name for these weights")
        place = x.device, x.data_ptr(), x.shape, x.stride()
        found.update(f"{name} {x.dtype} {tuple(x.shape)} {place in seen and x.numel() > 0}\n".encode())
        if place not in seen:  # weights that are tied count once
            seen.add(place)
            content = x.detach().contiguous().reshape(-1).view(torch.uint8)
            for part in content.split(HASH_BYTES):
                found.update(part.cpu().numpy().data)
    return f"weights-xxh3-{found.hexdigest()}"


def stores_of(layers: list[Any], spec: CodecSpec) -> dict[int, KVStore]:
    """The stores of all layers, sealed. Raises UnsupportedModel for layers of which a file cannot hold what they need to go on."""
    check_layers(layers)
    stores = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, CompressedLayer):
            if layer.unsealed:
                layer.seal()
            stores[index] = layer.store if isinstance(layer.store, KVStore) else to_main_memory(layer.store)
        elif layer.is_initialized:
            held = _held(layer, layer.get_seq_length())
            k, v = (x[:, :, x.shape[2] - held :] for x in (layer.keys, layer.values))
            stores[index] = recent_only(k, v, layer.get_seq_length(), spec.layer(index, len(layers)))
        else:
            raise InvalidInput(f"layer {index} holds no tokens: fill the cache first")
    return stores


def give(layer: Any, store: KVStore) -> None:
    """Make what was read from a file a layer's. Raises InvalidInput if a sliding window lacks tokens, since the rest was cut off."""
    if isinstance(layer, CompressedLayer):
        layer.store = store
        layer.is_initialized = True
        return
    if not store.tokens:
        return
    held, there = _held(layer, store.tokens), store.tokens - store.tail_base
    if store.compressed or there < held:
        raise InvalidInput(
            "a layer with a sliding window holds its last tokens only, so no prefix can be cut from this file: take all of its tokens"
        )
    k, v = (x[:, :, there - held : there] for x in (store.tail_k, store.tail_v))
    layer.lazy_initialization(k, v)
    layer.keys, layer.values, layer.cumulative_length = k, v, store.tokens


def check_layers(layers: list[Any]) -> None:
    """Raise UnsupportedModel unless a file can hold what every layer needs to go on."""
    others = [
        index
        for index, layer in enumerate(layers)
        if not isinstance(layer, CompressedLayer) and type(layer) is not DynamicSlidingWindowLayer
    ]
    if others:
        raise UnsupportedModel(
            f"layers {others} are neither full attention nor sliding windows and cannot be saved in a file"
        )


def _held(layer: DynamicSlidingWindowLayer, tokens: int) -> int:
    """How many tokens a window keeps: the next one sees them and itself."""
    return min(tokens, layer.sliding_window - 1)
