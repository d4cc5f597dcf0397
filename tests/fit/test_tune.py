"""The turning points of ``kvcomp tune``: what is coded, and what its score is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from kvcomp.fit import tune
from kvcomp.fit.tune import Tuner
from kvcomp.results.journal import Journal
from kvcomp.spec import CodecSpec
from tiny_models import tiny_model


def tuner(model: Any, folder: Path, quizzes: Any = ()) -> Tuner:
    return Tuner(
        model=model, ids=np.arange(332) % 89 + 3, begins=[0], prompt=300, scored=32, quizzes=quizzes,
        base=CodecSpec.resolve("kvcomp"), journal=Journal(folder / "pieces", {}, resume=False),
        advance=lambda *_: None,
    )  # fmt: skip


@pytest.mark.parametrize("part", [0, 1])
def test_a_turning_point_codes_k_or_v_and_leaves_the_other(part: int, tmp_path: Path) -> None:
    made = tuner(tiny_model(), tmp_path)
    each = made.sample(0)
    for own, values in zip(each.cache, made._one_part(part, 0.5)(each), strict=True):
        assert torch.equal(values[1 - part], own[1 - part])
        assert not torch.equal(values[part], own[part])


@pytest.mark.parametrize(("known", "kept"), [(0.8, 0.5), (0.4, 1.0)])
def test_look_ups_count_where_the_model_can_do_them(
    known: float, kept: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that finds a share of them uncompressed, and half of that coded; text is as good as before."""
    exact, coded = torch.eye(3), torch.eye(3)
    each = SimpleNamespace(text=torch.tensor([[0, 0, 1]]), log_probs=exact)
    monkeypatch.setattr(Tuner, "sample", lambda *_: each)
    monkeypatch.setattr(Tuner, "records", lambda *_: each)
    monkeypatch.setattr(tune, "predict_from", lambda *_: coded)
    monkeypatch.setattr(tune, "answered", lambda _, x: [known if x is exact else known / 2])
    model = SimpleNamespace(device=torch.device("cpu"), config=LlamaConfig())
    assert tuner(model, tmp_path, [None])._kept("key", lambda _: []) == kept
