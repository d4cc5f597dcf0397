"""``kvcomp tune``: the spec of fewest bits that keeps a model's quality."""

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
    text: TextFile = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of text")] = 4,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of each")] = None,
    scored_tokens: Annotated[int, typer.Option(min=2, help="Tokens scored after each")] = 256,
    lists: Annotated[int, typer.Option(min=0, help="Look-up lists that --keep looks at too")] = 4,
    seed: Seed = 7,
    output: Annotated[Path, typer.Option("--output", "-o", help="The spec file to write")] = Path("kvcomp.json"),
    figures: Annotated[Path | None, typer.Option("--json", help="Write what was measured to this file")] = None,
    resume: Resume = False,
) -> None:
    """Find the spec of fewest bits that keeps a model's quality, and say when not to compress it.

    Without --keep, --max-kl or --like: --like kivi-4. The spec file is what KVCompCache(spec="kvcomp.json") takes.
    """
    if sum(goal is not None for goal in (keep, max_kl, like)) > 1:
        raise typer.BadParameter("give one of --keep, --max-kl and --like")
    if max_kl is not None and not max_kl > 0:
        raise typer.BadParameter("--max-kl must be above 0: nothing lossy has no KL")
    goal = {"keep": keep, "max_kl": max_kl, "like": like if keep or max_kl or like else "kivi-4"}
    size = {"prompts": prompts, "prompt": prompt_tokens, "scored": scored_tokens, "lists": lists, "seed": seed}
    with plain_errors():
        _tune(model, goal, spec, text, size, output, figures, resume)


def _tune(
    name: str | None,
    goal: dict[str, Any],
    start: str,
    text: Path | None,
    size: dict[str, Any],
    output: Path,
    figures: Path | None,
    resume: bool,
) -> None:
    with quiet_loading():
        from dataclasses import asdict

        import numpy as np

        from kvcomp import disk
        from kvcomp.evaluate.evaluation import Plan
        from kvcomp.evaluate.methods import KVComp, baseline
        from kvcomp.evaluate.models import check_has_keys, load_model, positions, shipped_model, training_ids
        from kvcomp.evaluate.retrieval import quizzes
        from kvcomp.fit.advice import advise
        from kvcomp.fit.tune import Tuner
        from kvcomp.results import schema as results
        from kvcomp.results.journal import Journal

        place = name if name is not None else str(shipped_model())
        model, tokenizer = load_model(place)
        check_has_keys(model.config)
        base = KVComp(start)
        reference = None if goal["like"] is None else baseline(goal["like"])
        plan = Plan.for_model(positions(model.config), lengths=(), **size)
        ids, source = training_ids(tokenizer, place, text)
    need = plan.prompt + plan.scored
    if ids.size < need:
        raise InvalidInput(f"the text has {ids.size} tokens and {need} are needed: give a longer --text")
    rng = np.random.default_rng(plan.seed)
    begins = rng.integers(0, ids.size - need + 1, plan.prompts).tolist()
    asked = quizzes(tokenizer, rng, plan.lists, plan.prompt) if goal["keep"] is not None else []
    about = results.environment(
        model=SHIPPED if name is None else name,
        text=source,
        goal=goal,
        start=base.settings(),
        **{key: vars(plan)[key] for key in size},
    )
    identity = {key: about[key] for key in ("model", "text", "goal", "start", *size)}
    journal = Journal(partial(output), identity, resume)
    try:
        with bar() as progress:
            task = progress.add_task("")

            def advance(what: str, cost: float) -> None:
                progress.update(task, description=what, advance=cost)

            tuner = Tuner(model, ids, begins, plan.prompt, plan.scored, asked, base.spec, journal, advance)
            if goal["keep"] is not None:
                progress.update(task, total=tuner.cost_of_turning_points())
                found = tuner.turning_points(goal["keep"])
            else:
                progress.update(task, total=tuner.cost_of_allocation())
                most = goal["max_kl"] if reference is None else tuner.figures(reference.name, reference)["kl"]
                found = tuner.allocate(most)
            progress.update(task, description="advice")
            advice = advise(model, tuner.sample(0), KVComp(found.spec, "tuned"))
    except KeyboardInterrupt:
        errors.print(f"stopped; what is done is in {partial(output)}: the same command with --resume goes on")
        raise typer.Exit(130) from None
    before = {base.name: tuner.figures(f"start/{base.name}", base)}
    if reference is not None:
        before[reference.name] = tuner.figures(reference.name, reference)
    disk.write(output, [found.spec.to_json().encode() + b"\n"])
    if figures is not None:
        results.write(
            figures, "tune", about, spec=found.spec.to_json(), before=before, **found.figures, advice=asdict(advice)
        )
    journal.close()
    table = Table(title=f"on {source}", title_justify="left")
    for header in ("", "coded bits", "total bits", "KL, nats", "top-1"):
        table.add_column(header, justify="left" if not header else "right")
    for label, row in [(f"tuned: {output}", found.figures), *before.items()]:
        numbers = (
            f"{row['coded_bits']:.2f}",
            f"{row['total_bits']:.2f}",
            f"{row['kl']:.2e}",
            f"{100 * row['top1']:.1f} %",
        )
        table.add_row(label, *numbers)
    screen.print(table)
    if "kept" in found.figures:
        screen.print(f"together they keep {100 * found.figures['kept']:.1f} % of the score", highlight=False)
    for sentence in advice.sentences:
        screen.print(sentence, highlight=False)
