"""What measurements of several rates of a method share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bits_at(kl: float, bits: Sequence[float], kls: Sequence[float]) -> float:
    """Bits at which a method reaches ``kl``, by log KL between its rates; infinite beyond what was measured."""
    order = np.argsort(kls)
    x, y = np.log(np.asarray(kls, float)[order]), np.asarray(bits, float)[order]
    return float(np.interp(np.log(kl), x, y)) if x[0] <= np.log(kl) <= x[-1] else float("inf")
