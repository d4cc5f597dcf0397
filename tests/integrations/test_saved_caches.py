"""KVCompCache in files: what is loaded goes on as if it had never been away, with its own model alone."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3NextConfig,
)
from transformers.cache_utils import LinearAttentionAndSlidingWindowAttentionLayer

import kvcomp
from families import config_of
from kvcomp import files
from kvcomp.errors import CorruptData, InvalidInput, LimitExceeded, UnsupportedModel
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.spec import PRESETS, CodecSpec, TensorSpec
from kvcomp.store import KVStore
from sealing import seal, unseal
from tiny_models import HYBRIDS, LOSSY, TINY, random_model, run, steps


def prompt(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [10, 100, 400])
def test_generation_goes_on_the_same_after_loading(llama: PreTrainedModel, tmp_path: Path, tokens: int) -> None:
    cache = KVCompCache(llama.config, LOSSY)
    first = run(llama, cache, prompt(2, tokens)).argmax(-1, keepdim=True)
    cache.save(tmp_path / "a.kvc")
    again = KVCompCache.load(tmp_path / "a.kvc", llama.config)
    assert repr(again) == repr(cache)
    assert again.spec == cache.spec
    expected, found = steps(llama, cache, first, 90), steps(llama, again, first, 90)
    assert expected[1] == found[1]
    assert all(torch.equal(x, y) for x, y in zip(expected[0], found[0], strict=True))
    cache.save(tmp_path / "b.kvc")
    again.save(tmp_path / "c.kvc")
    assert (tmp_path / "b.kvc").read_bytes() == (tmp_path / "c.kvc").read_bytes()


def test_generate_takes_a_loaded_cache(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.set_attn_implementation("kvcomp")
    ids, cache = prompt(1, 200), KVCompCache(llama.config, LOSSY)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "attention_mask": None}
    run(llama, cache, ids[:, :-1])
    cache.save(tmp_path / "a.kvc")
    options["attention_mask"] = torch.ones_like(ids)
    expected = llama.generate(ids, past_key_values=cache, **options)
    again = KVCompCache.load(tmp_path / "a.kvc", llama.config)
    assert torch.equal(llama.generate(ids, past_key_values=again, **options), expected)


def test_other_attention_saves_what_it_has_not_compressed_yet(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.set_attn_implementation("sdpa")
    cache = KVCompCache(llama.config, LOSSY)
    with torch.inference_mode():
        llama(prompt(1, 200), past_key_values=cache)
    assert cache.compressed_layers[0].unsealed
    cache.save(tmp_path / "a.kvc")
    again = KVCompCache.load(tmp_path / "a.kvc", llama.config)
    step = prompt(1, 1)
    assert torch.equal(run(llama, again, step), run(llama, cache, step))


def test_a_loaded_prefix_is_the_cropped_cache(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = KVCompCache(llama.config, LOSSY)
    ids = prompt(1, 300)
    run(llama, cache, ids)
    cache.save(tmp_path / "a.kvc")
    for tokens in (0, 1, 3, 4, 68, 100, 299, 300):
        again = KVCompCache.load(tmp_path / "a.kvc", llama.config, tokens=tokens)
        twin = deepcopy(cache)
        twin.crop(tokens if tokens else -300)
        assert again.get_seq_length() == twin.get_seq_length() == tokens
        assert torch.equal(run(llama, again, ids[:, tokens : tokens + 40] if tokens < 300 else ids[:, :1]),
                           run(llama, twin, ids[:, tokens : tokens + 40] if tokens < 300 else ids[:, :1]))  # fmt: skip
    with pytest.raises(InvalidInput, match="cannot crop a cache of 300 tokens to 301"):
        KVCompCache.load(tmp_path / "a.kvc", llama.config, tokens=301)


def test_rows_are_split_into_files_and_joined_into_a_batch(llama: PreTrainedModel, tmp_path: Path) -> None:
    """Rows of other lengths, alone, from one file, and together: each goes on as it would alone."""
    lengths, alone, logits = (90, 300, 7), [], []
    for number, length in enumerate(lengths):
        cache = KVCompCache(llama.config, LOSSY)
        run(llama, cache, prompt(1, length, seed=number))
        cache.save(tmp_path / f"{number}.kvc")
        alone.append(cache)
    paths = [tmp_path / f"{number}.kvc" for number in range(3)]
    joined = KVCompCache.load(paths, llama.config)
    assert joined.get_seq_length() == 300
    assert [store.starts.tolist() for store in (layer.store for layer in joined.compressed_layers)] == [
        [210, 0, 293]
    ] * 2
    joined.save(tmp_path / "all.kvc")
    joined.save(tmp_path / "second.kvc", rows=[1])
    assert (tmp_path / "second.kvc").read_bytes() == (tmp_path / "1.kvc").read_bytes()
    from_file = KVCompCache.load(tmp_path / "all.kvc", llama.config)
    swapped = KVCompCache.load(tmp_path / "all.kvc", llama.config, rows=[2, 0])
    token = prompt(3, 1, seed=9)
    mask = torch.ones((3, 300), dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, : 300 - length] = 0
    for step in range(100):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = [run(llama, cache, token[row : row + 1]) for row, cache in enumerate(alone)]
        together, loaded = run(llama, joined, token, mask), run(llama, from_file, token, mask)
        assert torch.equal(together, loaded)
        torch.testing.assert_close(together, torch.cat(logits), rtol=1e-4, atol=1e-4)
        two = run(llama, swapped, token[[2, 0]], mask[[2, 0]])
        torch.testing.assert_close(two, torch.cat([logits[2], logits[0]]), rtol=1e-4, atol=1e-4)
        token = together.argmax(-1, keepdim=True)
        if step == 60:
            joined.save(tmp_path / "later.kvc")
            from_file = KVCompCache.load(tmp_path / "later.kvc", llama.config)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (LlamaConfig(**{**TINY, "num_hidden_layers": 3}), "num_hidden_layers 2, not 3"),
        (LlamaConfig(**{**TINY, "vocab_size": 98}), "vocab_size 97, not 98"),
        (LlamaConfig(**{**TINY, "rope_theta": 5e5}), "rope_parameters .*10000.*500000"),
        (LlamaConfig(**{**TINY, "head_dim": 32}), "head_dim 16, not 32"),
        (Qwen3Config(**TINY), "layer_types|model_type 'llama', not 'qwen3'"),
    ],
)
def test_a_file_of_another_model_is_refused(llama: PreTrainedModel, tmp_path: Path, other: Any, match: str) -> None:
    cache = KVCompCache(llama.config, LOSSY)
    run(llama, cache, prompt(1, 20))
    cache.save(tmp_path / "a.kvc")
    with pytest.raises(InvalidInput, match=match):
        KVCompCache.load(tmp_path / "a.kvc", other)


def test_a_file_is_bound_to_its_model_id(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = KVCompCache(llama.config, LOSSY)
    run(llama, cache, prompt(1, 20))
    cache.save(tmp_path / "named.kvc", model_id="llama@1")
    cache.save(tmp_path / "plain.kvc")
    assert KVCompCache.load(tmp_path / "named.kvc", llama.config, model_id="llama@1").get_seq_length() == 20
    for name, model_id in (("named", None), ("named", "llama@2"), ("plain", "llama@1")):
        with pytest.raises(InvalidInput, match="model_id"):
            KVCompCache.load(tmp_path / f"{name}.kvc", llama.config, model_id=model_id)


def test_a_file_is_bound_to_the_weights(llama: PreTrainedModel, tmp_path: Path) -> None:
    """The hash of a model's weights stands for them: another model of the same configuration is refused, the same one
    elsewhere is not.
    """
    cache = KVCompCache(llama.config, LOSSY)
    run(llama, cache, prompt(1, 20))
    cache.save(tmp_path / "a.kvc", llama)
    assert KVCompCache.load(tmp_path / "a.kvc", llama.config, llama).get_seq_length() == 20
    llama.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert KVCompCache.load(tmp_path / "a.kvc", again.config, again).get_seq_length() == 20
    with torch.no_grad():
        again.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    for other in (again, again.to(torch.bfloat16), None, "llama"):
        with pytest.raises(InvalidInput, match="model_id"):
            KVCompCache.load(tmp_path / "a.kvc", llama.config, other)
    with pytest.raises(InvalidInput, match="a name or the model itself"):
        cache.save(tmp_path / "b.kvc", 5)  # type: ignore[arg-type]
    with torch.device("meta"):
        absent = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    with pytest.raises(InvalidInput, match="is not in memory"):
        cache.save(tmp_path / "b.kvc", absent)


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("tokens", [20, 40, 300])
def test_models_with_sliding_windows_go_on_the_same(tmp_path: Path, name: str, tokens: int) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(HYBRIDS[name]).eval()
    cache = KVCompCache(model.config, LOSSY)
    first = run(model, cache, prompt(2, tokens)).argmax(-1, keepdim=True)
    cache.save(tmp_path / "a.kvc")
    again = KVCompCache.load(tmp_path / "a.kvc", model.config)
    swapped = KVCompCache.load(tmp_path / "a.kvc", model.config, rows=[1, 0])
    for part in ("pages", "values", "dense"):
        assert getattr(again.memory(), part) == getattr(cache.memory(), part)
    expected, found = steps(model, cache, first, 60), steps(model, again, first, 60)
    assert all(torch.equal(x, y) for x, y in zip(expected[0], found[0], strict=True))
    turned = steps(model, swapped, first.flip(0), 60)
    for x, y in zip(expected[0], turned[0], strict=True):
        torch.testing.assert_close(x.flip(0), y, rtol=1e-4, atol=1e-4)
    cache.save(tmp_path / "b.kvc")
    again.save(tmp_path / "c.kvc")
    assert (tmp_path / "b.kvc").read_bytes() == (tmp_path / "c.kvc").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Qwen3-Next", "Granite 4 hybrid", "LFM2"])
def test_models_with_linear_attention_go_on_the_same(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = random_model(config_of(family)).to(dtype)
    cache = KVCompCache(model.config, LOSSY)
    for tokens in (2, 300):
        first = run(model, cache, prompt(2, tokens)).argmax(-1, keepdim=True)
        cache.save(tmp_path / "a.kvc")
        again = KVCompCache.load(tmp_path / "a.kvc", model.config)
        swapped = KVCompCache.load(tmp_path / "a.kvc", model.config, rows=[1, 0])
        assert again.memory().dense == cache.memory().dense
        beside = deepcopy(cache)
        expected, found = steps(model, beside, first, 20), steps(model, again, first, 20)
        assert all(torch.equal(x, y) for x, y in zip(expected[0], found[0], strict=True))
        turned = run(model, swapped, first.flip(0))
        torch.testing.assert_close(
            turned.flip(0), expected[0][0], rtol=1e-2, atol=1e-1 if dtype == torch.bfloat16 else 1e-4
        )
        beside.save(tmp_path / "b.kvc")
        again.save(tmp_path / "c.kvc")
        assert (tmp_path / "b.kvc").read_bytes() == (tmp_path / "c.kvc").read_bytes()
    with pytest.raises(InvalidInput, match="no prefix can be cut"):
        KVCompCache.load(tmp_path / "a.kvc", model.config, tokens=299)
    cache.save(tmp_path / "d.kvc", layers=[1])
    with pytest.raises(InvalidInput, match="the file holds the layers"):
        KVCompCache.load(tmp_path / "d.kvc", model.config)


def test_states_that_were_recorded_further_back_are_saved_as_the_next_token_needs_them(tmp_path: Path) -> None:
    model = random_model(config_of("LFM2"))
    for tokens in (1, 40):
        recorded, plain = (KVCompCache(model.config, LOSSY) for _ in range(2))
        recorded.activate_past_recording()
        for cache, name in ((recorded, "a"), (plain, "b")):
            run(model, cache, prompt(1, tokens))
            cache.save(tmp_path / f"{name}.kvc")
        assert (tmp_path / "a.kvc").read_bytes() == (tmp_path / "b.kvc").read_bytes()


def alone_and_joined(model: Any, lengths: Sequence[int], folder: Path) -> tuple[list[KVCompCache], KVCompCache]:
    """Caches of prompts of these lengths, and what their files give as one batch."""
    alone, paths = [], [folder / f"{number}.kvc" for number in range(len(lengths))]
    for number, (length, path) in enumerate(zip(lengths, paths, strict=True)):
        alone.append(KVCompCache(model.config, LOSSY))
        run(model, alone[-1], prompt(1, length, seed=number))
        alone[-1].save(path)
    return alone, KVCompCache.load(paths, model.config)


def test_rows_of_models_with_linear_attention_are_joined(tmp_path: Path) -> None:
    model = random_model(config_of("Qwen3.5"))
    alone, joined = alone_and_joined(model, (20, 150, 90), tmp_path)
    token, mask = prompt(3, 1, seed=9), joined.attention_mask()
    expected = [run(model, cache, token[row : row + 1]) for row, cache in enumerate(alone)]
    torch.testing.assert_close(run(model, joined, token, mask), torch.cat(expected), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["conv_states.1", "conv_states", "more.0", "conv_states.x"])
def test_states_of_another_name_are_refused(tmp_path: Path, name: str) -> None:
    model = random_model(config_of("LFM2"))
    cache = KVCompCache(model.config, LOSSY)
    run(model, cache, prompt(1, 20))
    cache.save(tmp_path / "a.kvc")
    header, sections = unseal((tmp_path / "a.kvc").read_bytes())
    header["states"][0]["name"] = name
    (tmp_path / "a.kvc").write_bytes(seal(header, sections))
    with pytest.raises(InvalidInput, match="has no state"):
        KVCompCache.load(tmp_path / "a.kvc", model.config)


def test_rows_of_models_with_sliding_windows_are_joined(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(HYBRIDS["gemma3"]).eval()
    lengths = (20, 150, 90)
    alone, joined = alone_and_joined(model, lengths, tmp_path)
    mask = torch.ones((3, 150), dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, : 150 - length] = 0
    token = prompt(3, 1, seed=9)
    for _ in range(70):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        expected = [run(model, cache, token[row : row + 1]) for row, cache in enumerate(alone)]
        found = run(model, joined, token, mask)
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
        token = found.argmax(-1, keepdim=True)


@pytest.mark.parametrize("longer", [177, 700])
@pytest.mark.parametrize("chosen", ["when loaded", "when saved", "before"])
def test_a_short_row_of_joined_windows_goes_on_from_a_file(tmp_path: Path, longer: int, chosen: str) -> None:
    """Its padding is no prefix that was dropped: alone it stays compressed, and goes on as it would have."""
    config = deepcopy(HYBRIDS["gemma3"])
    config.sliding_window = 600
    model = random_model(config)
    joined, alone = (KVCompCache(config, LOSSY) for _ in range(2))
    run(model, joined, prompt(1, longer))
    token = run(model, alone, prompt(1, 76, seed=1)).argmax(-1, keepdim=True)
    joined.join(alone)
    if chosen == "before":
        joined.batch_select_indices(torch.tensor([1]))
    joined.save(tmp_path / "a.kvc", rows=[1] if chosen == "when saved" else None)
    again = KVCompCache.load(tmp_path / "a.kvc", config, rows=[1] if chosen == "when loaded" else None)
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in alone.layers]
    for _ in range(90):
        expected, found = run(model, alone, token), run(model, again, token, again.attention_mask())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        token = expected.argmax(-1, keepdim=True)
    assert all(layer.store.compressed for layer in again.compressed_layers)


def test_a_prefix_past_a_sliding_window_cannot_be_cut(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(HYBRIDS["gemma3"]).eval()
    ids = prompt(1, 100)
    for tokens in (30, 100):
        cache = KVCompCache(model.config, LOSSY)
        run(model, cache, ids[:, :tokens])
        cache.save(tmp_path / f"{tokens}.kvc")
    with pytest.raises(InvalidInput, match="no prefix can be cut"):
        KVCompCache.load(tmp_path / "100.kvc", model.config, tokens=99)
    cut, whole = KVCompCache.load(tmp_path / "30.kvc", model.config, tokens=10), KVCompCache(model.config, LOSSY)
    run(model, whole, ids[:, :10])
    torch.testing.assert_close(run(model, cut, ids[:, 10:90]), run(model, whole, ids[:, 10:90]))
    assert KVCompCache.load(tmp_path / "30.kvc", model.config, tokens=0).get_seq_length() == 0


def test_some_layers_of_a_cache(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = KVCompCache(llama.config, LOSSY)
    run(llama, cache, prompt(2, 200))
    cache.save(tmp_path / "a.kvc", layers=[1], rows=[1])
    packed = kvcomp.load(tmp_path / "a.kvc")
    assert torch.equal(packed.decompress()[0], cache.compressed_layers[1].store.dense()[0][1:])
    with pytest.raises(InvalidInput, match="the file holds the layers"):
        KVCompCache.load(tmp_path / "a.kvc", llama.config)
    for layers in ([], [2], [-1]):
        with pytest.raises(InvalidInput, match="layers must be some of the 2"):
            cache.save(tmp_path / "b.kvc", layers=layers)


@pytest.mark.parametrize("spec", PRESETS.values(), ids=PRESETS)
def test_the_file_of_a_long_cache_is_as_large_as_the_cache(
    llama: PreTrainedModel, tmp_path: Path, spec: CodecSpec
) -> None:
    """Within one per cent, everything counted, at 8,192 tokens of a usual shape."""
    stores = {}
    for layer in range(2):
        stores[layer] = KVStore(spec.layer(layer, 2))
        stores[layer].append(*torch.randn(2, 1, 2, 8192, 128, dtype=torch.bfloat16))
        stores[layer].seal()
    files.save(tmp_path / "a.kvc", stores, spec, 2)
    size, held = (tmp_path / "a.kvc").stat().st_size, sum(store.memory().total for store in stores.values())
    assert abs(size / held - 1) < 0.01


def test_what_cannot_be_saved_or_loaded_is_said(llama: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.kvc"
    with pytest.raises(InvalidInput, match="fill the cache first"):
        KVCompCache(llama.config).save(path)
    linear = Qwen3NextConfig(**TINY, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(InvalidInput, match="fill the cache first"):
        KVCompCache(linear).save(path)
    both = Qwen3NextConfig(**TINY)
    chunked = KVCompCache(both)
    chunked.layers[0] = LinearAttentionAndSlidingWindowAttentionLayer(16)
    with pytest.raises(
        UnsupportedModel, match=r"layers \[0\] are neither full attention nor sliding windows nor linear"
    ):
        chunked.save(path)
    kvcomp.compress(*torch.randn(2, 1, 2, 20, 16)).save(path)
    with pytest.raises(InvalidInput, match=r"read it with kvcomp\.load"):
        KVCompCache.load(path, llama.config)
    with pytest.raises(InvalidInput, match="at least one path"):
        KVCompCache.load([], llama.config)
    cache = KVCompCache(llama.config, LOSSY)
    run(llama, cache, prompt(1, 20))
    files.save(
        path,
        {1: cache.compressed_layers[1].store},
        LOSSY,
        2,
        {"id": None, "configuration": cache.session.configuration},
    )
    with pytest.raises(InvalidInput, match="the file holds the layers"):
        KVCompCache.load(path, llama.config)
    cache.save(path)
    header, sections = unseal(path.read_bytes())
    header["tokens"] = 1025
    tail = [dict(parts) for parts in sections]
    header["layers"][0]["recent"] = header["layers"][1]["recent"] = 20
    for parts in tail:
        rows = bytearray(parts["rows"])
        rows[:8] = (1005).to_bytes(8, "little")
        parts["rows"] = bytes(rows)
    path.write_bytes(seal(header, tail))
    with pytest.raises(LimitExceeded, match="positions end at 1024"):
        KVCompCache.load(path, llama.config)


def test_one_layer_of_many(llama: PreTrainedModel, tmp_path: Path) -> None:
    spec = CodecSpec(TensorSpec("block", (0.05, 0.2)), TensorSpec("token", 0.1), window=0)
    cache = KVCompCache(llama.config, spec)
    run(llama, cache, prompt(1, 200))
    cache.save(tmp_path / "a.kvc")
    for layer in (0, 1):
        packed = kvcomp.load(tmp_path / "a.kvc", layer=layer)
        store = cache.compressed_layers[layer].store
        assert all(torch.equal(x, y) for x, y in zip(packed.decompress(), store.dense(), strict=True))
    with pytest.raises(InvalidInput, match="say which one with layer="):
        kvcomp.load(tmp_path / "a.kvc")
    with pytest.raises(InvalidInput, match="holds the layers 0, 1"):
        kvcomp.load(tmp_path / "a.kvc", layer=2)
    # only what is asked for is read: damage elsewhere goes unnoticed
    data = bytearray((tmp_path / "a.kvc").read_bytes())
    data[-1] ^= 1
    (tmp_path / "b.kvc").write_bytes(data)
    kvcomp.load(tmp_path / "b.kvc", layer=0)
    with pytest.raises(CorruptData, match="layer 1 is wrong: the file is damaged"):
        kvcomp.load(tmp_path / "b.kvc", layer=1)


@pytest.mark.parametrize("window", [0, 40])
def test_the_memory_of_a_loaded_cache_is_that_of_the_saved_one(
    llama: PreTrainedModel, tmp_path: Path, window: int
) -> None:
    cache = KVCompCache(llama.config, replace(LOSSY, window=window))
    run(llama, cache, prompt(1, 900))
    cache.save(tmp_path / "a.kvc")
    again = KVCompCache.load(tmp_path / "a.kvc", llama.config)
    for one in (cache, again):
        run(llama, one, torch.full((1, 1), 5))  # after which kernels have made of the books what they need
    assert again.memory() == cache.memory()
    assert (tmp_path / "a.kvc").stat().st_size < 1.1 * cache.memory().total


def test_a_damaged_file_of_several_is_named(llama: PreTrainedModel, tmp_path: Path) -> None:
    paths = [tmp_path / "a.kvc", tmp_path / "b.kvc"]
    for path in paths:
        cache = KVCompCache(llama.config, LOSSY)
        run(llama, cache, prompt(1, 200))
        cache.save(path)
    data = paths[1].read_bytes()
    for content, message in (
        (b"x" * 100, "b.kvc: this is no .kvc file"),
        (data[:-1] + bytes([data[-1] ^ 1]), "b.kvc: the checksum of the section"),
    ):
        paths[1].write_bytes(content)
        with pytest.raises(CorruptData, match=message):
            KVCompCache.load(paths, llama.config)
