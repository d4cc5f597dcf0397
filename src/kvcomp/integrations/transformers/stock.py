"""Transformers' own cache layers, beside the compressed ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvcomp.store import Memory


def stock_rows(layer: Any) -> int:
    """The batch of one of transformers' own cache layers; 0 if it is empty."""
    keys = getattr(layer, "keys", None)
    return keys.shape[0] if isinstance(keys, Tensor) and keys.numel() else 0


def stock_memory(layer: Any) -> Memory:
    """The memory of one of transformers' own cache layers: what its tensors of values keep allocated."""
    found: list[Tensor] = []
    for value in vars(layer).values():
        inside = value.values() if isinstance(value, dict) else [value]
        found += [x for x in inside if isinstance(x, Tensor) and x.is_floating_point()]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
    return Memory(
        other=sum(storages.values()),
        values=sum(x.numel() for x in found),
        dense=sum(x.numel() * x.itemsize for x in found),
    )
