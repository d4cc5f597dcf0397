"""Where the results lie, and what each says of the machine and the software it was measured with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from kvcomp.results import schema as results

RESULTS = Path(__file__).parent / "results"


def setting(**parameters: Any) -> dict[str, Any]:
    """Device, versions, commit, load and date, what OpenMP and torch use, and the benchmark's own parameters."""
    return results.setting(
        GOMP_SPINCOUNT=os.environ.get("GOMP_SPINCOUNT", "default"),
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        **parameters,
    )
