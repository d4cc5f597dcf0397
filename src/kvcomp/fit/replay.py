"""Passes of a model that begin at one of its layers: those before it give what they gave the first time.

With the K or V of one layer coded, all layers before it see what they saw without. On average half of a pass is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Replay:
    """What each decoder layer of a model gives in one pass.

    Parameters
    ----------
    model
        A transformers model.
    layers
        Layers of its cache. Where its decoder layers are not found, or do more than hand on what they give, nothing is
        replayed.
    predict
        The pass: what it returns is compared with a replayed one.
    """

    def __init__(self, model: nn.Module, layers: int, predict: Callable[[], Tensor]) -> None:
        self.decoder = decoder_layers(model, layers)
        self.outputs: list[Any] = []
        if not self.decoder:
            return
        hooks = [one.register_forward_hook(lambda *given: self.outputs.append(given[2])) for one in self.decoder]
        try:
            expected = predict()
        finally:
            for hook in hooks:
                hook.remove()
        try:
            with self.up_to(layers - 1):
                same = torch.equal(predict(), expected)
        except Exception:  # noqa: BLE001 - a layer may miss anything that others leave for it
            same = False
        if not same:
            self.decoder = []

    @contextmanager
    def up_to(self, index: int) -> Iterator[None]:
        """Within, decoder layers before this one compute nothing."""
        replayed = self.decoder[:index]
        for one, output in zip(replayed, self.outputs, strict=False):
            one.forward = lambda *_, output=output, **__: output
        try:
            yield
        finally:
            for one in replayed:
                del one.forward


def decoder_layers(model: nn.Module, layers: int) -> list[nn.Module]:
    """A model's decoder layers, one for each layer of its cache; none if there is no such list, or others replaced what
    its layers do.
    """
    for found in model.modules():
        if isinstance(found, nn.ModuleList) and len(found) == layers and all(map(_has_number, found, range(layers))):
            return [] if any("forward" in vars(layer) for layer in found) else list(found)
    return []


def _has_number(layer: nn.Module, number: int) -> bool:
    return any(getattr(part, "layer_idx", None) == number for part in layer.modules())
