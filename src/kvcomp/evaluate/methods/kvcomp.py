"""kvcomp itself: a preset or a spec, in a KVCompCache, with attention on the compressed bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from kvcomp.calibration import Calibration, resolve
from kvcomp.evaluate.methods.baseline import FURTHEST
from kvcomp.evaluate.methods.method import Method, Pair
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers.layer import CompressedLayer
from kvcomp.spec import PRESETS, CodecSpec
from kvcomp.store import Memory, Store


class KVComp(Method):
    """kvcomp with a spec.

    Parameters
    ----------
    spec, calibration
        As ``KVCompCache`` takes them.
    name
        By default the preset's or the file's.
    backend
        As ``KVCompCache`` takes it.

    Raises
    ------
    InvalidInput
        As ``kvcomp.calibration.resolve``.
    """

    attention = "kvcomp"

    def __init__(
        self,
        spec: str | Path | CodecSpec,
        name: str | None = None,
        calibration: Calibration | str | Path | None = None,
        backend: str = "cpu",
    ) -> None:
        self.spec, self.calibration = resolve(spec, calibration)
        self.backend = backend
        stem = "spec" if isinstance(spec, CodecSpec) else Path(spec).stem
        self.name = name or (str(spec) if stem in PRESETS else stem)

    def cache(self, config: PreTrainedConfig) -> Cache:
        return KVCompCache(config, self.spec, calibration=self.calibration, backend=self.backend)

    def memory(self, cache: Cache) -> Memory:
        self.stores(cache)  # which compresses what is due
        return cast(KVCompCache, cache).memory()

    def values(self, cache: Cache) -> list[Pair]:
        self.stores(cache)
        layers: list[Any] = list(cache.layers)
        return [
            layer.dense(layer.seen(0)) if isinstance(layer, CompressedLayer) else (layer.keys, layer.values)
            for layer in layers
        ]

    def stores(self, cache: Cache) -> dict[int, Store]:
        """The store of each compressed layer, with all that is due compressed."""
        layers = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, CompressedLayer)}
        for layer in layers.values():
            layer.seal()
        return {i: layer.store for i, layer in layers.items()}

    def room(self, cache: Cache) -> int:
        stores = self.stores(cache).values()
        return min((store.until_seal() for store in stores), default=FURTHEST)

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"spec": json.loads(self.spec.to_json())}
        if self.calibration is not None:
            levels = self.calibration.levels_of(self.spec)
            size = sum(self.calibration.nbytes(level, [index]) for index, level in levels.items())
            settings |= {"levels": sorted(set(levels.values())), "calibration_bytes": size}
        return settings
