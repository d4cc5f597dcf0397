"""Levels hold for text that nobody made for the calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kvcomp.evaluate.models import shipped_model
from kvcomp.evaluate.text import start_ids
from kvcomp.fit import sources
from kvcomp.fit.cached import cached_path, calibrate
from kvcomp.fit.calibrate import KIVI_BITS, Calibrator
from kvcomp.fit.quality import Quality, quality_of
from kvcomp.fit.sources import EACH, source_windows
from kvcomp.fit.windows import Settings
from kvcomp.results.journal import Journal
from tiny_models import tiny_model

SETTINGS = Settings(windows=4, prompt=256, scored=32)
KLS = st.floats(1e-8, 10)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(shipped_model())
    return found


def test_windows_are_of_documentation_and_of_sources(tokenizer: Any) -> None:
    windows = source_windows(tokenizer, SETTINGS)
    assert [window.shape for window in windows] == [(1, SETTINGS.length)] * 2 * EACH
    start = start_ids(tokenizer)
    assert all(window[0, : len(start)].tolist() == start for window in windows)
    texts = [tokenizer.decode(window[0]) for window in windows]
    assert len(set(texts)) == len(texts)
    assert any("def " in text for text in texts[EACH:])
    again = source_windows(tokenizer, SETTINGS)
    assert all(torch.equal(one, other) for one, other in zip(windows, again, strict=True))


def test_where_nothing_is_installed_there_are_no_windows(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_documentation", lambda: iter(["too short"]))
    monkeypatch.setattr(sources, "_sources", lambda: iter([]))
    assert source_windows(tokenizer, SETTINGS) == []


@given(st.tuples(KLS, KLS, KLS), st.tuples(KLS, KLS, KLS))
def test_the_worst_kind_of_text_decides(mine: tuple[float, ...], theirs: tuple[float, ...]) -> None:
    one, other = (quality_of(list(zip(("text", "repeated", "sources"), kls, strict=True))) for kls in (mine, theirs))
    assert one == Quality(*mine)
    assert one.over(other) == max(a / b for a, b in zip(mine, theirs, strict=True))
    assert one.mean == (mine[0] + mine[1]) / 2
    without = quality_of([("text", mine[0]), ("repeated", mine[1]), ("text", mine[0])])
    assert without.sources is None
    assert without.over(other) == max(a / b for a, b in zip(mine[:2], theirs[:2], strict=True))


def test_a_level_is_as_good_as_it_says_on_the_sources_and_nothing_is_fitted_to_them(tmp_path: Path) -> None:
    """Sources that the model can hardly be coded on take more bits; transforms and curves stay as they are."""
    model: Any = tiny_model(num_hidden_layers=2, head_dim=32)
    text = np.random.default_rng(0).integers(3, 97, 1200)
    hard = [torch.arange(SETTINGS.length)[None] % 7 + 3]
    made = {}
    for name, given_sources in (("with", hard), ("without", [])):
        journal = Journal(tmp_path / name, {}, resume=False)
        calibrator = Calibrator(model, text, SETTINGS, journal, sources=given_sources)
        calibrator.write()
        calibrator.read()
        curves = calibrator.curves()
        levels = {level: calibrator.level(curves, bits) for level, bits in KIVI_BITS.items()}
        made[name] = calibrator, curves, levels
    (first, curves, levels), (second, their_curves, their_levels) = made["with"], made["without"]
    for at, affine in first.affines.items():
        assert torch.equal(affine.matrix, second.affines[at].matrix)
        assert torch.equal(first.reach[at], second.reach[at])
    for tensor, curve in curves.items():
        assert np.array_equal(curve.kl, their_curves[tensor].kl)
        assert np.array_equal(curve.bits, their_curves[tensor].bits)
    for level, (_, about) in levels.items():
        assert about["reached"]
        assert about["kl"]["sources"] <= about["kl_of"]["sources"]
        assert their_levels[level][1]["kl"]["sources"] is None
        assert about["price"] >= their_levels[level][1]["price"]


def test_one_with_sources_is_kept_beside_one_without(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny_model(num_hidden_layers=1, vocab_size=len(tokenizer))
    made = [calibrate(model, SETTINGS, tokenizer=one) for one in (None, tokenizer)]
    assert [one.about.made["sources"] for one in made] == [0, 2 * EACH]
    places = [cached_path(model, SETTINGS, sources) for sources in (False, True)]
    assert [place.read_bytes() for place in places] == [one.content for one in made]
