"""kvcomp bench: what it measures, that a wrong kernel gets no time, and that a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig
from typer.testing import CliRunner, Result

from kvcomp.bench import cases as bench
from kvcomp.bench import checks, generation
from kvcomp.cli import app
from kvcomp.errors import UnsupportedModel
from kvcomp.kernels.cpu import backend as cpu
from kvcomp.results import schema as results
from kvcomp.spec import PRESETS, CodecSpec, TensorSpec
from kvcomp.store import KVStore, sealed
from tiny_models import tiny_model

SMALL = ("--context", "320", "--batch", "2", "--group", "2", "--head-dim", "32", "--kv-heads", "2", "--rounds", "5")
SPREAD = {"median", "quartile_1", "quartile_3"}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A bench sets torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(output: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["bench", *SMALL, "-o", str(output), *options])


def written(output: Path) -> Any:
    return json.loads(output.read_text(encoding="utf-8"))


def test_times_come_with_their_setting_their_spread_and_the_error(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    result = run(output, "--part", "attention", "--part", "codec", "--threads", "1", "--threads", "2")
    assert result.exit_code == 0, result.output
    found = results.read(output)
    assert found["partial"] is False
    assert found["setting"]["backend"] == "cpu"
    assert found["setting"]["spec"]["key"]["unit"] == "channel"
    assert {"device", "torch", "commit", "date", "GOMP_SPINCOUNT"} <= set(found["setting"])
    assert [row["threads"] for row in found["attention"]] == [1, 2]
    for row in found["attention"]:
        assert row["error"] < checks.SHORT_TOLERANCE
        assert row["rounds"] == 5
        assert set(row["time_over"]) == {"sdpa_gqa", "sdpa_folded", "sdpa_repeated", "matmul"}
        for spread in (*row["time_over"].values(), *row["milliseconds"].values()):
            assert set(spread) == SPREAD
            assert 0 < spread["quartile_1"] <= spread["median"] <= spread["quartile_3"]
        assert row["time_over"][row["fastest_dense"]]["median"] > 0
    (codec,) = found["codec"]
    assert min(codec[name]["median"] for name in ("encode_ns_per_value", "decompress_ns_per_value")) > 0
    assert "backend: cpu" in result.output
    assert "FlashAttention" in result.output
    assert not output.with_name("bench.json.partial").exists()


def test_pictures_lie_beside_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "bench.json"
    assert run(output, "--part", "attention", "--threads", "1").exit_code == 0
    assert output.with_suffix(".svg").read_text(encoding="utf-8").startswith("<svg")
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("spec", ["kvcomp", "kvcomp-klt:balanced"])
def test_generation_is_timed_whole_with_both_caches(tmp_path: Path, spec: str) -> None:
    output = tmp_path / "bench.json"
    options = ("--part", "generate", "--prompt-tokens", "448", "--new-tokens", "4", "--threads", "1", "--spec", spec)
    result = CliRunner().invoke(app, ["bench", "--batch", "2", "--rounds", "5", "-o", str(output), *options])
    assert result.exit_code == 0, result.output
    (row,) = written(output)["generate"]
    assert (row["prompt_tokens"], row["new_tokens"], row["batch"]) == (448, 4, 2)
    assert row["error"] < checks.SHORT_TOLERANCE  # the small model is timed in bfloat16
    assert row["total_bits"] < 16
    for times in (row["first_token_seconds"], row["milliseconds_per_token"]):
        assert set(times) == {"kvcomp", "uncompressed"}
        assert all(spread["median"] > 0 for spread in times.values())


def test_a_window_that_dropped_tokens_is_checked_whole() -> None:
    """It cannot be cropped to its first pages, as other stores are for the reference."""
    store = KVStore(replace(PRESETS["kvcomp"], window=20), sliding_window=200)
    store.append(*torch.randn(2, 1, 2, 900, 16, generator=torch.Generator().manual_seed(0)))
    store.set_starts([0])
    store.seal()
    assert store.rows.dropped.all()
    assert 0 < checks.reference_error(store, torch.randn(1, 4, 1, 16)) < checks.TOLERANCE


@pytest.mark.parametrize(("head_dim", "scale"), [(72, 0.08), (64, 0.004)], ids=["padded", "raw"])
def test_attention_over_padded_heads_and_over_raw_blocks_is_checked(head_dim: int, scale: float) -> None:
    spec = CodecSpec(TensorSpec("channel", scale), TensorSpec("token", scale), window=0)
    store = sealed(spec, *bench.tensors(1, 2, 320, head_dim))
    assert (store.memory().raw_blocks > 0) == (head_dim == 64)
    assert 0 < checks.attention_error(store, torch.randn(1, 4, 1, head_dim)) < checks.SHORT_TOLERANCE


def test_queries_of_a_check_fit_a_k_with_a_large_channel() -> None:
    """Whatever is drawn: others have scores that 16-bit factors hold too coarsely, and called right kernels wrong."""
    k, v = bench.tensors(1, 2, 320, 64)
    k[..., 3] *= 100
    store = sealed(PRESETS["kvcomp"], k, v)
    for _ in range(20):
        q = generation.queries(store)
        scores = q @ store.dense()[0].float().mT * 64**-0.5
        torch.testing.assert_close(scores.std(-1), torch.full((1, 2, 1), generation.SPREAD))
        assert 0 < checks.reference_error(store, q) < checks.SHORT_TOLERANCE


def test_the_memory_is_noted_as_tokens_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", replace(bench.QUICK, growth=224))
    output = tmp_path / "bench.json"
    result = CliRunner().invoke(app, ["bench", "--part", "growth", "-o", str(output)])
    assert result.exit_code == 0, result.output
    (row,) = written(output)["growth"]
    memory = row["memory"]
    assert memory["tokens"] == sorted(memory["tokens"])
    assert len(memory["tokens"]) == len(memory["kvcomp"]) == len(memory["uncompressed"]) >= 5
    per_token = {dense / tokens for tokens, dense in zip(memory["tokens"], memory["uncompressed"], strict=True)}
    assert per_token == {4 * 2 * 2 * 64 * 2.0}  # layers, K and V, KV heads, channels, bytes
    assert memory["kvcomp"][-1] < memory["uncompressed"][-1]


@pytest.mark.parametrize("part", ["generate", "growth"])
def test_a_model_of_which_nothing_is_compressed_is_refused_by_name(part: str) -> None:
    model = tiny_model(MistralConfig, sliding_window=32)
    with pytest.raises(UnsupportedModel, match="no layer of this mistral model is compressed"):
        bench.cases(bench.QUICK, (PRESETS["kvcomp"], None), [part], model, False)


def times_in(text: str) -> bool:
    return any(word in text for word in ("ns a value", "ms", "over a copy"))


@pytest.mark.parametrize("size", [1.001, float("nan")])
def test_attention_that_is_wrong_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    right = cpu.attend

    def wrong(*args: Any, **options: Any) -> Any:
        out, lse = right(*args, **options)
        out[-1, -1, -1] *= size  # one query of one head
        return out, lse

    monkeypatch.setattr(cpu, "attend", wrong)
    output = tmp_path / "bench.json"
    result = run(output, "--part", "attention", "--threads", "1")
    assert result.exit_code == 1
    assert "CheckFailed: attention is wrong" in " ".join(result.output.split())
    assert not times_in(result.output)
    assert not output.exists()


def test_generation_with_a_wrong_kernel_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda *args, **options: tuple(1.01 * x for x in right(*args, **options)))
    output = tmp_path / "bench.json"
    options = ("--part", "generate", "--prompt-tokens", "192", "--new-tokens", "4")
    result = CliRunner().invoke(app, ["bench", "--batch", "1", "-o", str(output), *options])
    assert result.exit_code == 1
    assert "CheckFailed" in result.output
    assert not output.exists()


def test_an_encoder_that_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.encode_pages

    def wrong(*args: Any, **options: Any) -> Any:
        pages, offsets = right(*args, **options)
        pages[int(offsets[1]) - 20] ^= 1  # a bit of a stream in the first page
        return pages, offsets

    k, v = bench.tensors(1, 2, 320, 32)
    checks.check_codec(PRESETS["kvcomp"].bare(), k, v)
    monkeypatch.setattr(cpu, "encode_pages", wrong)
    with pytest.raises(checks.CheckFailed, match="encoder"):
        checks.check_codec(PRESETS["kvcomp"].bare(), k, v)


def test_decompression_that_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.decompress

    def wrong(*args: Any, **options: Any) -> None:
        right(*args, **options)
        next(x for x in args if isinstance(x, np.ndarray) and x.ndim == 3)[0, 0, 0] += 1  # a unit in the last place

    k, v = bench.tensors(1, 2, 320, 32)
    monkeypatch.setattr(cpu, "decompress", wrong)
    with pytest.raises(checks.CheckFailed, match="decompression"):
        checks.check_codec(PRESETS["kvcomp"].bare(), k, v)


def test_a_run_that_was_stopped_leaves_its_results_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "bench.json"
    options = ("--part", "attention", "--group", "1", "--group", "4", "--threads", "1")  # three cases with SMALL's
    measure, measured = bench.AttentionCase.measure, []

    def until_stopped(case: Any, grid: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case)
        return measure(case, grid)

    with monkeypatch.context() as patch:
        patch.setattr(bench.AttentionCase, "measure", until_stopped)
        stopped = run(output, *options)
    assert stopped.exit_code == 130
    assert "--resume" in stopped.output
    partial = written(output)
    assert partial["partial"] is True
    assert len(partial["attention"]) == 2
    assert run(output, *options, "--rounds", "6", "--resume").exit_code == 1  # another measurement
    assert run(output, *options, "--resume").exit_code == 0
    whole = written(output)
    assert whole["partial"] is False
    assert whole["attention"][:2] == partial["attention"]
    assert [row["group"] for row in whole["attention"]] == [2, 1, 4]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--part", "nothing"), 2, "the parts are"),
        (("--spec", "nothing"), 2, "no preset"),
        (("--part", "attention", "--spec", "kvcomp-klt"), 1, "--part generate"),
        (("--context", "64"), 1, "at least 256 tokens"),
        (("--threads", "0"), 1, "must be 1 or more"),
        (("--part", "generate", "--prompt-tokens", "100000"), 1, "--prompt-tokens"),
        (("--resume",), 1, "nothing to resume"),
    ],
)
def test_a_wrong_use_says_why(tmp_path: Path, options: tuple[str, ...], code: int, message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "-o", str(tmp_path / "bench.json"), *options])
    assert result.exit_code == code
    assert message in " ".join(result.output.split())


def test_the_quick_grid_is_a_part_of_the_full_one() -> None:
    for name in ("contexts", "batches", "groups", "head_dims", "threads", "prompts"):
        assert set(getattr(bench.QUICK, name)) <= set(getattr(bench.FULL, name))


def test_dense_methods_agree_with_each_other() -> None:
    from kvcomp.bench.dense import dense_methods

    k, v = (x.float() for x in bench.tensors(2, 2, 128, 32))
    out = [method() for method in dense_methods(k, v, torch.randn(2, 2, 4, 32)).values()]
    for other in out[1:]:
        torch.testing.assert_close(other, out[0], rtol=1e-4, atol=1e-5)
