"""TurboQuant-style quantisation (Zandieh et al., arXiv 2504.19874).

A vector is rotated at random, and each coordinate goes to a Lloyd-Max level of a Gaussian. The rotation is drawn from a
seed and not counted; a vector's norm is float16. Every token is coded, there is no window.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvcomp.evaluate.methods.baseline import Baseline, Parts
from kvcomp.evaluate.methods.bits import pack, unpack
from kvcomp.spec import Kind

SEED = 20250428


@lru_cache
def rotation(channels: int) -> Tensor:
    """A random orthogonal matrix, float32 (channels, channels)."""
    drawn = torch.randn(channels, channels, generator=torch.Generator().manual_seed(SEED))
    orthogonal: Tensor = torch.linalg.qr(drawn)[0]
    return orthogonal


@lru_cache
def levels(bits: int) -> Tensor:
    """The 2**bits levels of least squared error for a standard Gaussian, float32 (Lloyd, 1982)."""
    centres = torch.linspace(-2, 2, 2**bits, dtype=torch.float64)
    far = torch.tensor([torch.inf], dtype=torch.float64)
    for _ in range(2000):
        edges = torch.cat([-far, (centres[1:] + centres[:-1]) / 2, far])
        density = torch.exp(-edges.square() / 2) / (2 * torch.pi) ** 0.5
        centres = -density.diff() / torch.special.ndtr(edges).diff()
    return centres.float()


class TurboQuant(Baseline):
    """TurboQuant-style quantisation at some bits a coordinate."""

    def __init__(self, bits: int) -> None:
        self.name, self.bits = f"turboquant-{bits}", bits

    def coded(self, tokens: int, kind: Kind) -> int:
        return tokens

    def encode(self, x: Tensor, kind: Kind) -> Parts:
        norm = x.float().norm(dim=-1, keepdim=True).half()
        unit = x.float() / norm.float().clamp(min=1e-7)
        centres, turn = levels(self.bits).to(x.device), rotation(x.shape[-1]).to(x.device)
        codes = torch.bucketize(unit @ turn * x.shape[-1] ** 0.5, (centres[1:] + centres[:-1]) / 2)
        return {"codes": pack(codes, self.bits), "scales": norm}

    def decode(self, parts: Parts, kind: Kind) -> Tensor:
        codes = unpack(parts["codes"], self.bits).long()
        y = levels(self.bits).to(codes.device)[codes]
        back: Tensor = y @ rotation(y.shape[-1]).to(y.device).T * y.shape[-1] ** -0.5 * parts["scales"].float()
        return back

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "norm": "float16", "rotation_seed": SEED}
