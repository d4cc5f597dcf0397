"""transformers' own QuantizedCache, with the package that does its arithmetic: hqq or optimum-quanto.

Each package's axes are those that transformers' documentation advises; group 64 and residual 128 are its defaults.
It codes all it holds anew whenever its residual is full.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, QuantizedCache

from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.evaluate.methods.method import Method, Pair
from kvcomp.store import Memory

PACKAGES = {"hqq": "hqq", "quanto": "optimum-quanto"}
AXES = {"hqq": 1, "quanto": 0}
GROUP, RESIDUAL = 64, 128


class Quantized(Method):
    """QuantizedCache at some bits a code. Raises InvalidInput if the package is not installed."""

    def __init__(self, backend: str, bits: int) -> None:
        self.name, self.backend, self.bits = f"{backend}-{bits}", backend, bits
        try:
            self.version = version(PACKAGES[backend])
        except PackageNotFoundError:
            raise InvalidInput(
                f"{self.name} needs {PACKAGES[backend]}: pip install '.[baselines]', or leave it out"
            ) from None

    def cache(self, config: PreTrainedConfig) -> Cache:
        axis = AXES[self.backend]
        try:
            return QuantizedCache(self.backend, config, self.bits, axis, axis, GROUP, RESIDUAL)
        except ValueError as error:
            raise UnsupportedModel(f"{self.name} cannot be used with this model: {error}") from None

    def memory(self, cache: Cache) -> Memory:
        memory = Memory()
        layers: list[Any] = list(cache.layers)
        for layer in layers:
            held = [x for x in (layer.keys, layer.values) if x is not None and x.ndim == 4]
            raw = sum(x.numel() for x in held)
            size = layer.dtype.itemsize
            found = [x for part in (layer._quantized_keys, layer._quantized_values) for x in tensors_of(part)]
            coded = sum(x.numel() for x in layer_values(layer)) - raw
            memory += Memory(
                codes=sum(x.nbytes for x in found if not x.is_floating_point()),
                scales=sum(x.nbytes for x in found if x.is_floating_point()),
                window=raw * size,
                sealed_values=coded,
                values=coded + raw,
                dense=(coded + raw) * size,
            )
        return memory

    def values(self, cache: Cache) -> list[Pair]:
        return [layer_values(layer) for layer in cache.layers]

    def room(self, cache: Cache) -> int:
        layers: list[Any] = list(cache.layers)
        if not all(layer.is_initialized for layer in layers):
            return 1
        held = [layer.keys.shape[2] for layer in layers if layer.keys.ndim == 4]
        return max(1, RESIDUAL - max(held, default=0))

    def settings(self) -> dict[str, Any]:
        axis = AXES[self.backend]
        about = {"package": PACKAGES[self.backend], "version": self.version, "axis": axis}
        return {**about, "bits": self.bits, "group": GROUP, "residual": RESIDUAL}


def layer_values(layer: Any) -> Pair:
    """K and V of a QuantizedLayer, decoded."""
    pairs = ((layer._quantized_keys, layer.keys), (layer._quantized_values, layer.values))
    k, v = (torch.cat([layer._dequantize(coded), *([raw] if raw.ndim == 4 else [])], 2) for coded, raw in pairs)
    return k, v


def tensors_of(held: Any) -> Iterator[Tensor]:
    """The plain tensors within what a package holds: tuples, dictionaries and tensors made of others."""
    if isinstance(held, Tensor) and hasattr(held, "__tensor_flatten__") and type(held) is not Tensor:
        for name in held.__tensor_flatten__()[0]:
            yield from tensors_of(getattr(held, name))
    elif isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from tensors_of(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from tensors_of(value)
