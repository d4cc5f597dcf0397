"""Tensors as NumPy arrays and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.codec.dtypes import DTYPES

TYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
NAMES = {dtype: name for name, dtype in TYPES.items()}


def as_array(x: Tensor) -> npt.NDArray[Any]:
    """A numpy view of a CPU tensor; bfloat16 as its bits in uint16."""
    x = x.detach()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def as_tensor(x: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
    """An array as a tensor, without a copy."""
    return torch.from_numpy(x.view(np.int16)).view(dtype) if dtype == torch.bfloat16 else torch.from_numpy(x)


def to_pinned(content: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array in pinned memory, from which ``.to(device, non_blocking=True)`` copies. Nobody else may change it."""
    host = torch.from_numpy(content)
    return host.pin_memory() if device.type == "cuda" else host
