"""Which channels of K turn with a token's place, and how fast: measured on the model, as configurations name it in many
ways (scaled, partial, interleaved, another base in some layers).

The same few tokens are read at two places. K of a pair of channels, as a complex number, differs by exp(i w n). The
angle at n = 1 says w nearly, and larger n say it ever better.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

from kvcomp.calibration.rotary import Rotation
from kvcomp.evaluate.fidelity import attend_plainly

SAMPLE = 64  # tokens read
OFFSETS = (1, 16, 256, 4096)
LARGEST_REST = 1e-4  # of the squares of a pair, if it really turns so
LEAST_TURN = 0.05  # radians over the whole context; less stays
WORTH = 0.1  # squared mean over the variance of a pair: a mean less than that is not worth its part of a product

Pairs = npt.NDArray[np.int64]


@torch.no_grad()
def rotations(model: Any, ids: Tensor, layers: list[int], context: int) -> dict[int, Rotation]:
    """How K of each layer turns; nothing of a layer where it does not, or in another way.

    Parameters
    ----------
    model
        Of transformers, with rotary positions.
    ids
        int64 (1, tokens).
    layers
        Numbers of the layers.
    context
        Places that the model is used at.
    """
    attend_plainly(model)
    offsets = [offset for offset in OFFSETS if offset + SAMPLE <= context]
    ids = ids[:, :SAMPLE].to(model.device)

    def keys(first: int) -> dict[int, Tensor]:
        cache = DynamicCache(config=model.config)
        places = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
        model(ids, past_key_values=cache, position_ids=places, logits_to_keep=1)
        held: list[Any] = list(cache.layers)
        return {index: held[index].keys[0].double().cpu() for index in layers}

    here, there = keys(0), [keys(offset) for offset in offsets]
    found = {}
    for index in layers:
        turn = _rotation(here[index], [of[index] for of in there], offsets, context)
        if turn is not None:
            found[index] = turn
    return found


def worth_it(rotation: Rotation, mean: Tensor, variance: Tensor) -> Rotation | None:
    """The pairs of which a head has a large mean; None if there is none. mean, variance: squares, (KV heads, D)."""
    pairs = np.array([rotation.first, rotation.second]).T
    ratio = mean[:, pairs].sum(-1) / variance[:, pairs].sum(-1).clamp_min(torch.finfo(variance.dtype).tiny)
    large = (ratio.amax(0) >= WORTH).cpu().numpy()
    return Rotation.of(pairs[large], np.array(rotation.speed)[large], mean.shape[1]) if large.any() else None


def _rotation(here: Tensor, there: list[Tensor], offsets: list[int], context: int) -> Rotation | None:
    """The rotation that brings K (KV heads, tokens, D) to what it is at the other places."""
    channels = here.shape[2]
    for pairs in _layouts(channels):
        before = torch.complex(here[..., pairs[:, 0]], here[..., pairs[:, 1]])
        speed, rest = np.zeros(len(pairs)), torch.ones(len(pairs))
        size = before.abs().square().sum((0, 1)).clamp_min(torch.finfo(torch.float64).tiny)
        for offset, k in zip(offsets, there, strict=True):
            after = torch.complex(k[..., pairs[:, 0]], k[..., pairs[:, 1]])
            angle = (after * before.conj()).sum((0, 1)).angle().numpy()
            speed += np.angle(np.exp(1j * (angle - speed * offset))) / offset
            turned = before * torch.from_numpy(np.exp(1j * speed * offset))
            rest = (after - turned).abs().square().sum((0, 1)) / size
        others = np.setdiff1d(np.arange(channels), pairs)
        moved = (there[-1] - here)[..., others].square().sum() > LARGEST_REST * here[..., others].square().sum()
        if bool((rest < LARGEST_REST).all()) and not moved:
            moving = np.abs(speed) * context >= LEAST_TURN
            return Rotation.of(pairs[moving], speed[moving], channels) if moving.any() else None
    return None


def _layouts(channels: int) -> Iterator[Pairs]:
    """Pairs as models have them: the halves of a head, neighbours, the halves of its first part."""

    def halves(turning: int) -> Pairs:
        return np.stack([np.arange(turning // 2), np.arange(turning // 2, turning)], 1)

    yield halves(channels)
    yield np.arange(channels).reshape(-1, 2)
    yield from (halves(turning) for turning in range(channels - 2, 0, -2))
