"""What is the same of a model in main memory and of one on a GPU: figures of baselines, and a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvcomp.calibration import Calibration
from kvcomp.evaluate.fidelity import Comparison, compare, fill, predict, sample
from kvcomp.evaluate.methods import baseline
from kvcomp.evaluate.sensitivity import errors_by_head, probe, sensitivity
from kvcomp.fit.calibrate import Calibrator
from kvcomp.fit.windows import Settings
from kvcomp.results.journal import Journal
from kvcomp.spec import LEVELS
from tiny_models import tiny_model

BASELINES = "uncompressed", "fp8", "kivi-4", "kivi-2-same-raw", "turboquant-4"
SETTINGS = Settings(windows=4, prompt=256, scored=16)


def figures(model: Any, ids: torch.Tensor) -> dict[str, tuple[Comparison, Any, Any, Any]]:
    """Fidelity, errors, sensitive heads and memory of each baseline."""
    each = sample(model, ids, 200)
    probed, found = probe(model, each), {}
    for method in map(baseline, BASELINES):
        compared = compare(each, predict(model, each.text, fill(model, each, method), method, streaming=True))
        suffering = sensitivity(model, probed, method)
        memory = method.memory(fill(model, each, method))
        found[method.name] = compared, errors_by_head(model, each, method), suffering, memory
    return found


def model_of_turning_means() -> Any:
    """A model whose means of K are worth turning."""
    model: Any = tiny_model(num_hidden_layers=1, head_dim=32, attention_bias=True)
    torch.nn.init.normal_(model.model.layers[0].self_attn.k_proj.bias, std=3)
    return model


def calibrated_on(model: Any, ids: np.ndarray[Any, Any] | None, folder: Path) -> Calibration:
    return Calibrator(model, ids, SETTINGS, Journal(folder / "a.partial", {}, resume=False)).run("some")


def assert_alike(mine: Calibration, theirs: Calibration) -> None:
    """Two calibrations of one model and text, up to what another order of sums changes."""
    (one, steps), (other, their_steps) = mine.layers[0], theirs.layers[0]
    for affine, expected in ((one.key, other.key), (one.value, other.value)):
        assert affine.matrix.device.type == "cpu"
        torch.testing.assert_close(affine.matrix, expected.matrix, atol=0.02, rtol=0)  # rounded to 8 bits
        torch.testing.assert_close(affine.mean, expected.mean, atol=1e-4, rtol=1e-4)
    for level in LEVELS:  # on a GPU transformers repeats K and V for the queries of a group
        np.testing.assert_allclose(steps[level].steps, their_steps[level].steps, rtol=0.05)
