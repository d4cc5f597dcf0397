"""Everything there is to check on a machine with an NVIDIA GPU, in one command: ``make gpu-check``.

Uses the Python it is run with: torch 2.11 or later with CUDA, transformers 5.17 or later, cuda-bindings with NVRTC,
numpy, pytest; Numba and pytest-xdist make it faster. What is missing is skipped, and said.

No step hinders another. Benchmarks compare each configuration with float32 attention before they time it, and a wrong
one loses its own time only. Steps come by what they are worth, compute-sanitizer last; a step gets what time is left
but for the least of those behind it. results/gpu_check.json is written after every step; gpu_check.md is the same to
read.

On a machine that is lent: ``python benchmarks/gpu_first.py --compile 90`` beforehand with XDG_CACHE_HOME set to
KERNELS, carry that folder, then ``gpu_check.py --minutes 9`` with the names of steps as often as there is time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MINUTES = 29.0  # for all
KERNELS = ROOT / ".gpu-kernels"  # compiled beforehand, if it is there
COUNTERS = (
    "gpu__time_duration.sum",
    "smsp__inst_executed.sum",
    "dram__bytes_read.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed.avg.per_cycle_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed_pipe_alu.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_mio_throttle_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",
)
PYTEST = ("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-o", "filterwarnings=default")
WORKERS = ("-n", "8") if importlib.util.find_spec("xdist") else ()


@dataclass(frozen=True)
class Step:
    """command: without the Python that runs it, unless ``tool`` runs it; in it PYTHON stands for that, LIMIT for the
    seconds after which it must begin nothing. tool: what must be there. least, most: seconds.
    """

    name: str
    command: tuple[str, ...]
    least: int
    most: int
    tool: str | None = None


def _sanitiser(kind: str, *options: str) -> Step:
    command = "--tool", kind, *options, "--error-exitcode", "1", "PYTHON", "benchmarks/gpu_sanitise.py"
    return Step(kind, command, 30, 120, "compute-sanitizer")


STEPS = (
    Step("first results", ("benchmarks/gpu_first.py",), 30, 150),
    Step("rates", ("benchmarks/gpu_rates.py",), 20, 90),
    Step("correctness", (*PYTEST, *WORKERS, "-m", "gpu", "tests/gpu"), 120, 240),
    Step("attention", ("benchmarks/gpu_attention.py", "--limit", "LIMIT"), 150, 480),
    Step(
        "hardware counters",
        ("--clock-control", "none", "--kernel-name", "attend", "--csv", "--page", "raw",
         "--metrics", ",".join(COUNTERS), "PYTHON", "benchmarks/gpu_attention.py", "--once"),
        60, 180, "ncu",
    ),
    Step("generation", ("benchmarks/gpu_generate.py", "--small", "--limit", "LIMIT"), 60, 240),
    Step("throughput", ("benchmarks/gpu_throughput.py", "--limit", "LIMIT"), 40, 120),
    _sanitiser("memcheck", "--report-api-errors", "no"),  # torch and cuBLAS make some that fail
    _sanitiser("racecheck"),
)  # fmt: skip


@dataclass
class Ended:
    """How a step ended: passed, failed, stopped or skipped, and why; the end of its output."""

    name: str
    outcome: str
    seconds: float
    tail: str

    @property
    def fine(self) -> bool:
        return self.outcome.startswith(("passed", "skipped"))


def run_command(command: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Status, None if the time was over, and output of a command in the repository's root."""
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if KERNELS.exists():
        environment["XDG_CACHE_HOME"] = str(KERNELS)
    started = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = started.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)  # what a profiler started goes too
        return None, started.communicate()[0]
    return started.returncode, output


def find_tool(name: str) -> str | None:
    for place in (shutil.which(name), f"/usr/local/cuda/bin/{name}", f"/opt/nvidia/nsight-compute/{name}"):
        if place and Path(place).exists():
            return place
    return None


def run_steps(
    steps: Sequence[Step],
    seconds: float,
    run: Callable[[Sequence[str], float], tuple[int | None, str]] = run_command,
    find: Callable[[str], str | None] = find_tool,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Ended]:
    """Run the steps within so many seconds of now; gives each as it ends."""
    end = clock() + seconds
    found = {x.tool: find(x.tool) for x in steps if x.tool}
    for number, step in enumerate(steps):
        later = sum(x.least for x in steps[number + 1 :] if not x.tool or found[x.tool])
        begin = clock()
        left = end - begin
        limit = min(step.most, max(left - later, step.least))
        reason = ""
        if step.tool and not found[step.tool]:
            reason = f"{step.tool} is not on this machine"
        elif left < step.least:
            reason = "no time is left"
        if reason:
            print(f"== {step.name}: SKIPPED, {reason}", flush=True)
            yield Ended(step.name, f"skipped: {reason}", 0.0, "")
            continue
        print(f"== {step.name}, at most {limit:.0f} s", flush=True)
        words = {"PYTHON": sys.executable, "LIMIT": str(int(0.9 * limit - 10))}
        arguments = [words.get(x, x) for x in step.command]
        status, output = run([found[step.tool] or "" if step.tool else sys.executable, *arguments], limit)
        outcome = (
            f"stopped after {limit:.0f} s" if status is None else "passed" if status == 0 else f"failed ({status})"
        )
        ended = Ended(step.name, outcome, round(clock() - begin, 1), output[-6000:])
        print(f"{ended.tail}\n== {step.name}: {outcome}, {ended.seconds:.0f} s", flush=True)
        yield ended


def write(about: dict[str, Any], ended: Sequence[Ended], results: Path) -> None:
    """gpu_check.json and gpu_check.md, and gpu_counters.csv if there are counters."""
    results.mkdir(exist_ok=True)
    content = {"setting": about, "steps": [asdict(x) for x in ended]}
    (results / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [
        ", ".join(f"{name} {value}" for name, value in about.items()),
        "",
        "| step | outcome | s |",
        "|---|---|---|",
    ]
    lines += [f"| {x.name} | {x.outcome} | {x.seconds:.0f} |" for x in ended]
    (results / "gpu_check.md").write_text("\n".join(lines) + "\n")
    for x in ended:
        if x.name == "hardware counters" and (rows := re.findall(r'^".*$', x.tail, re.MULTILINE)):
            (results / "gpu_counters.csv").write_text("\n".join(rows) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="only these")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    arguments = parser.parse_args()
    if unknown := set(arguments.steps) - {x.name for x in STEPS}:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(x.name for x in STEPS)}")
    steps = [x for x in STEPS if not arguments.steps or x.name in arguments.steps]
    device = "torch.cuda.get_device_properties(0)"  # fails where there is none
    told = "print(json.dumps(schema.environment(gpu=True)))"
    probe = f"import json, torch; from kvcomp.results import schema; {device}; {told}"
    status, output = run_command([sys.executable, "-c", probe], 90)
    if status != 0:
        print(f"no GPU: torch of {sys.executable} sees none\n{output[-500:]}")
        return 1
    about = json.loads(output.splitlines()[-1])
    print(about)
    ended: list[Ended] = []
    for one in run_steps(steps, 60 * arguments.minutes):
        ended.append(one)
        write(about, ended, RESULTS)
    print((RESULTS / "gpu_check.md").read_text())
    return int(not all(x.fine for x in ended))


if __name__ == "__main__":
    sys.exit(main())
