"""Codes of some bits each, in bytes without gaps."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.errors import InvalidInput


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2**bits, (..., n), as uint8 (..., n * bits / 8). Raises InvalidInput if these are no whole bytes."""
    if codes.shape[-1] * bits % 8:
        raise InvalidInput(f"{codes.shape[-1]} codes of {bits} bits do not fill whole bytes")
    ones = (codes.to(torch.uint8).unsqueeze(-1) >> _places(bits, codes)) & 1
    octets = ones.flatten(-2).unflatten(-1, (-1, 8))
    packed: Tensor = (octets << _places(8, codes)).sum(-1, dtype=torch.uint8)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes, uint8 (..., n), of what ``pack`` returned."""
    ones = (packed.unsqueeze(-1) >> _places(8, packed)) & 1
    digits = ones.flatten(-2).unflatten(-1, (-1, bits))
    codes: Tensor = (digits << _places(bits, packed)).sum(-1, dtype=torch.uint8)
    return codes


def _places(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)
