"""The text that a calibration is measured on: windows of the given text, and some that the model writes itself.

What a model writes has a bit of everything it was trained on. A share of it keeps a calibration on one kind of text
from failing on another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from kvcomp.evaluate.gradients import draw
from kvcomp.integrations.transformers.models import setting

TEXT_FOR_WRITTEN = 4  # windows of text for each that the model writes
SEED = 0
TOLD = 64  # tokens written between two reports

Tell = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


@dataclass(frozen=True)
class Settings:
    """How much text a calibration is measured on. Lengths are in tokens."""

    windows: int = 8
    """Of text: half go on with text, half with a repetition."""
    prompt: int = 2048
    """Of each window, coded."""
    scored: int = 128
    """Of each window, scored."""
    sinks: int = 4
    """First tokens that stay raw, as in the spec."""
    window: int = 64
    """Newest tokens that stay raw, as in the spec."""

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.prompt + self.scored

    @property
    def written(self) -> int:
        """Windows that the model writes, besides those of the text."""
        return self.windows // TEXT_FOR_WRITTEN


def draw_windows(ids: npt.NDArray[np.int64], count: int, settings: Settings) -> list[tuple[Tensor, bool]]:
    """Windows spread over a text, int64 (1, length), and whether each repeats a part of its prompt: half do."""
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


def first_token(config: PreTrainedConfig) -> int:
    """What a text of the model begins with: its first token by name, else the last one, else 0."""
    found = [setting(config, name) for name in ("bos_token_id", "eos_token_id")]
    return next((token for token in found if isinstance(token, int)), 0)


@torch.inference_mode()
def write(model: Any, ids: npt.NDArray[np.int64], rows: int, length: int, tell: Tell) -> npt.NDArray[np.int64]:
    """Texts that a model writes from a token of ``ids`` on, each token drawn, int64 (rows, length)."""
    text = [torch.from_numpy(np.random.default_rng(SEED).choice(ids, (rows, 1)))]
    generator = torch.Generator().manual_seed(SEED)
    cache = DynamicCache(config=model.config)
    for done in range(1, length):
        if done % TOLD == 1:
            tell("the model writes", done, length)
        logits = model(text[-1], past_key_values=cache).logits[:, -1].float()
        text.append(draw(logits.softmax(-1), generator))
    return torch.cat(text, 1).numpy()
