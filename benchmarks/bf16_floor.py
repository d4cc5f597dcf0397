"""What of a KL in bfloat16 is the cache's, and what the model's own rounding.

A model that computes in bfloat16 rounds each of its sums, and whichever of these comes out one step further changes
what follows. So its predictions move by about as much whether one value of K in a thousand is one step off or all are.
That much is the floor of every cache that is not exact. Beside it stand kvcomp-klt's transforms alone, which round K'
and V' to bfloat16 and code nothing, and the coded caches, in both types. One is read by kvcomp's own attention.

    python benchmarks/bf16_floor.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from kvcomp.calibration import Calibration
from kvcomp.cli.common import bar, plain_errors
from kvcomp.evaluate.fidelity import Sample, compare, fill, measure, predict_from
from kvcomp.evaluate.methods import KVComp
from kvcomp.results import schema as results
from kvcomp.spec import CALIBRATED
from kvcomp.store import Memory
from real import CALIBRATIONS, DTYPES, SCORED, SEED, samples, show, summary
from real_models import load

OUTPUT = Path(__file__).parent / "results" / "bf16_floor.json"
MODEL = "smollm2-135m"
RAW = 65536  # tokens of a window that nothing leaves

Row = dict[str, Any]


def neighbours(x: Tensor, share: float, seed: int) -> Tensor:
    """x with a share of its values replaced by the next one of its type, up or down."""
    drawn = torch.rand(2, *x.shape, generator=torch.Generator().manual_seed(seed))
    direction = torch.where(drawn[0] < 0.5, torch.inf, -torch.inf).to(x.dtype)
    return torch.where(drawn[1] < share, torch.nextafter(x, direction), x)


def moved(share: float) -> Callable[[Any, Sample], Row]:
    def run(model: Any, each: Sample) -> Row:
        pairs = [
            (neighbours(k, share, 2 * index), neighbours(v, share, 2 * index + 1))
            for index, (k, v) in enumerate(each.cache)
        ]
        size = sum(x.nbytes for pair in pairs for x in pair)
        memory = Memory(window=size, values=size // pairs[0][0].itemsize, dense=size)
        return asdict(compare(each, predict_from(model, each, pairs))) | {"memory": asdict(memory)}

    return run


def held(method: KVComp) -> Callable[[Any, Sample], Row]:
    def run(model: Any, each: Sample) -> Row:
        found, memory = measure(model, each, method)
        return asdict(found) | {"memory": asdict(memory)}

    return run


def attended(method: KVComp) -> Callable[[Any, Sample], Row]:
    """Token by token with kvcomp's attention on the compressed pages, as a user generates."""

    @torch.inference_mode()
    def run(model: Any, each: Sample) -> Row:
        cache = fill(model, each, method)
        memory = method.memory(cache)
        model.set_attn_implementation(method.attention)
        logits = [model(token, past_key_values=cache).logits[0] for token in each.text.split(1, 1)]
        found = compare(each, torch.cat(logits).float().log_softmax(-1))
        return asdict(found) | {"memory": asdict(memory)}

    return run


def caches() -> dict[str, Callable[[Any, Sample], Row]]:
    calibration = Calibration.read(CALIBRATIONS / f"{MODEL}.kvcal")
    found = {"one value in a thousand one step off": moved(0.001), "every value one step off": moved(1.0)}
    uncoded = replace(calibration.spec("balanced"), window=RAW)
    found["transformed and back, nothing coded"] = held(KVComp(uncoded, "uncoded", calibration))
    for level in ("near-lossless", "balanced"):
        found[f"{CALIBRATED}:{level}"] = held(KVComp(calibration.spec(level), level, calibration))
    found[f"{CALIBRATED}:balanced, by kvcomp's attention"] = attended(
        KVComp(calibration.spec("balanced"), "balanced", calibration)
    )
    return found | {"kvcomp": held(KVComp("kvcomp"))}


def main(
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in all, of every kind of text")] = 6,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each")] = 1024,
    output: Annotated[Path, typer.Option(help="Where the results go")] = OUTPUT,
) -> None:
    with plain_errors(), bar() as progress:
        chosen, runs = caches(), []
        about = results.environment(model=MODEL, prompt_tokens=prompt_tokens, scored=SCORED, seed=SEED)
        task = progress.add_task(MODEL, total=len(DTYPES) * prompts * len(chosen))
        for dtype in DTYPES:
            model, tokenizer = load(MODEL, dtype)
            rows: dict[str, list[Row]] = {name: [] for name in chosen}
            for kind, each in samples(model, tokenizer, prompts, prompt_tokens):
                for name, run in chosen.items():
                    rows[name].append(run(model, each) | {"kind": kind})
                    progress.update(task, description=dtype, advance=1)
            methods = [summary(name, {}, of) for name, of in rows.items()]
            runs.append({"model": MODEL, "dtype": dtype, "prompt_tokens": prompt_tokens, "methods": methods})
            runs[-1]["equal_quality"] = {}
        results.write(output, "bf16_floor", about, runs=runs)
        show(runs)


if __name__ == "__main__":
    typer.run(main)
