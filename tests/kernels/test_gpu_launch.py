"""Into how many parts a context is cut, what kernels are known by, and when they are loaded."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from kvcomp.kernels.cuda import device as gpu
from kvcomp.kernels.cuda.launch import attend, splits_for
from kvcomp.kernels.cuda.layout import AttendArguments, attend_build, machine, page_build
from kvcomp.spec import PRESETS

SPEC = PRESETS["kvcomp:paper"]


@pytest.mark.parametrize(
    ("rows", "tokens", "splits"),
    [
        (1, 64, 1),  # one page
        (8, 32768, 2),  # 64 CTAs a split: two splits fit 132 multiprocessors
        (1, 32768, 16),  # all at once
        (17, 32768, 8),  # 136 CTAs would take two turns, the second with four of them
    ],
)
def test_splits_let_the_multiprocessors_end_together(rows: int, tokens: int, splits: int) -> None:
    on: Any = SimpleNamespace(machine=machine(90, processors=132))
    build = replace(attend_build(SPEC, 128, "bfloat16", "bfloat16", False, on.machine), warps=8)
    assert splits_for(on, build, rows, 8, 4, tokens) == splits


def test_builds_of_two_stores_are_one_key() -> None:
    one, other = (page_build(SPEC, 128, "bfloat16") for _ in range(2))
    assert one is not other
    assert len({("encode", one), ("encode", other)}) == 1


def test_a_graph_never_is_the_first_to_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = MagicMock()
    driver.configure_mock(**{f"{name}.return_value": (driver.CUresult.CUDA_SUCCESS, 1) for name in (
        "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent", "cuModuleLoadData", "cuModuleGetFunction",
        "cuFuncSetAttribute", "cuLaunchKernel",
    )})  # fmt: skip
    driver.cuDeviceGetAttribute.side_effect = [(driver.CUresult.CUDA_SUCCESS, x) for x in (9, 0, 132, 227 << 10)]
    monkeypatch.setattr(gpu, "_driver", lambda: driver)
    monkeypatch.setattr(gpu, "compile_kernel", lambda *_: b"")
    on = gpu.Gpu(0, lambda: 0)
    build = attend_build(SPEC, 128, "bfloat16", "bfloat16", False, on.machine)
    a = AttendArguments(rows=1, heads=1, queries=1)
    attend(on, build, a, splits=1)
    before = driver.cuModuleGetFunction.call_count
    attend(on, build, a, splits=2)
    assert driver.cuLaunchKernel.call_count == 3
    assert driver.cuModuleGetFunction.call_count == before == 2
