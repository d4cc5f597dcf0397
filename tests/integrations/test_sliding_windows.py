"""Sliding windows of 512 tokens are compressed, and are to transformers what its own layers are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from families import FAMILIES
from generating import assert_same, attend_densely, forward, generate, prompt
from kvcomp import PrefixStore
from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.integrations.transformers import KVCompCache, layers
from kvcomp.integrations.transformers.layer import CompressedLayer
from kvcomp.integrations.transformers.sliding import SlidingLayer
from tiny_models import LOSSY, TINY, random_model

WINDOW = 512
TOLERANCE = 1e-3  # of a logit, in float32; Gemma 4's reach some tens
# every block has more codes than a block can code, and is kept as it came
EXACT = replace(
    LOSSY, key=replace(LOSSY.key, relative_scale=2.0**-9), value=replace(LOSSY.value, relative_scale=2.0**-9)
)


def config(family: str, window: int = WINDOW) -> Any:
    kind, settings = FAMILIES[family]
    about = {**TINY, **settings, "sliding_window": window, "max_position_embeddings": 4096}
    if "num_kv_shared_layers" in settings:  # the last window before these stays raw
        about |= {"num_hidden_layers": 6, "layer_types": settings["layer_types"][:2] * 3}
    return AutoConfig.for_model(kind, **about)


@pytest.fixture(scope="module", params=["Gemma 3", "Mistral", "gpt-oss", "Gemma 4"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return random_model(config(request.param))


@pytest.fixture(scope="module")
def gemma() -> PreTrainedModel:
    return random_model(config("Gemma 3"))


def windows(cache: KVCompCache) -> list[SlidingLayer]:
    return [layer for layer in cache.layers if isinstance(layer, SlidingLayer)]


def test_windows_with_room_for_pages_are_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    def kinds(window: int, spec: Any = "kvcomp", **options: Any) -> list[type]:
        return [type(layer) for layer in KVCompCache(config("Gemma 3", window), spec, **options).layers]

    assert kinds(512) == kinds(4096) == kinds(512, backend="reference") == [SlidingLayer, CompressedLayer]
    assert kinds(511) == kinds(512, backend="gpu") == [DynamicSlidingWindowLayer, CompressedLayer]
    assert kinds(512, replace(LOSSY, window=400))[0] == DynamicSlidingWindowLayer
    cache = KVCompCache(config("Gemma 3"))
    assert cache.is_sliding == [True, False]
    assert cache.layers[0].get_max_length() == 512
    chunks = config("Gemma 3")
    chunks.attention_chunk_size = 512
    assert type(KVCompCache(chunks).layers[0]) is DynamicSlidingWindowLayer


CROPS = pytest.mark.skipif(
    not hasattr(DynamicSlidingWindowLayer, "activate_past_recording"),
    reason="this transformers' own windows cannot be cropped",
)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, pytest.param({"prompt_lookup_num_tokens": 3}, marks=CROPS)],
    ids=["greedy", "beams", "prompt lookup"],
)
def test_generation_is_that_of_a_dynamic_cache(model: PreTrainedModel, options: dict[str, Any]) -> None:
    inputs = prompt(640) if "prompt_lookup_num_tokens" in options else prompt(640, 500)
    options = {"max_new_tokens": 70 if not options else 12, **options}
    want = generate(model, inputs, DynamicCache(config=model.config), "eager", **options)
    cache = KVCompCache(model.config, EXACT)
    assert_same(generate(model, inputs, cache, **options), want, TOLERANCE)
    for layer in windows(cache):
        assert layer.store.rows.dropped.max() > 0
        assert layer.store.compressed
        assert (layer.store.starts == cache.compressed_layers[-1].store.starts).all()


def test_a_window_that_other_layers_share_stays_raw() -> None:
    cache = KVCompCache(config("Gemma 4"))
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds[:4] == ["SlidingLayer", "CompressedLayer", "DynamicSlidingWindowLayer", "CompressedLayer"]


def test_keys_of_a_pass_whose_tokens_are_dropped_are_refused(gemma: PreTrainedModel) -> None:
    layer = windows(KVCompCache(gemma.config, LOSSY))[0]
    keys, values = layer.update(*torch.randn(2, 1, 2, 900, 16))
    layer.seal()
    for handle in (keys, values):
        handle.source.fresh = None
        with pytest.raises(InvalidInput, match="take them from its last update"):
            handle.sum()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_reads_the_same(gemma: PreTrainedModel, attention: str) -> None:
    inputs = prompt(600, 700)
    want = generate(gemma, inputs, DynamicCache(config=gemma.config), "eager")
    cache = KVCompCache(gemma.config, EXACT)
    assert_same(generate(gemma, inputs, cache, attention), want)
    keys, values = windows(cache)[0].keys, windows(cache)[0].values
    assert keys is not None
    assert values is not None
    assert keys.shape == values.shape == (2, 2, WINDOW - 1, 16)


def pieces(model: PreTrainedModel, cache: Any, ids: torch.Tensor, sizes: list[int], how: str = "kvcomp") -> Any:
    return torch.cat([forward(model, cache, how, input_ids=part) for part in ids.split(sizes, 1)], 1)


@pytest.mark.parametrize("sizes", [[300, 400, 1, 200, 5], [906], [64] * 14 + [10], [905, 1]])
def test_a_prompt_in_pieces(model: PreTrainedModel, sizes: list[int]) -> None:
    ids = prompt(906)["input_ids"]
    want = pieces(model, DynamicCache(config=model.config), ids, [906], "eager")
    found = pieces(model, KVCompCache(model.config, EXACT), ids, sizes)
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)


def test_masks_mean_the_same_as_to_transformers(gemma: PreTrainedModel) -> None:
    """Padding that the window has not left, has left in part, and has left; and a mask that hides what was seen."""
    inputs, more = prompt(560, 300, 40), prompt(30, 30, 30, seed=1)["input_ids"]
    caches = KVCompCache(gemma.config, EXACT), DynamicCache(config=gemma.config)
    found = []
    for cache, attention in zip(caches, ("kvcomp", "eager"), strict=True):
        mask, out = inputs["attention_mask"], [forward(gemma, cache, attention, **inputs)[:, -1:]]
        for part in more.split([1, 1, 20, 1, 7], 1):
            mask = torch.cat([mask, torch.ones_like(part)], 1)
            if part.shape[1] == 7:
                mask = mask.clone()
                mask[:, 400:420] = 0
            place = (mask.cumsum(1) - 1).clamp(min=0)[:, -part.shape[1] :]
            out.append(forward(gemma, cache, attention, input_ids=part, attention_mask=mask, position_ids=place))
        found.append(torch.cat(out, 1))
    torch.testing.assert_close(*found, atol=TOLERANCE, rtol=0)


def test_compressed_pages_are_attended_as_densely(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = prompt(700, 580)
    lossy = generate(model, inputs, KVCompCache(model.config, LOSSY))
    attend_densely(monkeypatch)
    assert_same(lossy, generate(model, inputs, KVCompCache(model.config, LOSSY)), 2e-3)


# Going back


def test_recorded_tokens_can_go_and_others_cannot(gemma: PreTrainedModel) -> None:
    ids = prompt(760)["input_ids"]
    cache = KVCompCache(gemma.config, EXACT)
    pieces(gemma, cache, ids[:, :700], [700])
    layer = windows(cache)[0]
    dropped = int(layer.store.rows.dropped[0])
    with pytest.raises(InvalidInput, match="activate_past_recording"):
        cache.crop(-90)
    assert [x.get_seq_length() for x in cache.layers] == [700, 700]
    cache.activate_past_recording()
    pieces(gemma, cache, torch.cat([ids[:, :200], prompt(4, seed=9)["input_ids"]], 1), [200, 4])
    assert layer.store.rows.dropped[0] == dropped
    cache.crop(-204)
    found = pieces(gemma, cache, ids[:, 700:], [60])
    want = pieces(gemma, DynamicCache(config=gemma.config), ids, [760], "eager")[:, 700:]
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
    cache.crop(0)
    assert layer.store.rows.dropped[0] > dropped


def test_tokens_are_recorded_until_a_reset(gemma: PreTrainedModel) -> None:
    ids = prompt(900)["input_ids"]
    cache = KVCompCache(gemma.config, EXACT)
    cache.activate_past_recording()
    pieces(gemma, cache, ids[:, :800], [600, 200])
    (rows,) = (layer.store.rows for layer in windows(cache))
    assert rows.dropped[0] == 0
    cache.crop(0)
    dropped = rows.dropped[0]
    assert dropped > 0
    pieces(gemma, cache, ids[:, 800:], [100])
    assert rows.dropped[0] == dropped
    cache.reset()
    pieces(gemma, cache, ids[:, :800], [600, 200])
    assert windows(cache)[0].store.rows.dropped[0] == dropped


def test_a_short_crop_needs_no_recording(gemma: PreTrainedModel) -> None:
    ids = prompt(720)["input_ids"]
    cache = KVCompCache(gemma.config, EXACT)
    pieces(gemma, cache, ids[:, :700], [700])
    held = int(windows(cache)[0].store.rows.begins[0])
    back = 700 - (held + WINDOW - 1)
    assert back > 0
    cache.crop(-back)
    found = pieces(gemma, cache, ids[:, 700 - back :], [20 + back])
    want = pieces(gemma, DynamicCache(config=gemma.config), ids, [720], "eager")[:, 700 - back :]
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
    cache.reset()
    assert cache.get_seq_length() == 0
    want = pieces(gemma, DynamicCache(config=gemma.config), ids[:, :640], [640], "eager")
    torch.testing.assert_close(pieces(gemma, cache, ids[:, :640], [640]), want, atol=TOLERANCE, rtol=0)


@CROPS
def test_a_crop_that_a_raw_window_refuses_changes_no_layer() -> None:
    about = config("Gemma 3", 32)
    about.layer_types = about.layer_types[::-1]
    model = random_model(about)
    cache = KVCompCache(model.config, EXACT)
    assert [type(layer) for layer in cache.layers] == [CompressedLayer, DynamicSlidingWindowLayer]
    pieces(model, cache, prompt(100)["input_ids"], [100])
    with pytest.raises(RuntimeError, match="past states"):
        cache.crop(-5)
    assert [layer.get_seq_length() for layer in cache.layers] == [100, 100]


@pytest.mark.parametrize("tokens", [1, 300])
def test_a_failed_pass_is_taken_back_or_the_cache_refuses(gemma: PreTrainedModel, tokens: int) -> None:
    ids = prompt(1100)["input_ids"]
    cache = KVCompCache(gemma.config, EXACT)
    pieces(gemma, cache, ids[:, :700], [700])

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.layers[1].store, "append", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            pieces(gemma, cache, ids[:, 700 : 700 + tokens], [tokens])
    if tokens == 1:
        found = pieces(gemma, cache, ids[:, 700:720], [20])
        want = pieces(gemma, DynamicCache(config=gemma.config), ids[:, :720], [720], "eager")[:, 700:]
        torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
    else:
        with pytest.raises(InvalidInput, match="cannot go back"):
            pieces(gemma, cache, ids[:, 700:701], [1])


# Files, stores, and rows that join


@pytest.mark.parametrize("lengths", [(700, 560), (300, 200), (560, 40)])
def test_a_cache_goes_on_from_a_file(model: PreTrainedModel, tmp_path: Path, lengths: tuple[int, int]) -> None:
    cache, inputs = KVCompCache(model.config, LOSSY), prompt(*lengths)
    forward(model, cache, **inputs)
    cache.save(tmp_path / "a.kvc", model)
    again = KVCompCache.load(tmp_path / "a.kvc", model.config, model)
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in cache.layers]
    assert torch.equal(again.attention_mask(), cache.attention_mask())
    more, mask = prompt(150, 150, seed=2)["input_ids"], inputs["attention_mask"]
    for part in more.split([1, 100, 49], 1):
        mask = torch.cat([mask, torch.ones_like(part)], 1)
        place = (mask.cumsum(1) - 1)[:, -part.shape[1] :]
        found, want = (
            forward(model, x, input_ids=part, attention_mask=mask, position_ids=place) for x in (again, cache)
        )
        assert torch.equal(found, want)
    for mine, theirs in zip(windows(again), windows(cache), strict=True):
        assert mine.store.rows.dropped.tolist() == theirs.store.rows.dropped.tolist()
        assert mine.store.rows.tail_begin.tolist() == theirs.store.rows.tail_begin.tolist()


def test_no_prefix_is_cut_behind_a_full_window(gemma: PreTrainedModel, tmp_path: Path) -> None:
    cache = KVCompCache(gemma.config, LOSSY)
    forward(gemma, cache, **prompt(900))
    cache.save(tmp_path / "a.kvc", gemma)
    with pytest.raises(InvalidInput, match="no prefix can be cut"):
        KVCompCache.load(tmp_path / "a.kvc", gemma.config, gemma, tokens=700)
    short = KVCompCache(gemma.config, LOSSY)
    forward(gemma, short, **prompt(400))
    short.save(tmp_path / "b.kvc", gemma)
    assert KVCompCache.load(tmp_path / "b.kvc", gemma.config, gemma, tokens=300).get_seq_length() == 300


def test_raw_windows_of_older_files_stay_raw(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "LEAST_WINDOW", 10_000)
    old = KVCompCache(model.config, LOSSY)
    assert not windows(old)
    forward(model, old, **prompt(700))
    old.save(tmp_path / "a.kvc", model)
    monkeypatch.undo()
    again = KVCompCache.load(tmp_path / "a.kvc", model.config, model)
    assert not windows(again)
    with pytest.raises(InvalidInput, match="no prefix can be cut"):
        KVCompCache.load(tmp_path / "a.kvc", model.config, model, tokens=699)
    token = prompt(1, seed=3)["input_ids"]
    assert torch.equal(forward(model, again, input_ids=token), forward(model, old, input_ids=token))
    fresh = KVCompCache(model.config, LOSSY)
    forward(model, fresh, **prompt(700))
    with pytest.raises(UnsupportedModel, match="make both in one way"):
        again.join(fresh)


def test_a_compressed_window_is_decompressed_where_none_can_be(gemma: PreTrainedModel, tmp_path: Path) -> None:
    cache = KVCompCache(gemma.config, LOSSY)
    forward(gemma, cache, **prompt(700))
    cache.save(tmp_path / "a.kvc", gemma)
    again = KVCompCache.load(tmp_path / "a.kvc", gemma.config, gemma, backend="gpu")
    assert type(again.layers[0]) is DynamicSlidingWindowLayer
    for mine, theirs in zip((again.layers[0].keys, again.layers[0].values), windows(cache)[0].dense(511), strict=True):
        assert torch.equal(mine, theirs)


def test_rows_join_and_leave(model: PreTrainedModel) -> None:
    alone = [KVCompCache(model.config, LOSSY) for _ in range(2)]
    for number, (cache, length) in enumerate(zip(alone, (900, 600), strict=True)):
        forward(model, cache, **prompt(length, seed=number))
    both = KVCompCache(model.config, LOSSY)
    forward(model, both, **prompt(900, seed=0))
    both.join(alone[1])
    for step in range(3):
        mask, token = both.attention_mask(1), prompt(1, 1, seed=5 + step)["input_ids"]
        found = forward(model, both, input_ids=token, attention_mask=mask, position_ids=mask.cumsum(1)[:, -1:] - 1)
        for row, cache in enumerate(alone):
            want = forward(model, cache, input_ids=token[row : row + 1])
            torch.testing.assert_close(found[row : row + 1], want, atol=TOLERANCE, rtol=0)
    both.batch_select_indices(torch.tensor([1]))
    token = prompt(1, seed=9)["input_ids"]
    mask = both.attention_mask(1)
    found = forward(model, both, input_ids=token, attention_mask=mask, position_ids=mask.cumsum(1)[:, -1:] - 1)
    torch.testing.assert_close(found, forward(model, alone[1], input_ids=token), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["Gemma 3", "gpt-oss"])
@pytest.mark.parametrize("first", ["sliding_attention", "full_attention"])
def test_a_prefix_store_goes_on_from_a_state(family: str, first: str, tmp_path: Path) -> None:
    """Windows before the first layer of all tokens stay raw there, so that this one can be computed again."""
    about, ids = config(family), prompt(900)["input_ids"]
    about.layer_types = sorted(about.layer_types, reverse=first == "sliding_attention")
    model = random_model(about)
    model.set_attn_implementation("kvcomp")
    other = torch.cat([ids[:, :850], prompt(30, seed=1)["input_ids"]], 1)
    with PrefixStore(tmp_path / "prefixes") as store:
        for text in (ids, other):
            cache = store.load(text, model, LOSSY)
            store.prefill(text, cache, model)
            forward(model, cache, input_ids=text[:, cache.get_seq_length() :])
            assert store.save(text, cache, model) == text.shape[1]
            assert len(windows(cache)) == (first == "full_attention")
        longer = torch.cat([text, prompt(40, seed=2)["input_ids"]], 1)
        again = store.load(longer, model, LOSSY)
    assert again.get_seq_length() == text.shape[1]
    for part in longer[:, text.shape[1] :].split([1, 39], 1):
        assert torch.equal(forward(model, again, input_ids=part), forward(model, cache, input_ids=part))
    for mine, theirs in zip(windows(again), windows(cache), strict=True):
        assert mine.store.rows.dropped.tolist() == theirs.store.rows.dropped.tolist()


def test_a_cache_of_ones_own_is_stored_if_it_came_in_one_pass(gemma: PreTrainedModel, tmp_path: Path) -> None:
    ids = prompt(900)["input_ids"]
    with PrefixStore(tmp_path) as store:
        cache = KVCompCache(gemma.config, LOSSY)
        pieces(gemma, cache, ids, [600, 300])
        with pytest.raises(InvalidInput, match="a cache that the store's load gave"):
            store.save(ids, cache, gemma)
        cache.reset()
        pieces(gemma, cache, ids, [900])
        assert store.save(ids, cache, gemma) == 900
        again = store.load(torch.cat([ids, ids[:, :9]], 1), gemma, LOSSY)
    assert again.get_seq_length() == 900
    token = torch.full((1, 1), 5)
    found, want = (forward(gemma, x, input_ids=token) for x in (again, cache))
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)


def test_memory_counts_the_window_that_the_next_token_sees(gemma: PreTrainedModel) -> None:
    caches = KVCompCache(gemma.config, LOSSY), DynamicCache(config=gemma.config)
    for cache, attention in zip(caches, ("kvcomp", "sdpa"), strict=True):
        forward(gemma, cache, attention, **prompt(900))
        forward(gemma, cache, attention, input_ids=torch.full((1, 1), 5))
    of_layer = windows(caches[0])[0].store.memory()
    own = caches[1].layers[0]
    assert of_layer.values == own.keys.numel() + own.values.numel()
    assert of_layer.dense == own.keys.nbytes + own.values.nbytes
    assert of_layer.total < 0.62 * of_layer.dense
