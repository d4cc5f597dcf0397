"""What all commands share: where they print, how they fail, the options and bars of long ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from kvcomp.errors import KVCompError
from kvcomp.spec import CodecSpec

screen, errors = Console(), Console(stderr=True)


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


def say(message: str) -> None:
    screen.print(message, markup=False, highlight=False, soft_wrap=True)  # a path may hold anything


def say_error(message: str) -> None:
    errors.print(Text.assemble(("error: ", "bold red"), message), highlight=False, soft_wrap=True)


def named_spec(name: str) -> CodecSpec:
    """The spec that an option names; a name that is none is a wrong use of the command."""
    try:
        return CodecSpec.resolve(name)
    except KVCompError as error:
        raise typer.BadParameter(str(error), param_hint="--spec") from None


Resume = Annotated[bool, typer.Option("--resume", help="Go on where a run with the same options was stopped")]


def partial(output: Path) -> Path:
    """Where an interrupted run leaves its pieces."""
    return output.with_name(output.name + ".partial")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """A status line while torch and transformers load, without their own progress bars."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with screen.status("loading"):
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        yield


def bar() -> Progress:
    """A progress bar with the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=screen, transient=True)


SHIPPED = "tiny-lm"


Model = Annotated[str | None, typer.Argument(help="Model directory or hub name [default: the shipped one]")]


TextFile = Annotated[
    Path | None,
    typer.Option("--text", help="UTF-8 text to score [default: text the shipped model never saw, or Python's manual]"),
]


Seed = Annotated[int, typer.Option(help="Seed of the look-ups")]
