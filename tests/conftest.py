"""What all tests share: hypothesis profiles and the backends to run over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, register_random, settings

import kvcomp
from kvcomp.spec import PRESETS, CodecSpec, TensorSpec

COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=60, **COMMON)
settings.register_profile("ci", max_examples=60, derandomize=True, database=None, print_blob=True, **COMMON)
settings.register_profile("release", max_examples=5000, **COMMON)
torch.set_num_threads(1)  # the tensors are small: threads would only wait for each other
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


class TorchRandom:
    """Torch's generator as Hypothesis wants one, so that an example that failed fails again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH = TorchRandom()
register_random(TORCH)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on which ones ran before it."""
    torch.manual_seed(0)


MODULES = {"reference": "kvcomp.kernels.reference", "cpu": "kvcomp.kernels.cpu.backend"}


@pytest.fixture(scope="session", params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend; one that this machine cannot import is skipped."""
    pytest.importorskip(MODULES[request.param], exc_type=ImportError)
    return str(request.param)


@pytest.fixture(scope="session")
def compiled() -> None:
    """Numba has compiled the kernels: it cannot while ``np.empty`` is another function."""
    pytest.importorskip(MODULES["cpu"], exc_type=ImportError)
    head = TensorSpec("head", steps=((0.1,),))
    for spec in (PRESETS["kvcomp"], CodecSpec(head, head)):
        compressed = kvcomp.compress(*torch.randn(2, 1, 1, 321, 16), spec.layer(0, 1))
        compressed.attend(torch.randn(1, 1, 1, 16))
        compressed.decompress()


@pytest.fixture
def poison(compiled: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that torch and NumPy give without a value holds NaN, so that whoever reads it is found out."""
    plain = np.empty

    def filled(*args: Any, **options: Any) -> Any:
        array = plain(*args, **options)
        if array.dtype.kind == "f":
            array.fill(np.nan)
        return array

    monkeypatch.setattr(np, "empty", filled)
    torch.use_deterministic_algorithms(True)  # also fills what torch.empty and new_empty return
    yield
    torch.use_deterministic_algorithms(False)
