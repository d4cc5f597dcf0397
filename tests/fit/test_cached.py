"""``kvcomp.calibrate``: a calibration is made once for some weights, and found again."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import kvcomp
from kvcomp.calibration import Calibration
from kvcomp.errors import LimitExceeded, UnsupportedModel
from kvcomp.evaluate.fidelity import GROUPED
from kvcomp.fit.cached import cached_path, calibrate, fitting
from kvcomp.fit.calibrate import Calibrator
from kvcomp.fit.statistics import Statistics
from kvcomp.fit.windows import Settings
from kvcomp.integrations.transformers import KVCompCache

SETTINGS = Settings(windows=4, prompt=256, scored=32)


def config(positions: int = 1024) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16).eval()
    return made


def never(*_: Any) -> None:
    raise AssertionError


def too_large(*_: Any) -> None:
    raise LimitExceeded


@pytest.mark.parametrize("mode", [torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_modes_change_no_calibration(
    model: PreTrainedModel, mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = kvcomp.calibrate(model, SETTINGS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with mode:
        made = kvcomp.calibrate(model, SETTINGS)
    assert made.fingerprint == expected.fingerprint


def test_what_was_made_is_found_and_the_model_stays_as_it_is(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model.config._attn_implementation
    made = kvcomp.calibrate(model, SETTINGS)
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, before)
    with monkeypatch.context() as patched:
        patched.setattr(Calibrator, "run", never)
        found = calibrate(model, SETTINGS)
        assert found.fingerprint == made.fingerprint
    KVCompCache(model.config, "kvcomp-klt", calibration=found)
    place = cached_path(model, SETTINGS, False)
    place.write_bytes(place.read_bytes()[:-1])
    assert calibrate(model, SETTINGS).fingerprint == made.fingerprint  # a damaged one is made again
    with monkeypatch.context() as patched:
        patched.setattr(Calibration, "read", too_large)
        assert calibrate(model, SETTINGS).fingerprint == made.fingerprint
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1
    assert cached_path(model, SETTINGS, False) != place


def test_a_stopped_one_goes_on(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Calibrator, "level", stop)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, SETTINGS)
    place = cached_path(model, SETTINGS, False)
    assert not place.exists()
    with monkeypatch.context() as patched:
        patched.setattr(Calibrator, "_gradients", never)  # it is among the pieces
        calibrate(model, SETTINGS)
    assert sorted(path.suffix for path in place.parent.iterdir()) == [".kvcal", ".lock"]


def test_what_is_refused_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dynamic = config()
    dynamic.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedModel, match="dynamic"):
        calibrate(AutoModelForCausalLM.from_config(dynamic).eval(), SETTINGS)
    assert [path.suffix for path in (tmp_path / "kvcomp" / "calibrations").iterdir()] == [".lock"]


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_the_process_stays_as_it_was(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """What other models read from the environment, whether it ends well or not; and no sums stay in memory."""
    monkeypatch.delenv(GROUPED, raising=False)
    if before is not None:
        monkeypatch.setenv(GROUPED, before)
    made: list[ref[Statistics]] = []
    begin = Statistics.__init__

    def noted(self: Statistics, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        made.append(ref(self))

    monkeypatch.setattr(Statistics, "__init__", noted)
    with monkeypatch.context() as patched:
        patched.setattr(Calibrator, "level", never)
        with pytest.raises(AssertionError):
            calibrate(model, SETTINGS)
    assert os.environ.get(GROUPED) == before
    calibrate(model, SETTINGS)
    assert os.environ.get(GROUPED) == before
    gc.collect()
    assert made
    assert not [one for one in made if one() is not None]


def test_short_positions_take_shorter_prompts() -> None:
    assert fitting(config(1 << 14)) == Settings()
    assert fitting(config(1024)).length == 1024


def test_only_models_of_transformers_are_calibrated() -> None:
    with pytest.raises(UnsupportedModel, match="Linear"):
        calibrate(nn.Linear(1, 1))  # type: ignore[arg-type]
