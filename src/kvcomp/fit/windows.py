"""What a calibration is measured on: windows of the given text, and some that the model writes itself, in which places.

What a model writes has a bit of everything it was trained on. A share of it keeps a calibration on one kind of text
from failing on another.

Under rotary positions K turns as the place grows, in some directions by a fraction of a turn over thousands of tokens.
So the windows stand at places spread over all that the calibration is to hold for. The model says the same of a text
wherever it stands, as it sees differences of places alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from kvcomp.errors import InvalidInput
from kvcomp.evaluate.gradients import draw
from kvcomp.integrations.transformers.identity import rope_parts
from kvcomp.integrations.transformers.models import position_limit, setting, text_config
from kvcomp.spec import PAGE_TOKENS

TEXT_FOR_WRITTEN = 4  # windows of text for each that the model writes
SEED = 0
EVERY = 2  # windows of which one is used for the bits of a curve
TOLD = 64  # tokens written between two reports
DRAFTS, DRAFTED = 16, 32  # rows and tokens of a draft
TINY = 1e-9  # a share that is less is rounding
GOLDEN = (5**0.5 - 1) / 2  # any of its multiples, less their whole part, are spread evenly

TextKind = Literal["text", "repeated", "sources"]
"""Text that goes on, that repeats a part of the prompt word for word, and that nobody made for a calibration."""
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
    context: int | None = None
    """That windows are spread over, where positions are rotary; as many as the model allows if None."""

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.prompt + self.scored

    @property
    def written(self) -> int:
        """Windows that the model writes, besides those of the text."""
        return self.windows // TEXT_FOR_WRITTEN


class Drawn(NamedTuple):
    """A window of text."""

    ids: Tensor
    """int64 (1, length)."""
    kind: TextKind


def long_enough(ids: npt.NDArray[np.int64], settings: Settings) -> npt.NDArray[np.int64]:
    """The ids of a text that windows can be drawn from. Raises InvalidInput if it is too short."""
    if ids.size < 2 * settings.length:
        raise InvalidInput(
            f"the text has {ids.size} tokens, and {2 * settings.length} is the least: give a longer --text, or none, "
            "and the model writes its own"
        )
    return ids


def draw_windows(ids: npt.NDArray[np.int64], count: int, settings: Settings) -> list[Drawn]:
    """Windows spread over a text, of which half repeat a part of their prompt."""
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
        windows.append(Drawn(window[None], "repeated" if index >= half else "text"))
    return windows


def is_rotary(config: PreTrainedConfig) -> bool:
    """Whether a model sees differences of positions alone, and takes any positions."""
    return bool(rope_parts(setting(config, "rope_parameters")))


def context_of(config: PreTrainedConfig, settings: Settings) -> int:
    """Tokens that windows are spread over. Raises InvalidInput if the model has no such positions."""
    limit, most = position_limit(config), settings.context or setting(config, "max_position_embeddings")
    context = max(most, settings.length) if is_rotary(config) and isinstance(most, int) else settings.length
    if limit is not None and limit < context:
        raise InvalidInput(f"the model's positions end at {limit} tokens: give a shorter --prompt-tokens or --context")
    return context


def coded_part(settings: Settings) -> slice:
    """The tokens of a window that are coded. Raises InvalidInput if there is too little to measure on."""
    pages = (settings.prompt - settings.window - settings.sinks) // PAGE_TOKENS
    if pages < 1 or settings.prompt < 2 * settings.scored + settings.window + settings.sinks:
        raise InvalidInput(f"prompts of {settings.prompt} tokens are too short for {settings.scored} scored ones")
    if settings.windows < 2 * EVERY:
        raise InvalidInput(f"{settings.windows} windows are too few: give at least {2 * EVERY}")
    return slice(settings.sinks, settings.sinks + pages * PAGE_TOKENS)


def spread(count: int, settings: Settings, context: int, device: torch.device) -> list[Tensor]:
    """Positions of windows in a context, int64 (1, length) each; those of every second window are spread as well."""
    firsts = (int((context - settings.length) * (GOLDEN * index % 1)) for index in range(count))
    return [torch.arange(first, first + settings.length, device=device)[None] for first in firsts]


def first_token(config: PreTrainedConfig) -> int:
    """What a text of the model begins with: its first token by name, else the last one, else 0."""
    found = [setting(config, name) for name in ("bos_token_id", "eos_token_id")]
    return next((token for token in found if isinstance(token, int)), 0)


@torch.inference_mode()
def write(model: Any, text: npt.NDArray[np.int64] | None, rows: int, length: int, tell: Tell) -> npt.NDArray[np.int64]:
    """Texts that a model writes, each token drawn, int64 (rows, length).

    They begin with the model's first token, or with any of ``text``. Some models know no text without the former, and
    then repeat themselves. So a draft is written after both, and what the model predicts less surely goes on.
    """
    start = torch.full((rows, 1), first_token(text_config(model.config)))
    if text is not None:
        drawn = torch.from_numpy(np.random.default_rng(SEED).choice(text, (rows, 1)))
        start = max(start, drawn, key=lambda one: _go_on(model, one[:DRAFTS], DRAFTED, lambda *_: None)[1])
    return _go_on(model, start, length, tell)[0].cpu().numpy()


def _go_on(model: Any, text: Tensor, length: int, tell: Tell) -> tuple[Tensor, float]:
    """Texts after these first tokens (rows, 1), int64 (rows, length), and the mean surprise of a token in nats."""
    texts, surprise = [text.to(model.device)], torch.zeros((), device=model.device)
    generator = torch.Generator().manual_seed(SEED)
    cache = DynamicCache(config=model.config)
    for done in range(1, length):
        if done % TOLD == 1:
            tell("the model writes", done, length)
        share = model(texts[-1], past_key_values=cache).logits[:, -1].float().softmax(-1)
        texts.append(draw(share, generator))
        surprise = surprise - share.gather(1, texts[-1]).clamp_min(TINY).log().mean()  # nobody waits for it here
    return torch.cat(texts, 1), float(surprise) / (length - 1)
