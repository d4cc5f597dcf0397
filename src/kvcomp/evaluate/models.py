"""Load a model for a command: a directory, a GGUF file, a hub name, or the small one that comes with kvcomp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from kvcomp.calibration import Calibration, resolve
from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.evaluate import gguf_file
from kvcomp.evaluate.text import held_out_names, held_out_text, join, manual_text, training_text
from kvcomp.spec import CodecSpec, is_calibrated
from kvcomp.store.tensors import NAMES, TYPES

TUNED_SPEC = "kvcomp.json"
FITTING_CHARACTERS = 2_000_000
CALIBRATION = "model.kvcal"
CONFIGS = "config.json", "adapter_config.json"
HUB_PARTS = 2  # owner/name


def shipped_model() -> Path:
    """Find the model that comes with kvcomp: in the package where it is installed, in ``examples`` in a checkout.

    Raises InvalidInput if it is in neither.
    """
    package = Path(__file__).parents[1]
    places = package / "tiny-lm", package.parents[1] / "examples" / "tiny-lm"
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise InvalidInput(f"the shipped model is not at {places[0]} or {places[1]}: name a model directory")


def load_model(name: str | Path, dtype: str | None = None, device: str | None = None) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Parameters
    ----------
    name
        A directory, a hub name, a GGUF file or the folder of one.
    dtype
        One of TYPES; by default that of the weights, and float32 for a GGUF's that are quantised.
    device
        Where to put it, such as ``cuda``; None for where transformers puts it, which is main memory but for weights
        that need a GPU.

    Raises
    ------
    InvalidInput
        If nothing is there, transformers cannot load it, the type is not float32, float16 or bfloat16, or there is no
        such device.
    CorruptData, UnsupportedModel
        For a GGUF that is damaged or of another kind of model.
    """
    if dtype is not None and dtype not in TYPES:
        raise InvalidInput(f"no dtype {dtype!r}: use {', '.join(TYPES)}")
    if files := gguf_file.find(name):
        model, tokenizer = gguf_file.load(files, TYPES[dtype] if dtype else None)
        return _on(model, device), tokenizer
    _check_place(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto")
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"cannot load a model from {name}: {error}") from None
    if model.dtype not in NAMES:
        raise InvalidInput(f"{name} has weights of {model.dtype}: {', '.join(TYPES)} are possible")
    return _on(model, device), tokenizer


def _on(model: Any, device: str | None) -> Any:
    try:
        return model.eval() if device is None else model.eval().to(torch.device(device))
    except (RuntimeError, ValueError, AssertionError) as error:  # of torch, of quantised weights, without CUDA
        raise InvalidInput(f"the model cannot be put on the device {device!r}: {error}") from None


def backend_for(model: Any) -> str:
    """The backend of kvcomp's caches for a model, by where it lies."""
    return "gpu" if model.device.type == "cuda" else "cpu"


def _check_place(name: str | Path) -> None:
    """Raise InvalidInput for a path that is no model's. transformers would look for each one on the hub."""
    path = Path(name)
    if path.is_dir():
        wrong = not any((path / config).is_file() for config in CONFIGS)
        why = "the folder holds no config.json and no GGUF file: name the one that does"
    elif path.is_file():
        wrong, why = True, "this file is no model: name a model's folder or a GGUF file"
    else:
        wrong = path.is_absolute() or str(name).startswith((".", "~")) or len(path.parts) > HUB_PARTS
        why = "the path does not exist: name a model's folder, a GGUF file or a hub name"
    if wrong:
        raise InvalidInput(f"cannot load a model from {name}: {why}")


def calibration_beside(model: str | Path) -> Path | None:
    """The calibration in the model's directory; None if there is none."""
    path = gguf_file.folder_of(model) / CALIBRATION
    return path if path.is_file() else None


def spec_for(
    model: str | Path, spec: str | None = None, calibration: Calibration | Path | None = None
) -> tuple[CodecSpec, Calibration | None]:
    """``resolve`` with what lies in the model's directory.

    That is ``kvcomp.json`` if no spec is named, and ``model.kvcal`` for kvcomp-klt.
    Raises InvalidInput if there is no such spec or calibration.
    """
    tuned = gguf_file.folder_of(model) / TUNED_SPEC
    if spec is None:
        return resolve(tuned if tuned.is_file() else "kvcomp", calibration)
    if calibration is None and is_calibrated(spec):
        calibration = calibration_beside(model)
    return resolve(spec, calibration)


def held_out_ids(tokenizer: Any, model: Path) -> list[int]:
    """Token ids of the text that the shipped model never saw.

    It is files of the running Python's standard library, one after another.
    """
    ids: list[int] = join(tokenizer, held_out_text(held_out_names(model / "held_out.txt"))).tolist()
    return ids


def text_ids(tokenizer: Any, model: str | Path, text: Path | None) -> tuple[np.ndarray[Any, np.dtype[np.int64]], str]:
    """Token ids to score a model on, and what they are of.

    They are those of a file, else of text that the shipped model never saw, else of Python's manual.
    Raises InvalidInput for a file that is no UTF-8 text.
    """
    if text is not None:
        try:
            content = text.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"cannot read the text {text}: {error}; give a UTF-8 file") from None
        return join(tokenizer, [(text.name, content)]), str(text)
    if (Path(model) / "held_out.txt").is_file():
        return np.asarray(held_out_ids(tokenizer, Path(model)), np.int64), "held-out files of the standard library"
    return join(tokenizer, manual_text()), "Python's manual (pydoc_data.topics)"


def training_ids(
    tokenizer: Any, model: str | Path, text: Path | None
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], str]:
    """Token ids to fit something to a model on, and what they are of.

    They are those of a file, else of the standard library's sources that ``text_ids`` does not take.
    Raises InvalidInput for a file that is no UTF-8 text.
    """
    if text is not None:
        return text_ids(tokenizer, model, text)
    held_out = Path(model) / "held_out.txt"
    sources = training_text(held_out_names(held_out) if held_out.is_file() else [])
    order = np.random.default_rng(0).permutation(len(sources)).tolist()
    taken, size = [], 0
    while order and size < FITTING_CHARACTERS:
        taken.append(sources[order.pop()])
        size += len(taken[-1][1])
    return join(tokenizer, taken), "sources of the standard library"


def full_attention_layers(config: Any) -> list[int]:
    """Those that keep K and V of all tokens."""
    return [index for index, layer in enumerate(DynamicCache(config=config).layers) if type(layer) is DynamicLayer]


def check_has_keys(config: Any) -> None:
    """Raise UnsupportedModel for a model without a layer that keeps the K and V of all its tokens."""
    if not full_attention_layers(config):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in DynamicCache(config=config).layers}))
        raise UnsupportedModel(
            f"{config.model_type} keeps no K and V of all its tokens ({kinds}): there is nothing to compress"
        )


def attends_to_all(config: Any) -> bool:
    """Whether every layer of a model attends to all tokens: no sliding windows and the like."""
    return len(full_attention_layers(config)) == len(DynamicCache(config=config).layers)
