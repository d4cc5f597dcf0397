"""Every way to generate: the tokens of DynamicCache where nothing is lost, of dense attention where something is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

from generating import LOSSLESS, assert_same, attend_densely, forward, generate, prompt
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers import attention as transformers_attention
from kvcomp.spec import PRESETS, CodecSpec
from tiny_models import LOSSY, tiny_model

PACKED = replace(PRESETS["packed"], window=0, sinks=0)


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
    attend_densely(monkeypatch)
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
        attend_densely(patch)
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
