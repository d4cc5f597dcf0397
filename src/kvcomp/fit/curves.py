"""Curves of bits and KL over the step of a tensor, the K or V of one head, and which steps they say to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.calibration import CLASSES, MAX_SHIFT
from kvcomp.spec import PAGE_TOKENS

FINER = 8  # steps tried between two of a curve
PRICES = 1e-3, 1e9  # bits a value for a nat
UNSEEN_KL = 1e-9  # less is rounding
FLATTEST = 0.2  # a slope that is less is noise
NEAR = 0.9  # a level whose KL is this part of the wanted one is near enough
LARGEST_CODE = 127
HALVINGS = 20  # of the prices' logarithm

Tensors = tuple[int, int, int]  # layer, K (0) or V (1), head


@dataclass(frozen=True)
class Curve:
    """A tensor coded alone: bits a value and KL at each of some steps, ascending."""

    steps: npt.NDArray[np.float64]
    bits: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]

    def kl_at(self, step: float) -> float:
        """The KL at a step between those of the curve."""
        return float(np.exp(np.interp(np.log(step), np.log(self.steps), np.log(self.kl))))


def allocate(curves: Mapping[Tensors, Curve], price: float) -> dict[Tensors, float]:
    """For each tensor the step of least bits a value + price * KL, between the measured steps too.

    price: bits of the mean value for a nat.
    """
    steps = {}
    for tensor, curve in curves.items():
        place = np.linspace(0, len(curve.steps) - 1, FINER * (len(curve.steps) - 1) + 1)
        at = np.arange(len(curve.steps))
        kl = np.exp(np.interp(place, at, np.log(curve.kl)))
        best = np.argmin(np.interp(place, at, curve.bits) / len(curves) + price * kl)
        steps[tensor] = float(np.exp(np.interp(place[best], at, np.log(curve.steps))))
    return steps


def predicted(curves: Mapping[Tensors, Curve], steps: Mapping[Tensors, float]) -> float:
    """The KL of all tensors at these steps, as if each added its own."""
    return sum(curve.kl_at(steps[tensor]) for tensor, curve in curves.items())


def price_of(curves: Mapping[Tensors, Curve], kl: float) -> float:
    """The lowest price at which the curves predict no more than this KL."""
    low, high = np.log(PRICES)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        good = predicted(curves, allocate(curves, float(np.exp(middle)))) <= kl
        low, high = (low, middle) if good else (middle, high)
    return float(np.exp(high))


def next_price(found: Mapping[float, float]) -> float:
    """The price to try next: where a line in logarithms through two that were tried is good enough.

    The two are one too good and one too bad, or the two nearest if there is no such pair. At high rates KL falls as the
    price grows, so one alone gives a line too.

    found: for each price how many times worse than wanted the model was.
    """
    target = np.log((1 + NEAR) / 2)
    points = sorted((-float(np.log(price)), float(np.log(worse))) for price, worse in found.items())
    good, bad = [one for one in points if one[1] <= target], [one for one in points if one[1] > target]
    if good and bad:
        (low, less), (high, more) = good[-1], bad[0]
        return float(np.exp(-(low + (high - low) * (target - less) / (more - less))))
    (at, worse), *others = reversed(good) if good else bad
    slope = (others[0][1] - worse) / (others[0][0] - at) if others else 1.0
    return float(np.exp(np.clip(-at - (target - worse) / max(slope, FLATTEST), *np.log(PRICES))))


def shifts_of(reach: Tensor, step: Tensor | float) -> Tensor:
    """How many times the step of a coordinate must be doubled for its codes to have 8 bits."""
    return (reach / (LARGEST_CODE * step)).log2().ceil().clamp(0, MAX_SHIFT)


def entropy_bits(codes: Tensor, kind: int) -> float:
    """Bits a value that pairs of codes (windows, tokens, D) need.

    None where all codes are the same, else at least half a bit; 16 where a code fits no byte.
    """
    pairs = codes.unflatten(1, (-1, 2)).transpose(1, 2) if kind else codes.unflatten(2, (-1, 2)).permute(0, 3, 1, 2)
    a, b = pairs[:, 0], pairs[:, 1]  # V: (windows, token pairs, D); K: (windows, tokens, D/2)
    total = 0.0
    for of_class in range(CLASSES):
        width = a.shape[-1] // CLASSES
        part = slice(of_class * width, (of_class + 1) * width)
        symbol = ((a[..., part].clamp(-127, 127) + 127) * 255 + b[..., part].clamp(-127, 127) + 127).long().flatten()
        share = torch.bincount(symbol).double() / symbol.numel()
        share = share[share > 0]
        if len(share) > 1:
            total += max(1.0, float(-(share * share.log2()).sum())) / 2
    raw = codes.unflatten(1, (-1, PAGE_TOKENS)).abs().amax((2, 3)) > 127
    share_raw = float(raw.double().mean())
    return (1 - share_raw) * total / CLASSES + share_raw * 16
