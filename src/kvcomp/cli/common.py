"""What commands share: where they print, how they fail, and how long ones stop and go on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from kvcomp.errors import KVCompError
from kvcomp.spec import CALIBRATED_CODINGS, PRESETS, CodecSpec, is_calibrated

if TYPE_CHECKING:
    from kvcomp.results.journal import Journal

SHIPPED = "tiny-lm"
SPEC_NAMES = f"{', '.join(PRESETS)}, {', '.join(f'{name}:LEVEL' for name in CALIBRATED_CODINGS)} or a spec.json"

MODEL_HELP = "Model directory, hub name, GGUF file or its folder"
Model = Annotated[str | None, typer.Argument(help=f"{MODEL_HELP} \\[default: the shipped one]")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16 or float16 \\[default: of the weights; float32 if a GGUF quantises]"
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Where the model lies: cpu, or cuda, where kvcomp is untried \\[default: cpu]"),
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text", help="UTF-8 text to score \\[default: text the shipped model never saw, or Python's manual]"
    ),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help=f"The .kvcal file of {' and '.join(CALIBRATED_CODINGS)} \\[default: model.kvcal beside the model]",
        exists=True,
        dir_okay=False,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a run with the same options was stopped")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the look-ups")]

screen, errors = Console(), Console(stderr=True)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@contextmanager
def plain_errors() -> Iterator[None]:
    """A clear message and exit code 1 instead of a traceback, for what is known to go wrong."""
    from safetensors import SafetensorError

    try:
        yield
    except (KVCompError, OSError, MemoryError, SafetensorError) as error:
        say_error(f"{type(error).__name__}: {error}")
        raise typer.Exit(1) from None
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        say_error("there is not enough memory for these tensors")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("stopped")
        raise typer.Exit(130) from None


def say(message: str, console: Console = screen, style: str | None = None) -> None:
    """Print a message as it is: a path may hold anything."""
    console.print(_shown(message, console), style=style, markup=False, highlight=False, soft_wrap=True)


def say_error(message: str) -> None:
    """Print what went wrong to stderr."""
    errors.print(Text.assemble(("error: ", "bold red"), _shown(message, errors)), highlight=False, soft_wrap=True)


def _shown(message: str, console: Console) -> str:
    """A message without what a terminal obeys or cannot encode: names and headers of files are others' words."""
    plain = CONTROL.sub(lambda found: ascii(found[0])[1:-1], message)
    return plain.encode(console.encoding, "backslashreplace").decode(console.encoding)


def writable(path: Path | None) -> Path | None:
    """Where a command will write a file, refused before any work if it cannot be written; ``~`` is the home folder."""
    target = anywhere(path)
    if target is None:
        return None
    from kvcomp.disk import is_other

    if is_other(target):
        raise typer.BadParameter(f"{path} is a pipe or a device: name a file")
    return target


def anywhere(path: Path | None) -> Path | None:
    """The same for what is written at once, which may go to a pipe or a device such as /dev/stdout."""
    if path is None:
        return None
    if str(path) == "-":
        raise typer.BadParameter("- does not stand for the standard output here: name a file")
    from kvcomp.disk import place  # NumPy is not loaded for --help

    try:
        target = place(path)
    except KVCompError as error:
        raise typer.BadParameter(str(error)) from None
    if target.is_dir():
        raise typer.BadParameter(f"{path} is a folder: name a file in it")
    if not target.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {target.parent}: make it first")
    return target


def in_times(ratio: float) -> str:
    """How much smaller something is than something ``ratio`` times as large or, of few tokens, how much larger."""
    return f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger"


def check_spec(name: str | None) -> None:
    """Refuse a name that is no spec as a wrong use of the command, before anything is loaded."""
    if name is None or is_calibrated(name):
        return
    try:
        CodecSpec.resolve(name)
    except KVCompError as error:
        raise typer.BadParameter(str(error), param_hint="--spec") from None


@contextmanager
def quiet_loading() -> Iterator[None]:
    """A status line while torch and transformers load, without their own progress bars."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with screen.status("loading"):
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        yield


def model_with_keys(name: str | None, dtype: str | None, device: str | None = None) -> tuple[str, Any, Any]:
    """Place, model and tokenizer; without a name of the shipped one. Raises InvalidInput or UnsupportedModel."""
    from kvcomp.evaluate.models import check_has_keys, load_model, shipped_model

    place = name if name is not None else str(shipped_model())
    model, tokenizer = load_model(place, dtype, device)
    check_has_keys(model.config)
    return place, model, tokenizer


def bar(**options: Any) -> Progress:
    """A progress bar with the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=screen, **{"transient": True, **options})


@contextmanager
def resumable(
    output: Path, identity: Mapping[str, Any], resume: bool, report: Callable[[bool], None] = lambda stopped: None
) -> Iterator[Journal]:
    """A run whose finished pieces outlive Ctrl-C.

    ``identity`` tells runs apart: --resume takes the pieces of an equal one. ``report(stopped)`` writes what there is,
    at the end or when stopped; then the command exits with 130 and says how to go on.
    """
    from kvcomp.results.journal import Journal, pieces

    path = pieces(output)
    journal, stopped = Journal(path, identity, resume), False
    try:
        yield journal
    except KeyboardInterrupt:
        stopped = True
    except KVCompError:
        journal.refused()
        raise
    report(stopped)
    if stopped:
        say(f"stopped; what is done is in {path}: the same command with --resume goes on", errors)
        raise typer.Exit(130)
    journal.close()
