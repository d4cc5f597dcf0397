"""A budget chooses the level of each layer: what fits, at the least KL that the prices promise."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from calibrating import calibrated, like_keys
from kvcomp.calibration import Calibration
from kvcomp.calibration.budget import Plan, parse_bytes, within
from kvcomp.errors import InvalidInput, LimitExceeded
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers.models import fingerprint_of
from kvcomp.spec import LEVELS

LAYERS, TOKENS = 3, 4096
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2, hidden_size=64, head_dim=32,
    max_position_embeddings=TOKENS, dtype="bfloat16",
)  # fmt: skip
MADE = calibrated(LAYERS, model=fingerprint_of(CONFIG))
BITS, KL = (3.5, 1.9, 0.9), (0.001, 0.01, 0.08)


def priced(bits: list[float], kl: list[float]) -> Calibration:
    """The calibration with these bits and KL of layers, level after level."""
    of = iter(zip(bits, kl, strict=True))
    levels = {
        level: {"layers": {str(index): dict(zip(("bits", "kl"), next(of), strict=True)) for index in range(LAYERS)}}
        for level in LEVELS
    }
    return replace(MADE, about=replace(MADE.about, levels=levels))


USUAL = priced([bits for bits in BITS for _ in range(LAYERS)], [kl * (1 + n) for kl in KL for n in range(LAYERS)])


def plan(budget: int, calibration: Calibration = USUAL) -> Plan:
    return within(calibration, budget, TOKENS, 2)


def size_and_kl(calibration: Calibration, levels: tuple[str, ...]) -> tuple[float, float]:
    """Bytes and KL of a choice, counted another way."""
    prices = [calibration.about.levels[level]["layers"][str(index)] for index, level in enumerate(levels)]
    sealed = (TOKENS - 68) // 64 * 64
    values = 2 * 2 * 32  # K and V of a token in a layer
    size = LAYERS * values * 2 * (4 + 128) + sum(sealed * values * one["bits"] / 8 for one in prices)
    size += sum(calibration.nbytes(level, [index]) for index, level in enumerate(levels))
    size += LAYERS * 4 * 5 * 2 * 32 * 32  # A and A^-1 of K and of V, and one of them transposed
    return size, sum(one["kl"] for one in prices)


@given(
    st.lists(st.floats(0.3, 8), min_size=9, max_size=9),
    st.lists(st.floats(1e-4, 1), min_size=9, max_size=9),
    st.floats(0, 1),
)
def test_a_plan_fits_and_no_single_step_would_be_better(bits: list[float], kl: list[float], share: float) -> None:
    calibration = priced(bits, kl)
    every = [size_and_kl(calibration, levels) for levels in product(LEVELS, repeat=LAYERS)]
    least, most = min(size for size, _ in every), max(size for size, _ in every)
    budget = int(least + share * (most - least)) + 1
    found = plan(budget, calibration)
    levels = tuple(found.levels[index] for index in range(LAYERS))
    size, expected = size_and_kl(calibration, levels)
    assert (found.nbytes, found.kl) == (pytest.approx(size, abs=1), pytest.approx(expected))
    assert found.nbytes <= budget
    assert calibration.levels_of(found.spec) == found.levels
    for index, level in product(range(LAYERS), LEVELS):
        other = (*levels[:index], level, *levels[index + 1 :])
        further, less = size_and_kl(calibration, other)
        assert further > budget or less >= expected


def test_more_bytes_buy_finer_levels() -> None:
    assert set(plan(1 << 30).levels.values()) == {"near-lossless"}
    kls = [plan(size).kl for size in range(450_000, 950_000, 50_000)]
    assert kls == sorted(kls, reverse=True)
    assert len(set(kls)) > 3
    with pytest.raises(LimitExceeded, match="give more, or fewer tokens"):
        plan(420_000)


def test_a_step_that_takes_the_last_byte_is_taken() -> None:
    exact = priced([bits for bits in (4.0, 2.0, 1.0) for _ in range(LAYERS)], [kl for kl in KL for _ in range(LAYERS)])
    finest = plan(1 << 30, exact)
    assert plan(finest.nbytes, exact) == finest
    assert plan(finest.nbytes - 1, exact).kl > finest.kl


def test_sizes_are_read_as_people_write_them() -> None:
    cases = {"2GiB": 2 << 30, "1.5 MB": 1_500_000, "64k": 64_000, "12": 12, "1Ti": 1 << 40}
    assert {text: parse_bytes(text) for text in cases} == cases
    assert parse_bytes(7) == 7
    for wrong in ("", "much", "-1GB", "0", "0.1", "9" * 400, "9" * 400 + "GB", 0, -5, True, 1.5, None):
        with pytest.raises(InvalidInput, match="2GiB"):
            parse_bytes(wrong)  # type: ignore[arg-type]


def test_a_cache_with_a_budget_takes_no_more() -> None:
    budget = 730_000
    cache = KVCompCache(CONFIG, "kvcomp-klt", calibration=USUAL, budget=budget)
    assert cache.plan is not None
    assert len(set(cache.plan.levels.values())) > 1
    assert cache.plan.spec == cache.spec
    assert "near-lossless" in str(cache.plan)
    shorter = KVCompCache(CONFIG, "kvcomp-klt", calibration=USUAL, budget="730kB", context=256)
    assert shorter.plan is not None
    assert set(shorter.plan.levels.values()) == {"near-lossless"}
    for layer in range(LAYERS):
        k, v = (like_keys(1, 2, 300, 32, seed).bfloat16() for seed in (1, 2))
        cache.update(k, v.flip(-1), layer)
    for layer in cache.compressed_layers:
        layer.seal()
        assert torch.isfinite(layer.store.dense()[0]).all()


def test_what_a_budget_needs() -> None:
    with pytest.raises(InvalidInput, match="kvcomp-klt, not kvcomp"):
        KVCompCache(CONFIG, "kvcomp", budget="2GiB")
    with pytest.raises(InvalidInput, match="not kvcomp-klt:balanced"):
        KVCompCache(CONFIG, "kvcomp-klt:balanced", calibration=USUAL, budget="2GiB")
    with pytest.raises(InvalidInput, match="make it anew"):
        KVCompCache(CONFIG, "kvcomp-klt", calibration=MADE, budget="2GiB")
    with pytest.raises(InvalidInput, match="context"):
        KVCompCache(CONFIG, "kvcomp-klt", calibration=USUAL, budget="2GiB", context=0)
    with pytest.raises(InvalidInput, match="give a budget too"):
        KVCompCache(CONFIG, "kvcomp-klt", calibration=USUAL, context=256)
