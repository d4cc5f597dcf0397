"""What quality is measured on, and in: windows of text, and mean KL on two kinds of them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvcomp.evaluate.fidelity import token_kls
from kvcomp.fit.curves import UNSEEN_KL


@dataclass(frozen=True)
class Window:
    """A prompt's cache and what the model says of the text after it."""

    layers: list[Any]
    text: Tensor
    """int64 (1, tokens)."""
    log_probs: Tensor
    """float32 (tokens, vocabulary)."""
    repeats: bool
    """Whether the text repeats a part of the prompt."""
    positions: Tensor
    """Of the text, int64 (1, tokens)."""


@dataclass(frozen=True)
class Quality:
    """Mean KL in nats a token on text that goes on and on text that repeats."""

    text: float
    repeated: float

    @property
    def mean(self) -> float:
        return (self.text + self.repeated) / 2

    def over(self, other: Quality) -> float:
        """How many times worse than another, on the kind of text where it is most."""
        pairs = (self.text, other.text), (self.repeated, other.repeated)
        return max(max(mine, UNSEEN_KL) / max(theirs, UNSEEN_KL) for mine, theirs in pairs)


def mean_kl(expected: Tensor, found: Tensor) -> float:
    """Mean KL in nats a token between log probabilities (tokens, vocabulary)."""
    return float(token_kls(expected, found).mean().clamp_min(0))


def values_of(layer: Any, kind: int) -> Tensor:
    """K or V of a cache layer, (rows, KV heads, tokens, D)."""
    values: Tensor = layer.values if kind else layer.keys
    return values


def rows_of(windows: Sequence[Window]) -> list[tuple[slice, list[Any]]]:
    """Cache layers that hold several windows, a row each, and which: all of them, or one where a layer has more than K
    and V.

    K and V of the windows are views of them afterwards, so that nothing is held twice.
    """
    if not all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in windows[0].layers):
        return [(slice(number, number + 1), window.layers) for number, window in enumerate(windows)]
    found = []
    for each in zip(*(window.layers for window in windows), strict=True):
        whole = copy(each[0])
        whole.keys, whole.values = (torch.cat([values_of(layer, kind) for layer in each]) for kind in (0, 1))
        for layer, keys, values in zip(each, whole.keys.split(1), whole.values.split(1), strict=True):
            layer.keys, layer.values = keys, values
        found.append(whole)
    return [(slice(None), found)]
