"""The text that a calibration is measured on: windows of the given text, and some that the model writes itself.

What a model writes has a bit of everything it was trained on. A share of it keeps a calibration on one kind of text from failing on another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

TEXT_FOR_WRITTEN = 4  # windows of text for each that the model writes
SEED = 0
TOLD = 64  # tokens written between two reports

Tell = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


@dataclass(frozen=True)
class Settings:
    """windows: of text, half of them to go on with text, half with a repetition. prompt, scored: tokens of each. sinks, window: as in the spec."""

    windows: int = 24
    prompt: int = 2048
    scored: int = 256
    sinks: int = 4
    window: int = 64

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.prompt + self.scored

    @property
    def written(self) -> int:
        """Windows that the model writes, besides those of the text."""
        return self.windows // TEXT_FOR_WRITTEN


def draw_windows(ids: npt.NDArray[np.int64], count: int, settings: Settings) -> list[tuple[Tensor, bool]]:
    """Windows spread over a text, int64 (1, prompt + scored), and whether the prompt is followed by a part of itself: so in half of them."""
    windows = []
    half = count // 2
    begins = np.linspace(0, ids.size - settings.length, count).astype(int)
    for index, begin in enumerate([*begins[::2], *begins[1::2]]):
        window = torch.from_numpy(ids[begin : begin + settings.length].copy())
        if index >= half:
            first = settings.sinks + (settings.prompt - settings.window - settings.scored - settings.sinks) * (
                index - half
            ) // max(1, half)
            window[settings.prompt :] = window[first : first + settings.scored]
        windows.append((window[None], index >= half))
    return windows


@torch.inference_mode()
def write(model: Any, ids: npt.NDArray[np.int64], rows: int, length: int, tell: Tell) -> npt.NDArray[np.int64]:
    """Texts that a model writes by drawing every token from what it predicts, each from a token of ``ids`` on; int64 (rows, length)."""
    text = [torch.from_numpy(np.random.default_rng(SEED).choice(ids, (rows, 1)))]
    generator = torch.Generator().manual_seed(SEED)
    cache = DynamicCache(config=model.config)
    for done in range(1, length):
        if done % TOLD == 1:
            tell("the model writes", done, length)
        logits = model(text[-1], past_key_values=cache).logits[:, -1].float()
        text.append(torch.multinomial(logits.softmax(-1), 1, generator=generator))
    return torch.cat(text, 1).numpy()
