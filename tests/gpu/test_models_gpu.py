"""Models on a GPU are measured and calibrated as in main memory. ``make gpu-check`` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from on_devices import assert_alike, calibrated_on, figures, model_of_turning_means
from tiny_models import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def test_baselines_give_what_they_give_in_main_memory() -> None:
    model, ids = tiny_model(head_dim=32), torch.randint(3, 97, (1, 230))
    expected, found = figures(model, ids), figures(model.to("cuda"), ids.to("cuda"))
    for name, (compared, errors, _, memory) in expected.items():
        assert found[name][0].kl == pytest.approx(compared.kl, rel=0.05, abs=1e-6)
        assert found[name][3] == memory
        for mine, theirs in zip(found[name][1]["heads"], errors["heads"], strict=True):
            assert mine["rms"] == pytest.approx(theirs["rms"], rel=0.02)


def test_a_calibration_is_the_one_made_in_main_memory(tmp_path: Path) -> None:
    model, text = model_of_turning_means(), torch.randint(3, 97, (1200,)).numpy()
    expected = calibrated_on(model, text, tmp_path)
    assert_alike(calibrated_on(model.to("cuda"), text, tmp_path), expected)
