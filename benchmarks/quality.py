"""Quality and bits of every method on the shipped model, and bits at equal quality; ``kvcomp evaluate`` with more text.

Prompts of 2,048 tokens of held-out text are cached and coded; the 256 tokens after each are scored teacher-forced. Some
texts are streamed through a moving window, and look-ups are asked in lists. `coded` bits count coded tokens with all
their metadata, `total` bits everything the cache allocates. The paper's scheme is measured at a grid of scales, on the
same prompts, for its bits at another method's KL.

    python benchmarks/quality.py [--resume]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvcomp.calibration import Calibration
from kvcomp.cli.common import bar
from kvcomp.cli.tables import show_evaluation
from kvcomp.evaluate.evaluation import Evaluation, Plan
from kvcomp.evaluate.methods import BASELINES, KVComp, Method, baseline, default_specs, named_spec
from kvcomp.evaluate.models import CALIBRATION, load_model, shipped_model, text_ids
from kvcomp.results import plots
from kvcomp.results import schema as results
from kvcomp.results.journal import Journal, pieces
from kvcomp.spec import CALIBRATED, CodecSpec, TensorSpec
from rates import bits_at
from real import installed

OUTPUT = Path(__file__).parent / "results" / "quality.json"
KEY_SCALES = (0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.14, 0.2)
VALUE_OVER_KEY = (2, 3, 5)
SEED = 20261121
EQUAL_TO = "kivi-4", "kivi-3", "kivi-2", "kvcomp:paper"

screen = Console()


def methods(place: Path) -> list[Method]:
    """Everything that can be measured here."""
    found = [baseline("uncompressed"), *klt(place), *(one for one in default_specs(place) if one.name != CALIBRATED)]
    found += [KVComp(name) for name in ("kvcomp:paper", "packed", "packed:paper")]
    return [*found, *installed(name for name in BASELINES if name != found[0].name)]


def klt(place: Path) -> list[Method]:
    """The calibrated preset at each of its levels, from fine to coarse."""
    levels = Calibration.read(place / CALIBRATION).levels
    return [named_spec(place, f"{CALIBRATED}:{level}") for level in levels]


def paper(ratio: int) -> list[Method]:
    """The paper's scheme from fine to coarse, V's scale so many times K's."""
    grid = [(key, min(0.9, key * ratio)) for key in KEY_SCALES]
    return [
        KVComp(CodecSpec(TensorSpec("block", key), TensorSpec("token", value)), f"paper K {key:g} V {value:g}")
        for key, value in grid
    ]


def point(one: dict[str, Any]) -> dict[str, Any]:
    """Bits and KL of a method, teacher-forced."""
    memory, fidelity = one["memory"]["teacher_forced"], one["fidelity"]["teacher_forced"]
    bits = {name: memory[name] for name in ("coded_bits", "total_bits")}
    return {"name": one["name"], **bits, "kl": fidelity["kl"]["mean"]}


def equal_quality(found: dict[str, Any], curves: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Bits of each curve at the KL of known methods, log KL interpolated; absent where a curve does not reach it."""
    rows = []
    for name in EQUAL_TO:
        theirs = point(found[name])
        at: dict[str, Any] = {}
        for curve, points in curves.items():
            kls = [one["kl"] for one in points]
            bits = {
                kind: bits_at(theirs["kl"], [one[kind] for one in points], kls) for kind in ("coded_bits", "total_bits")
            }
            if max(bits.values()) < float("inf"):
                at[curve] = bits
        rows.append({"at": name, **theirs, "curves": at})
    return rows


def plot(found: list[dict[str, Any]], curves: dict[str, list[dict[str, Any]]], stem: Path) -> None:
    """KL over coded bits."""
    series = {name: ([p["coded_bits"] for p in points], [p["kl"] for p in points]) for name, points in curves.items()}
    families: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        if (
            "teacher_forced" in one["fidelity"]
            and one["name"] not in ("uncompressed", "kvcomp", "kvcomp:paper")
            and not one["name"].startswith(CALIBRATED)
        ):
            families.setdefault(one["name"].split("-")[0], []).append(point(one))
    for family, points in families.items():
        series[family] = ([p["coded_bits"] for p in points], [p["kl"] for p in points])
    plots.save(plots.rate_distortion(series), stem)


def main(
    prompts: Annotated[int, typer.Option(help="Prompts of held-out text")] = 24,
    streams: Annotated[int, typer.Option(help="Texts to stream")] = 4,
    lists: Annotated[int, typer.Option(help="Look-up lists of each length")] = 8,
    passkeys: Annotated[int, typer.Option(help="Passkeys of each length and depth")] = 4,
    output: Annotated[Path, typer.Option(help="Where the results go")] = OUTPUT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run was stopped")] = False,
) -> None:
    place = shipped_model()
    model, tokenizer = load_model(place)
    ids, source = text_ids(tokenizer, place, None)
    plan = Plan(prompts=prompts, streams=streams, lengths=(1024, 2048, 4096), lists=lists, passkeys=passkeys, seed=SEED)
    brief = Plan(prompts=prompts, streams=0, lists=0, passkeys=0, details=False, seed=SEED)
    families = {f"paper, V scale {ratio} x K's": paper(ratio) for ratio in VALUE_OVER_KEY}
    about = results.environment(model="tiny-lm", text=source, **vars(plan))
    chosen = methods(place)
    identity = {"plan": vars(plan), "methods": {one.name: one.settings() for one in chosen}, "scales": KEY_SCALES}
    journal = Journal(pieces(output), identity, resume)
    whole = Evaluation(model, tokenizer, ids, chosen, plan, journal)
    grid = [one for family in families.values() for one in family]
    curve = Evaluation(model, tokenizer, ids, grid, brief, journal)
    with bar() as progress:
        task = progress.add_task("", total=whole.cost + curve.cost)
        for evaluation in (whole, curve):
            evaluation.run(lambda what, cost: progress.update(task, description=what, advance=cost))
    found = whole.collected()[0]
    measured = {one["name"]: one for one in curve.collected()[0]}
    curves = {name: [point(measured[one.name]) for one in family] for name, family in families.items()}
    by_name = {one["name"]: one for one in found}
    curves[CALIBRATED] = [point(by_name[one.name]) for one in klt(place)]
    equal = equal_quality(by_name, curves)
    results.write(output, "evaluate", about, partial=False, methods=found, curves=curves, equal_quality=equal)
    journal.close()
    plot(found, curves, output.with_suffix(""))
    show_evaluation(found)
    for row in equal:
        for name, bits in row["curves"].items():
            screen.print(
                f"at the KL of {row['at']} ({row['coded_bits']:.2f} coded bits): {name} {bits['coded_bits']:.2f}"
            )


if __name__ == "__main__":
    typer.run(main)
