"""For mkdocs: the pictures of benchmarks/results, which pages link where they lie in the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Any, config: Any) -> None:
    """Add them to what the site is made of."""
    for picture in sorted(RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Link them where they lie in the site."""
    return re.sub(r"\.\./benchmarks/results/(\w[\w-]*\.svg)", r"results/\1", markdown)
