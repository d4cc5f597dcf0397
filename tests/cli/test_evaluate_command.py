"""``kvcomp evaluate`` and ``kvcomp tune`` as a user types them, on the shipped model and little text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
)
from typer.testing import CliRunner, Result

from kvcomp.cli import app
from kvcomp.evaluate.evaluation import Evaluation
from kvcomp.evaluate.models import shipped_model
from kvcomp.fit import advice
from kvcomp.results import schema as results
from kvcomp.results.journal import Journal
from kvcomp.spec import CodecSpec

SMALL = (
    "--prompts", "2", "--prompt-tokens", "256", "--scored-tokens", "32", "--streams", "1", "--streamed-tokens", "96",
    "--lengths", "512", "--lists", "1", "--passkeys", "1",
)  # fmt: skip
OWN = """
import pathlib
import torch
from kvcomp.evaluate.methods import Baseline

class Stubborn(Baseline):
    name = "stubborn"

    def coded(self, tokens, kind):
        return tokens // 128 * 128

    def encode(self, x, kind):
        if pathlib.Path(STOP).exists() and x.shape[2] == 512 // 128 * 128 - 128:
            raise KeyboardInterrupt
        return {"codes": x.to(torch.float8_e5m2)}

    def decode(self, parts, kind):
        return parts["codes"].float()
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write their results where they are called."""
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def test_evaluate_measures_methods_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    output, stop, own = tmp_path / "found.json", tmp_path / "stop", tmp_path / "own.py"
    own.write_text(OWN.replace("STOP", repr(str(stop))), encoding="utf-8")
    stop.touch()
    options = (
        "evaluate",
        *SMALL,
        "--spec",
        "kvcomp",
        "--baseline",
        str(own),
        "--baseline",
        "kivi-2",
        "--json",
        str(output),
    )
    stopped = run(*options)
    assert stopped.exit_code == 130, stopped.output
    assert "--resume" in stopped.output
    some = results.read(output)
    assert some["partial"]
    done = len(Path(f"{output}.partial").read_text().splitlines())
    assert done > 10
    other = run(*options, "--seed", "5", "--resume")
    assert other.exit_code == 1
    assert "another seed" in other.output
    stop.unlink()
    whole = run(*options, "--resume")
    assert whole.exit_code == 0, whole.output
    assert not Path(f"{output}.partial").exists()
    found = results.read(output)
    assert not found["partial"]
    assert [one["name"] for one in found["methods"]] == ["uncompressed", "kvcomp", "stubborn", "kivi-2"]
    exact, ours, theirs, kivi = found["methods"]
    assert exact["fidelity"]["teacher_forced"]["kl"]["mean"] == 0
    for one in (ours, theirs, kivi):
        forced = one["fidelity"]["teacher_forced"]
        assert forced["kl"]["mean"] > 0
        assert forced["kl"]["count"] == 2
        assert one["fidelity"]["streaming"]["kl"]["mean"] > 0
        assert 0 < one["memory"]["teacher_forced"]["total_bits"] < 16
        assert {cell["task"] for cell in one["retrieval"]} == {"key-value", "passkey"}
        assert sum(cell["asked"] for cell in one["retrieval"]) == 512 // 24 + 5
        assert {cell["depth"] for cell in one["retrieval"]} == {0.1, 0.3, 0.5, 0.7, 0.9}
        assert len(one["error"]["heads"]) == 4 * 2 * 2
        assert one["suffering"][0]["kl"] >= one["suffering"][-1]["kl"]
    parts = ours["memory"]["teacher_forced"]
    assert sum(parts["parts"].values()) == pytest.approx(parts["total_bits"])
    assert ours["error"]["missed"] == 0
    assert 0.9 < ours["error"]["largest_over_bound"] <= 1
    assert sum(ours["error"]["histogram"]["K"]["counts"]) > 0
    assert "suffers most in" in whole.output


def test_tune_writes_a_spec_that_is_within_its_goal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "BUDGET", 0.0)
    spec, figures = tmp_path / "tuned.json", tmp_path / "figures.json"
    few = ("--prompts", "1", "--prompt-tokens", "300", "--scored-tokens", "32")
    done = run("tune", "--like", "kivi-4", *few, "-o", str(spec), "--json", str(figures))
    assert done.exit_code == 0, done.output
    assert "dense" in done.output  # the advice
    found = results.read(figures)
    assert found["kl"] <= found["before"]["kivi-4"]["kl"]
    assert found["coded_bits"] < found["before"]["kivi-4"]["coded_bits"]
    tuned = CodecSpec.resolve(spec)
    assert len(tuned.key.scales) == len(tuned.value.scales) == 4
    assert tuned == CodecSpec.from_json(found["spec"])
    assert found["advice"]["size_from"] in (256, 512, 1024)
    assert [row["context"] for row in found["advice"]["speed"]] == [1024, 4096]


def test_tune_goes_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its middle and gone on with, a search ends where one that was never stopped does, and measures nothing
    twice.
    """
    monkeypatch.setattr(advice, "BUDGET", 0.0)
    few = ("tune", "--max-kl", "0.02", "--prompts", "1", "--prompt-tokens", "300", "--scored-tokens", "32")
    measured: list[str] = []
    stop_at = 20
    piece = Journal.piece

    def piece_until(journal: Journal, key: str, make: Callable[[], Any]) -> Any:
        if key not in journal:
            if len(measured) == stop_at:
                raise KeyboardInterrupt
            measured.append(key)
        return piece(journal, key, make)

    monkeypatch.setattr(Journal, "piece", piece_until)
    stopped = run(*few, "-o", "stopped.json")
    assert stopped.exit_code == 130, stopped.output
    assert "--resume" in stopped.output
    assert not Path("stopped.json").exists()
    stop_at = -1
    assert run(*few, "-o", "stopped.json", "--resume").exit_code == 0
    assert len(measured) == len(set(measured)) > 20
    once = measured.copy()
    measured.clear()
    assert run(*few, "-o", "whole.json").exit_code == 0
    assert measured == once
    assert Path("stopped.json").read_bytes() == Path("whole.json").read_bytes()


def test_tune_finds_turning_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "BUDGET", 0.0)
    monkeypatch.setattr(advice, "CONTEXTS", (1 << 20,))  # beyond the model's positions
    spec, figures = tmp_path / "tuned.json", tmp_path / "figures.json"
    few = ("--prompts", "1", "--prompt-tokens", "300", "--scored-tokens", "32", "--lists", "1")
    done = run("tune", "--keep", "0.9", *few, "-o", str(spec), "--json", str(figures))
    assert done.exit_code == 0, done.output
    found = results.read(figures)
    chosen = {"K": CodecSpec.resolve(spec).key.scales, "V": CodecSpec.resolve(spec).value.scales}
    for kind, scales in chosen.items():
        (scale,) = scales
        kept = {row["scale"]: row["kept"] for row in found["tried"] if row["kind"] == kind}
        assert all((share >= 0.9) == (tried <= scale) for tried, share in kept.items())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("evaluate", "no/such/model"), 1, "cannot load a model"),
        (("evaluate", "--baseline", "kivi"), 1, "no baseline 'kivi'"),
        (("evaluate", "--spec", "none-such"), 1, "no preset"),
        (("evaluate", "--spec", "kvcomp", "--spec", "kvcomp"), 1, "named twice"),
        (("evaluate", "--lengths", "1k"), 2, "numbers with commas"),
        (("evaluate", "--prompt-tokens", "4096"), 1, "4096 positions"),
        (("evaluate", "--resume", "--json", "no-such-run.json"), 1, "nothing to resume"),
        (("tune", "--keep", "0.9", "--max-kl", "0.1"), 2, "one of --keep"),
        (("tune", "--max-kl", "0"), 2, "above 0"),
        (("tune", "--like", "kivi-5"), 1, "no baseline"),
        (("tune", "--like", ""), 1, "no baseline"),
        (("tune", "--prompt-tokens", "100"), 1, "of 100 tokens is compressed: give --prompt-tokens 132"),
    ],
)
def test_wrong_use_is_told(arguments: tuple[str, ...], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_evaluate_that_is_stopped_before_it_measures_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluation, "__post_init__", stop)
    result = run("evaluate", *SMALL, "--json", "found.json")
    assert (result.exit_code, "--resume" in result.output) == (130, True), result.output
    assert not Path("found.json").exists()


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short\n", encoding="utf-8")
    for command in ("evaluate", "tune"):
        result = run(command, "--text", str(text))
        assert result.exit_code == 1
        assert "longer --text" in " ".join(result.output.split())


def test_a_model_with_sliding_windows_is_measured_without_what_needs_all_tokens(tmp_path: Path) -> None:
    """Gemma 2 also has no sdpa in transformers, and a soft cap."""
    save(
        Gemma2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            intermediate_size=32, sliding_window=64, vocab_size=4096, max_position_embeddings=1024,
        ),
        tmp_path,
    )  # fmt: skip
    output = tmp_path / "found.json"
    few = ("--prompts", "1", "--prompt-tokens", "300", "--scored-tokens", "8", "--lists", "0", "--passkeys", "0")
    options = ("--streamed-tokens", "16", "--spec", "kvcomp", "--baseline", "fp8", "--json", str(output))
    result = run("evaluate", str(tmp_path), *few, *options)
    assert result.exit_code == 0, result.output
    exact, ours, theirs = results.read(output)["methods"]
    assert exact["fidelity"]["teacher_forced"]["kl"]["mean"] == 0
    for one in (ours, theirs):
        assert "error" not in one
        assert one["memory"]["teacher_forced"]["parts"]["other"] > 0
        assert one["memory"]["teacher_forced"]["sealed_values"] > 0
    refused = run("tune", str(tmp_path), "--prompts", "1", "--prompt-tokens", "300", "--scored-tokens", "8")
    assert refused.exit_code == 1
    assert "attend to all tokens" in " ".join(refused.output.split())


def test_a_model_without_keys_is_refused(tmp_path: Path) -> None:
    save(MambaConfig(vocab_size=4096, hidden_size=32, num_hidden_layers=2, state_size=8), tmp_path)
    for command in ("evaluate", "tune"):
        result = run(command, str(tmp_path))
        assert result.exit_code == 1
        assert "nothing to compress" in " ".join(result.output.split())


def save(config: PreTrainedConfig, folder: Path) -> None:
    """A model of random weights with the shipped tokenizer."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(shipped_model()).save_pretrained(folder)


def test_a_method_that_cannot_hold_a_model_is_said_to_have_failed(tmp_path: Path) -> None:
    """Heads of 20 channels: no groups of 32, and no multiple of 8."""
    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=40, num_attention_heads=2, num_key_value_heads=2, head_dim=20,
        intermediate_size=32, vocab_size=4096, max_position_embeddings=1024,
    )  # fmt: skip
    save(config, tmp_path)
    output = tmp_path / "found.json"
    few = ("--prompts", "1", "--prompt-tokens", "300", "--scored-tokens", "8", "--lists", "0", "--passkeys", "0")
    options = ("--spec", "kvcomp", "--baseline", "kivi-4", "--baseline", "fp8", "--json", str(output))
    result = run("evaluate", str(tmp_path), *few, "--streamed-tokens", "32", *options)
    assert result.exit_code == 0, result.output
    found = {one["name"]: one for one in json.loads(output.read_text())["methods"]}
    for name in ("kvcomp", "kivi-4"):
        assert all("UnsupportedModel" in why for why in found[name]["failed"].values())
        assert not found[name]["fidelity"]
    assert "kvcomp failed" in result.output
    assert found["fp8"]["memory"]["teacher_forced"]["coded_bits"] == 8


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("evaluate", *SMALL, "--lengths", "10"), 1, "at least 64 tokens"),
        (("evaluate", *SMALL, "--seed", "-1"), 2, "--seed"),
        (("evaluate", *SMALL, "--json", "."), 2, "is a folder"),
        (("tune", "--spec", "kvcomp-klt:balanced"), 2, "has its own levels"),
        (("tune", "-o", "none/kvcomp.json"), 2, "no folder none"),
        (("tune", "-o", "/dev/full"), 2, "a pipe or a device"),
        (("generate", "-n", "5000"), 1, "positions of the model"),
        (("generate", "--seed", "99999999999999999999999"), 2, "--seed"),
    ],
)
def test_what_cannot_end_well_is_refused_before_it_begins(
    tmp_path: Path, arguments: tuple[str, ...], code: int, word: str
) -> None:
    result = run(*arguments)
    assert (result.exit_code, word in " ".join(result.output.split())) == (code, True), result.output
    assert not list(tmp_path.iterdir())
