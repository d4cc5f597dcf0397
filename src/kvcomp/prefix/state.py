"""What a model with sliding windows or linear attention needs to go on at a place: its state there, a value of its own.

Chunks hold pages, and any number of them is a cache. Of a sliding window only the last tokens are there, and of linear
attention only the present sums. So a state stands where the cache stood when it was saved, under the hash of all tokens
up to there: a .kvc file with the windows, the sums, and what layers that keep all tokens hold behind the last whole
chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from kvcomp import files
from kvcomp.errors import CorruptData
from kvcomp.files.container import Container
from kvcomp.files.header import Shapes
from kvcomp.prefix.chain import CHUNK_PAGES, Origin, binding, books_of
from kvcomp.serve.blobs import Buffer
from kvcomp.store import KVStore
from kvcomp.store.tensors import NAMES


@dataclass(frozen=True)
class State:
    """All that a cache holds at a place but its first chunks."""

    chunks: int
    """How many chunks come before what ``stores`` has of layers that keep all tokens."""
    stores: Mapping[int, KVStore]
    """Of every layer with K and V what is not in those chunks, at the positions of the whole sequence."""
    linear: Mapping[int, Mapping[str, Tensor]]
    """The states of layers with linear attention."""


def state_of(
    origin: Origin, stores: Mapping[int, KVStore], linear: Mapping[int, Mapping[str, Tensor]], chunks: int
) -> State:
    """The state of a whole cache whose first chunks are stored by themselves. stores: of every layer with K and V."""
    rest = {
        layer: store.behind(chunks * CHUNK_PAGES) if layer in origin.compressed else store
        for layer, store in stores.items()
    }
    return State(chunks, rest, linear)


def pack_state(origin: Origin, state: State, key: str, tokens: int) -> list[memoryview]:
    """The value of a state behind so many tokens."""
    model = binding(origin, key, tokens)
    return files.pack_stores(state.stores, origin.spec, origin.layers, model, states=state.linear)


def unpack_state(
    origin: Origin, value: Buffer, key: str, tokens: int, books: bytes, shapes: Shapes, backend: str
) -> State:
    """A state behind so many tokens, after every check that there is.

    books: of the chunks before it. shapes: what the model's layers hold. backend: of the stores. Raises CorruptData,
    UnsupportedVersion or LimitExceeded.
    """
    container = Container(np.frombuffer(value, np.uint8))
    header = container.header
    if (header.tokens, header.rows, header.spec) != (tokens, 1, origin.spec) or header.shapes != shapes:
        raise CorruptData("the value is the state of another place, or of another model")
    if header.model != binding(origin, key, tokens):
        raise CorruptData("the value was stored under another key")
    compressed = tuple(layer for layer in header.layers if layer.layer in origin.compressed)
    if books_of(replace(header, layers=compressed)) != books:
        raise CorruptData("the value has other codebooks than the chunks before it")
    stores = files.load(container, backend, calibration=origin.calibration)
    begins = {int(stores[layer].rows.begins[0]) for layer in origin.compressed}
    chunks = origin.chunks(min(begins))
    if (
        begins != {origin.end(chunks - 1)}
        or not chunks
        or any(store.starts[0] for store in stores.values() if store.compressed)
        or {NAMES[store.dtype] for store in stores.values()} != {origin.dtype}
    ):
        raise CorruptData("the value does not begin where a chunk ends, or has another dtype")
    return State(chunks, stores, files.load_states(container))
