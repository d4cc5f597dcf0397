"""The model of a multiprocessor (benchmarks/multiprocessor.py) on traces whose time is plain."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

TURN = 200


@pytest.fixture(scope="module")
def model() -> Any:
    return importlib.import_module("multiprocessor")


def trace(name: str, **control: int) -> list[Any]:
    sass = importlib.import_module("sass")
    return [sass.Instruction(name, name, "", "", (), sass.Control(**control))] * TURN


def always(wavefronts: int) -> Any:
    drawn = np.array([wavefronts])
    return lambda _: drawn


@pytest.mark.parametrize(("name", "cycles"), [("LOP3", 2), ("IMAD", 2), ("FADD", 1), ("HMMA", 6), ("NOP", 1)])
def test_a_pipe_takes_its_instructions_at_its_rate(model: Any, name: str, cycles: int) -> None:
    assert model.cycles(trace(name), always(0), 4, 90) == pytest.approx(cycles * TURN, rel=0.05)
    assert max(model.floors(trace(name), [0.0] * TURN, 90).values()) == cycles * TURN


@pytest.mark.parametrize("wavefronts", [1, 3, 32])
def test_loads_of_all_schedulers_share_a_pipe(model: Any, wavefronts: int) -> None:
    expected = model.SCHEDULERS * wavefronts * TURN
    assert model.cycles(trace("LDS"), always(wavefronts), 4, 90) == pytest.approx(expected, rel=0.05)
    assert model.floors(trace("LDS"), [float(wavefronts)] * TURN, 90)["memory"] == expected


def test_a_chain_of_loads_waits_for_each(model: Any) -> None:
    chain = trace("LDS", sets=0, waits=1)
    one = model.cycles(chain, always(1), 4, 90)
    assert one == pytest.approx(model.LATENCY * TURN, rel=0.1)
    assert model.cycles(chain, always(1), 12, 90) == pytest.approx(one / 3, rel=0.1)


def test_half_as_many_warps_as_schedulers_leave_half_idle(model: Any) -> None:
    assert model.cycles(trace("FADD"), always(0), 2, 90) == pytest.approx(2 * TURN, rel=0.05)


def test_a_trace_that_never_waits_is_refused_where_warps_share_a_scheduler(model: Any) -> None:
    with pytest.raises(ValueError, match="never waits"):
        model.cycles(trace("FADD"), always(0), 8, 90)
