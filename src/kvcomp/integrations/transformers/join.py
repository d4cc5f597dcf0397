"""The rows of two caches in one: their layers, compressed or transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from kvcomp.errors import UnsupportedModel
from kvcomp.integrations.transformers.layer import CompressedLayer
from kvcomp.integrations.transformers.stock import join_stock
from kvcomp.store import KVStore


def joined_layers(layers: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Layers with the rows of both, which end at the same position. Those given hold what they held.

    Raises UnsupportedModel if none is compressed, or one is of a kind that cannot be joined, InvalidInput for other
    specs or no tokens, LimitExceeded if memory ends.
    """
    pairs = list(zip(layers, others, strict=True))
    if any(type(mine) is not type(theirs) for mine, theirs in pairs):
        raise UnsupportedModel(
            "one of the caches has raw sliding windows, as older files and prefix stores give them, the other "
            "compressed ones: make both in one way"
        )
    compressed = [pair for pair in pairs if isinstance(pair[0], CompressedLayer)]
    if not compressed:
        raise UnsupportedModel("rows join only where a layer is compressed: this model has short sliding windows alone")
    for layer in (layer for pair in compressed for layer in pair):
        layer.settle()
    for layer, beside in (*compressed, *((theirs, mine) for mine, theirs in compressed)):
        if beside.store.batch and not isinstance(beside.store, KVStore):  # else both go up later
            layer.upload(beside.store.device)
    stores = [layer.store for layer in compressed[0] if layer.store.batch]
    tokens = max((store.tokens - int(store.starts.min()) for store in stores), default=0)
    return [_joined(mine, theirs, tokens) for mine, theirs in pairs]


def _joined(mine: Any, theirs: Any, tokens: int) -> Any:
    if not isinstance(mine, CompressedLayer):
        return join_stock(mine, theirs, tokens)
    joined = copy(mine)
    joined.store = mine.store.join([theirs.store], tokens)
    return joined
