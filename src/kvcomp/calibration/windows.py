"""What codes the layers that a calibration lacks: sliding windows, by a plain spec that belongs to each level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvcomp.spec import Coding, TensorSpec, WindowSpec


class Scales(NamedTuple):
    """Of windows at a level."""

    key: float
    """Relative scale of K, a channel each."""
    value: float
    """Relative scale of V, a token each."""
    bits: float
    """Bits to expect of a value in a page with Huffman codes, for plans: those of Gemma 3 270M."""


SCALES: Mapping[str, Scales] = {
    "near-lossless": Scales(0.02, 0.05, 5.0),
    "balanced": Scales(0.04, 0.1, 4.0),
    "aggressive": Scales(0.12, 0.2, 2.8),
}
FINEST = SCALES["near-lossless"]


def window_bits(level: str) -> float:
    """Bits to expect of a value of a window's pages at a level."""
    return SCALES.get(level, FINEST).bits


def window_spec(layers: Sequence[int], level: str, coding: Coding) -> WindowSpec | None:
    """How these layers are coded at a level, one of an unknown name as at the finest; None if there are none."""
    scales = SCALES.get(level, FINEST)
    key, value = TensorSpec("channel", scales.key, coding), TensorSpec("token", scales.value, coding)
    return WindowSpec(tuple(layers), key, value) if layers else None
