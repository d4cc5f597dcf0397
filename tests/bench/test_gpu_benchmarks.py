"""The benchmarks of generation on a GPU run, on a tiny model on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: they would measure"),
]


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


def test_nothing_is_begun_after_the_limit(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_throughput.py"), "--limit", "0", "--output", str(found)]
    subprocess.run(command, check=True, capture_output=True)
    assert all("limit" in row["error"] for row in json.loads(found.read_text())["rows"])
