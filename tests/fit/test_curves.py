"""Which steps curves say to take, and how a level's price is found."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcomp.fit.calibrate import Calibrator
from kvcomp.fit.curves import (
    LARGEST_CODE,
    NEAR,
    Curve,
    Tensors,
    allocate,
    entropy_bits,
    next_price,
    predicted,
    price_of,
    shifts_of,
)
from kvcomp.fit.quality import Quality

STEPS = np.geomspace(0.01, 10, 9)


def curve(size: float, weight: float) -> Curve:
    """Of a Gaussian tensor at high rate."""
    return Curve(STEPS, np.maximum(0.0, np.log2(size / STEPS) + 2), weight * STEPS**2)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(1e-4, 1e-1)), min_size=1, max_size=5), st.floats(-5, -1))
def test_the_price_of_a_kl_is_kept_to(of: list[tuple[float, float]], exponent: float) -> None:
    curves = {(0, 0, head): curve(*one) for head, one in enumerate(of)}
    wanted = 10.0**exponent
    steps = allocate(curves, price_of(curves, wanted))
    least = predicted(curves, dict.fromkeys(curves, STEPS[0]))
    assert predicted(curves, steps) <= max(wanted, least) * (1 + 1e-6)


@pytest.mark.parametrize("power", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0])
def test_a_price_is_found_in_a_few_steps(power: float, factor: float) -> None:
    """Where what is measured follows a power of the price."""
    found: dict[float, float] = {}
    price = 100.0
    for _ in range(5):
        found[price] = factor * (price / 100) ** -power
        if NEAR <= found[price] <= 1:
            return
        price = next_price(found)
    raise AssertionError(found)


def test_of_the_prices_that_reach_a_level_the_lowest_is_taken() -> None:
    wanted, times_worse, tried = 0.01, iter([0.5, 1.2, 0.8, 0.93]), list[float]()

    def at_price(curves: Mapping[Tensors, Curve], price: float) -> tuple[dict[Tensors, float], Quality]:
        tried.append(price)
        kl = wanted * next(times_worse)
        return allocate(curves, price), Quality(kl, kl)

    stub: Any = SimpleNamespace(
        kivi=lambda bits: Quality(wanted, wanted), at_price=at_price, tell=lambda *_: None, over=1.0
    )
    _, about = Calibrator.level(stub, {(0, 0, 0): curve(1.0, 0.01)}, 4)
    assert about["reached"]
    assert about["kl"]["text"] == pytest.approx(0.93 * wanted)
    assert about["price"] == sorted(tried)[1] == tried[3]


@given(st.floats(1e-3, 1e4), st.floats(1e-3, 1e2))
def test_shifts_are_the_fewest_that_fit_eight_bits(reach: float, step: float) -> None:
    shift = float(shifts_of(torch.tensor(reach, dtype=torch.float64), step))
    assert reach / (step * 2**shift) <= LARGEST_CODE * (1 + 1e-9) or shift == 16
    assert shift == 0 or reach / (step * 2 ** (shift - 1)) > LARGEST_CODE * (1 - 1e-9)


@pytest.mark.parametrize("kind", [0, 1])
def test_bits_of_codes_that_are_alike_or_fit_no_byte(kind: int) -> None:
    codes = torch.zeros(2, 128, 16)
    assert entropy_bits(codes, kind) == 0
    codes[0, 70, 3] = 127
    assert entropy_bits(codes, kind) == 0.5 / 4
    codes[0, 70, 3] = 128
    assert entropy_bits(codes, kind) >= 16 / 4
