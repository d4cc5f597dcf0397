"""Calibrating models of many kinds, and generating from caches that use it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from kvcomp.calibration import Calibration
from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.fit.calibrate import KIVI_BITS, Calibrator
from kvcomp.fit.statistics import Statistics, observe
from kvcomp.fit.windows import Settings, write
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.results.journal import Journal
from kvcomp.spec import LEVELS

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROPE = {"rope_theta": 10000.0}
SETTINGS = Settings(windows=4, prompt=256, scored=32)
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama3 rope": LlamaConfig(
        **SMALL,
        rope_parameters={
            **ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ),
    "yarn rope": Qwen3Config(
        **SMALL,
        head_dim=16,
        rope_parameters={**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    ),
    "partial rope": GPTNeoXConfig(
        **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
        rope_parameters={**ROPE, "rope_type": "default", "partial_rotary_factor": 0.25},
    ),
    "no rope": GPT2Config(
        vocab_size=64, n_positions=2048, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    ),
    "soft cap, sliding window": Gemma2Config(
        **{**SMALL, "pad_token_id": 0}, head_dim=16, query_pre_attn_scalar=16, sliding_window=128
    ),
}  # fmt: skip


def model_of(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def text(tokens: int = 700) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(0).integers(0, 64, tokens)


def calibrator(model: Any, path: Path, resume: bool = False, settings: Settings = SETTINGS) -> Calibrator:
    return Calibrator(model, text(), settings, Journal(path / "made.partial", {}, resume))


def calibrate(model: Any, path: Path) -> Calibration:
    return run(calibrator(model, path))


def run(made: Calibrator) -> Calibration:
    made.write()
    made.read()
    curves = made.curves()
    return made.build({level: made.level(curves, bits) for level, bits in KIVI_BITS.items()}, "random")


@pytest.mark.parametrize("kind", CONFIGS)
def test_models_of_many_kinds_are_calibrated_and_generate(kind: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS[kind])
    calibration = calibrate(model, tmp_path)
    assert calibration.levels == LEVELS
    ids = torch.from_numpy(text(400))[None]
    logits = {}
    for name in ("exact", "near-lossless", "aggressive"):
        exact = name == "exact"
        model.set_attn_implementation("sdpa" if exact and "cap" not in kind else "eager" if exact else "kvcomp")
        cache = (
            DynamicCache(config=model.config)
            if exact
            else KVCompCache(model.config, f"kvcomp-klt:{name}", calibration=calibration)
        )
        with torch.inference_mode():
            model(ids[:, :-8], past_key_values=cache)
            logits[name] = model(ids[:, -8:], past_key_values=cache).logits
        if not exact:
            assert any(layer.store.compressed for layer in cache.compressed_layers)
            k = cache.compressed_layers[0].store.held()[0]
            assert (
                k.std((0, 1, 2)).argmax() < k.shape[3] // 4
            )  # the channels are in order: the transform is that of these keys
    change = {name: float((x - logits["exact"]).abs().max()) for name, x in logits.items()}
    spread = float(logits["exact"].std())
    assert change["near-lossless"] < 0.3 * spread
    assert change["near-lossless"] <= change["aggressive"]


def test_sums_are_those_of_the_tokens() -> None:
    model = model_of(CONFIGS["llama"])
    ids = torch.from_numpy(text(300))[None]
    statistics = Statistics()
    caches: list[Any] = [observe(model, part, 4, statistics) for part in (ids[:, :150], ids[:, 150:])]
    whole = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :150], past_key_values=whole)
    assert torch.equal(caches[0].layers[1].keys, whole.layers[1].keys)
    for index in range(2):
        k = torch.cat([cache.layers[index].keys[0, :, 4:] for cache in caches], 1).double()
        mean, covariance = statistics.layers[index].moments(True)
        assert statistics.layers[index].tokens == k.shape[1] == 292
        assert torch.allclose(mean, k.mean(1), atol=1e-9)
        assert torch.allclose(covariance[1], torch.cov(k[1].T, correction=0), atol=1e-9)
        weight = model.model.layers[index].self_attn.o_proj.weight.double()
        expected = weight[:, :32].T @ weight[:, :32]  # the first KV head's group of two heads
        assert torch.allclose(statistics.layers[index].output[0], expected[:16, :16] + expected[16:, 16:], atol=1e-5)


def test_an_interrupted_calibration_goes_on_and_gives_the_same(tmp_path: Path) -> None:
    """Stopped once in every part of it."""
    model = model_of(CONFIGS["llama"])
    whole = calibrate(model, tmp_path)
    places = [
        ("the model writes", 1),
        ("reading", 2),
        ("gradients", 3),
        ("each layer alone", 3),
        ("as good as 3 bits", 1),
    ]
    for count, (where, when) in enumerate(places):
        seen = []

        def stop(
            what: str, done: int, total: int, where: str = where, when: int = when, seen: list[Any] = seen
        ) -> None:
            assert 0 <= done < total
            seen.append((what, done))
            if (what, done) == (where, when):
                raise KeyboardInterrupt

        interrupted = calibrator(model, tmp_path, resume=count > 0)
        interrupted.tell = stop
        with pytest.raises(KeyboardInterrupt):
            run(interrupted)
        assert (("the model writes", 1) in seen) == (count < 2)  # what is done is not done again
        assert (("gradients", 0) in seen) == (count in (2, 3))
    again = calibrator(model, tmp_path, resume=True)
    assert "written" in again.journal
    assert len([key for key in again.journal.pieces if key.startswith("alone.")]) == len(again.layers) * 2
    assert run(again).content == whole.content


def test_some_of_the_text_is_written_by_the_model(tmp_path: Path) -> None:
    model = model_of(CONFIGS["llama"])
    made = calibrator(model, tmp_path)
    made.write()
    assert [repeats for _, repeats in made.drawn] == [False, False, True, True, True]
    assert all(ids.shape == (1, SETTINGS.length) for ids, _ in made.drawn)
    first = int(made.drawn[-1][0][0, 0])
    assert first in text()
    again = calibrator(model, tmp_path, resume=True)
    again.write()
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(made.drawn, again.drawn, strict=True))


@torch.no_grad()
def test_what_a_model_writes_is_drawn_from_what_it_predicts() -> None:
    model = model_of(CONFIGS["llama"])
    model.lm_head.weight.mul_(10)  # so that it expects something
    written = torch.from_numpy(write(model, text(), 4, 200, lambda *_: None))
    assert written.shape == (4, 200)
    logits = model(written).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, written[:, 1:].flatten())
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert abs(float(loss - entropy)) < 0.2
    assert entropy < np.log(64) - 0.5


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0}),
        Phi3Config(
            **{**SMALL, "pad_token_id": 0},
            original_max_position_embeddings=512,
            rope_parameters={
                **ROPE, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 512,
            },
        ),
    ],
    ids=["dynamic", "longrope"],
)  # fmt: skip
def test_frequencies_that_change_with_length_are_refused_by_name(config: PreTrainedConfig, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"dynamic|longrope"):
        calibrator(model_of(config), tmp_path)


def test_windows_stand_all_over_the_positions_and_say_the_same_there(tmp_path: Path) -> None:
    """K at a place is K of the same text at 0, turned; what the model says of the text does not change."""
    model = model_of(CONFIGS["llama"])
    made = calibrator(model, tmp_path)
    made.write()
    made.read()
    firsts = [int(window.positions[0, 0]) - SETTINGS.prompt for window in made.windows]
    room = made.context - SETTINGS.length
    assert firsts[0] == 0 < 0.6 * room < max(firsts) <= room
    ids = torch.cat([made.drawn[2][0][:, : SETTINGS.prompt], made.windows[2].text], 1)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        plain = model(ids[:, : SETTINGS.prompt], past_key_values=cache)
        plain = model(ids[:, SETTINGS.prompt :], past_key_values=cache).logits[0].log_softmax(-1)
    assert torch.allclose(plain, made.windows[2].log_probs, atol=1e-3)
    here, there = cache.layers[1].keys[:, :, : SETTINGS.prompt], made.windows[2].layers[1].keys
    assert not torch.allclose(here, there, atol=1e-2)
    assert torch.allclose(here.norm(dim=3), there.norm(dim=3), atol=1e-3)
    model = model_of(CONFIGS["no rope"])
    assert calibrator(model, tmp_path).context == SETTINGS.length


def test_what_cannot_be_calibrated_says_why(tmp_path: Path) -> None:
    model = model_of(CONFIGS["llama"])
    journal = Journal(tmp_path / "made.partial", {}, False)
    with pytest.raises(InvalidInput, match="longer --text"):
        Calibrator(model, text(300), SETTINGS, journal)
    with pytest.raises(InvalidInput, match="positions end at"):
        Calibrator(model, text(), Settings(4, 4096, 32), journal)
    with pytest.raises(InvalidInput, match="too short"):
        Calibrator(model, text(), Settings(4, 128, 64), journal)
    with pytest.raises(InvalidInput, match="--context"):
        Calibrator(model, text(), replace(SETTINGS, context=1 << 20), journal)
    with pytest.raises(InvalidInput, match="too few"):
        Calibrator(model, text(), Settings(2, 256, 32), journal)


def test_a_cache_is_refused_for_another_model_or_without_its_calibration(tmp_path: Path) -> None:
    model = model_of(CONFIGS["llama"])
    calibration = calibrate(model, tmp_path)
    with pytest.raises(InvalidInput, match="kvcomp calibrate MODEL"):
        KVCompCache(model.config, "kvcomp-klt")
    with pytest.raises(InvalidInput, match="run kvcomp calibrate"):
        KVCompCache(LlamaConfig(**{**SMALL, "vocab_size": 65}), "kvcomp-klt", calibration=calibration)
    model.set_attn_implementation("kvcomp")
    cache = KVCompCache(model.config, "kvcomp-klt", calibration=calibration)
    ids = torch.from_numpy(text(400))[None]
    model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    cache.save(tmp_path / "one.kvc")
    with pytest.raises(InvalidInput, match=calibration.fingerprint):
        KVCompCache.load(tmp_path / "one.kvc", model.config)
    calibration.write(tmp_path / "model.kvcal")
    back = KVCompCache.load(tmp_path / "one.kvc", model.config, calibration=tmp_path / "model.kvcal")
    for mine, theirs in zip(back.compressed_layers, cache.compressed_layers, strict=True):
        assert torch.equal(mine.store.dense()[0], theirs.store.dense()[0])
    more = torch.from_numpy(text(404))[None, -1:]
    with torch.inference_mode():
        assert torch.equal(model(more, past_key_values=back).logits, model(more, past_key_values=cache).logits)


def test_a_context_beyond_the_calibrations_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(CONFIGS["llama"])
    whole = calibrate(model, tmp_path)
    assert whole.tokens == model.config.max_position_embeddings
    calibration = run(calibrator(model, tmp_path, settings=replace(SETTINGS, context=288)))
    cache = KVCompCache(model.config, "kvcomp-klt", calibration=calibration)
    model.set_attn_implementation("kvcomp")
    ids = torch.from_numpy(text(400))[None]
    with torch.inference_mode(), caplog.at_level("WARNING", "kvcomp"):
        model(ids[:, :288], past_key_values=cache)
        assert not caplog.records
        for token in range(288, 292):
            model(ids[:, token : token + 1], past_key_values=cache)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "the calibration was measured on 288 tokens"
    ]
