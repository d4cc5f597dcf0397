"""A forward pass counts in every layer of a cache or in none, and a cache from outside gives right tokens
or an error.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, PreTrainedModel

from families import FAMILIES
from kvcomp import PrefixStore
from kvcomp.errors import InvalidInput, LimitExceeded
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers import attention as transformers_attention
from tiny_models import HYBRIDS, LOSSY, TINY, random_model

IDS = torch.randint(3, 97, (1, 120), generator=torch.Generator().manual_seed(0))
STEP = torch.full((1, 1), 5)


def model_of(config: Any) -> PreTrainedModel:
    model = random_model(config)
    model.set_attn_implementation("kvcomp")
    return model


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return model_of(LlamaConfig(**TINY))


def filled(model: PreTrainedModel) -> KVCompCache:
    cache = KVCompCache(model.config, LOSSY)
    with torch.inference_mode():
        model(IDS, past_key_values=cache)
    return cache


def step(model: PreTrainedModel, cache: KVCompCache) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(STEP, past_key_values=cache).logits
        return logits


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def no_room(*_: object) -> None:
    raise LimitExceeded("no room")


def interrupted(model: PreTrainedModel, cache: KVCompCache, before: int = 1, ids: torch.Tensor = STEP) -> None:
    """A pass that ends before the layer of this number."""
    stop = model.model.layers[before].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), torch.inference_mode():
            model(ids, past_key_values=cache)
    finally:
        stop.remove()


def test_a_pass_that_stopped_between_two_layers_is_taken_back_by_the_next(llama: PreTrainedModel) -> None:
    cache, twin = filled(llama), filled(llama)
    interrupted(llama, cache)
    assert [layer.store.tokens for layer in cache.compressed_layers] == [121, 120]
    with pytest.raises(InvalidInput, match="did not end; its tokens are taken back"):
        step(llama, cache)
    assert [layer.store.tokens for layer in cache.compressed_layers] == [120, 120]
    assert torch.equal(step(llama, cache), step(llama, twin))


def test_a_pass_that_fails_in_a_later_layer_is_taken_back_from_all(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, twin = KVCompCache(llama.config, LOSSY), KVCompCache(llama.config, LOSSY)
    ids = torch.arange(120)[None] % 97
    with torch.no_grad():
        for one in (cache, twin):
            llama(ids, past_key_values=one)
        for method in ("append", "seal"):
            with monkeypatch.context() as patch:
                patch.setattr(cache.layers[1].store, method, no_room)
                with pytest.raises(LimitExceeded, match="no room"):
                    llama(ids[:, :3], past_key_values=cache)
            assert cache.get_seq_length() == 120
            assert {layer.store.tokens for layer in cache.compressed_layers} == {120}
        stale = cache.update(*torch.zeros(2, 1, 2, 1, 16), 0)
        cache.crop(120)
        with pytest.raises(InvalidInput, match="before the cache changed"):
            transformers_attention.kvcomp_attention(
                llama.model.layers[0].self_attn, torch.zeros(1, 4, 1, 16), *stale, None
            )
        assert cache.get_seq_length() == 120  # which is no reason to take anything back
        logits = [llama(ids[:, :3], past_key_values=one).logits for one in (cache, twin)]
    assert torch.equal(*logits)


def test_another_thread_cannot_go_into_the_middle_of_a_pass(llama: PreTrainedModel) -> None:
    cache = filled(llama)
    interrupted(llama, cache)
    errors: list[Exception] = []

    def other() -> None:
        try:
            step(llama, cache)
        except InvalidInput as error:
            errors.append(error)

    thread = Thread(target=other)
    thread.start()
    thread.join()
    assert "another thread is in the middle" in str(errors[0])
    assert cache.layers[0].store.tokens == 121


def test_a_window_that_cannot_go_back_makes_the_cache_refuse_until_it_is_reset() -> None:
    model = model_of(HYBRIDS["gemma3"])
    cache = filled(model)
    expected = step(model, filled(model))
    interrupted(model, cache)  # behind the sliding window
    for _ in range(2):
        with pytest.raises(InvalidInput, match="sliding windows and linear attention cannot go back"):
            step(model, cache)
    cache.reset()
    with torch.inference_mode():
        model(IDS, past_key_values=cache)
    assert torch.equal(step(model, cache), expected)


USES: dict[str, Callable[[PreTrainedModel, KVCompCache, Path], object]] = {
    "the next pass": lambda model, cache, folder: step(model, cache),
    "a file": lambda model, cache, folder: cache.save(folder / "a.kvc"),
    "join": lambda model, cache, folder: cache.join(filled(model)),
    "being joined": lambda model, cache, folder: filled(model).join(cache),
    "a copy": lambda model, cache, folder: deepcopy(cache),
    "a crop": lambda model, cache, folder: cache.crop(-1),
    "other rows": lambda model, cache, folder: cache.reorder_cache(torch.tensor([0, 0])),
    "a prefix store": lambda model, cache, folder: PrefixStore(folder / "store").save(IDS, cache, model),
}


@pytest.mark.parametrize("use", USES)
def test_whatever_comes_after_a_stopped_pass_takes_it_back(llama: PreTrainedModel, tmp_path: Path, use: str) -> None:
    cache, twin = filled(llama), filled(llama)
    interrupted(llama, cache)
    with pytest.raises(InvalidInput, match="did not end; its tokens are taken back"):
        USES[use](llama, cache, tmp_path)
    assert [layer.store.tokens for layer in cache.compressed_layers] == [120, 120]
    assert not list(tmp_path.rglob("*.kvc"))
    assert torch.equal(step(llama, cache), step(llama, twin))


# Linear attention, whose states cannot go back

LINEAR = {"Qwen3-Next": "linear_attention", "Granite 4 hybrid": "mamba", "LFM2": "conv"}
STOPS = {
    "before the first attention": (1, 1),
    "between two attentions": (2, 1),
    "between two attentions, many tokens": (3, 20),
    "behind the last attention": (4, 20),
}


@pytest.fixture(scope="module", params=LINEAR)
def hybrid(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Five layers: linear attention, and after it full attention, in turns."""
    kind, settings = FAMILIES[request.param]
    full = "attention" if kind == "granitemoehybrid" else "full_attention"
    linear = LINEAR[request.param]
    layers = {"num_hidden_layers": 5, "layer_types": [linear, full, linear, full, linear]}
    return model_of(AutoConfig.for_model(kind, **{**TINY, **settings, **layers}))


@pytest.mark.parametrize("stop", STOPS)
def test_states_that_moved_on_alone_make_the_cache_refuse_until_it_is_reset(
    hybrid: PreTrainedModel, tmp_path: Path, stop: str
) -> None:
    before, tokens = STOPS[stop]
    expected = step(hybrid, filled(hybrid))
    for use in USES.values():
        cache = filled(hybrid)
        interrupted(hybrid, cache, before, IDS[:, :tokens])
        for again in (use, *USES.values()):
            with pytest.raises(InvalidInput, match="linear attention cannot go back: reset the cache"):
                again(hybrid, cache, tmp_path)
        assert not list(tmp_path.rglob("*.kvc"))
        cache.reset()
        with torch.inference_mode():
            hybrid(IDS, past_key_values=cache)
        assert torch.equal(step(hybrid, cache), expected)


def test_states_that_all_moved_on_are_used_by_everything(hybrid: PreTrainedModel, tmp_path: Path) -> None:
    """After many tokens and after one, after a reset, after a file, and after a failure behind the last layer."""
    cache = filled(hybrid)
    step(hybrid, cache)
    cache.reset()  # outside of the mode that its states were made in
    for tokens in (1, 30, 1, 1, 30):
        with torch.inference_mode():
            hybrid(IDS[:, :tokens], past_key_values=cache)
        twin = deepcopy(cache)
        cache.save(tmp_path / "a.kvc")
        cache = KVCompCache.load(tmp_path / "a.kvc", hybrid.config)
        assert torch.equal(step(hybrid, deepcopy(cache)), step(hybrid, twin))
    norm = hybrid.get_decoder().norm if hasattr(hybrid.get_decoder(), "norm") else hybrid.get_decoder().embedding_norm
    stop = norm.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        hybrid(IDS[:, :20], past_key_values=cache)
    stop.remove()
    assert cache.get_seq_length() == 83
    step(hybrid, cache)
    cache.join(deepcopy(cache))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.save(tmp_path / "b.kvc")


# Caches from outside


def generate(model: PreTrainedModel, ids: torch.Tensor, cache: KVCompCache, **inputs: Any) -> torch.Tensor:
    out: torch.Tensor = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False, **inputs)
    return out


def test_the_mask_of_the_last_turn_is_refused(llama: PreTrainedModel) -> None:
    cache = filled(llama)
    more = torch.cat([IDS, STEP], 1)
    for ids, entries, padding, match in (
        (more, 122, 0, "go beyond those in the cache"),
        (STEP, 120, 0, "go beyond those in the cache"),
        (STEP, 120, 1, "has 120 entries"),
    ):
        mask = torch.ones((1, entries), dtype=torch.int64)
        mask[:, :padding] = 0
        with pytest.raises(InvalidInput, match=match):
            generate(llama, ids, cache, attention_mask=mask)
        assert cache.get_seq_length() == 120
    fresh = generate(llama, more, KVCompCache(llama.config, LOSSY))
    assert torch.equal(generate(llama, more, cache, attention_mask=torch.ones_like(more)), fresh)


@pytest.mark.parametrize("tokens", [1, 60, 119, 120])
def test_ids_that_do_not_go_beyond_the_cache_are_refused(llama: PreTrainedModel, tokens: int) -> None:
    cache = filled(llama)
    with pytest.raises(InvalidInput, match=r"ids that go beyond those in the cache|no new tokens"):
        generate(llama, IDS[:, :tokens], cache)
    assert cache.get_seq_length() == 120


def test_generating_twice_at_once_with_one_cache_is_refused(llama: PreTrainedModel) -> None:
    """The steps of two generations in turns: the mask of each counts its own tokens alone."""
    cache = filled(llama)
    masks = [torch.ones((1, 121), dtype=torch.int64) for _ in range(2)]
    with torch.inference_mode():
        llama(STEP, attention_mask=masks[0], past_key_values=cache)
        with pytest.raises(InvalidInput, match="has 121 entries, and there are 121 tokens in the cache and 1 new"):
            llama(STEP, attention_mask=masks[1], past_key_values=cache)
