"""KL and bits of llama.cpp's quantised K and V, beside kvcomp's on the same GGUF file, text and places.

Each cache is held against the uncompressed one of its own runtime: float16 in llama.cpp, float32 in transformers. Both
compute with the file's weights in float32. With weights of 4 bits llama.cpp rounds activations to 8, and that noise
would drown the cache's. llama.cpp reads the prompt through its cache, piece after piece, so what is quantised changes
the K and V of later tokens. kvcomp is measured in the same way, "in pieces", and as `real.py` does it: the prompt
attends to itself exactly. llama.cpp turns K and V of 8 bits and less by a Hadamard matrix. Its noise floor is float32,
which it keeps only without flash attention. Run by `make bench-llama`, which has llama-cpp-python.

    python benchmarks/llama_cpp_cache.py [--resume]
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import llama_cpp
import numpy as np
import torch
import typer
from torch import Tensor

from kvcomp.cli.common import bar, plain_errors, resumable
from kvcomp.errors import CorruptData
from kvcomp.evaluate.fidelity import Sample, attend_plainly, compare, fill, predict, sample
from kvcomp.evaluate.methods import KVComp, Method
from kvcomp.results import schema as results
from kvcomp.results.journal import Journal
from kvcomp.spec import CALIBRATED
from kvcomp.store import Memory
from real import CALIBRATIONS, SEED, calibrated, equal_quality, show, split, summary
from real_models import REAL_MODELS, load
from real_texts import sequences

OUTPUT = Path(__file__).parent / "results" / "llama_cpp.json"
MODEL = "smollm2-135m"
PIECE = 512  # tokens of a prompt that llama.cpp reads at once, its default
SCORED = 80
IN_PIECES = ", in pieces"
CURVES = {CALIBRATED + IN_PIECES: f"{CALIBRATED}:.*{IN_PIECES}", CALIBRATED: f"{CALIBRATED}:[^,]*$"}


class Type(NamedTuple):
    """A type of K and V in llama.cpp: its number in GGML, and the bytes of a block of 32 values."""

    number: int
    codes: int
    scales: int = 0
    flash: bool = True

    def memory(self, values: int) -> Memory:
        """Bytes of so many values, all of them of this type."""
        blocks = values // 32
        parts = {"codes": blocks * self.codes, "scales": blocks * self.scales}
        return Memory(**parts, sealed_values=values, values=values, dense=2 * values)


EXACT = Type(1, 64)  # float16
TYPES = {"f32": Type(0, 128, flash=False), "q8_0": Type(8, 32, 2), "q4_0": Type(2, 16, 2)}


def floats(file: Path, folder: str) -> Path:
    """The model with its weights in float32. Raises CorruptData if llama.cpp cannot read it."""
    found = Path(folder) / "float32.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.nthread = llama_cpp.LLAMA_FTYPE_ALL_F32, True, 1
    if llama_cpp.llama_model_quantize(bytes(file), bytes(found), ctypes.byref(options)):
        raise CorruptData(f"llama.cpp cannot read {file}: run make models again")
    return found


def log_probs(file: Path, kind: Type, ids: Sequence[int]) -> Tensor:
    """What llama.cpp predicts after each of the last ``SCORED`` ids, float32 (tokens, vocabulary)."""
    model = llama_cpp.Llama(
        str(file), n_ctx=len(ids), n_batch=PIECE, n_threads=1, n_threads_batch=1, flash_attn=kind.flash,
        type_k=kind.number, type_v=kind.number, verbose=False,
    )  # fmt: skip
    found = []
    model.eval(ids[:-SCORED])
    for token in ids[-SCORED:]:
        model.eval([token])
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),))
        found.append(torch.from_numpy(logits.copy()).log_softmax(-1))
    model.close()
    return torch.stack(found)


@torch.inference_mode()
def in_pieces(model: Any, each: Sample, method: Method) -> tuple[Tensor, Memory]:
    """What transformers predicts of a sample's text, read through a method's cache as llama.cpp reads it, and bytes."""
    attend_plainly(model)
    held = method.cache(model.config)
    for piece in each.prompt.split(PIECE, 1):
        model(piece, past_key_values=held, logits_to_keep=1)
    memory = method.memory(held)
    return predict(model, each.text, held, method, streaming=True), memory


def at_once(model: Any, each: Sample, method: Method) -> tuple[Tensor, Memory]:
    """The same with the prompt coded after it was read, and a text that is not coded, as ``real.py`` measures."""
    held = fill(model, each, method)
    memory = method.memory(held)
    return predict(model, each.text, held, method), memory


def measure(
    model: Any, file: Path, chosen: Sequence[Method], ids: Tensor, journal: Journal
) -> Iterator[tuple[str, Any, Any]]:
    """(method, settings, row) of all caches on one prompt, ids (1, tokens)."""
    config, prompt = model.config, ids.shape[1] - SCORED
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * prompt
    read = cache(lambda: sample(model, ids, prompt))

    @cache
    def theirs() -> Sample:
        """The text and what llama.cpp says of it uncompressed."""
        return Sample(ids[:, :prompt], [], ids[:, prompt:], log_probs(file, EXACT, ids[0].tolist()))

    def row(of: Sample, predicted: Tensor, memory: Memory) -> dict[str, Any]:
        return asdict(compare(of, predicted)) | {"memory": asdict(memory)}

    def runtimes() -> dict[str, Any]:
        return row(read(), theirs().log_probs, EXACT.memory(values))

    def quantised(kind: Type) -> dict[str, Any]:
        return row(theirs(), log_probs(file, kind, ids[0].tolist()), kind.memory(values))

    def ours(method: Method, how: Any) -> dict[str, Any]:
        return row(read(), *how(model, read(), method))

    yield "llama.cpp f16, against transformers", {}, journal.piece("runtimes", runtimes)
    for name, kind in TYPES.items():
        yield f"llama.cpp {name}", {}, journal.piece(name, partial(quantised, kind))
    for method in chosen:
        for how, said in ((in_pieces, IN_PIECES), (at_once, "")):
            name = method.name + said
            yield name, method.settings(), journal.piece(name, partial(ours, method, how))


def main(
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in all, of every kind of text")] = 9,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each")] = 2048,
    output: Annotated[Path, typer.Option(help="Where the results go")] = OUTPUT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run was stopped")] = False,
) -> None:
    with plain_errors(), tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        model, tokenizer = load(MODEL)
        file = floats(REAL_MODELS[MODEL].file(), folder)
        chosen = [KVComp("kvcomp"), *calibrated(model.config, sorted(CALIBRATIONS.glob("*.kvcal")))]
        identity: dict[str, Any] = {"model": MODEL, "prompt_tokens": prompt_tokens, "scored": SCORED, "seed": SEED}
        about = results.environment(**identity, piece=PIECE, llama_cpp_python=llama_cpp.__version__)
        rows: dict[str, list[dict[str, Any]]] = {}
        settings: dict[str, Any] = {}

        def report(stopped: bool) -> None:
            whole = min(map(len, rows.values()), default=0)  # a prompt that was stopped half-way counts for no cache
            measured = {name: of[:whole] for name, of in rows.items()}
            runs = [
                {
                    "model": MODEL,
                    "dtype": "float32",
                    "prompt_tokens": prompt_tokens,
                    "methods": [summary(name, settings[name], of) for name, of in measured.items()],
                    "equal_quality": equal_quality(measured, [f"llama.cpp {name}" for name in TYPES], CURVES),
                }
            ]
            results.write(output, "llama_cpp", about, partial=stopped, runs=runs)
            show(runs)

        with resumable(output, identity, resume, report) as journal, bar() as progress:
            task = progress.add_task("", total=prompts)
            size = prompt_tokens + SCORED
            texts = {
                kind: sequences(kind, tokenizer, count, size, SEED).reshape(count, 1, size)
                for kind, count in split(prompts).items()
                if count
            }
            for index in range(prompts):
                kind, number = list(texts)[index % len(texts)], index // len(texts)
                ids = torch.from_numpy(texts[kind][number])
                for name, given, row in measure(model, file, chosen, ids, journal.part(f"{kind}/{number}")):
                    settings[name] = given
                    rows.setdefault(name, []).append(row | {"kind": kind})
                progress.update(task, description=kind, advance=1)


if __name__ == "__main__":
    typer.run(main)
