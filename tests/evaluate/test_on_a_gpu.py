"""Baselines, gradients and calibrations of a model that lies on a GPU, as far as torch's rules for devices go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fake_gpu import DEVICE, fake_gpu
from kvcomp.calibration import Calibration
from kvcomp.errors import BackendUnavailable, InvalidInput
from kvcomp.evaluate.fidelity import compare, fill, predict, sample
from kvcomp.evaluate.methods import baseline
from kvcomp.evaluate.models import backend_for, load_model, shipped_model
from kvcomp.evaluate.sensitivity import errors_by_head, probe, sensitivity
from kvcomp.fit.calibrate import Calibrator
from kvcomp.fit.tune import Tuner
from kvcomp.fit.windows import Settings
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.results.journal import Journal
from kvcomp.spec import LEVELS, PRESETS
from tiny_models import tiny_model

BASELINES = "uncompressed", "fp8", "kivi-4", "kivi-2-same-raw", "turboquant-4"


def test_the_stand_in_has_the_rules_of_a_gpu() -> None:
    with fake_gpu():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert there.is_cuda
        assert (there + 1).device == DEVICE
        assert there.cpu().numpy().sum() == 3
        assert (there[torch.tensor([0, 2])] * float(here.sum())).tolist() == [3, 3]
        for wrong in (lambda: there + here, lambda: here @ there, lambda: here[torch.zeros(1, device=DEVICE).long()]):
            with pytest.raises(RuntimeError, match="on a GPU and tensors in main memory"):
                wrong()
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
        there[1:].mul_(2)
        assert there.tolist() == [1, 2, 2]


def figures(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    each = sample(model, ids, 200)
    probed, found = probe(model, each), {}
    for method in map(baseline, BASELINES):
        compared = compare(each, predict(model, each.text, fill(model, each, method), method, streaming=True))
        suffering = sensitivity(model, probed, method)
        memory = method.memory(fill(model, each, method))
        found[method.name] = compared, errors_by_head(model, each, method), suffering, memory
    return found


def test_baselines_give_what_they_give_in_main_memory() -> None:
    model, ids = tiny_model(head_dim=32), torch.randint(3, 97, (1, 230))
    expected = figures(model, ids)
    with fake_gpu():
        found = figures(model.to(DEVICE), ids.to(DEVICE))
    assert found == expected
    assert expected["kivi-4"][0].kl > 0


@pytest.mark.parametrize("given", [True, False])
def test_a_calibration_is_the_one_made_in_main_memory(given: bool, tmp_path: Path) -> None:
    settings = Settings(windows=4, prompt=256, scored=16)
    text = torch.randint(3, 97, (1200,)).numpy() if given else None

    def made(model: Any, name: str) -> Calibration:
        return Calibrator(model, text, settings, Journal(tmp_path / name, {}, resume=False)).run("some")

    model: Any = tiny_model(num_hidden_layers=1, head_dim=32, attention_bias=True)
    torch.nn.init.normal_(model.model.layers[0].self_attn.k_proj.bias, std=3)  # so that means of K turn
    expected = made(model, "here")
    assert expected.layers[0][0].key.rotation is not None
    with fake_gpu():
        found = made(model.to(DEVICE), "there")
    (mine, steps), (theirs, expected_steps) = found.layers[0], expected.layers[0]
    for one, other in ((mine.key, theirs.key), (mine.value, theirs.value)):
        assert one.matrix.device.type == "cpu"
        torch.testing.assert_close(one.matrix, other.matrix, atol=0.02, rtol=0)  # rounded to 8 bits
        torch.testing.assert_close(one.mean, other.mean)
    for level in LEVELS:  # on a GPU transformers repeats K and V for the queries of a group
        np.testing.assert_allclose(steps[level].steps, expected_steps[level].steps, rtol=0.05)


def test_what_cannot_be_on_a_gpu_says_so(tmp_path: Path) -> None:
    for device in ("cuda:0", "nowhere"):
        if device == "nowhere" or not torch.cuda.is_available():
            with pytest.raises(InvalidInput, match=f"cannot be put on the device '{device}'"):
                load_model(shipped_model(), device=device)
    model, ids = tiny_model(), np.ones(100, np.int64)
    assert backend_for(model) == "cpu"
    with fake_gpu():
        model = model.to(DEVICE)
        assert backend_for(model) == "gpu"
        with pytest.raises(BackendUnavailable, match="backend='gpu'"):
            model(torch.ones((1, 5), device=DEVICE, dtype=torch.int64), past_key_values=KVCompCache(model.config))
        with pytest.raises(InvalidInput, match="tuning measures on the CPU"):
            Tuner(
                model=model, ids=ids, begins=[0], prompt=50, scored=20, quizzes=[], base=PRESETS["kvcomp"],
                journal=Journal(tmp_path / "tuned", {}, resume=False), advance=lambda *_: None,
            )  # fmt: skip
