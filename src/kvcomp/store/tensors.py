"""Tensors as NumPy arrays and back, without a copy."""

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
