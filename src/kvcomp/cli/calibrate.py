"""``kvcomp calibrate``: makes the calibration that the preset kvcomp-klt needs of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcomp.cli.common import MODEL_HELP, Resume, bar, plain_errors, quiet_loading, resumable
from kvcomp.cli.tables import show_calibration


def calibrate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .kvcal file to write")],
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text like what the model will read [default: the model writes some]",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=4, help="Windows of text to measure on")] = 12,
    prompt_tokens: Annotated[int, typer.Option(min=256, help="Tokens of each that are compressed")] = 2048,
    scored_tokens: Annotated[int, typer.Option(min=16, help="Tokens of each that are predicted from them")] = 256,
    resume: Resume = False,
) -> None:
    """Measure a model on text and write what the preset kvcomp-klt needs of it: transforms, steps and codebooks.

    The quality levels near-lossless, balanced and aggressive are then as good, in KL on this text, as KIVI-style
    quantisation at 4, 3 and 2 bits.
    """
    with plain_errors():
        with quiet_loading():
            from kvcomp.evaluate.models import load_model, text_ids
            from kvcomp.fit.calibrate import Calibrator
            from kvcomp.fit.windows import Settings

            loaded, tokenizer = load_model(model)
            ids = None if text is None else text_ids(tokenizer, model, text)[0]
        settings = Settings(windows, prompt_tokens, scored_tokens)
        identity = {"model": model, "text": str(text), "tokens": 0 if ids is None else ids.size, **vars(settings)}
        with resumable(output, identity, resume) as journal:
            with bar() as progress:
                task = progress.add_task("", total=None)

                def tell(what: str, done: int, total: int | None) -> None:
                    progress.update(task, description=what, completed=done, total=total)

                calibration = Calibrator(loaded.float(), ids, settings, journal, tell).run(
                    text.name if text else "written by the model"
                )
            calibration.write(output)
        show_calibration(f"{output}: {len(calibration.content)} bytes", calibration.about.levels)
