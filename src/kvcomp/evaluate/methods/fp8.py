"""8-bit floating point (E4M3) with scale 1 for every token: how inference engines hold a cache without calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.evaluate.methods.baseline import Baseline, Parts
from kvcomp.spec import Kind

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Fp8(Baseline):
    name = "fp8"

    def coded(self, tokens: int, kind: Kind) -> int:
        return tokens

    def encode(self, x: Tensor, kind: Kind) -> Parts:
        return {"codes": x.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)}

    def decode(self, parts: Parts, kind: Kind) -> Tensor:
        return parts["codes"].float()
