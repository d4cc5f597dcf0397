"""KIVI-style quantisation (Liu et al., arXiv 2402.02750): asymmetric, K along tokens, V along channels.

Of K whole groups of 128 tokens are coded, so 0 to 127 stay raw; of V the newest 128 tokens stay raw.
Scale and zero are float16. Which tokens are raw moves quality as much as the code does, so it can also leave those raw
that kvcomp leaves: the first, and a window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcomp.errors import UnsupportedModel
from kvcomp.evaluate.methods.baseline import Baseline, Parts
from kvcomp.evaluate.methods.bits import pack, unpack
from kvcomp.spec import PAGE_TOKENS, CodecSpec, Kind

GROUP, RESIDUAL = 32, 128


class Kivi(Baseline):
    """KIVI-style quantisation at some bits a code.

    Parameters
    ----------
    bits
        Of a code.
    group
        Channels of V that share a scale and a zero; a divisor of head_dim. Of K always 32 tokens share them.
    raw
        The spec whose sinks and window stay raw; as published without one.
    """

    def __init__(self, bits: int, group: int = GROUP, raw: CodecSpec | None = None) -> None:
        self.name = f"kivi-{bits}" + ("-same-raw" if raw else "")
        self.bits, self.group, self.raw = bits, group, raw

    def coded(self, tokens: int, kind: Kind) -> int:
        if self.raw is not None:
            pages = (tokens - self.raw.sinks - self.raw.window) // PAGE_TOKENS
            return self.raw.sinks + pages * PAGE_TOKENS if pages > 0 else 0
        return tokens // RESIDUAL * RESIDUAL if kind == "K" else max(0, tokens - RESIDUAL)

    def encode(self, x: Tensor, kind: Kind) -> Parts:
        if x.shape[3] % self.group:
            raise UnsupportedModel(f"{self.name} needs a head_dim that is a multiple of {self.group}, not {x.shape[3]}")
        if self.raw is not None:
            sinks = x.shape[2] % PAGE_TOKENS  # none but in what is coded first
            return {"sinks": x[:, :, :sinks], **self._codes(x[:, :, sinks:], kind)}
        return self._codes(x, kind)

    def _codes(self, x: Tensor, kind: Kind) -> Parts:
        axis, size = (2, GROUP) if kind == "K" else (3, self.group)
        groups = x.float().unflatten(axis, (-1, size))
        zero = groups.amin(axis + 1, keepdim=True).half()
        scale = ((groups.amax(axis + 1, keepdim=True) - zero.float()) / (2**self.bits - 1)).half()
        step = torch.where(scale == 0, 1.0, scale.float())
        codes = ((groups - zero.float()) / step).round().clamp(0, 2**self.bits - 1)
        return {"codes": pack(codes.flatten(axis, axis + 1), self.bits), "scales": torch.stack([zero, scale])}

    def decode(self, parts: Parts, kind: Kind) -> Tensor:
        axis, size = (2, GROUP) if kind == "K" else (3, self.group)
        zero, scale = parts["scales"].float()
        groups = unpack(parts["codes"], self.bits).float().unflatten(axis, (-1, size))
        back: Tensor = (groups * scale + zero).flatten(axis, axis + 1)
        return back if self.raw is None else torch.cat([parts["sinks"].float(), back], 2)

    def settings(self) -> dict[str, Any]:
        raw = {"residual": RESIDUAL} if self.raw is None else {"sinks": self.raw.sinks, "window": self.raw.window}
        return {"bits": self.bits, "group": self.group, **raw, "scales": "float16"}
