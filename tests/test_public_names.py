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


@pytest.mark.parametrize(
    ("code", "without", "extra"),
    [
        ("from kvcomp.integrations.transformers import KVCompCache", "transformers", "[hf]"),
        ("import kvcomp; kvcomp.calibrate", "transformers", "[hf]"),
        ("import kvcomp; kvcomp.calibrate", "platformdirs", "[hf]"),
        ("from kvcomp.cli import main", "typer", "[cli]"),
        ("from kvcomp.cli import main", "rich", "[cli]"),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(code: str, without: str, extra: str) -> None:
    code = f"""import sys
class Absent:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "{without}":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
{code}"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"pip install '.{extra}'")
