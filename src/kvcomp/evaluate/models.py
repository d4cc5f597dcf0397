"""Load a model for a command: a directory, a hub name, or the small one that comes with kvcomp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcomp.errors import InvalidInput
from kvcomp.evaluate.text import held_out_names, held_out_text, join
from kvcomp.spec import CodecSpec

TUNED_SPEC = "kvcomp.json"


def shipped_model() -> Path:
    """Directory of the model that comes with kvcomp: in the package where it is installed, in ``examples`` in a checkout."""
    package = Path(__file__).parents[1]
    places = package / "tiny-lm", package.parents[1] / "examples" / "tiny-lm"
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise InvalidInput(f"the shipped model is not at {places[0]} or {places[1]}: name a model directory")


def load_model(name: str | Path) -> tuple[Any, Any]:
    """Model, in the type of its weights, and tokenizer. Raises InvalidInput if transformers cannot load them."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"cannot load a model from {name}: {error}") from None
    if model.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InvalidInput(f"{name} has weights of {model.dtype}: float32, float16 or bfloat16 are possible")
    return model.eval(), tokenizer


def default_spec(model: str | Path) -> CodecSpec:
    """The spec tuned for a model, ``kvcomp.json`` in its directory, or the preset ``kvcomp``."""
    tuned = Path(model) / TUNED_SPEC
    return CodecSpec.resolve(tuned if tuned.is_file() else "kvcomp")


def held_out_ids(tokenizer: Any, model: Path) -> list[int]:
    """Token ids of the text that the shipped model never saw: files of the running Python's standard library, one after another."""
    ids: list[int] = join(tokenizer, held_out_text(held_out_names(model / "held_out.txt"))).tolist()
    return ids
