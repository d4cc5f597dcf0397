"""``make gpu-check`` without a GPU: what it runs, in which order, and that it ends in time."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvcomp.kernels.cuda import layout

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    return importlib.import_module("gpu_check")


class Machine:
    """Runs nothing: each command takes so many seconds, or all it is given."""

    def __init__(self, seconds: float, status: int = 0) -> None:
        self.seconds, self.status = seconds, status
        self.now = 1000.0
        self.commands: list[str] = []

    def clock(self) -> float:
        return self.now

    def run(self, command: Sequence[str], limit: float) -> tuple[int | None, str]:
        self.commands.append(" ".join(command))
        self.now += min(self.seconds, limit)
        return (None if self.seconds > limit else self.status), f'of {len(self.commands)}\n"a","b"'


SECONDS = 1740


def ended_on(gpu_check: ModuleType, machine: Machine, tools: bool = True, seconds: float = SECONDS) -> list[Any]:
    find = (lambda name: f"/tools/{name}") if tools else (lambda name: None)
    return list(gpu_check.run_steps(gpu_check.STEPS, seconds, machine.run, find, machine.clock))


def test_everything_runs_in_order(gpu_check: ModuleType, tmp_path: Path) -> None:
    machine = Machine(10)
    ended = ended_on(gpu_check, machine)
    assert [x.outcome for x in ended] == ["passed"] * len(gpu_check.STEPS)
    words = [
        "gpu_first", "gpu_rates", "tests/gpu", "gpu_attention", "/tools/ncu", "gpu_generate", "gpu_throughput",
        "memcheck", "racecheck",
    ]  # fmt: skip
    assert all(word in command for word, command in zip(words, machine.commands, strict=True))
    assert not any("PYTHON" in command or "LIMIT" in command for command in machine.commands)
    gpu_check.write({"device": "none", "commit": "abc"}, ended, tmp_path)
    assert json.loads((tmp_path / "gpu_check.json").read_text())["setting"]["commit"] == "abc"
    assert "| attention | passed | 10 |" in (tmp_path / "gpu_check.md").read_text()
    assert (tmp_path / "gpu_counters.csv").read_text() == '"a","b"\n'


@pytest.mark.parametrize("seconds", [100, 200, 10_000])
def test_it_ends_in_time_and_leaves_every_step_its_least(gpu_check: ModuleType, seconds: float) -> None:
    machine = Machine(seconds)
    ended = ended_on(gpu_check, machine)
    assert machine.now - 1000 <= SECONDS == 60 * gpu_check.MINUTES < 30 * 60
    least = {x.name: x.least for x in gpu_check.STEPS}
    assert all(x.seconds >= min(seconds, least[x.name]) for x in ended)


def test_with_little_time_what_comes_first_is_run(gpu_check: ModuleType) -> None:
    machine = Machine(10_000)
    ended = ended_on(gpu_check, machine, seconds=195)
    assert machine.now - 1000 <= 195
    assert [x.outcome.split()[0] for x in ended[:3]] == ["stopped", "stopped", "stopped"]
    assert {x.outcome for x in ended[3:]} == {"skipped: no time is left"}


@pytest.mark.parametrize("machine", [Machine(10, status=1), Machine(10_000)])
def test_a_step_that_fails_or_does_not_end_hinders_no_other(gpu_check: ModuleType, machine: Machine) -> None:
    assert len(ended_on(gpu_check, machine)) == len(machine.commands) == len(gpu_check.STEPS)


def test_missing_tools_are_skipped_and_said(gpu_check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    ended = ended_on(gpu_check, Machine(10), tools=False)
    assert [x.name for x in ended if x.outcome.startswith("skipped")] == ["hardware counters", "memcheck", "racecheck"]
    assert "SKIPPED, compute-sanitizer is not on this machine" in capsys.readouterr().out


def test_the_scripts_are_there(gpu_check: ModuleType) -> None:
    for step in gpu_check.STEPS:
        assert all((ROOT / word).exists() for word in step.command if word.endswith((".py", "tests/gpu")))


def test_a_command_out_of_time_ends_with_what_it_started(gpu_check: ModuleType) -> None:
    begin = time.monotonic()
    status, output = gpu_check.run_command(["sh", "-c", "echo begun; sleep 60 & sleep 60"], 2)
    assert (status, output) == (None, "begun\n")
    assert time.monotonic() - begin < 30


def test_a_command_finds_what_the_environment_has(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    _, output = gpu_check.run_command(["sh", "-c", "echo $PYTHONPATH"], 10)
    assert output.strip().split(":") == [str(ROOT / "src"), "/elsewhere"]


def test_rates_need_no_numba() -> None:
    pytest.importorskip("cuda.bindings")
    without = "import sys; sys.modules['numba'] = None; sys.path.append('benchmarks'); import gpu_rates"
    subprocess.run([sys.executable, "-c", without], check=True, cwd=ROOT)


def test_what_the_sanitiser_runs_is_compiled_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_first, gpu_sanitise = (importlib.import_module(name) for name in ("gpu_first", "gpu_sanitise"))
    compiled: list[tuple[str, Any]] = []
    monkeypatch.setattr(gpu_first, "compile_kernel", lambda source, defines, _: compiled.append((source, defines)))
    gpu_first.compile_all(90)
    for channels, spec in gpu_sanitise.SPECS:
        of_layer = spec.layer(0, 1), channels, "bfloat16"
        attend = layout.attend_build(*of_layer, "bfloat16", False, layout.machine(90, processors=132))
        pages = layout.page_build(*of_layer).defines
        wanted = ("decode_attention.cu", attend.defines), ("encode.cu", pages), ("decompress.cu", pages)
        assert all(one in compiled for one in wanted)


def test_the_table_names_the_fastest_rival() -> None:
    gpu_attention = importlib.import_module("gpu_attention")
    shape = {"batch": 8, "tokens": 32768}
    rows = [
        {**shape, "what": "read the same bytes once", "ms": 0.3, "gigabytes_a_second": 3579.0},
        {**shape, "group": 4, "what": "sdpa flash", "ms": 0.5, "host_us": 20.0},
        {**shape, "group": 4, "what": "sdpa cudnn", "ms": 0.4, "host_us": 20.0},
        {**shape, "group": 4, "what": "flashinfer", "error": "no"},
        {**shape, "group": 4, "what": "kvcomp, x", "ms": 0.2, "host_us": 9.0, "coded_bits": 2.5, "share_of_roof": 0.3},
    ]
    table = gpu_attention.table(rows)
    assert "| 8 x 32768 | 4 | sdpa cudnn | 0.400 | 20 | 1.00 | 16.00 |  |" in table
    assert "| 8 x 32768 | 4 | kvcomp, x | 0.200 | 9 | 2.00 | 2.50 | 0.30 |" in table
    assert "| 8 x 32768 | read the same bytes once | 0.300 | 3579 |" in table
    assert "sdpa flash" not in table
