"""Which steps curves say to take, and how a level's price is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcomp.fit.curves import LARGEST_CODE, NEAR, Curve, allocate, next_price, predicted, price_of, shifts_of

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


@given(st.floats(1e-3, 1e4), st.floats(1e-3, 1e2))
def test_shifts_are_the_fewest_that_fit_eight_bits(reach: float, step: float) -> None:
    shift = float(shifts_of(torch.tensor(reach, dtype=torch.float64), step))
    assert reach / (step * 2**shift) <= LARGEST_CODE * (1 + 1e-9) or shift == 16
    assert shift == 0 or reach / (step * 2 ** (shift - 1)) > LARGEST_CODE * (1 - 1e-9)
