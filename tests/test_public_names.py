"""What ``import kvcomp`` gives, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kvcomp

HEAVY = ["torch", "transformers", "numpy", "numba", "matplotlib"]


def test_the_public_names_are_those_listed() -> None:
    assert dir(kvcomp) == sorted(kvcomp.__all__)
    for name in kvcomp.__all__:
        assert getattr(kvcomp, name) is not None
    with pytest.raises(AttributeError, match="KVStore"):
        _ = kvcomp.KVStore


@pytest.mark.parametrize(
    "code", ["import kvcomp", "from kvcomp.cli import app; app(['--help'], standalone_mode=False)"]
)
def test_nothing_heavy_is_loaded_before_it_is_needed(code: str) -> None:
    check = f"{code}\nimport sys\nassert not {{*{HEAVY}}} & {{*sys.modules}}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
