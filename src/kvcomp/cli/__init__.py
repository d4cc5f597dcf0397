"""The command line. Each command is a function in a module of its subject."""

from __future__ import annotations

import inspect
import os
import re
import sys

try:
    import typer

    from kvcomp.cli import bench, calibrate, evaluate, files, generate, report, tune
    from kvcomp.cli.common import say_error
except ModuleNotFoundError as error:
    if error.name not in ("rich", "typer"):
        raise
    sys.exit("error: the command kvcomp needs typer and rich: pip install '.[cli]'")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Run language models from a compressed KV cache.\n\nStart here: [bold]kvcomp generate --compare[/bold]",
)
for _command in (
    generate.generate,
    evaluate.evaluate,
    tune.tune,
    calibrate.calibrate,
    files.compress,
    files.decompress,
    files.inspect,
    files.verify,
    bench.bench,
    report.report,
):
    # A line break in a docstring is a space, in later paragraphs too.
    app.command(help=re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(_command) or ""))(_command)


def main() -> None:
    """Entry point of the command ``kvcomp``."""
    try:
        app()
    except OSError as error:  # the standard output takes no more: Python must not try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        say_error(f"{type(error).__name__}: {error}")
        sys.exit(1)
