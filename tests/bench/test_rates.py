"""What measurements of several rates share."""

from __future__ import annotations

import pytest

from rates import bits_at


def test_bits_are_interpolated_in_log_kl_and_not_beyond_what_was_measured() -> None:
    assert bits_at(1e-3, [4.0, 2.0], [1e-4, 1e-2]) == pytest.approx(3.0)
    assert bits_at(1e-5, [4.0, 2.0], [1e-4, 1e-2]) == float("inf")
