"""``kvcomp calibrate``: makes the calibration that the preset kvcomp-klt needs of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvcomp.cli.common import Resume, bar, errors, partial, plain_errors, quiet_loading, screen
from kvcomp.errors import KVCompError


def calibrate(
    model: Annotated[str, typer.Argument(help="Model directory or hub name")],
    text: Annotated[Path, typer.Option(help="UTF-8 text like what the model will read", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .kvcal file to write")],
    windows: Annotated[int, typer.Option(min=4, help="Windows of text to measure on")] = 24,
    prompt_tokens: Annotated[int, typer.Option(min=256, help="Tokens of each that are compressed")] = 2048,
    scored_tokens: Annotated[int, typer.Option(min=16, help="Tokens of each that are predicted from them")] = 256,
    resume: Resume = False,
) -> None:
    """Measure a model on text and write what the preset kvcomp-klt needs of it: transforms, steps and codebooks.

    The quality levels near-lossless, balanced and aggressive are then as good, in KL on this text, as KIVI-style quantisation at 4, 3 and 2 bits.
    """
    with plain_errors():
        _calibrate(model, text, output, windows, prompt_tokens, scored_tokens, resume)


def _calibrate(name: str, text: Path, output: Path, windows: int, prompt: int, scored: int, resume: bool) -> None:
    with quiet_loading():
        from kvcomp.evaluate.models import load_model, text_ids
        from kvcomp.fit.calibrate import Calibrator
        from kvcomp.fit.windows import Settings
        from kvcomp.results.journal import Journal

        model, tokenizer = load_model(name)
        ids, _ = text_ids(tokenizer, name, text)
    settings = Settings(windows, prompt, scored)
    identity = {"model": name, "text": str(text), "tokens": ids.size, **vars(settings)}
    journal = Journal(partial(output), identity, resume)
    statistics = output.with_name(output.name + ".statistics")
    if not resume:
        statistics.unlink(missing_ok=True)
    try:
        with bar() as progress:
            task = progress.add_task("", total=None)
            calibrator = Calibrator(
                model.float(),
                ids,
                settings,
                journal,
                lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
            )
            calibration = calibrator.run(statistics, text.name)
    except KeyboardInterrupt:
        errors.print("stopped; the same command with --resume goes on from here")
        raise typer.Exit(130) from None
    except KVCompError:
        if not journal.pieces:
            journal.close()  # refused before anything was measured
        raise
    calibration.write(output)
    journal.close()
    statistics.unlink(missing_ok=True)
    table = Table(
        "level",
        "as good as",
        "KL on the text",
        "of that",
        "reached",
        title=f"{output}: {len(calibration.content)} bytes",
    )
    for level, about in calibration.about.levels.items():
        kl, wanted = about["kl"], about["kl_of"]
        table.add_row(
            level,
            about["as_good_as"],
            f"{kl['text']:.2e}, repeated {kl['repeated']:.2e}",
            f"{wanted['text']:.2e}, repeated {wanted['repeated']:.2e}",
            "yes" if about["reached"] else "no: the best there is",
        )
    screen.print(table)
