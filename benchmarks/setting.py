"""What every result says of the machine and the software it was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def setting(**parameters: Any) -> dict[str, Any]:
    """Device, versions, commit, load and date, and the benchmark's own parameters."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS, capture_output=True, text=True, check=False
    )
    return {
        "device": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "default"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("kvcomp", "torch", "numpy", "numba", "transformers")},
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **parameters,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
