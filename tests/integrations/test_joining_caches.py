"""Rows that join a KVCompCache and leave it while it is in use."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig

from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.spec import PRESETS

EXAMPLE = Path(__file__).parents[2] / "examples" / "continuous_batching.py"
SPEC = replace(PRESETS["kvcomp"], window=16)
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 400,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    made.set_attn_implementation("kvcomp")
    return made


def filled(model: LlamaForCausalLM, tokens: int, seed: int = 0, **how: Any) -> KVCompCache:
    cache = KVCompCache(model.config, **{"spec": SPEC, **how})
    ids = torch.randint(0, 97, (1, tokens), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def decode(model: LlamaForCausalLM, cache: KVCompCache, ids: torch.Tensor) -> torch.Tensor:
    mask = cache.attention_mask(ids.shape[1])
    positions = mask.cumsum(1)[:, -ids.shape[1] :] - 1
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@pytest.mark.parametrize("attention", ["kvcomp", "sdpa"])
def test_a_row_that_joined_goes_on_as_it_would_alone(model: LlamaForCausalLM, attention: str) -> None:
    joined, one, other = filled(model, 300, seed=1), filled(model, 300, seed=1), filled(model, 90, seed=2)
    joined.join(other)
    model.set_attn_implementation(attention)
    try:
        for step in range(70):
            ids = torch.tensor([[step], [96 - step]])
            logits = decode(model, joined, ids)
            for row, alone in enumerate((one, other)):
                expected = decode(model, alone, ids[row : row + 1])
                torch.testing.assert_close(logits[row], expected[0], rtol=1e-4, atol=1e-4)
    finally:
        model.set_attn_implementation("kvcomp")


def test_padding_that_every_row_has_goes(model: LlamaForCausalLM) -> None:
    cache = filled(model, 390, seed=1)
    cache.join(filled(model, 60, seed=2))
    decode(model, cache, torch.tensor([[1], [2]]))
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.get_seq_length() == 391
    cache.join(filled(model, 100, seed=3))
    assert cache.get_seq_length() == 100
    assert cache.attention_mask().sum(1).tolist() == [62, 101]
    for _ in range(20):  # beyond the 400 positions that the first row would have had
        decode(model, cache, torch.tensor([[1], [2]]))


def test_other_caches_are_refused(model: LlamaForCausalLM) -> None:
    cache = filled(model, 100)
    with pytest.raises(InvalidInput, match="one spec"):
        cache.join(filled(model, 100, spec="packed"))
    with pytest.raises(InvalidInput, match="hold tokens"):
        cache.join(KVCompCache(model.config, SPEC))
    with pytest.raises(InvalidInput, match="hidden_size"):
        cache.join(KVCompCache(LlamaConfig(**{**SIZES, "hidden_size": 128}), SPEC))
    with pytest.raises(InvalidInput, match="one backend"):
        cache.join(KVCompCache(model.config, SPEC, backend="gpu"))
    sliding = KVCompCache(MistralConfig(**SIZES, sliding_window=64), SPEC)
    with pytest.raises(UnsupportedModel, match="sliding windows"):
        sliding.join(sliding)
    assert cache.get_seq_length() == 100
    assert cache.attention_mask().shape == (1, 101)


def test_the_example_of_continuous_batching_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "every request got the tokens that it gets alone" in capsys.readouterr().out
