"""``kvcomp bench``: times beside those of an uncompressed cache."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcomp.cli.common import (
    SPEC_NAMES,
    CalibrationFile,
    Resume,
    bar,
    check_spec,
    plain_errors,
    quiet_loading,
    resumable,
    screen,
    writable,
)
from kvcomp.cli.tables import show_bench

PARTS = "attention", "codec", "generate", "growth"
SAME = "device", "kvcomp", "torch", "commit", "backend", "spec", "model", "parts", "threads"  # of runs that may go on


Numbers = list[int] | None


def bench(
    model: Annotated[str | None, typer.Argument(help="Model to generate with \\[default: the shipped one]")] = None,
    spec: Annotated[str, typer.Option(help=f"{SPEC_NAMES}; kvcomp-klt for generate and growth")] = "kvcomp",
    calibration: CalibrationFile = None,
    part: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(PARTS)} \\[default: all]; may be repeated")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="The full grid: longer contexts, more rounds, calls from rest")
    ] = False,
    context: Annotated[
        Numbers, typer.Option(help="Tokens in the cache of attention; may be repeated, as the next four")
    ] = None,
    batch: Annotated[Numbers, typer.Option(help="Sequences")] = None,
    group: Annotated[Numbers, typer.Option(help="Queries a KV head (G)")] = None,
    head_dim: Annotated[Numbers, typer.Option(help="Channels of a head (D)")] = None,
    threads: Annotated[Numbers, typer.Option(help="Threads \\[default: 1, and as many as torch uses]")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads", min=1)] = None,
    prompt_tokens: Annotated[Numbers, typer.Option(help="Prompt tokens of generate; may be repeated")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate", min=2)] = None,
    rounds: Annotated[int | None, typer.Option(help="Most rounds of a measurement", min=5)] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the results go; the plots beside it", callback=writable)
    ] = Path("kvcomp-bench.json"),
    resume: Resume = False,
) -> None:
    """Time decode attention, encoding, decompression and generation, with and without compression.

    Every kernel is held against the float64 reference on the data it is timed with; no time is given of one that is
    wrong.
    The defaults take under two minutes on two cores.
    """
    parts = [name for name in PARTS if part is None or name in part]
    if part and set(part) - set(PARTS):
        raise typer.BadParameter(f"the parts are {', '.join(PARTS)}", param_hint="--part")
    check_spec(spec)
    given: dict[str, Any] = {
        "contexts": context,
        "batches": batch,
        "groups": group,
        "head_dims": head_dim,
        "threads": threads,
        "prompts": prompt_tokens,
    }
    given = {name: tuple(numbers) for name, numbers in given.items() if numbers}
    given |= {
        name: n for name, n in (("kv_heads", kv_heads), ("new_tokens", new_tokens), ("rounds", rounds)) if n is not None
    }
    with plain_errors():
        with quiet_loading():
            from kvcomp.bench import cases
            from kvcomp.evaluate.models import load_model, shipped_model, spec_for
            from kvcomp.results import schema

            place = model if model is not None else shipped_model()
            loaded = load_model(place)[0] if {"generate", "growth"} & set(parts) else None
            coding = spec_for(place, spec, calibration)
        grid = replace(cases.FULL if full else cases.QUICK, **given)
        todo = cases.cases(grid, coding, parts, loaded, full)
        about = schema.environment(
            **cases.parameters(grid, coding[0]), named_spec=spec, model=Path(place).name, parts=parts
        )
        identity = {**{name: about[name] for name in SAME}, **asdict(grid), "full": full}

        def content() -> dict[str, Any]:
            return {part: journal.some(cases.key(case) for case in todo if case.part == part) for part in parts}

        def report(stopped: bool) -> None:
            schema.write(output, "bench", about, partial=stopped, **content())
            show_bench(content())

        # Without auto_refresh: a thread that draws would count in the times.
        progress = bar(transient=False, auto_refresh=False, speed_estimate_period=600)
        with resumable(output, identity, resume, report) as journal, progress:
            task = progress.add_task("", total=sum(case.cost for case in todo))
            for case in todo:
                progress.update(task, description=case.part, refresh=True)
                journal.piece(cases.key(case), partial(case.measure, grid))
                progress.update(task, advance=case.cost, refresh=True)
        _say_where(about)
        _draw(output, content())


def _say_where(about: dict[str, Any]) -> None:
    """On what machine the times were taken, and what could not be compared."""
    if about["load_average"] > 1:
        busy = f"the load average was {about['load_average']:.1f}: on a machine at rest the times are other ones"
        screen.print(busy, style="yellow")
    device = f"{about['device']}, {about['llvm_cpu']}, torch {about['torch']} with {about['torch_capability']}"
    screen.print(f"kvcomp's backend: {about['backend']}; {device}", highlight=False)
    for method, why in about["not_compared"].items():
        screen.print(f"{method}: {why}", style="dim")


def _draw(output: Path, found: dict[str, Any]) -> None:
    """The picture beside the results, where matplotlib is there to draw it."""
    if not (found.get("attention") or found.get("growth")):
        return
    try:
        from kvcomp.results import plots
    except ImportError:
        screen.print(f"the results are in {output}; for pictures: pip install '.[plots]'", markup=False)
        return
    pictures = []
    if found.get("attention"):
        pictures += plots.save(plots.speed_up(found["attention"]), output.with_suffix(""))
    for row in found.get("growth", []):
        stem = output.with_name(f"{output.stem}-memory")
        pictures += plots.save(plots.memory_growth(plots.growth_series(row["memory"])), stem)
    screen.print(f"results: {output}; {', '.join(map(str, pictures))}", markup=False, highlight=False)
