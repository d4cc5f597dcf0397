"""What can be done with a KVCompCache between two passes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

from generating import LOSSLESS, assert_same, filled, forward, generate, prompt
from kvcomp.errors import InvalidInput
from kvcomp.integrations.transformers import KVCompCache
from tiny_models import HYBRIDS, LOSSY, TINY, random_model, tiny_model


def test_crop_and_go_on(llama: PreTrainedModel) -> None:
    ids = prompt(200)["input_ids"]
    for spec, tolerance in ((LOSSLESS, 1e-4), (LOSSY, 2e-3)):
        cache, straight = KVCompCache(llama.config, spec), KVCompCache(llama.config, spec)
        forward(llama, straight, input_ids=ids)
        forward(llama, cache, input_ids=ids)
        forward(llama, cache, input_ids=torch.full((1, 9), 5))
        cache.crop(-9)
        cache.crop(0)
        assert cache.get_seq_length() == 200
        step = torch.full((1, 1), 6)
        one, two = (forward(llama, c, input_ids=step) for c in (cache, straight))
        torch.testing.assert_close(one, two, atol=tolerance, rtol=0)
        cache.crop(-1000)
        assert cache.get_seq_length() == 0


def test_a_positive_crop_is_the_length_to_keep(llama: PreTrainedModel) -> None:
    cache = filled(llama)
    cache.crop(200)
    assert cache.get_seq_length() == 150
    cache.crop(30)
    assert cache.get_seq_length() == 30


def test_rows_are_repeated_selected_and_reordered(llama: PreTrainedModel) -> None:
    inputs = prompt(150, 110)
    cache = KVCompCache(llama.config, LOSSY)
    forward(llama, cache, **inputs)
    twin = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1]))  # rows 1 and 0 of the original
    cache.batch_select_indices(torch.tensor([True, True]))
    assert cache.layers[0].store.starts.tolist() == [40, 0]
    tokens = torch.tensor([[5], [8]])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    swapped = forward(llama, cache, input_ids=tokens.flip(0), attention_mask=mask.flip(0))
    straight = forward(llama, twin, input_ids=tokens, attention_mask=mask)
    torch.testing.assert_close(swapped.flip(0), straight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", HYBRIDS)
def test_rows_of_hybrids_are_repeated_and_selected(family: str) -> None:
    """Transformers' own layers of linear attention know reorder_cache alone."""
    model = random_model(HYBRIDS[family])
    cache = KVCompCache(model.config, LOSSY)
    forward(model, cache, **prompt(150, 150))
    twin = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([False, True, False, True]))
    cache.batch_select_indices(torch.tensor([1, 0]))
    tokens = torch.tensor([[5], [8]])
    swapped = forward(model, cache, input_ids=tokens.flip(0))
    straight = forward(model, twin, input_ids=tokens)
    assert not torch.allclose(straight[0], straight[1])
    torch.testing.assert_close(swapped.flip(0), straight, atol=1e-4, rtol=0)


def test_a_copy_is_independent(llama: PreTrainedModel) -> None:
    cache = filled(llama)
    twin = copy.deepcopy(cache)
    step = torch.full((1, 1), 5)
    expected = forward(llama, twin, input_ids=step)
    forward(llama, twin, input_ids=torch.full((1, 70), 9))
    assert cache.get_seq_length() == 150
    torch.testing.assert_close(forward(llama, cache, input_ids=step), expected, atol=0, rtol=0)
    assert twin.session is not cache.session
    assert twin.layers[0].session is twin.session


@pytest.mark.parametrize("config", [LlamaConfig(**TINY), *HYBRIDS.values()], ids=["llama", *HYBRIDS])
def test_a_cache_that_was_reset_is_as_good_as_new(config: PreTrainedConfig) -> None:
    model = random_model(config)
    cache = KVCompCache(model.config, LOSSY)
    for inputs in (prompt(150), prompt(20, 10), prompt(150)):
        with torch.inference_mode():  # whose tensors cannot be written in place by the reset outside
            found = generate(model, inputs, cache)
        assert_same(found, generate(model, inputs, KVCompCache(model.config, LOSSY)), 0)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.memory().total == 0


def test_keys_and_values_are_handles_that_decompress(llama: PreTrainedModel) -> None:
    cache = KVCompCache(llama.config, LOSSY)
    assert cache.layers[0].keys is None
    forward(llama, cache, **prompt(150))
    layer = cache.layers[0]
    k, v = layer.store.dense()
    assert layer.keys.shape == (1, 2, 150, 16)
    assert torch.equal(layer.keys + 0, k)
    assert torch.equal(layer.values[:, :, 5:9], v[:, :, 5:9])
    assert torch.equal(copy.deepcopy(layer.keys), k)
    assert "KVCompCache" in repr(layer.keys)
    keys = layer.keys
    forward(llama, cache, input_ids=torch.full((1, 1), 5))
    with pytest.raises(InvalidInput, match="before the cache changed"):
        keys.sum()


def test_memory_counts_every_layer() -> None:
    model = tiny_model(
        Gemma3TextConfig, sliding_window=32, layer_types=["sliding_attention", "full_attention"], head_dim=64
    )
    cache = KVCompCache(model.config, LOSSY)
    assert cache.memory().total == 0
    forward(model, cache, **prompt(300))
    sliding, full = cache.layers
    memory, own = cache.memory(), full.store.memory()
    assert memory.pages == own.pages > 0
    assert memory.other == sum(x.untyped_storage().nbytes() for x in (sliding.keys, sliding.values))
    assert memory.total == own.total + memory.other
    assert memory.dense - own.dense == sliding.keys.nbytes + sliding.values.nbytes
    assert memory.values - own.values == sliding.keys.numel() + sliding.values.numel()


def test_repr(llama: PreTrainedModel) -> None:
    cache = KVCompCache(llama.config)
    assert repr(cache) == "KVCompCache(2 compressed layers, 0 tokens, batch of 0)"
    forward(llama, cache, **prompt(20, 10))
    assert repr(cache) == "KVCompCache(2 compressed layers, 20 tokens, batch of 2)"


@pytest.mark.parametrize("attention", ["kvcomp", "sdpa"])  # eager reads the cache as sdpa does
def test_compiled_models_work(attention: str) -> None:
    """A prompt, and tokens after its pages are sealed. One layer, as tracing takes seconds for each."""
    model = tiny_model(LlamaConfig, num_hidden_layers=1)
    model.set_attn_implementation(attention)
    expected, got = KVCompCache(model.config, LOSSY), KVCompCache(model.config, LOSSY)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for tokens in (150, 1, 1, 40):
            ids = prompt(tokens)["input_ids"]
            logits = compiled(ids, past_key_values=got).logits
            torch.testing.assert_close(logits, model(ids, past_key_values=expected).logits, atol=1e-4, rtol=0)
    assert got.layers[0].store.rows.count.tolist() == expected.layers[0].store.rows.count.tolist()
