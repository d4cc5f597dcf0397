"""Text that nobody made for a calibration: documentation and sources of packages that are installed beside kvcomp.

A level that is only held to what the model writes can lose several times what it says on other text
(docs/decisions.md, "What text says of levels").
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from kvcomp.evaluate.text import Tokenizer, encode, start_ids
from kvcomp.fit.windows import SEED, Settings

EACH = 2  # windows of documentation, and of sources
SHORTEST = 400  # characters of what a function says of itself
LONGEST = 60_000  # of a file, of which no more is read
HEADER = 5_000  # with licence and imports, which are left out


def source_windows(tokenizer: Tokenizer, settings: Settings) -> list[Tensor]:
    """Windows of documentation and of sources, int64 (1, length) each; fewer where less is installed."""
    start, windows = start_ids(tokenizer), []
    for texts in (_documentation(), _sources()):
        for _ in range(EACH):
            ids = list(start)
            while len(ids) < settings.length and (text := next(texts, None)) is not None:
                ids += encode(tokenizer, [text])[0]
            if len(ids) >= settings.length:
                windows.append(torch.tensor([ids[: settings.length]]))
    return windows


def _documentation() -> Iterator[str]:
    """What torch's functions and layers say of themselves, in any order."""
    modules = torch, torch.nn, torch.nn.functional, torch.linalg
    described = {inspect.getdoc(thing) or "": name for module in modules for name, thing in vars(module).items()}
    texts = [f"{name}\n\n{text}\n\n\n" for text, name in sorted(described.items()) if len(text) >= SHORTEST]
    return (texts[index] for index in _order(len(texts)))


def _sources() -> Iterator[str]:
    """Files of transformers, in any order."""
    paths = sorted(Path(str(transformers.__file__)).parent.glob("*.py"))
    for index in _order(len(paths)):
        try:
            yield paths[index].read_text(encoding="utf-8")[HEADER:LONGEST]
        except (OSError, UnicodeDecodeError):
            continue


def _order(count: int) -> list[int]:
    order: list[int] = np.random.default_rng(SEED).permutation(count).tolist()
    return order
