"""KVCompCache in transformers: the same tokens as DynamicCache where nothing is lost, dense attention's where something
is.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    DynamicCache,
    FalconConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    MllamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
    T5Config,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvcomp.errors import InvalidInput, LimitExceeded, UnsupportedModel
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers import attention as transformers_attention
from kvcomp.integrations.transformers import session as transformers_session
from kvcomp.integrations.transformers.layer import CompressedLayer
from kvcomp.spec import PRESETS, CodecSpec, TensorSpec
from kvcomp.store import KVStore

LOSSLESS = replace(PRESETS["kvcomp"], window=4096)  # everything stays in the window
LOSSY = replace(PRESETS["kvcomp"], window=16)
PACKED = replace(PRESETS["packed"], window=0, sinks=0)


TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def tiny_config(kind: type[PreTrainedConfig] = LlamaConfig, **settings: object) -> PreTrainedConfig:
    return kind(**{**TINY, **settings})


def tiny_model(kind: type[PreTrainedConfig] = LlamaConfig, seed: int = 0, **settings: object) -> PreTrainedModel:
    """A model whose weights are large enough that its attention is far from uniform."""
    torch.manual_seed(seed)
    dtype = settings.pop("dtype", torch.float32)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.to(dtype)


def dense_attend(
    store: KVStore, q: torch.Tensor, scaling: float, softcap: float = 0.0, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """What ``attend`` and ``attend_tiled`` stand for: softmax over the decompressed cache, in float64."""
    k, v = (x.repeat_interleave(q.shape[1] // store.heads, dim=1).double() for x in store.dense())
    position = torch.arange(store.tokens)
    if mask is None:
        mask = position <= position[-q.shape[2] :, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e30)
    score = q.double() @ k.mT * scaling
    score = softcap * torch.tanh(score / softcap) if softcap else score
    padding = position < torch.from_numpy(store.starts)[:, None, None, None]
    weight = (score + mask).masked_fill(padding, -1e30).softmax(-1).masked_fill(padding, 0)
    return (weight @ v).to(q.dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kind of attention runs."""
    count = {"attend": 0, "attend_tiled": 0, "_dense": 0}

    def counted(name: str, real: Any, *args: Any, **kwargs: Any) -> Any:
        count[name] += 1
        return real(*args, **kwargs)

    for name in count:
        monkeypatch.setattr(transformers_attention, name, partial(counted, name, getattr(transformers_attention, name)))
    return count


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model()


def prompt(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (len(lengths), max(lengths)), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: Any, attention: str = "kvcomp", **options: Any
) -> Any:
    """Tokens and logits."""
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    settings = GenerationConfig(**options, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    return model.generate(**inputs, past_key_values=cache, generation_config=settings)


def assert_same(one: Any, two: Any, tolerance: float = 1e-4) -> None:
    assert torch.equal(one.sequences, two.sequences)
    assert one.logits
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(two.logits), atol=tolerance, rtol=0)


def forward(model: PreTrainedModel, cache: Any, attention: str = "kvcomp", **inputs: torch.Tensor) -> torch.Tensor:
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return model(**inputs, past_key_values=cache).logits


# Ways to generate

MODES: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
    "greedy": (prompt(150), {}),
    "greedy, short prompt": (prompt(7), {"max_new_tokens": 90}),
    "padded": (prompt(150, 83), {}),
    "padded by more than a page": (prompt(200, 190, 7), {"max_new_tokens": 80}),
    "sampling": (prompt(150), {"do_sample": True, "top_k": 20}),
    "several samples": (prompt(150, 120), {"do_sample": True, "num_return_sequences": 3}),
    "beams": (prompt(150, 120), {"num_beams": 3}),
    "sampled beams": (prompt(150), {"num_beams": 4, "num_return_sequences": 2, "do_sample": True}),
    "repetition penalty": (prompt(150, 83), {"repetition_penalty": 1.3}),
    "prompt lookup": (prompt(150), {"prompt_lookup_num_tokens": 4, "max_new_tokens": 30}),
    "prefill in chunks": (prompt(230, 120), {"prefill_chunk_size": 70}),
}


@pytest.mark.parametrize(
    ("mode", "attention"),
    [
        *((mode, "kvcomp") for mode in MODES),
        *((mode, "sdpa") for mode in ("padded", "beams", "prompt lookup")),
        ("padded", "eager"),
    ],
)
def test_nothing_lost_gives_the_tokens_of_a_dynamic_cache(llama: PreTrainedModel, mode: str, attention: str) -> None:
    inputs, options = MODES[mode]
    options = {**options, "max_new_tokens": 12}
    expected = generate(llama, inputs, DynamicCache(config=llama.config), "sdpa", **options)
    assert_same(generate(llama, inputs, KVCompCache(llama.config, LOSSLESS), attention, **options), expected)


@pytest.mark.parametrize("mode", MODES)
def test_compressed_attention_is_dense_attention_over_what_is_stored(
    llama: PreTrainedModel, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, options = MODES[mode]
    cache = KVCompCache(llama.config, LOSSY)
    got = generate(llama, inputs, cache, **options)
    assert cache.layers[0].store.compressed
    monkeypatch.setattr(transformers_attention, "attend", dense_attend)
    monkeypatch.setattr(transformers_attention, "attend_tiled", dense_attend)
    assert_same(got, generate(llama, inputs, KVCompCache(llama.config, LOSSY), **options), 2e-3)


@pytest.mark.parametrize("spec", [LOSSY, PACKED], ids=["huffman", "fixed"])
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_fused_and_materialised_agree(llama: PreTrainedModel, mode: str, spec: CodecSpec) -> None:
    _, options = MODES[mode]
    options = {**options, "max_new_tokens": 70}
    fused, materialised = KVCompCache(llama.config, spec), KVCompCache(llama.config, spec)
    got = generate(llama, prompt(150), fused, "kvcomp", **options)
    assert_same(got, generate(llama, prompt(150), materialised, "sdpa", **options), 2e-3)
    assert fused.memory().sealed_values >= materialised.memory().sealed_values > 0


def test_assisted_generation(llama: PreTrainedModel) -> None:
    assistant = tiny_model(num_hidden_layers=1, seed=1)

    def assisted(cache: Any, attention: str = "kvcomp") -> torch.Tensor:
        llama.set_attn_implementation(attention)
        return llama.generate(
            **prompt(150),
            past_key_values=cache,
            assistant_model=assistant,
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
        )

    expected = generate(llama, prompt(150), DynamicCache(config=llama.config), "sdpa", max_new_tokens=24).sequences
    for attention in ("kvcomp", "sdpa"):
        assert torch.equal(assisted(KVCompCache(llama.config, LOSSLESS), attention), expected)
    lossy = assisted(KVCompCache(llama.config, LOSSY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_attention, "attend", dense_attend)
        patch.setattr(transformers_attention, "attend_tiled", dense_attend)
        assert torch.equal(lossy, assisted(KVCompCache(llama.config, LOSSY)))


def test_a_padded_row_is_as_if_it_were_alone(llama: PreTrainedModel) -> None:
    inputs = prompt(230, 150)
    cache, alone = KVCompCache(llama.config, LOSSY), KVCompCache(llama.config, LOSSY)
    batch = generate(llama, inputs, cache, max_new_tokens=60)
    own = {name: x[1:, 80:] for name, x in inputs.items()}
    single = generate(llama, own, alone, max_new_tokens=60)
    assert torch.equal(batch.sequences[1, 80:], single.sequences[0])
    torch.testing.assert_close(torch.stack(batch.logits)[:, 1], torch.stack(single.logits)[:, 0], atol=2e-3, rtol=0)
    assert [layer.store.starts.tolist() for layer in cache.layers] == [[0, 80]] * 2
    assert cache.layers[0].store.rows.count[1] == alone.layers[0].store.rows.count[0]


def test_decoding_is_fused_and_the_prompt_dense(llama: PreTrainedModel, calls: dict[str, int]) -> None:
    cache = KVCompCache(llama.config, LOSSY)
    generate(llama, prompt(150, 140), cache, max_new_tokens=10)
    assert calls == {"_dense": 2, "attend": 18, "attend_tiled": 0}
    forward(llama, cache, input_ids=torch.full((2, 40), 5))
    assert calls == {"_dense": 2, "attend": 18, "attend_tiled": 2}
    forward(llama, KVCompCache(llama.config, LOSSY), **prompt(5))
    assert calls == {"_dense": 4, "attend": 18, "attend_tiled": 2}


def test_turns_reuse_the_cache(llama: PreTrainedModel) -> None:
    caches = {"sdpa": DynamicCache(config=llama.config), "kvcomp": KVCompCache(llama.config, LOSSLESS)}
    ids = {name: prompt(60)["input_ids"] for name in caches}
    for turn in range(3):
        for name, cache in caches.items():
            inputs = {"input_ids": ids[name], "attention_mask": torch.ones_like(ids[name])}
            said = generate(llama, inputs, cache, name, max_new_tokens=20).sequences
            ids[name] = torch.cat([said, prompt(50, seed=turn)["input_ids"]], dim=1)
        assert torch.equal(ids["sdpa"], ids["kvcomp"])
        assert caches["kvcomp"].get_seq_length() == caches["sdpa"].get_seq_length()


@pytest.mark.parametrize("kind", [LlamaConfig, Gemma2Config])
def test_a_second_prompt_attends_to_the_compressed_first(kind: type[PreTrainedConfig]) -> None:
    softcap = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 1}
    model = tiny_model(kind, **(softcap if kind is Gemma2Config else {}))
    logits = []
    for attention in ("kvcomp", "eager"):
        cache = KVCompCache(model.config, LOSSY)
        forward(model, cache, attention, **prompt(150, 150))
        logits.append(forward(model, cache, attention, input_ids=prompt(90, 90, seed=1)["input_ids"]))
    torch.testing.assert_close(*logits, atol=2e-3, rtol=0)


# Models

MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "one KV head": (LlamaConfig, {"num_key_value_heads": 1}),
    "as many KV heads": (LlamaConfig, {"num_key_value_heads": 4}),
    "64": (LlamaConfig, {"head_dim": 64}),
    "80": (LlamaConfig, {"head_dim": 80}),
    "96": (LlamaConfig, {"head_dim": 96}),
    "128": (LlamaConfig, {"head_dim": 128}),
    "256": (LlamaConfig, {"head_dim": 256}),
    "qwen2": (Qwen2Config, {}),
    "qwen2, some layers sliding": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral, sliding": (MistralConfig, {"sliding_window": 32}),
    "phi3": (Phi3Config, {}),
    "gemma2": (Gemma2Config, {"sliding_window": 32, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3n": (
        Gemma3nTextConfig,
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 32,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings = MODELS[name]
    model = tiny_model(kind, **settings)
    inputs = prompt(150, 90)
    expected = generate(model, inputs, DynamicCache(config=model.config), "eager")
    assert_same(generate(model, inputs, KVCompCache(model.config, LOSSLESS)), expected)

    cache = KVCompCache(model.config, LOSSY)
    lossy = generate(model, inputs, cache)
    stores = [layer.store for layer in cache.layers if isinstance(layer, CompressedLayer)]
    assert all(store.compressed for store in stores)
    assert bool(stores) == (name != "mistral, sliding")
    monkeypatch.setattr(transformers_attention, "attend", dense_attend)
    monkeypatch.setattr(transformers_attention, "attend_tiled", dense_attend)
    assert_same(lossy, generate(model, inputs, KVCompCache(model.config, LOSSY)), 2e-3)


def test_sliding_layers_keep_their_own_cache() -> None:
    cache = KVCompCache(tiny_config(Gemma3TextConfig, layer_types=["sliding_attention", "full_attention"]))
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, CompressedLayer]
    assert cache.is_sliding == [True, False]
    assert not cache.is_compileable
    assert cache.layers[1].is_croppable


def test_the_text_part_of_a_multi_modal_configuration_counts() -> None:
    cache = KVCompCache(LlavaConfig(text_config=tiny_config().to_dict()))
    assert len(cache.layers) == 2


def test_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dtype=torch.bfloat16, head_dim=64)
    cache = KVCompCache(model.config, LOSSY)
    got = torch.cat(
        [forward(model, cache, **prompt(150, 120)), forward(model, cache, input_ids=torch.full((2, 1), 7))], dim=1
    )
    assert cache.layers[0].store.dtype == torch.bfloat16
    monkeypatch.setattr(transformers_attention, "attend", dense_attend)
    cache = KVCompCache(model.config, LOSSY)
    want = torch.cat(
        [forward(model, cache, **prompt(150, 120)), forward(model, cache, input_ids=torch.full((2, 1), 7))], dim=1
    )
    torch.testing.assert_close(got, want, atol=0.02 * float(want.abs().max()), rtol=0)


def test_a_soft_cap_is_not_forgotten_on_plain_tensors() -> None:
    model = tiny_model(Gemma2Config, sliding_window=32, attn_logit_softcapping=2.0)
    inputs = prompt(150, 90)
    assert_same(generate(model, inputs, None, "kvcomp"), generate(model, inputs, None, "eager"))


@pytest.mark.parametrize("kind", [LlamaConfig, Gemma2Config])
def test_a_static_cache_is_longer_than_what_it_holds(kind: type[PreTrainedConfig]) -> None:
    model = tiny_model(kind)
    outputs = [
        forward(model, StaticCache(config=model.config, max_cache_len=200), attention, **prompt(150))
        for attention in ("kvcomp", "eager")
    ]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("spec", [LOSSLESS, LOSSY], ids=["lossless", "lossy"])
def test_attention_without_a_mask(spec: CodecSpec, causal: bool) -> None:
    """Causal queries are the last tokens; with is_causal=False every query sees every token."""
    torch.manual_seed(0)
    k, v, q = torch.randn(1, 2, 230, 16), torch.randn(1, 2, 230, 16), torch.randn(1, 4, 80, 16)
    model = tiny_model(num_hidden_layers=1)
    cache, module = KVCompCache(model.config, spec), model.model.layers[0].self_attn
    for tokens in (slice(0, 150), slice(150, 230)):
        keys, values = cache.update(k[:, :, tokens], v[:, :, tokens], 0)
        dense = cache.layers[0].store.dense()
        queries = q if tokens.start else q.repeat(1, 1, 2, 1)[:, :, :150]
        ours = transformers_attention.kvcomp_attention(module, queries, keys, values, None, is_causal=causal)[0]
    mask = torch.ones(80, 230, dtype=torch.bool).tril(150) if causal else None
    expected = torch.nn.functional.scaled_dot_product_attention(q, *dense, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(ours.transpose(1, 2), expected, atol=1e-4, rtol=0)


# Masks


def test_a_mask_of_any_pattern_is_honoured(llama: PreTrainedModel) -> None:
    """Holes in the middle, boolean or additive, over a dense and over a compressed past."""
    ids = prompt(150)["input_ids"]
    mask = torch.ones((1, 1, 150, 150), dtype=torch.bool).tril()
    mask[..., 20:30] = False
    mask[..., range(20, 30), range(20, 30)] = True
    expected = forward(llama, DynamicCache(config=llama.config), "sdpa", input_ids=ids, attention_mask=mask)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for given in (mask, additive):
        cache = KVCompCache(llama.config, LOSSLESS)
        got = [forward(llama, cache, input_ids=ids[:, :100], attention_mask=given[:, :, :100, :100])]
        got += [forward(llama, cache, input_ids=ids[:, 100:], attention_mask=given[:, :, 100:])]
        torch.testing.assert_close(torch.cat(got, dim=1), expected, atol=1e-4, rtol=0)


def hiding(tokens: int, hidden: slice) -> torch.Tensor:
    """A mask over this many tokens that hides some."""
    mask = torch.ones((1, tokens), dtype=torch.long)
    mask[:, hidden] = 0
    return mask


DISTANCE = torch.arange(151).flip(0)
STEP_MASKS = {
    "a hole": hiding(151, slice(40, 90)),
    "a window": hiding(151, slice(0, 60)),
    "a bias by distance": -0.2 * DISTANCE[None, None, None].float(),
    "one mask for each head": (torch.tensor([20, 60, 100, 140])[:, None, None] > DISTANCE)[None],
}


@pytest.mark.parametrize("mask", STEP_MASKS.values(), ids=STEP_MASKS)
def test_masks_over_compressed_pages(llama: PreTrainedModel, mask: torch.Tensor) -> None:
    """As sdpa, on the decompressed cache, has it; and no window is taken for padding."""
    logits = []
    for attention in ("kvcomp", "sdpa"):
        cache = KVCompCache(llama.config, LOSSY)
        forward(llama, cache, attention, **prompt(150))
        logits.append(forward(llama, cache, attention, input_ids=torch.full((1, 1), 5), attention_mask=mask))
        assert cache.layers[0].store.starts.tolist() == [0]
        assert cache.layers[0].store.compressed
    torch.testing.assert_close(*logits, atol=2e-3, rtol=0)


def test_a_mask_may_change_in_place(llama: PreTrainedModel) -> None:
    cache, step = filled(llama), torch.full((1, 1), 5)
    mask = torch.ones((1, 1, 1, 151), dtype=torch.bool)
    forward(llama, cache, input_ids=step, attention_mask=mask)
    cache.crop(-1)
    mask[..., 40:90] = False
    got = forward(llama, cache, input_ids=step, attention_mask=mask)
    torch.testing.assert_close(got, forward(llama, filled(llama), input_ids=step, attention_mask=mask), atol=0, rtol=0)


def test_a_mask_is_read_once_for_all_layers(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = transformers_session.read_mask
    monkeypatch.setattr(transformers_session, "read_mask", lambda *args: read.append(1) or real(*args))
    generate(llama, prompt(150, 90), KVCompCache(llama.config, LOSSY), max_new_tokens=5)
    assert len(read) == 5
    session = KVCompCache(llama.config).session
    masks = torch.ones((1, 1, 1, 9), dtype=torch.bool), torch.eye(9, dtype=torch.bool)[None, None, :1]
    assert [session.plan_for(mask, 1, 1, 9).causal for mask in masks] == [True, False]


def test_rows_that_begin_in_a_later_chunk(llama: PreTrainedModel) -> None:
    inputs = prompt(200, 40)
    cache = KVCompCache(llama.config, LOSSY)
    expected = generate(llama, inputs, DynamicCache(config=llama.config), "sdpa")
    generate(llama, inputs, cache, prefill_chunk_size=64)
    assert cache.layers[0].store.starts.tolist() == [0, 160]
    lossless = generate(llama, inputs, KVCompCache(llama.config, LOSSLESS), prefill_chunk_size=64)
    assert_same(lossless, expected)


# What a cache can do


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


def test_a_copy_is_independent(llama: PreTrainedModel) -> None:
    cache = KVCompCache(llama.config, LOSSY)
    forward(llama, cache, **prompt(150))
    twin = copy.deepcopy(cache)
    step = torch.full((1, 1), 5)
    expected = forward(llama, twin, input_ids=step)
    forward(llama, twin, input_ids=torch.full((1, 70), 9))
    assert cache.get_seq_length() == 150
    torch.testing.assert_close(forward(llama, cache, input_ids=step), expected, atol=0, rtol=0)
    assert twin.session is not cache.session
    assert twin.layers[0].session is twin.session


def test_reset_makes_it_new(llama: PreTrainedModel) -> None:
    cache = KVCompCache(llama.config, LOSSY)
    expected = generate(llama, prompt(150), cache).sequences
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory().total == 0
    generate(llama, prompt(20, 10), cache)
    cache.reset()
    assert torch.equal(generate(llama, prompt(150), cache).sequences, expected)


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


def test_a_pass_that_fails_in_a_later_layer_is_taken_back_from_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().eval()
    model.set_attn_implementation("kvcomp")
    cache, twin = KVCompCache(model.config, LOSSY), KVCompCache(model.config, LOSSY)
    ids = torch.arange(120)[None] % 97
    with torch.no_grad():
        for one in (cache, twin):
            model(ids, past_key_values=one)
        for method in ("append", "seal"):
            with monkeypatch.context() as patch:
                patch.setattr(cache.layers[1].store, method, _no_room)
                with pytest.raises(LimitExceeded, match="no room"):
                    model(ids[:, :3], past_key_values=cache)
            assert cache.get_seq_length() == 120
            assert {layer.store.tokens for layer in cache.compressed_layers} == {120}
        stale = cache.update(*torch.zeros(2, 1, 2, 1, 16), 0)
        cache.crop(120)
        with pytest.raises(InvalidInput, match="before the cache changed"):
            transformers_attention.kvcomp_attention(
                model.model.layers[0].self_attn, torch.zeros(1, 4, 1, 16), *stale, None
            )
        assert cache.get_seq_length() == 120  # which is no reason to take anything back
        logits = [model(ids[:, :3], past_key_values=one).logits for one in (cache, twin)]
    assert torch.equal(*logits)


def _no_room(*_: object) -> None:
    raise LimitExceeded("no room")


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


def test_each_layer_has_its_scale() -> None:
    spec = CodecSpec(TensorSpec("block", (0.05, 0.02)), TensorSpec("token", 0.1))
    cache = KVCompCache(tiny_config(), spec)
    assert [layer.spec.key.scale for layer in cache.layers] == [0.05, 0.02]
    with pytest.raises(InvalidInput, match="2 layers, the model has 3"):
        KVCompCache(tiny_config(num_hidden_layers=3), spec)


def test_generate_does_not_compile_and_compiled_models_work(llama: PreTrainedModel) -> None:
    cache = KVCompCache(llama.config, LOSSY)
    expected = forward(llama, cache, **prompt(150))
    cache.reset()
    compiled = torch.compile(llama, backend="eager")
    with torch.no_grad():
        got = compiled(**prompt(150), past_key_values=cache).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert cache.layers[0].store.compressed


# Refusals


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (MllamaConfig(), "cross-attention layers"),
        (BertConfig(is_decoder=True, add_cross_attention=True), "cross-attention layers"),
        (DeepseekV3Config(), "latent attention"),
        (GptOssConfig(), "sink parameters"),
        (BloomConfig(), "bias by position"),
        (FalconConfig(alibi=True), "bias by position"),
        (tiny_config(head_dim=24), "head_dim is 24, not a multiple of 16"),
        (tiny_config(head_dim=512), "head_dim is 512"),
        (tiny_config(v_head_dim=32), "head_dim is 16 in K and 32 in V"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_models_that_are_refused(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        KVCompCache(config)


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


def filled(model: PreTrainedModel) -> KVCompCache:
    cache = KVCompCache(model.config, LOSSY)
    forward(model, cache, **prompt(150))
    return cache


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
    with pytest.raises(UnsupportedModel, match="needs both of one shape"):
        cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 32), 0)
    for bad in (torch.zeros(1, 2, 16), torch.zeros(1, 3, 1, 16), torch.zeros(1, 2, 1, 16, dtype=torch.int32)):
        with pytest.raises(InvalidInput):
            cache.update(bad, bad, 0)
    assert_unchanged(cache, before)


def test_more_tokens_than_the_model_has_positions(llama: PreTrainedModel) -> None:
    cache = filled(llama)
    before = state(cache)
    with pytest.raises(LimitExceeded, match="end at 512 tokens: the cache holds 150, so 400 more"):
        forward(llama, cache, input_ids=torch.full((1, 400), 5))
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
    for name in ("s_aux", "position_bias"):
        for key, value in (cache.update(x, x, 0), (x, x)):
            with pytest.raises(UnsupportedModel, match="use another attn_implementation"):
                transformers_attention.kvcomp_attention(
                    module, torch.zeros(1, 4, 1, 16), key, value, None, **{name: torch.zeros(4)}
                )
    assert_unchanged(cache, before)
