"""KL and bits of llama.cpp's quantised K and V, on the prompts and model files of ``real.py``.

Every type of the cache is compared with float16 in llama.cpp itself, which reads the prompt through the cache too: what
is quantised there changes the K and V of later tokens. kvcomp attends a prompt exactly and compresses it then. The
noise floor is float32 in place of float16. Run by `make bench-llama`, which has llama-cpp-python.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import llama_cpp
import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.table import Table

from klt import with_intervals
from kvcomp.cli.common import bar, plain_errors, resumable
from kvcomp.evaluate.fidelity import token_kls
from kvcomp.results import schema as results
from real import SCORED, SEED, split
from real_models import REAL_MODELS, load
from real_texts import KINDS, sequences

OUTPUT = Path(__file__).parent / "results" / "llama_cpp.json"
BATCH = 512  # tokens of a prompt that llama.cpp reads at once, its default


class Type(NamedTuple):
    """A type of llama.cpp's cache, by its GGML number, and its bits a value with the scales of its blocks of 32."""

    number: int
    bits: float


TYPES = {"f32": Type(0, 32.0), "f16": Type(1, 16.0), "q8_0": Type(8, 8.5), "q5_1": Type(7, 6.0), "q4_0": Type(2, 4.5)}
PAIRS = ("f32", "f32"), ("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q5_1", "q5_1"), ("q4_0", "q4_0")  # of K and of V
EXACT = "f16", "f16"

screen = Console()


def log_probs(file: Path, pair: tuple[str, str], ids: Sequence[int], threads: int) -> npt.NDArray[np.float32]:
    """What llama.cpp says of the last ``SCORED`` tokens, float32 (tokens, vocabulary), each after those before it."""
    key, value = (TYPES[name].number for name in pair)
    model = llama_cpp.Llama(
        str(file), n_ctx=len(ids), n_batch=BATCH, n_threads=threads, n_threads_batch=threads, flash_attn=True,
        type_k=key, type_v=value, verbose=False,
    )  # fmt: skip
    found = []
    model.eval(ids[:-SCORED])
    for token in ids[-SCORED:]:
        raw = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),))
        found.append(torch.from_numpy(raw.copy()).log_softmax(-1).numpy())
        model.eval([token])
    model.close()
    return np.stack(found)


def rows_of(file: Path, ids: Sequence[int], threads: int) -> list[dict[str, Any]]:
    """For each of PAIRS the KL of every token, and the share whose likeliest next one is the same."""
    exact = torch.from_numpy(log_probs(file, EXACT, ids, threads))
    found = []
    for pair in PAIRS:
        other = torch.from_numpy(log_probs(file, pair, ids, threads))
        top1 = float((exact.argmax(-1) == other.argmax(-1)).double().mean())
        found.append({"kls": token_kls(exact, other).tolist(), "top1": top1})
    return found


def summary(pair: tuple[str, str], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kls, top1 = np.asarray([row["kls"] for row in rows]), np.asarray([row["top1"] for row in rows])

    def figures(drawn: Any) -> dict[str, float]:
        every = kls[drawn]
        return {
            "kl": float(every.mean()),
            "kl_99_9": float(np.quantile(every, 0.999)),
            "top1": float(top1[drawn].mean()),
        }

    bits = sum(TYPES[name].bits for name in pair) / 2
    return {
        "name": f"K {pair[0]}, V {pair[1]}",
        "bits": bits,
        "samples": len(rows),
        **with_intervals(figures, len(rows)),
    }


def show(runs: Sequence[dict[str, Any]]) -> None:
    for run in runs:
        table = Table("llama.cpp's cache", "bits", "KL, nats (95 %)", "99.9 %", "top-1", title=run["model"])
        for one in run["methods"]:
            low, high = one["kl"]["interval"]
            kl = f"{one['kl']['value']:.1e} ({low:.0e}-{high:.0e})"
            shares = f"{one['kl_99_9']['value']:.1e}", f"{100 * one['top1']['value']:.1f} %"
            table.add_row(one["name"], f"{one['bits']:g}", kl, *shares)
        screen.print(table)


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"{' or '.join(REAL_MODELS)} [default: both]")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in all, of every kind of text")] = 9,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each")] = 2048,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    output: Annotated[Path, typer.Option(help="Where the results go")] = OUTPUT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run was stopped")] = False,
) -> None:
    with plain_errors():
        names = model or list(REAL_MODELS)
        chosen = {"models": names, "prompts": prompts, "prompt_tokens": prompt_tokens, "scored": SCORED, "seed": SEED}
        about = results.environment(**chosen, kinds=list(KINDS), llama_cpp_python=llama_cpp.__version__)
        rows: dict[str, list[list[dict[str, Any]]]] = {}

        def report(stopped: bool) -> None:
            runs = [
                {
                    "model": name,
                    "prompt_tokens": prompt_tokens,
                    "methods": list(map(summary, PAIRS, zip(*of, strict=True))),
                }
                for name, of in rows.items()
            ]
            results.write(output, "llama_cpp", about, partial=stopped, runs=runs)
            show(runs)

        with resumable(output, chosen, resume, report) as journal, bar() as progress:
            task = progress.add_task("", total=len(names) * prompts)
            for name in names:
                _, tokenizer = load(name)
                file = REAL_MODELS[name].file()
                for kind, count in split(prompts).items():
                    texts = sequences(kind, tokenizer, count, prompt_tokens + SCORED, SEED).reshape(count, -1).tolist()
                    for number, ids in enumerate(texts):
                        make = partial(rows_of, file, ids, threads)
                        rows.setdefault(name, []).append(journal.piece(f"{name}/{kind}/{number}", make))
                        progress.update(task, description=f"{name}, {kind}", advance=1)


if __name__ == "__main__":
    typer.run(main)
