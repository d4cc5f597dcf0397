"""Chunks: K and V of some tokens of all layers, as a store of values holds them.

The value of a chunk is a .kvc file that names the key it was stored under, so that a value under another key is
refused, whoever mixed them up. It is opened whole, every check included, before anything is decoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcomp.calibration import Calibration
from kvcomp.errors import CorruptData, InvalidInput
from kvcomp.files import load, pack_stores
from kvcomp.files.container import Container
from kvcomp.serve.blobs import Buffer
from kvcomp.spec import CodecSpec
from kvcomp.store import KVStore, sealed
from kvcomp.store.tensors import TYPES


@dataclass(frozen=True)
class ChunkShape:
    """What a chunk holds: ``layers`` times K and V of ``heads`` KV heads, ``tokens`` tokens and ``channels`` channels,
    in ``dtype``.
    """

    layers: int
    heads: int
    tokens: int
    channels: int
    dtype: torch.dtype


def chunk_key(spec: CodecSpec, about: Mapping[str, Any]) -> str:
    """The key of a chunk: a digest of everything that its bytes depend on.

    about: plain JSON that says whose it is: model, tokens and all before them, part of the heads, tenant.
    """
    content = f'{{"about":{_plain(about)},"spec":{_plain_spec(spec)}}}'
    return hashlib.sha256(content.encode()).hexdigest()


@lru_cache(maxsize=16)
def _plain_spec(spec: CodecSpec) -> str:
    """A spec as keys have it: with a calibration that is as much text as all steps, for each chunk of a prompt."""
    return _plain({name: x for name, x in asdict(spec.bare()).items() if name != "windows" or x is not None})


def _plain(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def pack_chunk(
    key: str, spec: CodecSpec, kv: Sequence[tuple[Tensor, Tensor]], calibration: Calibration | None = None
) -> list[memoryview]:
    """The value of a chunk, in pieces that follow each other.

    kv: for each layer K and V, (KV heads, tokens, head_dim), float32, float16 or bfloat16. calibration: the one that
    the spec names, if it names one. Raises InvalidInput or LimitExceeded.
    """
    spec, stores = spec.bare(), {}  # a chunk goes on where another ended
    for layer, (k, v) in enumerate(kv):
        calibrated = calibration.layer(layer, spec) if calibration else None
        if calibration and calibrated is None:
            raise InvalidInput(f"the calibration has no layer {layer}: use a spec that needs none for this model")
        stores[layer] = sealed(spec.layer(layer, len(kv)), k[None], v[None], calibrated=calibrated)
    return pack_stores(stores, spec, len(kv), _origin(key))


def open_chunk(
    data: Buffer, key: str, spec: CodecSpec, shape: ChunkShape, calibration: Calibration | None = None
) -> list[KVStore]:
    """The layers of a chunk, every check done: what ``unpack`` gives cannot fail any more.

    data must not change as long as the stores are in use. Raises CorruptData, UnsupportedVersion or LimitExceeded; also
    if this is the value of another key, or of another shape.
    """
    container = Container(np.frombuffer(data, np.uint8))
    header = container.header
    if header.model != _origin(key):
        raise CorruptData("this value belongs to another key: the store mixed its values up, or someone else did")
    found = {
        ChunkShape(header.model_layers, layer.heads, header.tokens, layer.channels, TYPES[layer.dtype])
        for layer in header.layers
    }
    whole = header.rows == 1 and len(header.layers) == shape.layers and header.spec == spec.bare()
    square = all(layer.value_channels == layer.channels for layer in header.layers)
    if not whole or not square or header.states or found != {shape}:
        raise CorruptData(f"this value is not the chunk that was asked for: it has {found}, not {shape}")
    return list(load(container, calibration=calibration).values())


def unpack(store: KVStore) -> tuple[Tensor, Tensor]:
    """K and V of a layer of a chunk, each (KV heads, tokens, head_dim)."""
    k, v = store.dense()
    return k[0], v[0]


def _origin(key: str) -> dict[str, Any]:
    return {"id": None, "configuration": {"chunk": key}}
