"""The quick start runs, block after block, as one notebook."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|console)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow  # a process for each command; `make docs` runs it
def test_the_quick_start_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    names: dict[str, Any] = {}
    assert [kind for kind, _ in BLOCKS].count("console") >= 4
    for kind, text in BLOCKS:
        if kind == "python":
            Path("block.py").write_text(text, encoding="utf-8")
            names |= runpy.run_path("block.py", init_globals=names)
            continue
        for line in text.splitlines():
            done = subprocess.run(
                shlex.split(line.removeprefix("$ ")), capture_output=True, text=True, check=False, env=environment
            )
            assert done.returncode == 0, (line, done.stderr, done.stdout)
    assert names["again"].get_seq_length() == names["cache"].get_seq_length()
    assert names["second"].get_seq_length() >= 256
