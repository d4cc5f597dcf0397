"""The seeds of the fuzz targets are valid inputs: a fuzzer that begins with refused ones learns little."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from kvcomp import files
from kvcomp.files.check import check_pages
from kvcomp.files.container import Container

FUZZ = Path(__file__).parents[2] / "fuzz"
AGAIN = "the format has changed: run python fuzz/seeds.py"
SEEDS = {folder.name: sorted(folder.iterdir()) for folder in (FUZZ / "seeds").iterdir()}


@pytest.mark.parametrize("path", [*SEEDS["container"], *SEEDS["value"]], ids=lambda path: path.name)
def test_files_are_read(path: Path) -> None:
    data = np.frombuffer(path.read_bytes(), np.uint8)
    for store in files.load(Container(data)).values():
        assert store.compressed or path.name == "state", AGAIN


def test_pages_pass_their_check() -> None:
    layouts = import_module("layouts").LAYOUTS
    assert len(SEEDS["block"]) == len(layouts), AGAIN
    for path in SEEDS["block"]:
        which, page = path.read_bytes()[0], path.read_bytes()[1:]
        arena = np.frombuffer(page + bytes(layouts[which].channels), np.uint8)
        own = check_pages(arena, np.zeros(1, np.int64), layouts[which].page)
        assert layouts[which].own_books or not own.any(), AGAIN
