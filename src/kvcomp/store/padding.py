"""Heads of a size that no kernel takes, held with channels of zeros behind their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.codec.block import held_channels


@dataclass(frozen=True)
class Widen:
    """Zeros behind the channels of K or of V."""

    channels: int
    """As the model has them."""

    @property
    def held(self) -> int:
        """As they are held."""
        return held_channels(self.channels)

    def apply(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """(.., channels) -> (.., held), whatever the places of tokens."""
        return torch.nn.functional.pad(x.detach(), (0, self.held - self.channels))

    def undo(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """Undo ``apply``; contiguous."""
        return x[..., : self.channels].contiguous()


@dataclass(frozen=True)
class Padding:
    """What K and V pass before they are held, with the interface of a calibration's ``Transform``."""

    key: Widen
    value: Widen

    def queries(self, q: Tensor) -> Tensor:
        """q (batch, heads, queries, channels of K) in float32, whose products with the padded K are those with K."""
        return self.key.apply(q).to(torch.float32)

    def turning(self, q: Tensor) -> None:
        """Nothing: zeros take nothing from scores."""

    def outputs(self, out: Tensor) -> Tensor:
        """sum w V (batch, heads, queries, held channels of V) -> without the zeros."""
        return self.value.undo(out)


def padding(channels: tuple[int, int]) -> Padding | None:
    """The padding of heads with so many channels of K and of V; None where they need none.

    Raises InvalidInput for sizes that cannot be held.
    """
    key, value = (Widen(width) for width in channels)
    return None if (key.held, value.held) == channels else Padding(key, value)
