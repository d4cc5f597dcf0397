"""The cache that transformers uses by itself, in the model's type."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache

from kvcomp.evaluate.methods.baseline import FURTHEST
from kvcomp.evaluate.methods.method import Method, Pair
from kvcomp.integrations.transformers.stock import stock_memory
from kvcomp.store import Memory


class Uncompressed(Method):
    name = "uncompressed"

    def cache(self, config: PreTrainedConfig) -> Cache:
        return DynamicCache(config=config)

    def memory(self, cache: Cache) -> Memory:
        return sum((stock_memory(layer) for layer in cache.layers), Memory())

    def values(self, cache: Cache) -> list[Pair]:
        layers: list[Any] = list(cache.layers)
        return [(layer.keys, layer.values) for layer in layers]

    def room(self, cache: Cache) -> int:
        return FURTHEST
