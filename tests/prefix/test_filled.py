"""What filled a cache: it is stored under its token ids only if its K and V follow from them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    SiglipVisionConfig,
)

from kvcomp import PrefixStore
from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers.files import stores_of
from kvcomp.integrations.transformers.recompute import check_recomputed, layer_of
from tiny_models import LOSSY, TINY, exact, random_model, run

TOKENS, STORED = 600, 516
LLAMA = LlamaConfig(**TINY)


def ids_of(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (1, tokens), generator=torch.Generator().manual_seed(seed))


def forward(model: Any, cache: KVCompCache, attention: str = "kvcomp", **inputs: Any) -> KVCompCache:
    model.set_attn_implementation(attention)
    with torch.inference_mode():
        model(past_key_values=cache, **inputs)
    return cache


def causal() -> Tensor:
    return torch.ones((1, 1, TOKENS, TOKENS), dtype=torch.bool).tril()


def with_hole() -> Tensor:
    mask = torch.ones((1, TOKENS), dtype=torch.int64)
    mask[0, 100:105] = 0
    return mask


def in_blocks() -> Tensor:
    mask = causal()
    mask[:, :, 300:, :300] = False
    return mask


def as_scores(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def with_image(model: Any) -> Tensor:
    """Embeddings of the ids, of which those of one place are an image's."""
    embeddings = model.get_input_embeddings()(ids_of()).detach().clone()
    embeddings[0, 200] = torch.randn(64, generator=torch.Generator().manual_seed(1))
    return embeddings


OTHERWISE: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "embeddings of other ids": (
        "not those of these token ids",
        lambda model: {"inputs_embeds": model.get_input_embeddings()(ids_of(seed=1))},
    ),
    "an image among the embeddings": (
        "not those of these token ids",
        lambda model: {"inputs_embeds": with_image(model)},
    ),
    "embeddings of another size": (  # which the first layer's norm takes back
        "in layer 1 are not those of this model",
        lambda model: {"inputs_embeds": 2 * model.get_input_embeddings()(ids_of())},
    ),
    "other ids": ("not those of these token ids", lambda model: {"input_ids": ids_of(seed=1)}),
    "one other id": (
        "not those of these token ids",
        lambda model: {"input_ids": torch.where(torch.arange(TOKENS) == 300, ids_of() % 96 + 1, ids_of())},
    ),
    "given positions": (
        "not those of these token ids",
        lambda model: {"input_ids": ids_of(), "position_ids": torch.arange(TOKENS)[None] * 2},
    ),
    "a mask with a hole": ("mask", lambda model: {"input_ids": ids_of(), "attention_mask": with_hole()}),
    "blocks": ("mask", lambda model: {"input_ids": ids_of(), "attention_mask": in_blocks()}),
    "blocks as scores": ("mask", lambda model: {"input_ids": ids_of(), "attention_mask": as_scores(in_blocks())}),
    "both directions": (
        "mask",
        lambda model: {"input_ids": ids_of(), "attention_mask": torch.ones_like(causal())},
    ),
}


@pytest.mark.parametrize("fill", OTHERWISE)
@pytest.mark.parametrize("through", ["itself", "a file", "a batch"])
def test_what_does_not_follow_from_the_ids_is_not_stored(tmp_path: Path, fill: str, through: str) -> None:
    message, inputs = OTHERWISE[fill]
    model: Any = random_model(LLAMA)
    cache = forward(model, KVCompCache(LLAMA, LOSSY), **inputs(model))
    if through == "a file":
        cache.save(tmp_path / "a.kvc", model)
        cache = KVCompCache.load(tmp_path / "a.kvc", LLAMA, model)
    elif through == "a batch":
        plain = forward(model, KVCompCache(LLAMA, LOSSY), input_ids=ids_of())
        plain.join(cache)
        plain.batch_select_indices(torch.tensor([1]))
        cache = plain
    store = PrefixStore(tmp_path / "store")
    with pytest.raises(InvalidInput, match=message):
        store.save(ids_of(), cache, model)
    assert not list((tmp_path / "store").rglob("*.kvc"))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_batch_of_files_was_filled_like_the_worst_of_them(tmp_path: Path, order: tuple[int, int]) -> None:
    model: Any = random_model(LLAMA)
    for name, inputs in (("0", {"attention_mask": with_hole()}), ("1", {})):
        forward(model, KVCompCache(LLAMA, LOSSY), input_ids=ids_of(), **inputs).save(tmp_path / f"{name}.kvc", model)
    cache = KVCompCache.load([tmp_path / f"{number}.kvc" for number in order], LLAMA, model)
    cache.batch_select_indices(torch.tensor([order.index(0)]))
    with pytest.raises(InvalidInput, match="mask"):
        PrefixStore(tmp_path / "store").save(ids_of(), cache, model)
    assert not list((tmp_path / "store").rglob("*.kvc"))


FROM_IDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "ids": lambda model: {"input_ids": ids_of()},
    "ids and their mask": lambda model: {"input_ids": ids_of(), "attention_mask": torch.ones_like(ids_of())},
    "their own embeddings": lambda model: {"inputs_embeds": model.get_input_embeddings()(ids_of())},
    "a causal mask": lambda model: {"input_ids": ids_of(), "attention_mask": causal()},
    "their positions": lambda model: {"input_ids": ids_of(), "position_ids": torch.arange(TOKENS)[None]},
}


@pytest.mark.parametrize("fill", FROM_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_follows_from_the_ids_is_stored(tmp_path: Path, fill: str, dtype: torch.dtype) -> None:
    model: Any = random_model(LLAMA).to(dtype)
    cache = forward(model, KVCompCache(LLAMA, LOSSY), **FROM_IDS[fill](model))
    cache.save(tmp_path / "a.kvc", model)
    store = PrefixStore(tmp_path / "store")
    assert store.save(ids_of(), KVCompCache.load(tmp_path / "a.kvc", LLAMA, model), model) == STORED
    assert store.save(ids_of(), cache, model) == STORED
    assert store.load(ids_of(), model, LOSSY).get_seq_length() == STORED


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_that_another_attention_filled_is_not_stored(tmp_path: Path, attention: str) -> None:
    """Its mask is unknown, here one with a hole."""
    model: Any = random_model(LLAMA)
    cache = KVCompCache(LLAMA, LOSSY)
    forward(model, cache, attention, input_ids=ids_of(), attention_mask=with_hole())
    with pytest.raises(InvalidInput, match='attn_implementation="kvcomp"'):
        PrefixStore(tmp_path / "store").save(ids_of(), cache, model)
    cache.reset()
    forward(model, cache, input_ids=ids_of())
    assert PrefixStore(tmp_path / "store").save(ids_of(), cache, model) == STORED


def test_a_pass_that_was_taken_back_leaves_no_note(tmp_path: Path) -> None:
    model: Any = random_model(LLAMA)
    cache = forward(model, KVCompCache(LLAMA, LOSSY), input_ids=ids_of())
    session, broken = cache.session, model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        forward(model, cache, input_ids=ids_of(5), attention_mask=torch.ones((1, 1, 5, TOKENS + 5), dtype=torch.bool))
    assert session.not_from_ids
    broken.remove()
    with pytest.raises(InvalidInput, match="taken back"):
        forward(model, cache, input_ids=ids_of(5))
    assert session.not_from_ids is None
    assert PrefixStore(tmp_path / "store").save(ids_of(), cache, model) == STORED


def fail(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_file_that_does_not_say_how_it_was_filled_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvcomp import files

    save = files.save
    model: Any = random_model(LLAMA)
    cache = forward(model, KVCompCache(LLAMA, LOSSY), input_ids=ids_of())

    def before(path: Any, stores: Any, spec: Any, layers: int, origin: Any, *rest: Any) -> None:
        save(path, stores, spec, layers, {name: origin[name] for name in ("id", "configuration")}, *rest)

    monkeypatch.setattr(files, "save", before)
    cache.save(tmp_path / "a.kvc", model)
    loaded = KVCompCache.load(tmp_path / "a.kvc", LLAMA, model)
    with pytest.raises(InvalidInput, match="does not say how it was filled"):
        PrefixStore(tmp_path / "store").save(ids_of(), loaded, model)


VISION = SiglipVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
)


def test_models_that_see_images_are_refused_by_name(tmp_path: Path) -> None:
    text = Gemma3TextConfig(**TINY, layer_types=["full_attention"] * 2)
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    cache = forward(model, KVCompCache(config, LOSSY), input_ids=ids_of())
    store = PrefixStore(tmp_path / "store")
    for call in (lambda: store.load(ids_of(), model, LOSSY), lambda: store.save(ids_of(), cache, model)):
        with pytest.raises(UnsupportedModel, match="gemma3 takes more than text"):
            call()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_changed_since_the_cache_was_filled_are_noticed(
    tmp_path: Path, layer: int, dtype: torch.dtype
) -> None:
    model: Any = random_model(LLAMA).to(dtype)
    cache = forward(model, KVCompCache(LLAMA, LOSSY), input_ids=ids_of())
    with torch.no_grad():
        model.model.layers[layer].self_attn.v_proj.weight.mul_(1.5)
    with pytest.raises(InvalidInput, match="the adapters that it had then"):
        PrefixStore(tmp_path / "store").save(ids_of(), cache, model)


@pytest.mark.parametrize(
    "config",
    [LLAMA, Qwen3Config(**TINY), GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=1024)],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("tokens", [1, 1023, 1024, 1100])
def test_the_first_layer_is_that_of_a_forward_pass(config: Any, tokens: int) -> None:
    config = deepcopy(config)
    config.max_position_embeddings = 2048
    model = random_model(config)
    ids = ids_of(tokens)
    for mine, theirs in zip(layer_of(model, ids[0].tolist(), 0), exact(model, ids)[0], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_single_value_out_of_its_bound_is_found() -> None:
    model: Any = random_model(LLAMA)
    cache = forward(model, KVCompCache(LLAMA, replace(LOSSY, window=0)), input_ids=ids_of(260))
    stores = stores_of(cache.layers, cache.spec)
    ids = ids_of(260)[0].tolist()
    check_recomputed(stores, model, ids, 4)
    ids[130] = ids[130] % 96 + 1
    with pytest.raises(InvalidInput, match="values in layer 0"):
        check_recomputed(stores, model, ids, 4)


def test_autocast_is_another_computation(tmp_path: Path) -> None:
    model: Any = random_model(LLAMA)
    cache = KVCompCache(LLAMA, LOSSY)
    with torch.autocast("cpu", torch.bfloat16):
        run(model, cache, ids_of())
    with pytest.raises(InvalidInput, match=r"holds torch\.bfloat16"):
        PrefixStore(tmp_path / "store").save(ids_of(), cache, model)
