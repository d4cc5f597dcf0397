"""Input, other models and arguments that a KVCompCache refuses, and what it holds does not change."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config

from generating import filled, forward, prompt
from kvcomp.errors import InvalidInput, LimitExceeded, UnsupportedModel
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers import attention as transformers_attention
from tiny_models import tiny_config, tiny_model


def test_arguments_that_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(InvalidInput, match=r"model\.config"):
        KVCompCache(llama)
    with pytest.raises(InvalidInput, match="no preset 'zip'"):
        KVCompCache(llama.config, "zip")
    with pytest.raises(InvalidInput, match="pickled"):
        pickle.dumps(KVCompCache(llama.config))
    layer = KVCompCache(llama.config).layers[0]
    for move in (layer.offload, layer.prefetch):
        with pytest.raises(InvalidInput, match="KVCompCache cannot be"):
            move()


def state(cache: KVCompCache) -> list[Any]:
    return [
        (layer.store.tokens, layer.store.batch, layer.store.rows.count.tolist(), layer.store.dense())
        for layer in cache.layers
    ]


def assert_unchanged(cache: KVCompCache, before: list[Any]) -> None:
    after = state(cache)
    torch.testing.assert_close(after, before, atol=0, rtol=0)


@pytest.mark.parametrize("attention", ["kvcomp", "sdpa"])
@pytest.mark.parametrize(
    "other",
    [
        {"num_key_value_heads": 4},
        {"head_dim": 32},
        {"dtype": torch.bfloat16},
        {"num_hidden_layers": 3},
    ],
    ids=str,
)
def test_another_model_is_refused_and_changes_nothing(
    llama: PreTrainedModel, other: dict[str, Any], attention: str
) -> None:
    cache = filled(llama)
    before = state(cache)
    with pytest.raises(InvalidInput, match="this cache"):
        forward(tiny_model(**other), cache, attention, input_ids=torch.full((1, 1), 5))
    assert_unchanged(cache, before)


def test_a_model_of_the_same_shape_is_told_apart(llama: PreTrainedModel) -> None:
    cache = filled(llama)
    before = state(cache)
    for other in (tiny_model(num_hidden_layers=1), tiny_model(Qwen3Config), tiny_model(intermediate_size=64)):
        with pytest.raises(InvalidInput, match="make a KVCompCache for each model"):
            forward(other, cache, input_ids=torch.full((1, 1), 5))
        assert_unchanged(cache, before)
    fresh = KVCompCache(llama.config)
    with pytest.raises(InvalidInput, match="num_hidden_layers 2, not 1"):
        forward(tiny_model(num_hidden_layers=1), fresh, **prompt(20))
    assert fresh.get_seq_length() == 0
    forward(llama, fresh, **prompt(20, 10))
    forward(tiny_model(), fresh, input_ids=torch.full((2, 1), 5))  # the same configuration, loaded again


def test_bad_input_changes_nothing(llama: PreTrainedModel) -> None:
    cache = filled(llama)
    before = state(cache)
    step = torch.full((1, 1), 5)
    with pytest.raises(InvalidInput, match="no new tokens"):
        forward(llama, cache, input_ids=step[:, :0])
    with pytest.raises(InvalidInput, match="batch"):
        forward(llama, cache, input_ids=torch.full((2, 1), 5))
    with pytest.raises(InvalidInput, match="attention mask must be"):
        forward(llama, cache, input_ids=step, attention_mask=torch.ones((1, 1, 1, 99)))
    with pytest.raises(InvalidInput, match="computes no weights"):
        llama(input_ids=step, past_key_values=cache, output_attentions=True)
    llama.train()
    try:
        with pytest.raises(InvalidInput, match=r"call model\.eval"):
            llama(input_ids=step, past_key_values=cache)
    finally:
        llama.eval()
    with pytest.raises(InvalidInput, match="head_dim of K, of V"):
        cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 32), 0)
    for bad in (torch.zeros(1, 2, 16), torch.zeros(1, 3, 1, 16), torch.zeros(1, 2, 1, 16, dtype=torch.int32)):
        with pytest.raises(InvalidInput):
            cache.update(bad, bad, 0)
    assert_unchanged(cache, before)


def test_more_tokens_than_the_model_has_positions() -> None:
    model = tiny_model(max_position_embeddings=512)
    cache = filled(model)
    before = state(cache)
    with pytest.raises(LimitExceeded, match="end at 512 tokens: the cache holds 150, so 400 more"):
        forward(model, cache, input_ids=torch.full((1, 400), 5))
    with pytest.raises(LimitExceeded):
        cache.update(torch.zeros(1, 2, 363, 16), torch.zeros(1, 2, 363, 16), 0)
    assert_unchanged(cache, before)
    stretched = tiny_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert KVCompCache(stretched).session.limit is None


def test_attention_parameters_it_does_not_know(llama: PreTrainedModel) -> None:
    cache = filled(llama)
    before = state(cache)
    module = llama.model.layers[0].self_attn
    x = torch.zeros(1, 2, 1, 16)
    for key, value in (cache.update(x, x, 0), (x, x)):
        with pytest.raises(UnsupportedModel, match="use another attn_implementation"):
            transformers_attention.kvcomp_attention(
                module, torch.zeros(1, 4, 1, 16), key, value, None, position_bias=torch.zeros(4)
            )
    assert_unchanged(cache, before)


def test_flex_attention_is_refused_with_what_to_call_instead() -> None:
    model = tiny_model()
    cache = filled(model)
    before = state(cache)
    with pytest.raises(UnsupportedModel, match=r'set_attn_implementation\("kvcomp"\)'):
        forward(model, cache, "flex_attention", input_ids=torch.full((1, 1), 5))
    assert_unchanged(cache, before)


def test_repeats_that_are_no_numbers(llama: PreTrainedModel) -> None:
    cache = filled(llama)
    for repeats in (True, 0, 1.0, "2"):
        with pytest.raises(InvalidInput, match="repeats must be a whole number"):
            cache.batch_repeat_interleave(repeats)  # type: ignore[arg-type]


def test_a_cache_that_generate_shall_not_use_is_named(llama: PreTrainedModel) -> None:
    llama.set_attn_implementation("kvcomp")
    options: dict[str, Any] = {"max_new_tokens": 3, "use_cache": False, "past_key_values": KVCompCache(llama.config)}
    # before transformers 5.15 it is the mask that shows it
    with pytest.raises(InvalidInput, match=r"no use_cache=False|in the cache and 21 new ones"):
        llama.generate(**prompt(20), **options)
