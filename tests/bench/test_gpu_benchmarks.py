"""The benchmarks of generation on a GPU run, on a tiny model on the CPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvcomp.errors import UnsupportedModel

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: they would measure")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["gpu_throughput.py"], ["gpu_generate.py"], ["gpu_generate.py", "--longest", "--room", "1000000"]],
    ids=["throughput", "generate", "longest"],
)
def test_they_run(command: list[str], tmp_path: Path) -> None:
    script, *options = command
    found = tmp_path / "found.json"
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *options, "--output", str(found)],
        check=True,
        capture_output=True,
    )
    rows = json.loads(found.read_text())["rows"]
    assert [row["cache"] for row in rows] == ["dynamic", "static", "kvcomp", "kvcomp packed"]
    assert not any("error" in row for row in rows)


@pytest.mark.slow
def test_nothing_is_begun_after_the_limit(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_throughput.py"), "--limit", "0", "--output", str(found)]
    subprocess.run(command, check=True, capture_output=True)
    assert all("limit" in row["error"] for row in json.loads(found.read_text())["rows"])


@pytest.fixture
def gpu_model() -> ModuleType:
    pytest.importorskip("transformers")
    return importlib.import_module("gpu_model")


def test_caches_are_filled_in_several_passes(gpu_model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_model, "FILLED_AT_ONCE", 256)
    cache = gpu_model.cache_for(gpu_model.model_with_random_weights(), "kvcomp", 300)
    gpu_model.fill(cache, 2, 300)
    assert [layer.get_seq_length() for layer in cache.layers] == [300, 300]


def test_a_cache_that_fails_hinders_no_other(gpu_model: ModuleType) -> None:
    def run(name: str) -> None:
        if name == "static":
            raise UnsupportedModel("no\nmore")

    rows: list[dict[str, Any]] = []
    assert gpu_model.compiled(run, rows) == [name for name in gpu_model.NAMES if name != "static"]
    assert rows == [{"cache": "static", "error": "no"}]
