"""``kvcomp report``: one page of all results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcomp.cli.common import plain_errors, screen, writable
from kvcomp.errors import InvalidInput

DEFAULT_RESULTS = "kvcomp-evaluate.json", "kvcomp-tune.json", "kvcomp-bench.json"


def report(
    found: Annotated[
        list[Path] | None,
        typer.Argument(help=f"Results files \\[default: {', '.join(DEFAULT_RESULTS)}, as far as they are here]"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write", callback=writable)] = Path(
        "report.html"
    ),
) -> None:
    """Write one HTML page with all numbers, pictures and settings, that needs no network and no other file."""
    with plain_errors():
        try:
            from kvcomp.results.page import render
        except ImportError:
            raise InvalidInput("a report needs matplotlib and jinja2: pip install '.[plots]'") from None
        from kvcomp import disk

        paths = found if found is not None else [path for name in DEFAULT_RESULTS if (path := Path(name)).is_file()]
        page = render(paths).encode()
        disk.write(output, [page])
        screen.print(f"{output}: {len(page):,} bytes, from {', '.join(map(str, paths))}", markup=False, highlight=False)
