"""What a method does to K and V themselves: errors by layer and head, and which of them the predictions suffer from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcomp.evaluate.fidelity import Sample, compare, fill, predict_from
from kvcomp.evaluate.methods import KVComp, Method, Pair
from kvcomp.spec import KINDS, Kind
from kvcomp.store.pages import bits_by_head, error_shares
from kvcomp.store.pages import compare as compare_with_bound

EDGES = np.linspace(-1, 1, 41)
WORST = 2  # tensors whose heads are looked at one by one


@torch.inference_mode()
def errors_by_head(model: Any, each: Sample, method: Method) -> dict[str, Any]:
    """Error statistics of the prompt's K and V, as ``Error`` in ``results``."""
    cache = fill(model, each, method)
    values = method.values(cache)
    held = method.stores(cache) if isinstance(method, KVComp) else {}
    stores = {layer: store.to_main_memory() for layer, store in held.items()}
    bits = {layer: bits_by_head(store).tolist() for layer, store in stores.items()}
    heads, shares = [], {kind: np.zeros(EDGES.size - 1, np.int64) for kind in KINDS}
    for layer, kind, head, before, after in _by_head(each.cache, values):
        error = after - before
        rms = float(before.square().mean().sqrt())
        largest = float(before.abs().max())
        own = bits[layer][KINDS.index(kind)][head] if layer in bits else None
        heads.append(
            {
                "layer": layer,
                "kind": kind,
                "head": head,
                "rms": float(error.square().mean().sqrt()) / rms if rms else 0.0,
                "largest": float(error.abs().max()) / largest if largest else 0.0,
                "bits": None if own is None or np.isnan(own) else own,
            }
        )
        if not stores and rms:
            shares[kind] += _histogram((error[error != 0] / rms).numpy())
    found: dict[str, Any] = {"heads": heads, "largest_over_bound": None}
    if stores:
        for layer, store in stores.items():
            for kind, share in error_shares(store, *each.cache[layer]):
                shares[kind] += _histogram(share)
        total = [compare_with_bound(store, *each.cache[layer]) for layer, store in stores.items()]
        found["largest_over_bound"] = max(one.worst for one in total)
        found["missed"] = sum(one.missed for one in total)
        found["values"] = sum(one.values for one in total)
    over = "bound" if stores else "rms"
    found["histogram"] = {
        kind: {"edges": EDGES.tolist(), "counts": counts.tolist(), "over": over} for kind, counts in shares.items()
    }
    return found


@torch.inference_mode()
def sensitivity(model: Any, each: Sample, method: Method) -> list[dict[str, Any]]:
    """The KL if one layer's K or V alone is coded, largest first; of the worst also head by head."""
    values = method.values(fill(model, each, method))

    def kl_of(layer: int, part: int, head: int | None = None) -> float:
        mixed: list[Pair] = list(each.cache)
        pair = list(each.cache[layer])
        if head is None:
            pair[part] = values[layer][part]
        else:
            pair[part] = pair[part].clone()
            pair[part][:, head] = values[layer][part][:, head]
        mixed[layer] = (pair[0], pair[1])
        return compare(each, predict_from(model, each, mixed)).kl

    found: list[dict[str, Any]] = [
        {"layer": layer, "kind": kind, "kl": kl_of(layer, part)}
        for layer in range(len(values))
        for part, kind in enumerate(KINDS)
    ]
    found.sort(key=lambda one: -one["kl"])
    for one in found[:WORST]:
        part = KINDS.index(one["kind"])
        heads = values[one["layer"]][part].shape[1]
        one["heads"] = [kl_of(one["layer"], part, head) for head in range(heads)]
    return found


def _by_head(before: Sequence[Pair], after: Sequence[Pair]) -> Iterator[tuple[int, Kind, int, Tensor, Tensor]]:
    for layer, (pair, back) in enumerate(zip(before, after, strict=True)):
        for kind, x, y in zip(KINDS, pair, back, strict=True):
            for head in range(x.shape[1]):
                yield layer, kind, head, x[:, head].float(), y[:, head].float()


def _histogram(x: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Counts between EDGES; what lies beyond counts in the outermost."""
    counts: np.ndarray[Any, np.dtype[np.int64]] = np.histogram(np.clip(x, EDGES[0], EDGES[-1]), EDGES)[0]
    return counts
