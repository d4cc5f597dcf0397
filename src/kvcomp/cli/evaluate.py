"""The commands that measure quality: ``kvcomp evaluate`` and ``kvcomp tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kvcomp.cli.common import (
    SHIPPED,
    Model,
    Resume,
    Seed,
    TextFile,
    bar,
    errors,
    partial,
    plain_errors,
    quiet_loading,
    screen,
)
from kvcomp.errors import InvalidInput
from kvcomp.spec import PRESETS

DEFAULT_BASELINES = ["kivi-4", "kivi-2"]


def evaluate(
    model: Model = None,
    spec: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(PRESETS)}, kvcomp-klt:LEVEL or a spec.json; may be given again"),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="The .kvcal of the spec kvcomp-klt [default: model.kvcal beside the model]")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="What to compare with, such as kivi-2, fp8, hqq-4 or ./mine.py; may be given again"),
    ] = None,
    text: TextFile = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Prompts to score after, teacher-forced")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of each")] = None,
    scored_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens scored after each")] = None,
    streams: Annotated[int | None, typer.Option(min=1, help="Texts to stream through a moving window")] = None,
    streamed_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each")] = None,
    lengths: Annotated[str | None, typer.Option(help="Context lengths of the look-ups, such as 1024,2048")] = None,
    lists: Annotated[int | None, typer.Option(min=0, help="Look-up lists of each length")] = None,
    passkeys: Annotated[int | None, typer.Option(min=0, help="Passkeys of each length and depth")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, such as gsm8k,coqa, or .yaml files")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task [default: all]")] = None,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option("--json", help="Where the results go")] = Path("kvcomp-evaluate.json"),
    resume: Resume = False,
) -> None:
    """Measure what compression costs a model: fidelity, look-ups, tasks, bits and errors, against other methods.

    Without --spec: what was calibrated and tuned for the model, if it was, and the preset kvcomp; without --baseline: kivi-4 and kivi-2.
    """
    plan = {
        "prompts": prompts,
        "prompt": prompt_tokens,
        "scored": scored_tokens,
        "streams": streams,
        "streamed": streamed_tokens,
        "lengths": _numbers(lengths),
        "lists": lists,
        "passkeys": passkeys,
        "seed": seed,
    }
    with plain_errors():
        _evaluate(model, spec, calibration, baseline, text, plan, _names(tasks), task_limit, output, resume)


def _evaluate(
    name: str | None,
    specs: list[str] | None,
    calibration: Path | None,
    baselines: list[str] | None,
    text: Path | None,
    chosen: dict[str, Any],
    tasks: list[str],
    task_limit: int | None,
    output: Path,
    resume: bool,
) -> None:
    with quiet_loading():
        from kvcomp.evaluate.evaluation import Evaluation, Plan
        from kvcomp.evaluate.methods import baseline, default_specs, named_spec
        from kvcomp.evaluate.models import check_has_keys, load_model, positions, shipped_model, text_ids
        from kvcomp.results import schema as results
        from kvcomp.results.journal import Journal

        place = name if name is not None else str(shipped_model())
        model, tokenizer = load_model(place)
        check_has_keys(model.config)
        methods = [baseline("uncompressed")]
        methods += default_specs(place) if specs is None else [named_spec(place, one, calibration) for one in specs]
        methods += [baseline(one) for one in (DEFAULT_BASELINES if baselines is None else baselines)]
        twice = sorted({one.name for one in methods if [other.name for other in methods].count(one.name) > 1})
        if twice:
            raise InvalidInput(f"{', '.join(twice)} is named twice: give every method once")
        plan = Plan.for_model(positions(model.config), **chosen)
        ids, source = text_ids(tokenizer, place, text)
        harness = _harness(tasks) if tasks else None
    about = results.environment(model=SHIPPED if name is None else name, text=source, **vars(plan))
    identity = {key: about[key] for key in ("model", "text", *vars(plan))}
    identity["methods"] = {one.name: one.settings() for one in methods}
    identity["tasks"] = [tasks, task_limit]
    journal = Journal(partial(output), identity, resume)
    evaluation = Evaluation(model, tokenizer, ids, methods, plan, journal)
    stopped = False
    try:
        with bar() as progress:
            task = progress.add_task("", total=evaluation.cost)
            evaluation.run(lambda what, cost: progress.update(task, description=what, advance=cost))
        if harness is not None:  # it has progress bars of its own
            evaluation.run_tasks(harness, task_limit)
    except KeyboardInterrupt:
        stopped = True
    found, missing = evaluation.collected(harness.names if harness is not None else [])
    results.write(output, "evaluate", about, partial=missing, methods=found)
    show(found, plan.lengths)
    if stopped:
        errors.print(f"stopped; what is done is in {partial(output)}: the same command with --resume goes on")
        raise typer.Exit(130)
    journal.close()
    screen.print(f"written to {output}", style="dim")


def _harness(names: list[str]) -> Any:
    """Tasks of lm-evaluation-harness. Raises InvalidInput if it is not installed, or has no such tasks."""
    try:
        from kvcomp.evaluate.tasks import Tasks
    except ImportError as error:
        raise InvalidInput(f"--tasks needs lm-evaluation-harness: pip install 'kvcomp[eval]' ({error})") from None
    return Tasks(names)


def show(methods: list[dict[str, Any]], lengths: tuple[int, ...]) -> None:
    """The results as tables."""
    table = Table(title="bits per value, and the distance from the uncompressed cache", title_justify="left")
    table.add_column("method", no_wrap=True)
    for header in ("coded\nbits", "total\nbits", "KL, nats", "top-1", "perplexity\nchange", "KL\nstreaming"):
        table.add_column(header, justify="right")
    for one in methods:
        forced, moving = one["fidelity"].get("teacher_forced"), one["fidelity"].get("streaming")
        if forced is None:
            continue
        held = one["memory"]["teacher_forced"]
        table.add_row(
            one["name"],
            f"{held['coded_bits']:.2f}" if held["sealed_values"] else "",
            f"{held['total_bits']:.2f}",
            with_error(forced["kl"]),
            f"{100 * forced['top1']['mean']:.1f} %",
            f"{forced['perplexity'] - forced['perplexity_uncompressed']:+.3f}",
            f"{moving['kl']['mean']:.1e}" if moving else "",
        )
    screen.print(table)
    for one in methods:
        if "failed" in one:
            first, why = next(iter(one["failed"].items()))
            screen.print(
                f"{one['name']} failed {len(one['failed'])} times, first at {first}: {why}",
                highlight=False,
                markup=False,
            )
    asked = [one for one in methods if one.get("retrieval")]
    if asked:
        right = Table(title="look-ups right", title_justify="left")
        right.add_column("method", no_wrap=True)
        kinds = sorted({(cell["task"], cell["tokens"]) for cell in asked[0]["retrieval"]})
        for task, tokens in kinds:
            right.add_column(f"{task}\n{tokens:,}", justify="right")
        for one in asked:
            right.add_row(one["name"], *(_right(one["retrieval"], task, tokens) for task, tokens in kinds))
        screen.print(right)
    scored = [one for one in methods if one.get("tasks")]
    for name in scored[0]["tasks"] if scored else ():
        found = Table(title=name, title_justify="left")
        found.add_column("method", no_wrap=True)
        for metric in scored[0]["tasks"][name]:
            found.add_column(metric, justify="right")
        for one in scored:
            figures = one["tasks"].get(name, {}).values()
            found.add_row(one["name"], *(_score(figure) for figure in figures))
        screen.print(found)
    for one in methods:
        if one.get("suffering") and one["name"] != "uncompressed":
            screen.print(_worst(one), highlight=False)


def with_error(figure: dict[str, Any]) -> str:
    error = figure["standard_error"]
    return f"{figure['mean']:.1e}" + (f" ± {error:.0e}" if error else "")


def _score(figure: dict[str, Any]) -> str:
    error = figure["standard_error"]
    return f"{figure['mean']:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _right(cells: list[dict[str, Any]], task: str, tokens: int) -> str:
    of = [cell for cell in cells if (cell["task"], cell["tokens"]) == (task, tokens)]
    asked = sum(cell["asked"] for cell in of)
    return f"{100 * sum(cell['right'] for cell in of) / asked:.1f} %" if asked else ""


def _worst(one: dict[str, Any]) -> str:
    """The tensors that cost most, and the head within, in words."""
    total = sum(max(0.0, row["kl"]) for row in one["suffering"])
    parts = []
    for row in one["suffering"][:2]:
        heads = row.get("heads")
        head = f", most by head {max(range(len(heads)), key=heads.__getitem__)}" if heads and len(heads) > 1 else ""
        share = f"{100 * max(0.0, row['kl']) / total:.0f} %" if total > 0 else "none"
        parts.append(f"{row['kind']} of layer {row['layer']} ({share} of the KL{head})")
    return f"{one['name']} suffers most in {' and '.join(parts)}"


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} must be numbers with commas between", param_hint="--lengths") from None


def _names(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text else []
