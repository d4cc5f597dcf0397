"""Folding: what attention does to queries and outputs where K and V are held in other coordinates.

With the transforms of ``kvcomp.calibration.transform``, for each KV head:

- scores are q.K' with q' = q Q, plus a part that turns with the place t of a token: the real part of the sum over pairs
  of z exp(i w t), where z = q T;
- outputs are (sum w V') O + mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Folding:
    """Matrices of the KV heads, float32 and contiguous."""

    queries: npt.NDArray[np.float32]
    """Q, (KV heads, channels of K, channels of K as held)."""
    turning: npt.NDArray[np.float32]
    """T, (KV heads, channels of K, 2 pairs): real parts, then imaginary ones. No pairs where nothing turns."""
    speed: tuple[float, ...]
    """w of the pairs, radians a token."""
    outputs: npt.NDArray[np.float32]
    """O, (KV heads, channels of V as held, channels of V)."""
    mean: npt.NDArray[np.float32]
    """(KV heads, channels of V)."""

    def turned(self, q: Floats, tokens: int) -> Floats:
        """The part of scores that turns, float64: q (rows, KV heads, queries, channels) -> (.., queries, tokens)."""
        z = np.einsum("rhqc,hcp->rhqp", q.astype(np.float64), self.turning)
        waves = np.exp(1j * np.multiply.outer(np.array(self.speed), np.arange(tokens)))
        found: Floats = ((z[..., : len(self.speed)] + 1j * z[..., len(self.speed) :]) @ waves).real
        return found
