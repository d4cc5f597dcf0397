"""Prefixes of models with sliding windows or linear attention: a state of the whole cache is stored where it stood."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, cache_utils

from families import config_of
from generating import generate
from kvcomp import PrefixStore
from kvcomp.errors import InvalidInput
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.kernels import load_backend
from kvcomp.prefix.chain import CHUNK_TOKENS
from redis_server import running
from sealing import seal, unseal
from tiny_models import LOSSY, random_model, run, steps

FAMILIES = ("Qwen3-Next", "Granite 4 hybrid", "LFM2", "Gemma 3", "Gemma 4", "gpt-oss")
SINKS = LOSSY.sinks
SHARED = SINKS + 2 * CHUNK_TOKENS  # of prompts that share 700 tokens, the last whole chunk
LAST = SINKS + 3 * CHUNK_TOKENS


def prompt(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (1, tokens), generator=torch.Generator().manual_seed(seed))


def model_of(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    config = config_of(family)
    for name, value in settings.items():
        setattr(config, name, value)
    model = random_model(config).to(dtype)
    model.set_attn_implementation("kvcomp")
    return model


@pytest.fixture(scope="module")
def sliding() -> PreTrainedModel:
    return model_of("Gemma 3")


@pytest.fixture
def store(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path / "store")


def pieces(model: PreTrainedModel, ids: Tensor, *ends: int) -> tuple[KVCompCache, Tensor]:
    """A cache that no store has seen, filled piece by piece, and the logits of the last token."""
    cache = KVCompCache(model.config, LOSSY)
    for begin, end in zip((0, *ends), (*ends, ids.shape[1]), strict=True):
        logits = run(model, cache, ids[:, begin:end])
    return cache, logits


def same_from_here(model: PreTrainedModel, one: KVCompCache, other: KVCompCache, count: int = 40) -> bool:
    token = prompt(1, seed=77)
    expected, found = steps(model, one, token, count), steps(model, other, token, count)
    return all(torch.equal(x, y) for x, y in zip(expected[0], found[0], strict=True))


def states_of(store: PrefixStore) -> list[Path]:
    """The values that are states, by the place they stand at: their pages have no sinks before them, and a tail."""
    values = [path for path in store.blobs.path.glob("*/*.kvc") if unseal(path.read_bytes())[0]["layers"]]  # type: ignore[attr-defined]
    found = [(unseal(path.read_bytes())[0], path) for path in values]
    standing = [(h["tokens"], path) for h, path in found if any(layer["recent"] for layer in h["layers"])]
    return [path for _, path in sorted(standing)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_is_what_was_saved(store: PrefixStore, family: str, dtype: torch.dtype) -> None:
    """At any length; what comes after is bit by bit what comes after the cache that was saved."""
    model = model_of(family, dtype)
    for tokens in (600, 651):
        ids = prompt(tokens + 20, seed=tokens)
        cache, _ = pieces(model, ids[:, :tokens])
        assert store.load(ids, model, LOSSY).get_seq_length() == 0
        assert store.save(ids, cache, model) == tokens
        loaded = store.load(ids, model, LOSSY)
        assert loaded.get_seq_length() == tokens
        assert loaded.memory().values == cache.memory().values
        assert torch.equal(run(model, cache, ids[:, tokens:]), run(model, loaded, ids[:, tokens:]))
        assert same_from_here(model, cache, loaded)
    assert len(states_of(store)) == 2


def test_every_layer_is_read_by_the_backend_that_was_asked_for(store: PrefixStore) -> None:
    types = ["full_attention", "sliding_attention"]  # windows before the first layer that keeps all stay raw
    model, ids = model_of("Gemma 3", sliding_window=512, layer_types=types), prompt(720)
    store.save(ids, pieces(model, ids[:, :700])[0], model)
    loaded = store.load(ids, model, LOSSY, backend="reference")
    assert loaded.get_seq_length() == 700
    assert {layer.store.kernels for layer in loaded.layers} == {load_backend("reference")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_begin_alike_go_on_where_they_part(store: PrefixStore, family: str, dtype: torch.dtype) -> None:
    """The second prompt finds no state where it parts from the first, and leaves one there for the third."""
    if family == "LFM2" and not hasattr(cache_utils, "DummyLayer"):
        pytest.skip("transformers 5.14 computes LFM2 wrong where a prompt comes in two passes")
    model, system = model_of(family, dtype), prompt(700)
    for seed, (loaded, ends) in enumerate([(0, (LAST,)), (0, (SHARED, LAST)), (SHARED, (SHARED, LAST)), (SHARED, ())]):
        ids = torch.cat([system, prompt(150 if ends else 20, seed=seed + 1)], dim=1)
        cache = store.load(ids, model, LOSSY)
        assert cache.get_seq_length() == loaded
        store.prefill(ids, cache, model)
        held = max((loaded, *ends))
        assert cache.get_seq_length() == held
        logits = run(model, cache, ids[:, held:])
        if seed == 0:  # later ones have the codebooks of the first
            alone, expected = pieces(model, ids, *ends)
            assert torch.equal(logits, expected)
            assert same_from_here(model, alone, cache)
        again = store.load(ids, model, LOSSY)
        assert again.get_seq_length() == held
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4  # chunks may be those that another prompt computed
        torch.testing.assert_close(run(model, again, ids[:, held:]), logits, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", ["Qwen3.5", "Gemma 3"])
def test_a_chat_goes_on_where_it_ended(store: PrefixStore, family: str) -> None:
    """Each turn gives the tokens that one cache, never stored, gives."""
    model, ids, before = model_of(family), prompt(400), 0
    kept = KVCompCache(model.config, LOSSY)
    for turn in range(3):
        cache = store.load(ids, model, LOSSY)
        assert cache.get_seq_length() == before
        found, expected = (
            generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, x, max_new_tokens=50)
            for x in (cache, kept)
        )
        assert torch.equal(found.sequences, expected.sequences)
        before = store.save(found.sequences, cache, model)
        assert before == cache.get_seq_length() == ids.shape[1] + 49
        ids = torch.cat([found.sequences, prompt(20, seed=turn)], dim=1)


def test_a_window_that_is_not_full_yet(store: PrefixStore) -> None:
    model, ids = model_of("Gemma 3", sliding_window=2000), prompt(620)
    cache = store.load(ids, model, LOSSY)
    run(model, cache, ids[:, :600])
    assert store.save(ids, cache, model) == 600
    loaded = store.load(ids, model, LOSSY)
    assert torch.equal(run(model, cache, ids[:, 600:]), run(model, loaded, ids[:, 600:]))


def test_a_state_behind_a_wide_raw_window_is_found(store: PrefixStore, sliding: PreTrainedModel) -> None:
    spec, ids = replace(LOSSY, window=200), prompt(720)
    cache = store.load(ids, sliding, spec)
    run(sliding, cache, ids[:, :715])  # one chunk, three pages and 263 raw tokens
    assert store.save(ids, cache, sliding) == 715
    assert store.load(ids, sliding, spec).get_seq_length() == 715


def test_a_store_in_redis(tmp_path: Path, sliding: PreTrainedModel) -> None:
    ids = prompt(900)
    with running(tmp_path) as url, PrefixStore(url, timeout=30) as store:
        cache = store.load(ids, sliding, LOSSY)
        store.prefill(ids, cache, sliding)
        loaded = store.load(ids, sliding, LOSSY)
        assert loaded.get_seq_length() == LAST
        assert same_from_here(sliding, cache, loaded)


def test_short_prompts_are_not_stored_and_states_need_a_token_to_compute(
    store: PrefixStore, sliding: PreTrainedModel
) -> None:
    short = prompt(SINKS + CHUNK_TOKENS + LOSSY.window - 1)
    cache = store.load(short, sliding, LOSSY)
    store.prefill(short, cache, sliding)
    assert cache.get_seq_length() == 0
    run(sliding, cache, short)
    assert store.save(short, cache, sliding) == 0
    ids = prompt(700)
    cache, _ = pieces(sliding, ids[:, :600])
    store.save(ids, cache, sliding)
    assert store.load(ids[:, :601], sliding, LOSSY).get_seq_length() == 600
    assert store.load(ids[:, :600], sliding, LOSSY).get_seq_length() == 0
    other = ids.clone()
    other[0, 599] += 1
    assert store.load(other, sliding, LOSSY).get_seq_length() == 0


def test_a_model_of_full_attention_needs_no_prefill(store: PrefixStore) -> None:
    model, ids = model_of("Llama"), prompt(900)
    cache = store.load(ids, model, LOSSY)
    store.prefill(ids, cache, model)
    assert cache.get_seq_length() == 0


# What may not be stored


@pytest.mark.parametrize("family", ["Qwen3-Next", "Gemma 3", "LFM2"])
@pytest.mark.parametrize("place", [0, 300, 599])
def test_other_ids_than_those_that_filled_the_cache(store: PrefixStore, family: str, place: int) -> None:
    model, ids = model_of(family), prompt(600)
    cache, _ = pieces(model, ids)
    wrong = ids.clone()
    wrong[0, place] = wrong[0, place] % 96 + 1
    with pytest.raises(InvalidInput, match="are not those of these token ids"):
        store.save(wrong, cache, model)
    assert not states_of(store)
    assert store.save(ids, cache, model) == 600


def test_other_weights_and_attention_are_refused(store: PrefixStore, sliding: PreTrainedModel) -> None:
    ids = prompt(600)
    cache, _ = pieces(sliding, ids)
    with pytest.raises(InvalidInput, match=r"are not those of this model|of these token ids"):
        store.save(ids, cache, random_model(config_of("Gemma 3"), seed=1))
    sliding.set_attn_implementation("sdpa")
    with pytest.raises(InvalidInput, match="set_attn_implementation"):
        store.prefill(ids, store.load(ids, sliding, LOSSY), sliding)
    sliding.set_attn_implementation("kvcomp")
    with pytest.raises(InvalidInput, match="only a KVCompCache"):
        store.prefill(ids, None, sliding)  # type: ignore[arg-type]


def test_a_cache_that_was_cropped_within_a_page_has_no_state_that_can_be_checked(store: PrefixStore) -> None:
    model, ids = model_of("Gemma 3", sliding_window=2000), prompt(700)
    cache, _ = pieces(model, ids)
    cache.crop(-90)
    assert store.save(ids, cache, model) == 0
    run(model, cache, ids[:, 610:])
    assert store.save(ids, cache, model) == 0
    assert not states_of(store)


# Values that are not what they should be


def edited(edit: Callable[[dict[str, Any], Any], object]) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        header, sections = unseal(data)
        edit(header, sections)
        return seal(header, sections)

    return change


def moved(header: dict[str, Any], sections: Any) -> None:
    rows = bytearray(sections[1]["rows"])
    rows[:8] = (SHARED - 64).to_bytes(8, "little")
    sections[1]["rows"] = bytes(rows)


def shorter_window(header: dict[str, Any], sections: Any) -> None:
    layer, parts = header["layers"][0], sections[0]
    half = len(parts["tail"]) // 2
    token = half // layer["recent"]
    parts["tail"] = parts["tail"][: half - token] + parts["tail"][half:-token]
    layer["recent"] -= 1
    parts["rows"] = (int.from_bytes(parts["rows"][:8], "little") + 1).to_bytes(8, "little") + parts["rows"][8:]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "the end": lambda data: data[:-100],
    "nothing": lambda data: b"\0" * 100,
    "another key": edited(lambda header, _: header["model"]["prefix"].update(key="kvcomp:prefix:a")),
    "another place": edited(lambda header, _: header["model"]["prefix"].update(end=5)),
    "another model": edited(lambda header, _: header["model"].update(id="other")),
    "without a layer": edited(lambda header, sections: (header["layers"].pop(), sections.pop())),
    "another spec": edited(lambda header, _: header["spec"].update(window=17)),
    "another begin": edited(moved),
    "a shorter window": edited(shorter_window),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_is_removed_and_the_one_before_it_is_used(
    store: PrefixStore, sliding: PreTrainedModel, name: str
) -> None:
    ids = prompt(640)
    for tokens in (600, 630):
        cache, _ = pieces(sliding, ids[:, :tokens])
        assert store.save(ids, cache, sliding) == tokens
    assert store.load(ids, sliding, LOSSY).get_seq_length() == 630
    before, damaged = states_of(store)
    damaged.write_bytes(DAMAGE[name](damaged.read_bytes()))
    loaded = store.load(ids, sliding, LOSSY)
    assert loaded.get_seq_length() == 600
    assert not damaged.exists()
    assert before.exists()


@pytest.mark.parametrize(
    "edit",
    [
        lambda header, _: header["states"][0].update(name="conv_states.7"),
        lambda header, _: header["states"][0].update(layer=1),
        lambda header, sections: (header.pop("states"), sections.pop()),
    ],
)
def test_a_state_that_is_not_of_the_models_layers_is_removed(store: PrefixStore, edit: Any) -> None:
    model, ids = model_of("LFM2"), prompt(640)
    cache, _ = pieces(model, ids[:, :600])
    store.save(ids, cache, model)
    (path,) = states_of(store)
    path.write_bytes(edited(edit)(path.read_bytes()))
    assert store.load(ids, model, LOSSY).get_seq_length() == 0
    assert not path.exists()


def test_a_state_whose_chunks_are_gone_is_not_used(store: PrefixStore, sliding: PreTrainedModel) -> None:
    ids = prompt(900)
    for tokens in (500, 850):
        cache = store.load(ids, sliding, LOSSY)
        run(sliding, cache, ids[:, cache.get_seq_length() : tokens])
        assert store.save(ids, cache, sliding) == tokens
    assert store.load(ids, sliding, LOSSY).get_seq_length() == 850
    paths: Iterator[Path] = store.blobs.path.glob("*/*.kvc")  # type: ignore[attr-defined]
    (second,) = [path for path in paths if unseal(path.read_bytes())[0]["model"]["prefix"]["end"] == SHARED]
    second.write_bytes(second.read_bytes()[:-1])
    assert store.load(ids, sliding, LOSSY).get_seq_length() == 500
    assert not second.exists()
    assert store.save(ids, cache, sliding) == 850
    assert store.load(ids, sliding, LOSSY).get_seq_length() == 850
