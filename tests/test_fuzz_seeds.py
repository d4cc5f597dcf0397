"""The seeds of the fuzz targets are valid inputs: a fuzzer that begins with refused ones learns little."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from kvcomp import files
from kvcomp.arena import check_pages
from kvcomp.container import Container

FUZZ = Path(__file__).parents[1] / "fuzz"
AGAIN = "the format has changed: run python fuzz/seeds.py"
SEEDS = {folder.name: sorted(folder.iterdir()) for folder in (FUZZ / "seeds").iterdir()}


@pytest.mark.parametrize("path", [*SEEDS["container"], *SEEDS["value"]], ids=lambda path: path.name)
def test_files_are_read(path: Path) -> None:
    data = np.frombuffer(path.read_bytes(), np.uint8)
    for store in files.load(Container(data)).values():
        assert store.compressed, AGAIN


def test_pages_pass_their_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FUZZ)
    layouts = __import__("layouts").LAYOUTS
    try:
        assert len(SEEDS["block"]) == len(layouts), AGAIN
        for path in SEEDS["block"]:
            which, page = path.read_bytes()[0], path.read_bytes()[1:]
            arena = np.frombuffer(page + bytes(layouts[which].channels), np.uint8)
            own = check_pages(arena, np.zeros(1, np.int64), layouts[which].page)
            assert layouts[which].own_books or not own.any(), AGAIN
    finally:
        del sys.modules["layouts"]
