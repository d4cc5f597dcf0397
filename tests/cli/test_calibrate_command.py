"""``kvcomp calibrate`` as a user types it, on a model of random weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner, Result

from kvcomp.calibration import Calibration
from kvcomp.cli import app
from kvcomp.evaluate.models import shipped_model
from kvcomp.fit import cached
from kvcomp.fit.calibrate import Calibrator
from kvcomp.fit.windows import Settings
from kvcomp.spec import LEVELS

SMALL = "--windows", "4", "--prompt-tokens", "256", "--scored-tokens", "32"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


@pytest.fixture
def model(tmp_path: Path) -> str:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    place = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    AutoTokenizer.from_pretrained(shipped_model()).save_pretrained(place)
    return str(place)


@pytest.fixture
def text(tmp_path: Path) -> str:
    place = tmp_path / "text.txt"
    place.write_text("\n".join(f"The square of {n} is {n * n}." for n in range(400)), encoding="utf-8")
    return str(place)


def test_calibrate_goes_on_after_a_stop_and_leaves_one_file(
    model: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole.kvcal", tmp_path / "model.kvcal"
    finished = run("calibrate", model, "--text", text, "-o", str(whole), *SMALL)
    assert finished.exit_code == 0, finished.output
    assert "as good as" in finished.output

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Calibrator, "level", stop)
        stopped = run("calibrate", model, "--text", text, "-o", str(output), *SMALL)
    assert stopped.exit_code == 130
    assert "--resume" in stopped.output
    assert not output.exists()
    assert Path(f"{output}.partial").exists()
    with monkeypatch.context() as patched:
        patched.setattr(Calibrator, "_alone", stop)  # everything before the levels is there
        resumed = run("calibrate", model, "--text", text, "-o", str(output), *SMALL, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.kvcal*")) == ["model.kvcal", "whole.kvcal"]
    calibration = Calibration.read(output)
    assert calibration.levels == LEVELS
    assert calibration.about.made["written"] == 1


def test_calibrate_without_a_text_lets_the_model_write(model: str, tmp_path: Path) -> None:
    output = tmp_path / "model.kvcal"
    done = run("calibrate", model, "-o", str(output), *SMALL)
    assert done.exit_code == 0, done.output
    made = Calibration.read(output).about.made
    assert (made["text"], made["written"]) == ("written by the model", 5)


def test_calibrate_says_what_it_needs(model: str, text: str, tmp_path: Path) -> None:
    output = str(tmp_path / "model.kvcal")
    short = run("calibrate", model, "--text", text, "-o", output, "--prompt-tokens", "4000")
    assert (short.exit_code, "positions end at 1024" in short.output) == (1, True)
    nothing = run("calibrate", model, "--text", text, "-o", output, *SMALL, "--resume")
    assert (nothing.exit_code, "run once without --resume" in nothing.output) == (1, True)
    both = run("calibrate", model, "--text", text)
    assert (both.exit_code, "--output" in both.output) == (2, True)
    own = run("compress", text, "-o", output, "--spec", "kvcomp-klt")
    assert (own.exit_code, "kvcomp calibrate MODEL -o model.kvcal" in " ".join(own.output.split())) == (1, True)


def test_commands_find_a_calibration_that_was_made_without_a_place(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cached, "Settings", partial(Settings, 4, 256, 32))
    made = run("calibrate", model, *SMALL)
    assert made.exit_code == 0, made.output
    (place,) = (tmp_path / "cache").rglob("*.kvcal")
    assert str(place) in made.output
    monkeypatch.setattr(Calibrator, "run", None)
    output = tmp_path / "figures.json"
    done = run("generate", model, "--spec", "kvcomp-klt", "--prompt", "a", "-n", "2", "--json", str(output))
    assert done.exit_code == 0, done.output
    assert json.loads(output.read_text())["spec"]["calibration"] == Calibration.read(place).fingerprint
    within = run("generate", model, "--budget", "1MiB", "--prompt", "a", "-n", "2")
    assert (within.exit_code, "layers: 1 near-lossless" in within.output) == (0, True)
    without = run("generate", model, "--budget", "1kB", "--prompt", "a", "-n", "2")
    assert (without.exit_code, "give more, or fewer tokens" in " ".join(without.output.split())) == (1, True)
    other = run("generate", model, "--budget", "1MiB", "--spec", "packed", "--prompt", "a")
    assert (other.exit_code, "leave out --spec" in other.output) == (2, True)
