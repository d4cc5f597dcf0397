"""Windows of text in a model's caches, and what the model says of each with other K and V of its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from kvcomp.calibration.transform import Affine
from kvcomp.evaluate.fidelity import token_kls
from kvcomp.evaluate.methods.kivi import Kivi
from kvcomp.fit.replay import Replay
from kvcomp.fit.statistics import Statistics, observe
from kvcomp.fit.windows import Drawn, Settings, Tell, TextKind, coded_part
from kvcomp.spec import KINDS

Values = Mapping[tuple[int, int], Tensor]
"""By layer and K (0) or V (1): (windows, KV heads, coded tokens, D)."""


@dataclass(frozen=True)
class Window:
    """A prompt's cache and what the model says of the text after it."""

    layers: list[Any]
    text: Tensor
    """int64 (1, tokens)."""
    log_probs: Tensor
    """float32 (tokens, vocabulary)."""
    kind: TextKind
    positions: Tensor
    """Of the text, int64 (1, tokens)."""


class Reading:
    """Windows that a model has read.

    Parameters
    ----------
    model
        In float32.
    settings
        Tokens of each window.
    rotary
        Whether the model is told where tokens stand.

    Raises
    ------
    InvalidInput
        If windows are too short to measure on.
    """

    def __init__(self, model: Any, settings: Settings, rotary: bool) -> None:
        self.model, self.settings, self.rotary = model, settings, rotary
        self.coded = coded_part(settings)
        self.windows: list[Window] = []
        self.coordinates: dict[tuple[int, int], Tensor] = {}
        self._replays: dict[tuple[int, int], Replay] = {}

    def read(self, drawn: Sequence[Drawn], places: Sequence[Tensor], statistics: Statistics | None, tell: Tell) -> None:
        """Read windows at these places, int64 (1, length) each, and add to the statistics if there are some."""
        prompt = self.settings.prompt
        for done, (one, positions) in enumerate(zip(drawn, places, strict=True)):
            tell("reading", done, len(drawn))
            ids = one.ids.to(self.model.device)
            before, after = self.told(positions[:, :prompt]), positions[:, prompt:]
            if statistics is None:
                cache = DynamicCache(config=self.model.config)
                self.model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1, **before)
            else:
                cache = observe(self.model, ids[:, :prompt], self.settings.sinks, statistics, before)
            layers = list(cache.layers)
            (log_probs,) = self._predict(layers, ids[:, prompt:], after)
            self.windows.append(Window(layers, ids[:, prompt:], log_probs, one.kind, after))
        if self.windows:
            self._rows = rows_of(self.windows)
            self.places = torch.cat(list(places))[:, self.coded]

    def values(self, index: int, kind: int) -> Tensor:
        """K or V of a layer's coded tokens, (windows, KV heads, tokens, D)."""
        return torch.cat([values_of(window.layers[index], kind)[:, :, self.coded] for window in self.windows])

    def transform(self, index: int, kind: int, affine: Affine) -> None:
        """Find the coordinates of a layer's K or V."""
        if self.windows:
            self.coordinates[index, kind] = affine.apply(self.values(index, kind), self.places)

    def rounded(self, method: Kivi, index: int, kind: int) -> Tensor:
        """The coded tokens of a layer's K (0) or V (1), as this method gives them back."""
        name = KINDS[kind]
        raw = (values_of(window.layers[index], kind)[:, :, self.coded] for window in self.windows)
        return torch.cat([method.decode(method.encode(x, name), name) for x in raw])

    def told(self, positions: Tensor) -> dict[str, Tensor]:
        """What to tell the model of where tokens stand."""
        return {"position_ids": positions} if self.rotary else {}

    def _predict(self, layers: Sequence[Any], text: Tensor, positions: Tensor) -> Tensor:
        """Log probabilities (rows, tokens, vocabulary) of texts after these cache layers, which stay as they are."""
        cache = Cache(layers=[copy(x) if type(x) is DynamicLayer else deepcopy(x) for x in layers])
        logits: Tensor = self.model(text, past_key_values=cache, **self.told(positions)).logits
        return logits.float().log_softmax(-1)

    def kls(self, coded: Values) -> list[tuple[TextKind, float]]:
        """Kind and KL of each window with these values in place of the K (0) or V (1) of layers."""
        found = []
        for number, window in enumerate(self.windows):
            layers = [copy(layer) for layer in window.layers]
            for (index, kind), values in coded.items():
                _replace(layers[index], kind, self.coded, values[number])
            (log_probs,) = self._predict(layers, window.text, window.positions)
            found.append((window.kind, mean_kl(window.log_probs, log_probs)))
        return found

    def kls_together(self, index: int, kind: int, values: Tensor, tokens: int) -> list[float]:
        """KL of each window's first tokens with these values of one layer, all windows in one pass if they can be."""
        kls = []
        for number, (rows, together) in enumerate(self._rows):
            windows = self.windows[rows]
            text, positions = (
                torch.cat([getattr(x, name) for x in windows])[:, :tokens] for name in ("text", "positions")
            )
            if (number, tokens) not in self._replays:
                whole = partial(self._predict, together, text, positions)
                self._replays[number, tokens] = Replay(self.model, len(together), whole)
            layers = [copy(layer) for layer in together]
            _replace(layers[index], kind, self.coded, values[rows])
            with self._replays[number, tokens].up_to(index):
                found = self._predict(layers, text, positions)
            kls += [mean_kl(x.log_probs[:tokens], of) for x, of in zip(windows, found, strict=True)]
        return kls


def mean_kl(expected: Tensor, found: Tensor) -> float:
    """Mean KL in nats a token between log probabilities (tokens, vocabulary)."""
    return float(token_kls(expected, found).mean().clamp_min(0))


def values_of(layer: Any, kind: int) -> Tensor:
    """K or V of a cache layer, (rows, KV heads, tokens, D)."""
    values: Tensor = layer.values if kind else layer.keys
    return values


def _replace(layer: Any, kind: int, tokens: slice, values: Tensor) -> None:
    """Give a copy of a cache layer these values of K or V."""
    whole = values_of(layer, kind).clone()
    whole[:, :, tokens] = values
    setattr(layer, "values" if kind else "keys", whole)


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
