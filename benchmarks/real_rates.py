"""Coded bits of kvcomp-klt at the KL of KIVI-style quantisation, from rates that lie there.

A calibration has three levels, and a line between two of them says more bits than a rate between them takes, as log KL
falls the slower the more bits there are. So SmolLM2 is calibrated as ``kvcomp calibrate`` does by default, on what it
writes itself, and coded at prices whose KL is near that of each baseline. Prompts and figures are those of `real.py`.

    python benchmarks/real_rates.py [--resume]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcomp.cli.common import bar, plain_errors, resumable
from kvcomp.evaluate.fidelity import Sample, measure
from kvcomp.evaluate.methods import KVComp, Method, baseline
from kvcomp.fit.calibrate import Calibrator
from kvcomp.fit.curves import allocate
from kvcomp.fit.windows import Settings, Tell
from kvcomp.results import schema as results
from kvcomp.results.journal import Journal
from kvcomp.spec import CALIBRATED, LEVELS
from real import CURVES, KIVI, SCORED, SEED, equal_quality, samples, show, summary
from real_models import load

OUTPUT = Path(__file__).parent / "results" / "real_rates.json"
MODEL = "smollm2-135m"
PRICES = (300.0, 75.0, 50.0, 20.0, 5.0, 1.3)  # bits of the mean value for a nat


def at_prices(model: Any, journal: Journal, tell: Tell) -> list[Method]:
    """kvcomp-klt with the steps of each price."""
    calibrator = Calibrator(model, None, Settings(), journal, tell)
    calibrator.write()
    calibrator.read()
    curves = calibrator.curves()
    found: list[Method] = []
    for first in range(0, len(PRICES), len(LEVELS)):
        prices = dict(zip(LEVELS, PRICES[first:], strict=False))
        steps = {level: (allocate(curves, price), {"price": price}) for level, price in prices.items()}
        made = calibrator.build(steps, "written by the model")
        for level, price in prices.items():
            found.append(KVComp(made.spec(level), f"{CALIBRATED} at {price:g} bits a nat", made))
    return found


def row(model: Any, each: Sample, kind: str, method: Method) -> dict[str, Any]:
    found, memory = measure(model, each, method)
    return asdict(found) | {"memory": asdict(memory), "kind": kind}


def run_of(chosen: Sequence[Method], rows: dict[str, list[dict[str, Any]]], tokens: int) -> dict[str, Any]:
    """What was measured of all methods so far."""
    whole = min(map(len, rows.values()), default=0)  # a prompt that was stopped half-way counts for no method
    measured = {name: of[:whole] for name, of in rows.items()}
    methods = [summary(one.name, one.settings(), measured[one.name]) for one in chosen if whole]
    curves = {CALIBRATED: CURVES[CALIBRATED]}
    return {
        "model": MODEL,
        "dtype": "float32",
        "prompt_tokens": tokens,
        "methods": methods,
        "equal_quality": equal_quality(measured, KIVI, curves) if whole else {},
    }


def main(
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in all, of every kind of text")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each")] = 2048,
    output: Annotated[Path, typer.Option(help="Where the results go")] = OUTPUT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run was stopped")] = False,
) -> None:
    with plain_errors():
        model, tokenizer = load(MODEL)
        identity: dict[str, Any] = {"model": MODEL, "prompt_tokens": prompt_tokens, "scored": SCORED, "seed": SEED}
        about = results.environment(**identity, prices=PRICES)
        chosen: list[Method] = []
        rows: dict[str, list[dict[str, Any]]] = {}

        def report(stopped: bool) -> None:
            runs = [run_of(chosen, rows, prompt_tokens)]
            results.write(output, "real_rates", about, partial=stopped, runs=runs)
            show(runs)

        with resumable(output, identity, resume, report) as journal, bar() as progress:
            task = progress.add_task(MODEL, total=prompts)
            chosen += at_prices(
                model, journal.part("calibration"), lambda what, done, total: progress.update(task, description=what)
            )
            chosen += map(baseline, KIVI)
            rows |= {method.name: [] for method in chosen}
            for number, (kind, each) in enumerate(samples(model, tokenizer, prompts, prompt_tokens)):
                for method in chosen:
                    progress.update(task, description=method.name)
                    measured = partial(row, model, each, kind, method)
                    rows[method.name].append(journal.piece(f"{number}/{method.name}", measured))
                progress.update(task, advance=1)


if __name__ == "__main__":
    typer.run(main)
