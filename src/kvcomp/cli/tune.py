"""``kvcomp tune``: the spec of fewest bits that keeps a model's quality."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcomp.cli.common import (
    SHIPPED,
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
from kvcomp.cli.tables import show_tuning
from kvcomp.errors import InvalidInput
from kvcomp.spec import PAGE_TOKENS, PRESETS, is_calibrated


def tune(
    model: Model = None,
    keep: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Largest scales of K and V that keep this share of the score")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Fewest bits within this KL, nats a token; scales for each layer")
    ] = None,
    like: Annotated[
        str | None, typer.Option(help="Fewest bits within the KL of this method, such as kivi-4; scales for each layer")
    ] = None,
    spec: Annotated[str, typer.Option(help=f"What to start from: {', '.join(PRESETS)} or a spec.json")] = "kvcomp",
    dtype: Dtype = None,
    text: TextFile = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of text")] = 4,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of each")] = None,
    scored_tokens: Annotated[int, typer.Option(min=2, help="Tokens scored after each")] = 256,
    lists: Annotated[int, typer.Option(min=0, help="Look-up lists that --keep looks at too")] = 4,
    seed: Seed = 7,
    output: Annotated[Path, typer.Option("--output", "-o", help="The spec file to write", callback=writable)] = Path(
        "kvcomp.json"
    ),
    figures: Annotated[
        Path | None, typer.Option("--json", help="Write what was measured to this file", callback=writable)
    ] = None,
    resume: Resume = False,
) -> None:
    """Find the spec of fewest bits that keeps a model's quality, and say when not to compress it.

    Without --keep, --max-kl or --like: --like kivi-4. The spec file is what KVCompCache(spec="kvcomp.json") takes.
    """
    if sum(goal is not None for goal in (keep, max_kl, like)) > 1:
        raise typer.BadParameter("give one of --keep, --max-kl and --like")
    if is_calibrated(spec):
        raise typer.BadParameter(
            "a calibration has its own levels: start from a preset or a spec.json", param_hint="--spec"
        )
    if max_kl is not None and not max_kl > 0:
        raise typer.BadParameter("--max-kl must be above 0: nothing lossy has no KL")
    if keep is None and max_kl is None and like is None:
        like = "kivi-4"
    goal: dict[str, Any] = {"keep": keep, "max_kl": max_kl, "like": like}
    size: dict[str, Any] = {
        "prompts": prompts,
        "prompt": prompt_tokens,
        "scored": scored_tokens,
        "lists": lists,
        "seed": seed,
    }
    with plain_errors():
        with quiet_loading():
            from kvcomp import disk
            from kvcomp.evaluate.evaluation import Plan
            from kvcomp.evaluate.methods import KVComp, baseline
            from kvcomp.evaluate.models import training_ids
            from kvcomp.fit.advice import advise
            from kvcomp.fit.tune import Tuner
            from kvcomp.integrations.transformers.models import positions
            from kvcomp.results import schema

            place, loaded, tokenizer = model_with_keys(model, dtype)
            start, reference = KVComp(spec), None if goal["like"] is None else baseline(str(goal["like"]))
            plan = Plan.for_model(positions(loaded.config), lengths=(), **size)
            least = start.spec.sinks + PAGE_TOKENS + start.spec.window
            if plan.prompt < least:
                raise InvalidInput(
                    f"nothing of {plan.prompt} tokens is compressed: give --prompt-tokens {least} or more"
                )
            ids, source = training_ids(tokenizer, place, text)
            begins, asked = _drawn(tokenizer, ids, plan, goal["keep"] is not None)
        about = schema.environment(
            model=SHIPPED if model is None else model,
            dtype=str(loaded.dtype),
            text=source,
            goal=goal,
            start=start.settings(),
            **{key: vars(plan)[key] for key in size},
        )
        identity = {key: about[key] for key in ("model", "dtype", "text", "goal", "start", *size)}
        with resumable(output, identity, resume) as journal:
            with bar() as progress:
                task = progress.add_task("")

                def advance(what: str, cost: float) -> None:
                    progress.update(task, description=what, advance=cost)

                tuner = Tuner(
                    model=loaded, ids=ids, begins=begins, prompt=plan.prompt, scored=plan.scored, quizzes=asked,
                    base=start.spec, journal=journal, advance=advance,
                )  # fmt: skip
                if goal["keep"] is not None:
                    progress.update(task, total=tuner.cost_of_turning_points())
                    found = tuner.turning_points(goal["keep"])
                else:
                    progress.update(task, total=tuner.cost_of_allocation())
                    most = goal["max_kl"] if reference is None else tuner.figures(reference.name, reference)["kl"]
                    found = tuner.allocate(most)
                progress.update(task, description="advice")
                advice = advise(loaded, tuner.sample(0), KVComp(found.spec, "tuned"))
            before = {start.name: tuner.figures(f"start/{start.name}", start)}
            if reference is not None:
                before[reference.name] = tuner.figures(reference.name, reference)
            disk.write(output, [found.spec.to_json().encode() + b"\n"])
            if figures is not None:
                content = {"spec": found.spec.to_json(), "before": before, **found.figures, "advice": asdict(advice)}
                schema.write(figures, "tune", about, **content)
        show_tuning({f"tuned: {output}": found.figures, **before}, source)
        for sentence in advice.sentences:
            screen.print(sentence, highlight=False)


def _drawn(tokenizer: Any, ids: Any, plan: Any, with_lookups: bool) -> tuple[list[int], list[Any]]:
    """Where the samples begin in the text, and the look-ups. Raises InvalidInput if the text is too short."""
    import numpy as np

    from kvcomp.evaluate.retrieval import quizzes

    need = plan.prompt + plan.scored
    if ids.size < need:
        raise InvalidInput(f"the text has {ids.size} tokens and {need} are needed: give a longer --text")
    rng = np.random.default_rng(plan.seed)
    begins: list[int] = rng.integers(0, ids.size - need + 1, plan.prompts).tolist()
    return begins, quizzes(tokenizer, rng, plan.lists, plan.prompt) if with_lookups else []
