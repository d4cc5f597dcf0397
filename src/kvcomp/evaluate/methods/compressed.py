"""kvcomp itself: a preset or a spec, in a KVCompCache, with attention on the compressed bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from kvcomp.evaluate.methods.baseline import FURTHEST, stock_memory
from kvcomp.evaluate.methods.method import Method, Pair
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers_layer import CompressedLayer
from kvcomp.spec import PAGE_TOKENS, PRESETS, CodecSpec
from kvcomp.store import KVStore, Memory


class Compressed(Method):
    attention = "kvcomp"

    def __init__(self, spec: str | Path | CodecSpec, name: str | None = None) -> None:
        """spec: a preset's name, a spec.json or a spec. name: if None, the preset's or the file's. Raises InvalidInput."""
        self.spec = CodecSpec.resolve(spec)
        stem = "spec" if isinstance(spec, CodecSpec) else Path(spec).stem
        self.name = name or (str(spec) if stem in PRESETS else stem)

    def cache(self, config: PreTrainedConfig) -> Cache:
        return KVCompCache(config, self.spec)

    def memory(self, cache: Cache) -> Memory:
        memory = Memory()
        stores = self.stores(cache)
        for index, layer in enumerate(cache.layers):
            memory += stores[index].memory() if index in stores else stock_memory(layer)
        return memory

    def values(self, cache: Cache) -> list[Pair]:
        stores = self.stores(cache)
        layers: list[Any] = list(cache.layers)
        return [stores[i].dense() if i in stores else (layer.keys, layer.values) for i, layer in enumerate(layers)]

    def stores(self, cache: Cache) -> dict[int, KVStore]:
        """The store of each compressed layer, with all that is due compressed."""
        layers = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, CompressedLayer)}
        for layer in layers.values():
            layer.seal()
        return {i: layer.store for i, layer in layers.items()}

    def room(self, cache: Cache) -> int:
        stores = self.stores(cache).values()
        return min((_until_seal(store) for store in stores), default=FURTHEST)

    def settings(self) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads(self.spec.to_json())
        return {"spec": spec}


def _until_seal(store: KVStore) -> int:
    """Tokens until a row compresses a page."""
    if not store.batch:
        return store.spec.sinks + store.spec.window + PAGE_TOKENS
    begin = store.tail_begin + (store.count == 0) * (store.spec.sinks - store.sink_count)
    return max(1, int(begin.min()) + store.spec.window + PAGE_TOKENS - store.tokens)
