"""``kvcomp evaluate``: what compression costs a model, beside other methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcomp.cli.calibrate import calibration_for
from kvcomp.cli.common import (
    SHIPPED,
    SPEC_NAMES,
    CalibrationFile,
    Device,
    Dtype,
    Model,
    Resume,
    Seed,
    TextFile,
    bar,
    model_with_keys,
    plain_errors,
    quiet_loading,
    resumable,
    screen,
    writable,
)
from kvcomp.cli.tables import show_evaluation
from kvcomp.errors import InvalidInput

if TYPE_CHECKING:
    from kvcomp.calibration import Calibration

DEFAULT_BASELINES = ["kivi-4", "kivi-2"]


def evaluate(
    model: Model = None,
    spec: Annotated[list[str] | None, typer.Option(help=f"{SPEC_NAMES}; may be given again")] = None,
    calibration: CalibrationFile = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="What to compare with, such as kivi-2, fp8, hqq-4 or ./mine.py; may be given again"),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
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
    task_limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task \\[default: all]")] = None,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option("--json", help="Where the results go", callback=writable)] = Path(
        "kvcomp-evaluate.json"
    ),
    resume: Resume = False,
) -> None:
    """Measure what compression costs a model: fidelity, look-ups, tasks, bits and errors, against other methods.

    Without --spec: what was calibrated and tuned for the model, if it was, and the preset kvcomp; without --baseline:
    kivi-4 and kivi-2.
    """
    size = {
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
        with quiet_loading():
            from kvcomp.evaluate.evaluation import Evaluation, Plan
            from kvcomp.evaluate.models import backend_for, text_ids
            from kvcomp.integrations.transformers.models import positions
            from kvcomp.results import schema

            place, loaded, tokenizer = model_with_keys(model, dtype, device)
        found = calibration_for(place, loaded, tokenizer, spec or [], calibration)
        backend = backend_for(loaded)
        methods = _methods(place, spec, found, baseline, backend)
        with quiet_loading():
            plan = Plan.for_model(positions(loaded.config), **size)
            ids, source = text_ids(tokenizer, place, text)
            names = [part.strip() for part in (tasks or "").split(",") if part.strip()]
            harness = _harness(names) if names else None
        chosen = {"model": SHIPPED if model is None else model, "dtype": str(loaded.dtype), "text": source}
        about = schema.environment(backend == "gpu", **chosen, **vars(plan))
        identity = {key: about[key] for key in (*chosen, *vars(plan))}
        identity["backend"] = backend
        identity["methods"] = {one.name: one.settings() for one in methods}
        identity["tasks"] = [names, task_limit]

        evaluation: Evaluation | None = None

        def report(stopped: bool) -> None:
            if evaluation is None:  # stopped before there was anything to measure
                return
            found, missing = evaluation.collected(harness.names if harness is not None else [])
            schema.write(output, "evaluate", about, partial=missing, methods=found)
            show_evaluation(found)

        with resumable(output, identity, resume, report) as journal:
            evaluation = Evaluation(loaded, tokenizer, ids, methods, plan, journal)
            with bar() as progress:
                task = progress.add_task("", total=evaluation.cost)
                evaluation.run(lambda what, cost: progress.update(task, description=what, advance=cost))
            if harness is not None:  # it has progress bars of its own
                evaluation.run_tasks(harness, task_limit)
        screen.print(f"written to {output}", style="dim")


def _methods(
    place: str,
    specs: list[str] | None,
    calibration: Calibration | Path | None,
    baselines: list[str] | None,
    backend: str,
) -> list[Any]:
    """The uncompressed cache, kvcomp under each spec, and the baselines."""
    from kvcomp.evaluate.methods import baseline, default_specs, named_spec

    methods = [baseline("uncompressed")]
    if specs is None:
        methods += default_specs(place, backend)
    else:
        methods += [named_spec(place, one, calibration, backend) for one in specs]
    methods += [baseline(one) for one in (DEFAULT_BASELINES if baselines is None else baselines)]
    names = [one.name for one in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidInput(f"{', '.join(twice)} is named twice: give every method once")
    return methods


def _harness(names: list[str]) -> Any:
    """Tasks of lm-evaluation-harness. Raises InvalidInput if it is not installed, or has no such tasks."""
    try:
        from kvcomp.evaluate.tasks import Tasks
    except ImportError as error:
        raise InvalidInput(f"--tasks needs lm-evaluation-harness: pip install '.[eval]' ({error})") from None
    return Tasks(names)


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} must be numbers with commas between", param_hint="--lengths") from None
