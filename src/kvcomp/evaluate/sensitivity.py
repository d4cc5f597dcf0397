"""What a method does to K and V themselves: errors by layer and head, and which of them the predictions suffer from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvcomp.evaluate.fidelity import Sample, compare, fill, predict_from
from kvcomp.evaluate.gradients import Gradients, label_gradients
from kvcomp.evaluate.methods import KVComp, Method, Pair
from kvcomp.spec import KINDS, Kind
from kvcomp.store.pages import bits_by_head, error_shares
from kvcomp.store.pages import compare as compare_with_bound

EDGES = np.linspace(-1, 1, 41)
LABELS = 4  # backward passes
MEASURED = 6  # heads whose KL is measured, the others' is expected to be less
OUTLIER = 10.0  # a channel this many times the median makes the others coarse
HEAVY = 5.0  # a head is called sensitive if errors count this many times as much as in the median one


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
            shares[kind] += _histogram((error[error != 0] / rms).cpu().numpy())
    found: dict[str, Any] = {"heads": heads, "largest_over_bound": None}
    if stores:
        given = {layer: (each.cache[layer][0].cpu(), each.cache[layer][1].cpu()) for layer in stores}
        for layer, store in stores.items():
            for kind, share in error_shares(store, *given[layer]):
                shares[kind] += _histogram(share)
        total = [compare_with_bound(store, *given[layer]) for layer, store in stores.items()]
        found["largest_over_bound"] = max(one.worst for one in total)
        found["missed"] = sum(one.missed for one in total)
        found["values"] = sum(one.values for one in total)
    over = "bound" if stores else "rms"
    found["histogram"] = {
        kind: {"edges": EDGES.tolist(), "counts": counts.tolist(), "over": over} for kind, counts in shares.items()
    }
    return found


@dataclass(frozen=True)
class Probed:
    """A sample, and how its predictions follow from each K and V."""

    sample: Sample
    gradients: list[Gradients]
    """For each drawn label."""


def probe(model: Any, each: Sample) -> Probed:
    """Find the gradients of a sample, once for all methods."""
    layers = []
    for k, v in each.cache:
        layers.append(DynamicLayer())
        layers[-1].update(k, v)
    gradients = label_gradients(model, layers, each.text, range(len(layers)), LABELS, seed=0)
    return Probed(each, list(gradients))


@torch.no_grad()
def sensitivity(model: Any, probed: Probed, method: Method) -> list[dict[str, Any]]:
    """The heads from which the predictions suffer most, as ``suffering`` in ``results``.

    Gradients say which heads may be among them, at a cost that does not grow with their number. The KL with one of them
    coded alone is then measured.
    """
    each = probed.sample
    values = method.values(fill(model, each, method))
    heads = [_Head(*one, _shares_scales(method, one[1])) for one in _by_head(each.cache, values)]
    heads = [head for head in heads if head.error > 0]
    expected = [head.expected_kl(probed) for head in heads]
    weights = np.array([kl / head.error for kl, head in zip(expected, heads, strict=True)])
    found = []
    for place in np.argsort(expected)[::-1][:MEASURED].tolist():
        head = heads[place]
        weight = weights[place] / max(float(np.median(weights)), np.finfo(np.float64).tiny)
        kl = _kl_alone(model, each, head)
        found.append({"layer": head.layer, "kind": head.kind, "head": head.head, "kl": kl, "why": head.why(weight)})
    return sorted(found, key=lambda one: -one["kl"])


@dataclass(frozen=True)
class _Head:
    layer: int
    kind: Kind
    head: int
    before: Tensor
    """float32 (1, tokens, D)."""
    after: Tensor
    shared: bool
    """Whether the channels share a scale, so that a large one makes the others coarse."""

    @property
    def error(self) -> float:
        """Mean squared error over the mean square of the values."""
        return float((self.after - self.before).square().mean() / self.before.square().mean().clamp_min(1e-30))

    @property
    def outlier(self) -> float:
        """The largest channel over the median one, both as root mean squares."""
        sizes = self.before.square().mean((0, 1)).sqrt()
        return float(sizes.max() / sizes.median().clamp_min(1e-30))

    def expected_kl(self, probed: Probed) -> float:
        """1/2 E[(g.e)^2] a token of the text."""
        error = self.after - self.before
        key = self.layer, KINDS.index(self.kind)
        products = [float((of_label[key][:, self.head] * error).sum()) for of_label in probed.gradients]
        return float(np.mean(np.square(products))) / (2 * probed.sample.text.shape[1])

    def why(self, weight: float) -> str:
        """A likely reason and its remedy. weight: how much a relative error matters, over the median of all heads."""
        if self.shared and self.outlier >= OUTLIER:
            return (
                f"one channel is {self.outlier:.0f} times the median and shares its scale with the others: the unit "
                "channel, as the preset kvcomp has it for K, or a calibration codes them finer"
            )
        if weight >= HEAVY:
            return f"errors count {weight:.0f} times as much as in the median head: tune or calibrate for smaller steps"
        return f"its values are off by {100 * self.error**0.5:.1f} %: a smaller scale helps"


def _shares_scales(method: Method, kind: Kind) -> bool:
    """Whether the spec gives the channels of a head one scale; of a method without a spec nothing is known."""
    if not isinstance(method, KVComp):
        return False
    tensor = method.spec.key if kind == "K" else method.spec.value
    return tensor.unit in ("block", "token", "vector")


def _kl_alone(model: Any, each: Sample, head: _Head) -> float:
    """The KL with one head's K or V coded."""
    mixed: list[Pair] = list(each.cache)
    pair = list(each.cache[head.layer])
    part = KINDS.index(head.kind)
    pair[part] = pair[part].clone()
    pair[part][:, head.head] = head.after.to(pair[part].dtype)
    mixed[head.layer] = (pair[0], pair[1])
    return compare(each, predict_from(model, each, mixed)).kl


def _by_head(before: Sequence[Pair], after: Sequence[Pair]) -> Iterator[tuple[int, Kind, int, Tensor, Tensor]]:
    for layer, (pair, back) in enumerate(zip(before, after, strict=True)):
        for kind, x, y in zip(KINDS, pair, back, strict=True):
            for head in range(x.shape[1]):
                yield layer, kind, head, x[:, head].float(), y[:, head].float()


def _histogram(x: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Counts between EDGES; what lies beyond counts in the outermost."""
    counts: np.ndarray[Any, np.dtype[np.int64]] = np.histogram(np.clip(x, EDGES[0], EDGES[-1]), EDGES)[0]
    return counts
