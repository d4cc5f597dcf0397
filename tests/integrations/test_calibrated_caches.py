"""Calibrating models of many kinds, and generating from caches that use it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from kvcomp.calibration import Calibration
from kvcomp.errors import InvalidInput
from kvcomp.fit.calibrate import KIVI_BITS, Calibrator
from kvcomp.fit.rotation import rotations
from kvcomp.fit.statistics import LayerSums
from kvcomp.fit.windows import Settings
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


COHERE = CohereConfig(**SMALL, rope_parameters={**ROPE, "rope_type": "default"})


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


@pytest.mark.parametrize("kind", ["llama", "partial rope", "interleaved rope"])
def test_the_rotation_is_measured_and_the_mean_is_that_before_it(kind: str) -> None:
    config = COHERE if kind == "interleaved rope" else CONFIGS[kind]
    model = model_of(config)
    found = rotations(model, torch.from_numpy(text(64))[None], [0, 1], 2048)
    channels = 16
    turning = channels // 4 if kind == "partial rope" else channels
    speed = 10000.0 ** -(np.arange(0, turning, 2) / turning)
    for rotation in found.values():
        assert np.allclose(rotation.speed, speed, atol=1e-6)
        beside = 1 if kind == "interleaved rope" else turning // 2
        assert {b - a for a, b in zip(rotation.first, rotation.second, strict=True)} == {beside}
    places = torch.arange(300)[None]
    k = torch.randn(1, 2, 300, channels) + 3 * torch.randn(2, 1, channels)
    sums = LayerSums(1, *(torch.eye(channels, dtype=torch.float64).expand(2, -1, -1),) * 4)
    affine = sums.of_key(found[0].turned(k, places), places, found[0], True)
    assert affine.rotation is not None
    assert torch.allclose(affine.mean, k[0].mean(1), atol=0.3)
    assert float(affine.apply(found[0].turned(k, places), places).mean((0, 2)).abs().max()) < 0.1


def test_what_does_not_turn_has_no_rotation() -> None:
    keys = torch.randn(2, 64, 16, dtype=torch.float64)
    with torch.no_grad():
        assert rotations(Still(keys), torch.from_numpy(text(64))[None], [0], 2048) == {}
        assert rotations(Still(keys, noise=0.1), torch.from_numpy(text(64))[None], [0], 2048) == {}


class Still:
    """A model whose K does not depend on places, or in no way that is a rotation."""

    config, device = CONFIGS["llama"], torch.device("cpu")

    def __init__(self, keys: Tensor, noise: float = 0.0) -> None:
        self.keys, self.noise = keys, noise

    def set_attn_implementation(self, name: str) -> None:
        pass

    def __call__(self, ids: Tensor, past_key_values: Any, position_ids: Tensor, logits_to_keep: int) -> None:
        k = (self.keys + self.noise * position_ids[0, 0] * torch.randn_like(self.keys))[None]
        past_key_values.update(k, k, 0)


def test_windows_stand_all_over_the_positions_and_say_the_same_there(tmp_path: Path) -> None:
    """K at a place is K of the same text at 0, turned; what the model says of the text does not change."""
    model = model_of(CONFIGS["llama"])
    made = calibrator(model, tmp_path)
    made.write()
    made.read()
    firsts = [int(window.positions[0, 0]) - SETTINGS.prompt for window in made.fitted.windows]
    room = made.context - SETTINGS.length
    assert firsts[0] == 0 < 0.6 * room < max(firsts) <= room
    ids = torch.cat([made.drawn[2].ids[:, : SETTINGS.prompt], made.fitted.windows[2].text], 1)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        plain = model(ids[:, : SETTINGS.prompt], past_key_values=cache)
        plain = model(ids[:, SETTINGS.prompt :], past_key_values=cache).logits[0].log_softmax(-1)
    assert torch.allclose(plain, made.fitted.windows[2].log_probs, atol=1e-3)
    here, there = cache.layers[1].keys[:, :, : SETTINGS.prompt], made.fitted.windows[2].layers[1].keys
    assert not torch.allclose(here, there, atol=1e-2)
    assert torch.allclose(here.norm(dim=3), there.norm(dim=3), atol=1e-3)
    model = model_of(CONFIGS["no rope"])
    assert calibrator(model, tmp_path).context == SETTINGS.length


def test_where_the_rotation_is_unknown_windows_stand_at_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcomp.fit.calibrate.rotations", lambda *_: {})
    made = calibrator(model_of(CONFIGS["llama"]), tmp_path)
    made.write()
    made.read()
    assert made.context == SETTINGS.length
    assert {int(window.positions[0, 0]) for window in made.fitted.windows} == {SETTINGS.prompt}
    assert all(affine.rotation is None for affine in made.affines.values())


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


@pytest.mark.parametrize("attention", ["kvcomp", "sdpa"])
def test_autocast_rounds_nothing_of_the_transforms(attention: str, tmp_path: Path) -> None:
    """Tokens in one pass, in a few and alone, under bfloat16: as far off as with transformers' own cache."""
    model = model_of(LlamaConfig(**SMALL, attention_bias=True))
    torch.nn.init.normal_(model.model.layers[0].self_attn.k_proj.bias, std=3)  # so that means of K turn
    calibration = calibrate(model, tmp_path)
    assert calibration.layers[0][0].key.rotation is not None
    ids = torch.from_numpy(text(306))[None]

    def passes(cache: Any, implementation: str) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        parts = (ids[:, :300], ids[:, 300:305], ids[:, 305:])
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1).float()

    with torch.no_grad():
        exact = passes(DynamicCache(config=model.config), "sdpa")
        coded = passes(KVCompCache(model.config, "kvcomp-klt:near-lossless", calibration=calibration), attention)
        with torch.autocast("cpu", torch.bfloat16):
            expected = passes(DynamicCache(config=model.config), "sdpa")
            cache = KVCompCache(model.config, "kvcomp-klt:near-lossless", calibration=calibration)
            found = passes(cache, attention)
            held = cache.compressed_layers[0].store.held()
            dense = cache.compressed_layers[0].store.dense()
    alone = (expected - exact).norm() + (coded - exact).norm()
    assert (found - exact).norm() < 1.5 * alone
    store = cache.compressed_layers[0].store
    assert all(
        torch.equal(one, other) for one, other in zip((*held, *dense), (*store.held(), *store.dense()), strict=True)
    )
