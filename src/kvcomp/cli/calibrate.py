"""``kvcomp calibrate``: makes the calibration that the preset kvcomp-klt needs of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcomp.cli.common import MODEL_HELP, Device, Resume, bar, plain_errors, quiet_loading, resumable, say, writable
from kvcomp.cli.tables import show_calibration
from kvcomp.spec import is_calibrated

if TYPE_CHECKING:
    from kvcomp.calibration import Calibration
    from kvcomp.fit.windows import Tell


def calibrate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The .kvcal file to write \\[default: one in the user's cache folder]",
            callback=writable,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text like what the model will read \\[default: the model writes some]",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=4, help="Windows of text to measure on")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=256, help="Tokens of each that are compressed")] = 2048,
    scored_tokens: Annotated[int, typer.Option(min=16, help="Tokens of each that are predicted from them")] = 128,
    context: Annotated[
        int | None,
        typer.Option(
            min=256,
            help="Tokens that it must hold for, if positions are rotary: fewer take fewer bits "
            "\\[default: as many as the model allows]",
        ),
    ] = None,
    device: Device = None,
    resume: Resume = False,
) -> None:
    """Measure a model on text and write what the preset kvcomp-klt needs of it: transforms, steps and codebooks.

    The quality levels near-lossless, balanced and aggressive are then as good, in KL on this text and on sources of
    installed packages, as KIVI-style quantisation at 4, 3 and 2 bits. Other commands find the file in the cache folder
    by themselves.
    """
    if output is None and text is not None:
        raise typer.BadParameter("with --text give --output too: the cache folder is for text that the model writes")
    with plain_errors():
        with quiet_loading():
            from kvcomp.evaluate.models import load_model, text_ids
            from kvcomp.fit.cached import cached_path
            from kvcomp.fit.cached import calibrate as cached
            from kvcomp.fit.calibrate import Calibrator
            from kvcomp.fit.sources import source_windows
            from kvcomp.fit.windows import Settings

            loaded, tokenizer = load_model(model, device=device)
            ids = None if text is None else text_ids(tokenizer, model, text)[0]
        settings = Settings(windows, prompt_tokens, scored_tokens, context=context)
        if output is None:
            with telling() as tell:
                calibration = cached(loaded, settings, tell, tokenizer)
            _show(cached_path(loaded, settings, True), calibration)
            return
        identity = {"model": model, "text": str(text), "tokens": 0 if ids is None else ids.size, **vars(settings)}
        sources = source_windows(tokenizer, settings)
        identity["sources"] = len(sources)
        with resumable(output, identity, resume) as journal:
            with telling() as tell:
                calibrator = Calibrator(loaded.float(), ids, settings, journal, tell, sources)
                calibration = calibrator.run(text.name if text else "written by the model")
            calibration.write(output)
        _show(output, calibration)


def _show(path: Path, calibration: Calibration) -> None:
    say(f"{path}: {len(calibration.content):,} bytes")
    show_calibration(calibration.about.levels)


@contextmanager
def telling() -> Iterator[Tell]:
    """A progress bar for what takes long."""
    with bar() as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def calibration_for(
    place: str, model: Any, tokenizer: Any, specs: Sequence[str | None], given: Path | None
) -> Calibration | Path | None:
    """What the specs need: as given, beside the model, or from the user's cache folder, made if it is not there."""
    from kvcomp.evaluate.models import calibration_beside

    if given is not None or not any(map(is_calibrated, specs)):
        return given
    if beside := calibration_beside(place):
        return beside
    from kvcomp.fit.cached import calibrate as cached

    with telling() as tell:
        return cached(model, tell=tell, tokenizer=tokenizer)
