"""Everything there is to check on a machine with an NVIDIA GPU, in one command: ``make gpu-check``.

Uses the Python it is run with: torch 2.11 or later with CUDA, transformers 5.17 or later, cuda-bindings with NVRTC, numpy, pytest; no
Numba. Correctness first, then compute-sanitizer, then benchmarks, then hardware counters; what is missing is skipped, and said. Each step has
a limit, so that all of it ends within ten minutes. benchmarks/results/gpu_check.json tells how each step ended.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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
)


@dataclass
class Step:
    name: str
    outcome: str
    seconds: float
    tail: str


def step(name: str, command: Sequence[str], limit: int) -> Step:
    """Run a command for at most ``limit`` seconds; its output passes through, and the end of it is kept."""
    print(f"== {name}", flush=True)
    begin = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=ROOT,
            env=environment,
            timeout=limit,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output, outcome = done.stdout, "passed" if done.returncode == 0 else f"failed ({done.returncode})"
    except subprocess.TimeoutExpired as error:
        kept = error.stdout or b""
        output = kept.decode(errors="replace") if isinstance(kept, bytes) else kept
        outcome = f"stopped after {limit} s"
    print(output[-6000:])
    print(f"== {name}: {outcome}, {time.monotonic() - begin:.0f} s", flush=True)
    return Step(name, outcome, round(time.monotonic() - begin, 1), output[-3000:])


def skipped(name: str, reason: str) -> Step:
    print(f"== {name}: SKIPPED, {reason}", flush=True)
    return Step(name, f"skipped: {reason}", 0.0, "")


def tool(name: str) -> str | None:
    for place in (shutil.which(name), f"/usr/local/cuda/bin/{name}", f"/opt/nvidia/nsight-compute/{name}"):
        if place and Path(place).exists():
            return place
    return None


def counters(ncu: str) -> Step:
    """Hardware counters of the fused kernel on the middle shape."""
    command = (
        ncu, "--clock-control", "none", "--kernel-name", "attend", "--launch-count", "1", "--csv", "--page", "raw",
        "--metrics", ",".join(COUNTERS), sys.executable, "benchmarks/gpu_attention.py", "--once",
    )  # fmt: skip
    found = step("hardware counters", command, 90)
    (RESULTS / "gpu_counters.csv").write_text("\n".join(re.findall(r'^".*$', found.tail, re.MULTILINE)) + "\n")
    return found


def main() -> int:
    python = sys.executable
    probe = subprocess.run(
        [python, "-c", "import torch; assert torch.cuda.is_available(); print(torch.cuda.get_device_name(0))"],
        check=False,
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        print(f"no GPU: torch of {python} sees none\n{probe.stderr[-500:]}")
        return 1
    print(f"on {probe.stdout.strip()}")
    RESULTS.mkdir(exist_ok=True)
    pytest = [python, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    steps = [step("correctness", [*pytest, "-m", "gpu", "tests/gpu"], 180)]
    sanitizer = tool("compute-sanitizer")
    for kind in ("memcheck", "racecheck"):
        if sanitizer:
            command = (sanitizer, "--tool", kind, "--error-exitcode", "1", python, "benchmarks/gpu_sanitise.py")
            steps.append(step(kind, command, 75))
        else:
            steps.append(skipped(kind, "compute-sanitizer is not on this machine"))
    if steps[0].outcome == "passed":
        steps.append(step("attention", [python, "benchmarks/gpu_attention.py"], 150))
        steps.append(step("generation", [python, "benchmarks/gpu_generate.py", "--small"], 120))
        ncu = tool("ncu")
        steps.append(counters(ncu) if ncu else skipped("hardware counters", "ncu is not on this machine"))
    else:
        steps.append(skipped("benchmarks", "results that are wrong are not timed"))
    (RESULTS / "gpu_check.json").write_text(json.dumps([asdict(one) for one in steps], indent=1) + "\n")
    for one in steps:
        print(f"{one.name}: {one.outcome}, {one.seconds} s")
    return int(any(not one.outcome.startswith(("passed", "skipped")) for one in steps))


if __name__ == "__main__":
    sys.exit(main())
