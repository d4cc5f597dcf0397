"""The CPU kernels as Numba compiles them for other processors than this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcomp.kernels.cpu.bits import FEATURES

SCRIPT = """
import torch, kvcomp
torch.manual_seed(0)
for spec in ("packed", "kvcomp"):
    for dtype in (torch.bfloat16, torch.float32):
        k, v = torch.randn(2, 1, 2, 192, 64, dtype=dtype)
        q = torch.randn(1, 6, 1, 64)
        found, expected = (kvcomp.compress(k, v, spec, backend=of).attend(q) for of in ("cpu", "reference"))
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error < 2e-4, (spec, dtype, error)
"""
AVX = "+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+f16c"
AVX2 = f"{AVX},+avx2,+fma,+bmi,+bmi2,+lzcnt"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "features"), [("ivybridge", AVX), ("haswell", AVX2)])
def test_kernels_for_lesser_processors(name: str, features: str, tmp_path: Path) -> None:
    """They need no instruction that the target lacks, and compute the same."""
    if not {*features.split(",")} <= FEATURES:
        pytest.skip("this processor cannot run what is compiled for that")
    target = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", SCRIPT], env=os.environ | target, check=True, timeout=600)
