"""Matrix products in the type of their factors."""

from __future__ import annotations

import torch
from torch import Tensor


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y as it is without ``torch.autocast``, which would round float32 factors to 16 bits."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x @ y
    with torch.autocast(kind, enabled=False):
        return x @ y
