"""Baselines, gradients and calibrations of a model that lies on a GPU, as far as torch's rules for devices go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fake_gpu import DEVICE, fake_gpu
from kvcomp.errors import BackendUnavailable, InvalidInput, LimitExceeded
from kvcomp.evaluate.evaluation import Evaluation, Plan
from kvcomp.evaluate.methods.uncompressed import Uncompressed
from kvcomp.evaluate.models import backend_for, load_model, shipped_model
from kvcomp.fit.tune import Tuner
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.results.journal import Journal
from kvcomp.spec import PRESETS
from on_devices import assert_alike, calibrated_on, figures, model_of_turning_means
from tiny_models import tiny_model

ENDS: dict[str, Exception] = {
    "memory": torch.OutOfMemoryError("CUDA out of memory"),
    "lost": torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "other": RuntimeError("sizes do not match"),
}


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


def test_baselines_give_what_they_give_in_main_memory() -> None:
    model, ids = tiny_model(head_dim=32), torch.randint(3, 97, (1, 230))
    expected = figures(model, ids)
    with fake_gpu():
        found = figures(model.to(DEVICE), ids.to(DEVICE))
    assert found == expected
    assert expected["kivi-4"][0].kl > 0


@pytest.mark.parametrize("given", [True, False])
def test_a_calibration_is_the_one_made_in_main_memory(given: bool, tmp_path: Path) -> None:
    model, text = model_of_turning_means(), torch.randint(3, 97, (1200,)).numpy() if given else None
    expected = calibrated_on(model, text, tmp_path)
    assert expected.layers[0][0].key.rotation is not None
    with fake_gpu():
        assert_alike(calibrated_on(model.to(DEVICE), text, tmp_path), expected)


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


class Ends(Uncompressed):
    """A method under which a device comes to its end."""

    name = "ends"
    error: Exception = RuntimeError("sizes do not match")

    def cache(self, config: Any) -> Any:
        raise self.error


def test_a_device_that_ends_stops_the_evaluation_and_nothing_is_kept_as_failed(tmp_path: Path) -> None:
    plan = Plan(prompts=1, prompt=40, scored=8, streams=0, details=False)
    tokenizer: Any = None
    found: dict[str, Any] = {}
    for name, error in ENDS.items():
        method = Ends()
        method.error = error
        journal = Journal(tmp_path / name, {}, resume=False)
        evaluation = Evaluation(tiny_model(), tokenizer, np.arange(3, 60), [method], plan, journal)
        try:
            evaluation.run(lambda what, cost: None)
        except (LimitExceeded, RuntimeError) as raised:
            found[name] = type(raised), len(journal.pieces)
        else:
            found[name] = None, len(journal.pieces)
    assert found == {
        "memory": (LimitExceeded, 0),  # said with what to do, and --resume goes on
        "lost": (torch.AcceleratorError, 0),
        "other": (None, 1),
    }
