"""Means that turn: what rotary positions (RoPE, arXiv 2104.09864) make of the mean that K has before them.

A model turns pairs of channels of K by w t, for a token at the place t. So the mean m of K before that is R(t) m after
it, whatever the text. Without it there is less to code, and nothing in the slow pairs that holds for short texts only.
In exchange scores lack q.R(t) m, which is, for the pair (c, d) of channels,

    (q_c m_c + q_d m_d) cos w t + (q_d m_c - q_c m_d) sin w t  =  Re z exp(i w t)

with z = (q_c m_c + q_d m_d) - i (q_d m_c - q_c m_d). As pairs of floats that is a product of z with the waves of the
place, which are the same for all heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.errors import InvalidInput
from kvcomp.spec import PAGE_TOKENS

FASTEST = np.pi  # radians a token
FEW = 64  # places of a step


@dataclass(frozen=True)
class Rotation:
    """Pairs of channels that turn as tokens go on, and how fast."""

    first: tuple[int, ...]
    """A channel of each pair."""
    second: tuple[int, ...]
    """The other one."""
    speed: tuple[float, ...]
    """Radians a token."""

    @classmethod
    def of(cls, pairs: npt.NDArray[np.integer], speed: npt.NDArray[np.floating], channels: int) -> Rotation:
        """Make one from channels (pairs, 2) and radians a token (pairs,).

        Raises
        ------
        InvalidInput
            If a channel is none of a head's, or in two pairs, or a speed is out of range.
        """
        places = pairs.ravel()
        if pairs.ndim != 2 or pairs.shape[1] != 2 or speed.shape != pairs.shape[:1] or not len(pairs):
            raise InvalidInput(f"a rotation of channels {pairs.shape} and speeds {speed.shape} turns no pairs")
        if places.min() < 0 or places.max() >= channels or len(np.unique(places)) < places.size:
            raise InvalidInput(f"a rotation has channels twice, or others than 0 to {channels - 1}")
        if not (np.abs(speed) <= FASTEST).all():
            raise InvalidInput(f"a rotation has speeds beyond {FASTEST:.2f} radians a token")
        return cls(tuple(pairs[:, 0].tolist()), tuple(pairs[:, 1].tolist()), tuple(map(float, speed)))

    @cached_property
    def _both(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.first), torch.tensor(self.second)

    def still(self, x: Tensor) -> Tensor:
        """x (.., D) with zeros for the pairs that turn."""
        first, second = self._both
        return x.index_fill(-1, torch.cat([first, second]).to(x.device), 0.0)

    def turned(self, x: Tensor, places: Tensor) -> Tensor:
        """x as it is at each place.

        Parameters
        ----------
        x
            (KV heads, D), or (.., KV heads, tokens, D) with a vector for each token.
        places
            int64 (.., tokens), of either sign.

        Returns
        -------
        Tensor
            (.., KV heads, tokens, D) in x's dtype.
        """
        first, second = (which.to(x.device) for which in self._both)
        cos, sin = _cos_sin(self.speed, places.to(x.device))
        cos, sin = (of.to(x.device, x.dtype)[..., None, :, :] for of in (cos, sin))
        each = x[:, None] if x.ndim == 2 else x
        c, d = each[..., first], each[..., second]
        found = each.expand(*torch.broadcast_shapes(each.shape[:-1], cos.shape[:-1]), each.shape[-1]).clone()
        found[..., first], found[..., second] = c * cos - d * sin, d * cos + c * sin
        return found

    def folded(self, mean: Tensor) -> Tensor:
        """F with q F = z as pairs of floats: mean (KV heads, D) -> (KV heads, D, 2 pairs)."""
        first, second = (which.to(mean.device) for which in self._both)
        m_c, m_d = mean[:, first], mean[:, second]
        found = mean.new_zeros((*mean.shape, len(first), 2))
        pair = torch.arange(len(first), device=mean.device)
        found[:, first, pair, 0], found[:, second, pair, 0] = m_c, m_d
        found[:, first, pair, 1], found[:, second, pair, 1] = m_d, -m_c
        return found.flatten(2)

    def waves(self, places: Tensor) -> Tensor:
        """W with R(t) m = still + F W and q.(F W) = z W: int64 (.., tokens) -> float32 (.., tokens, 2 pairs)."""
        if places.numel() > FEW:
            return self.waves_on_device(places)
        found = _of_places(self.speed, tuple(places.flatten().tolist()), places.device)
        return found.view(*places.shape, -1)

    def first_waves(self, device: torch.device) -> Tensor:
        """``waves`` of the places 0 to 63, those of a page, float32 (64, 2 pairs)."""
        return _first_waves(self.speed, device)

    def waves_on_device(self, places: Tensor) -> Tensor:
        """``waves`` of places that the host need not know."""
        cos, sin = _cos_sin(self.speed, places)
        return torch.stack([cos, -sin], -1).flatten(-2).to(torch.float32)

    def ahead(self, z: Tensor, places: Tensor) -> Tensor:
        """z exp(i w t), whose products with ``waves`` of a place p are those of z with waves of t + p.

        z: (batch, heads, queries, 2 pairs). places: whole numbers (batch, t). Returns (.., queries, t, 2 pairs).
        """
        cos, sin = (of.to(torch.float32)[:, None, None] for of in _cos_sin(self.speed, places))
        real, imaginary = z[..., None, 0::2], z[..., None, 1::2]
        return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2)


def _cos_sin(speed: tuple[float, ...], places: Tensor) -> tuple[Tensor, Tensor]:
    """cos w t and sin w t, float64 (.., tokens, pairs)."""
    angle = places[..., None].double() * _speeds(speed, places.device)
    return angle.cos(), angle.sin()


@lru_cache(maxsize=256)
def _first_waves(speed: tuple[float, ...], device: torch.device) -> Tensor:
    return _of_places(speed, tuple(range(PAGE_TOKENS)), device)


@lru_cache(maxsize=256)
def _speeds(speed: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(speed, dtype=torch.float64, device=device)


@lru_cache(maxsize=64)
def _of_places(speed: tuple[float, ...], places: tuple[int, ...], device: torch.device) -> Tensor:
    """The same of the few places of a step, for which calls of torch take longer than the numbers."""
    angle = np.multiply.outer(np.array(places, np.float64), np.array(speed))
    found = np.stack([np.cos(angle), -np.sin(angle)], -1).astype(np.float32)
    return torch.from_numpy(found.reshape(len(places), -1)).to(device)
