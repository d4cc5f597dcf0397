"""Calibrations of synthetic K and V, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcomp.calibration import CLASSES, About, Calibration, LevelOfLayer, quantise_matrix
from kvcomp.calibration.rotary import Rotation
from kvcomp.calibration.transform import Affine, Transform, metric_klt
from kvcomp.fit.codebooks import fit_books
from kvcomp.kernels import Books, load_backend

STEPS = {"near-lossless": 0.1, "balanced": 0.5, "aggressive": 1.5}  # over the root mean square of K' and V'


def like_keys(batch: int, heads: int, tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Correlated values with a mean, float32 (batch, heads, tokens, channels); the correlations are the same for every
    seed.
    """
    fixed = torch.Generator().manual_seed(1234)
    mix = torch.randn(heads, channels, channels, generator=fixed) * torch.logspace(0.5, -1, channels)
    mean = 2 * torch.randn(heads, 1, channels, generator=fixed)
    noise = torch.randn(batch, heads, tokens, channels, generator=torch.Generator().manual_seed(seed))
    return noise @ mix.mT + mean


def calibrated(
    layers: int = 1,
    heads: int = 2,
    channels: int = 32,
    model: Mapping[str, Any] | None = None,
    centred: bool = True,
    sample: tuple[Tensor, Tensor] | None = None,
    rotation: Rotation | None = None,
    only: Sequence[int] | None = None,
) -> Calibration:
    """A calibration whose layers are all alike, fitted to ``like_keys`` or ``sample``, K and V.

    rotation: how the keys are turned. only: the layers that it has; all if None.
    """
    places = torch.arange(1024)
    kv = sample or (like_keys(1, heads, 1024, channels, 1), like_keys(1, heads, 1024, channels, 2).flip(-1))
    affines = []
    for index, x in enumerate(kv):
        mean = x[0].mean(1) if centred or index else torch.zeros(heads, channels)
        turn = None if index else rotation
        moved = (x[0] - mean[:, None]).double()
        moved = moved if turn is None else turn.turned(moved, places)
        covariance = moved.mT @ moved / moved.shape[1]
        metric = torch.diag_embed(torch.linspace(0.5, 2, channels, dtype=torch.float64)).expand(heads, -1, -1)
        matrix = torch.stack([metric_klt(c, m) for c, m in zip(covariance, metric, strict=True)])
        affines.append(Affine.of(quantise_matrix(matrix), mean, turn))
    levels: dict[str, LevelOfLayer] = {}
    for level, factor in STEPS.items():
        books: list[Books] = []
        steps = []
        for kind, (affine, x) in enumerate(zip(affines, kv, strict=True)):
            given = x if affine.rotation is None else affine.rotation.turned(x, places)
            moved = affine.apply(given, places)[0]
            steps.append(tuple(float(s) for s in factor * moved.square().mean((1, 2)).sqrt()))
            coded = load_backend("cpu").quantise(moved.numpy(), "head", steps[-1])
            books.append(fit_books(coded.codes.reshape(-1, 64, CLASSES, channels // CLASSES), kind))
        levels[level] = LevelOfLayer((steps[0], steps[1]), (books[0], books[1]))
    key, value = affines
    about = About(model or {"model_type": "none"}, layers, {level: {"kl": 0.0} for level in levels}, {"text": "none"})
    there = range(layers) if only is None else only
    return Calibration.build(about, dict.fromkeys(there, Transform(key, value)), dict.fromkeys(there, levels))
