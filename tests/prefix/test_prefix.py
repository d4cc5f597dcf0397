"""PrefixStore: what is loaded is what was computed for these tokens by this model, whatever the store and other
processes do.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel

from calibrating import calibrated
from kvcomp.errors import (
    BackendUnavailable,
    CorruptData,
    InvalidInput,
    KVCompError,
    LimitExceeded,
    StoreUnavailable,
    UnsupportedModel,
)
from kvcomp.integrations.transformers import KVCompCache, recompute
from kvcomp.integrations.transformers.models import fingerprint_of
from kvcomp.prefix import PrefixStore, chain
from kvcomp.prefix.chain import CHUNK_TOKENS
from kvcomp.spec import PRESETS, CodecSpec
from kvcomp.store import KVStore
from kvcomp.store.pages import compare
from kvcomp.store.tensors import as_array
from redis_server import answering, free_port, running
from sealing import seal, unseal
from tiny_models import LOSSY, TINY, exact, run, steps

FIXED = replace(PRESETS["packed"], window=0, sinks=0)
SINKS = LOSSY.sinks
SHARED = SINKS + 2 * CHUNK_TOKENS


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(LlamaConfig(**TINY)).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return found


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["folder", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PrefixStore]:
    if request.param == "folder":
        yield PrefixStore(tmp_path / "store")
        return
    import redis

    url = str(request.getfixturevalue("redis_url"))
    with redis.Redis.from_url(url) as client:
        client.flushall()
    with PrefixStore(url, timeout=30) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path / "store")


def prompt(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, (1, tokens), generator=torch.Generator().manual_seed(seed))


def computed(model: PreTrainedModel, ids: torch.Tensor, spec: CodecSpec = LOSSY) -> KVCompCache:
    cache = KVCompCache(model.config, spec)
    run(model, cache, ids)
    return cache


def cut(cache: KVCompCache, tokens: int) -> KVCompCache:
    cache.crop(tokens - cache.get_seq_length())
    return cache


def same(one: KVCompCache, other: KVCompCache) -> bool:
    return all(
        as_array(x).tobytes() == as_array(y).tobytes()
        for a, b in zip(one.compressed_layers, other.compressed_layers, strict=True)
        for x, y in zip(a.store.dense(), b.store.dense(), strict=True)
    )


def files_of(store: PrefixStore) -> list[Path]:
    return sorted(store.blobs.path.glob("*/*.kvc"))  # type: ignore[attr-defined]


@pytest.mark.parametrize("spec", [LOSSY, FIXED], ids=["huffman", "fixed"])
def test_a_loaded_prefix_is_the_cropped_cache_and_goes_on_as_it_does(
    model: PreTrainedModel, store: PrefixStore, spec: CodecSpec
) -> None:
    ids = prompt(700)
    assert store.load(ids, model, spec).get_seq_length() == 0
    cache = computed(model, ids, spec)
    stored = store.save(ids, cache, model)
    chunks = (700 - spec.window - spec.sinks) // CHUNK_TOKENS
    assert stored == spec.sinks + chunks * CHUNK_TOKENS
    loaded, cropped = store.load(ids, model, spec), cut(computed(model, ids, spec), stored)
    assert loaded.get_seq_length() == stored
    assert same(loaded, cropped)
    rest = ids[:, stored:]
    assert torch.equal(run(model, loaded, rest), run(model, cropped, rest))
    token = prompt(1)
    expected, found = steps(model, cropped, token, 80), steps(model, loaded, token, 80)
    assert all(torch.equal(x, y) for x, y in zip(expected[0], found[0], strict=True))
    assert same(loaded, cropped)


def test_a_prefix_under_a_calibration(model: PreTrainedModel, folder: PrefixStore) -> None:
    """It is found with the same calibration and level alone, and is the cropped cache."""
    made = calibrated(2, 2, 16, model=fingerprint_of(model.config))
    ids = prompt(700)
    cache = folder.load(ids, model, made.spec("balanced"), calibration=made)
    assert cache.get_seq_length() == 0
    run(model, cache, ids)
    stored = folder.save(ids, cache, model)
    assert stored > CHUNK_TOKENS
    loaded = folder.load(ids, model, made.spec("balanced"), calibration=made)
    assert same(loaded, cut(cache, stored))
    assert torch.equal(run(model, loaded, ids[:, stored:]), run(model, cache, ids[:, stored:]))
    assert folder.load(ids, model, made.spec("aggressive"), calibration=made).get_seq_length() == 0
    other = calibrated(2, 2, 16, model=fingerprint_of(model.config), centred=False)
    assert folder.load(ids, model, other.spec("balanced"), calibration=other).get_seq_length() == 0


def test_generate_with_a_store(model: PreTrainedModel, store: PrefixStore) -> None:
    """Three turns of a chat: each begins with what the ones before stored."""
    model.set_attn_implementation("kvcomp")
    ids, before = prompt(400), 0
    for turn in range(3):
        cache = store.load(ids, model, LOSSY)
        assert cache.get_seq_length() == before
        out = model.generate(ids, past_key_values=cache, max_new_tokens=150, do_sample=False, eos_token_id=None)
        before = store.save(out, cache, model)
        assert before > ids.shape[1] + 150 - CHUNK_TOKENS - 2 * 64
        ids = torch.cat([out, prompt(20, seed=turn)], dim=1)


def test_prompts_share_the_chunks_of_what_they_share(model: PreTrainedModel, folder: PrefixStore) -> None:
    system, total = prompt(SINKS + 2 * CHUNK_TOKENS + 30), []
    for user in range(3):
        ids = torch.cat([system, prompt(400, seed=user + 1)], dim=1)
        cache = folder.load(ids, model, LOSSY)
        assert cache.get_seq_length() == (SINKS + 2 * CHUNK_TOKENS if user else 0)
        run(model, cache, ids[:, cache.get_seq_length() :])
        folder.save(ids, cache, model)
        total.append(len(files_of(folder)))
    assert total[1] - total[0] == total[2] - total[1] == total[0] - 2 == 1
    lists = [row.tolist() for row in ids]
    assert folder.load(lists[0], model, LOSSY).get_seq_length() == folder.load(ids, model, LOSSY).get_seq_length()


@pytest.mark.parametrize("tokens", [1, 50, SINKS + CHUNK_TOKENS, SINKS + CHUNK_TOKENS + 1, SINKS + 2 * CHUNK_TOKENS])
def test_at_least_one_token_is_left_to_compute(model: PreTrainedModel, folder: PrefixStore, tokens: int) -> None:
    ids = prompt(700)
    folder.save(ids, computed(model, ids), model)
    cache = folder.load(ids[:, :tokens], model, LOSSY)
    assert cache.get_seq_length() == max(0, (tokens - 1 - SINKS) // CHUNK_TOKENS) * CHUNK_TOKENS + (
        SINKS if tokens > SINKS + CHUNK_TOKENS else 0
    )
    run(model, cache, ids[:, cache.get_seq_length() : tokens])


def test_nothing_of_another_model_or_spec_or_prompt(model: PreTrainedModel, folder: PrefixStore) -> None:
    ids = prompt(500)
    folder.save(ids, computed(model, ids), model)
    named = folder.save(ids, computed(model, ids), model, model_id="llama@1")
    assert named == folder.load(ids, model, LOSSY, model_id="llama@1").get_seq_length() > 0
    torch.manual_seed(5)
    other = AutoModelForCausalLM.from_config(LlamaConfig(**TINY)).eval()
    halved = AutoModelForCausalLM.from_config(LlamaConfig(**TINY), dtype=torch.bfloat16).eval()
    changed = ids.clone()
    changed[0, 0] += 1
    for arguments, options in (
        ((ids, other, LOSSY), {}),
        ((ids, halved, LOSSY), {"model_id": "llama@1"}),
        ((ids, model, replace(LOSSY, window=17)), {}),
        ((ids, model, LOSSY), {"model_id": "llama@2"}),
        ((changed, model, LOSSY), {}),
    ):
        assert folder.load(*arguments, **options).get_seq_length() == 0
    changed = ids.clone()
    changed[0, SINKS + CHUNK_TOKENS] += 1
    assert folder.load(changed, model, LOSSY).get_seq_length() == SINKS + CHUNK_TOKENS
    with torch.no_grad():
        kept = model.lm_head.weight.clone()
        model.lm_head.weight[0, 0] += 1
        assert folder.load(ids, model, LOSSY).get_seq_length() == 0
        model.lm_head.weight.copy_(kept)
    assert folder.load(ids, model, LOSSY).get_seq_length() == named


def test_what_cannot_be_stored(model: PreTrainedModel, folder: PrefixStore, tmp_path: Path) -> None:
    ids = prompt(400)
    cache = computed(model, ids)
    for wrong in (ids[:, :399], torch.cat([ids, ids])):
        with pytest.raises(InvalidInput, match=r"ids must be|give one row without padding"):
            folder.save(wrong, cache, model)
    two = KVCompCache(model.config, LOSSY)
    run(model, two, torch.cat([ids, ids]))
    padded = KVCompCache(model.config, LOSSY)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    run(model, padded, ids, mask)
    for other in (two, padded):
        with pytest.raises(InvalidInput, match="one row without padding"):
            folder.save(ids, other, model)
    with pytest.raises(InvalidInput, match=r"fill the cache first|holds 0 rows"):
        folder.save(ids, KVCompCache(model.config), model)
    for wrong, match in ((ids.float(), "whole numbers"), (ids[None], "of one prompt"), (ids.repeat(2, 1), "of one")):
        with pytest.raises(InvalidInput, match=match):
            folder.load(wrong, model, LOSSY)
    assert folder.load([], model, LOSSY).get_seq_length() == 0
    windows = AutoModelForCausalLM.from_config(MistralConfig(**TINY, sliding_window=40)).eval()
    with pytest.raises(UnsupportedModel, match="every layer of this model has a sliding window"):
        folder.load(ids, windows, LOSSY)
    with pytest.raises(UnsupportedModel, match="every layer of this model has a sliding window"):
        folder.save(ids, computed(windows, ids), windows)
    short = prompt(LOSSY.window + SINKS + 130)
    assert folder.save(short, computed(model, short), model) == 0  # its codebooks are not trained yet
    cropped = cut(computed(model, ids), SINKS + CHUNK_TOKENS + 10)
    assert folder.save(ids, cropped, model) == SINKS + CHUNK_TOKENS
    with pytest.raises(LimitExceeded, match="raise its limit"):
        PrefixStore(tmp_path / "small", limit=1000).save(ids, cache, model)


def test_the_first_to_store_a_beginning_decides_its_codebooks(
    model: PreTrainedModel, folder: PrefixStore, tmp_path: Path
) -> None:
    ids = [torch.cat([prompt(SHARED + 20), prompt(400, seed=seed)], dim=1) for seed in (1, 2)]
    caches = [computed(model, x) for x in ids]  # neither has seen the other's: two codebooks for the 300 tokens
    first = folder.save(ids[0], caches[0], model)
    before = files_of(folder)
    assert folder.save(ids[1], caches[1], model) == 0
    assert files_of(folder) == before
    assert same(folder.load(ids[0], model, LOSSY), cut(caches[0], first))
    again = folder.load(ids[1], model, LOSSY)
    assert again.get_seq_length() == SHARED
    run(model, again, ids[1][:, again.get_seq_length() :])
    assert folder.save(ids[1], again, model) > again.get_seq_length() - 300


def test_chunks_of_other_codebooks_are_not_mixed(model: PreTrainedModel, folder: PrefixStore, monkeypatch: Any) -> None:
    """Even where a value names the right key: its pages cannot be read with the first chunk's codebooks."""
    ids = [torch.cat([prompt(SHARED + 20), prompt(400, seed=seed)], dim=1) for seed in (1, 2)]
    folder.save(ids[0], computed(model, ids[0]), model)
    books: list[bytes] = []
    plain = chain.books_of
    for module in ("store", "read"):
        patched = f"kvcomp.prefix.{module}.books_of"
        monkeypatch.setattr(patched, lambda header: (books.append(plain(header)), books[0])[1])
    folder.load(ids[0], model, LOSSY)
    before = files_of(folder)
    folder.save(ids[1], computed(model, ids[1]), model)
    monkeypatch.undo()
    assert len(set(books)) == 2
    (wrong,) = {path for path in files_of(folder) if f'"end":{SHARED + CHUNK_TOKENS}' in str(path.read_bytes())} - set(
        before
    )
    loaded = folder.load(ids[1], model, LOSSY)
    assert loaded.get_seq_length() == SHARED
    assert same(loaded, cut(computed(model, ids[0]), SHARED))
    assert not wrong.exists()


# Values that are not what they should be


def test_swapped_values_are_removed_and_stored_anew(model: PreTrainedModel, store: PrefixStore) -> None:
    ids, seen = prompt(700), {}
    plain = store.blobs.put

    def noted(items: Any, kept: Any = ()) -> None:
        seen.update((key, b"".join(pieces)) for key, pieces in items)
        plain(items, kept)

    store.blobs.put = noted  # type: ignore[method-assign]
    cache = computed(model, ids)
    stored = store.save(ids, cache, model)
    keys = list(seen)
    for one in range(len(keys)):
        for other in range(len(keys)):
            if one != other:
                plain([(keys[one], [seen[keys[other]]])])
                expected = 0 if one == 0 else SINKS + one * CHUNK_TOKENS
                assert store.load(ids, model, LOSSY).get_seq_length() == expected
                assert store.blobs.sizes(keys[one : one + 1]) == [None]
                assert store.save(ids, cache, model) == stored
                assert store.load(ids, model, LOSSY).get_seq_length() == stored


def edited(value: bytes, edit: Any) -> bytes:
    header, sections = unseal(value)
    edit(header, sections)
    return seal(header, sections)


@pytest.mark.parametrize("chunk", [0, 1])
def test_values_under_right_checksums_that_are_no_chunks(
    model: PreTrainedModel, folder: PrefixStore, chunk: int, tmp_path: Path
) -> None:
    ids = prompt(700)
    cache = computed(model, ids)
    stored = folder.save(ids, cache, model)
    order: list[str] = []
    plain = folder.blobs.get
    folder.blobs.get = lambda keys: (order.extend(keys), plain(keys))[1]  # type: ignore[method-assign]
    folder.load(ids, model, LOSSY)
    folder.blobs.get = plain  # type: ignore[method-assign]
    key = order[chunk]
    value = bytes(plain([key])[0] or b"")
    whole = tmp_path / "whole.kvc"
    cache.save(whole)

    def cropped(header: Any, sections: Any) -> None:
        for of_layer in sections:
            of_layer["table"] = of_layer["table"][:-4] + (63).to_bytes(4, "little")
        header["tokens"] -= 1

    def short(header: Any, sections: Any) -> None:
        cropped(header, sections)
        header["tokens"] += 1
        for layer, of_layer in zip(header["layers"], sections, strict=True):
            layer["recent"] = 1
            of_layer["tail"] = bytes(2 * 2 * 16 * 4)

    wrong = [
        whole.read_bytes(),
        edited(value, lambda header, sections: header["model"].pop("prefix")),
        edited(value, lambda header, sections: header["model"]["prefix"].update(end=1)),
        edited(value, lambda header, sections: header["model"].update(id="other")),
        edited(value, lambda header, sections: header.update(model=None)),
        edited(value, lambda header, sections: header["spec"].update(window=0)),
        edited(value, lambda header, sections: (header["layers"].pop(), sections.pop())),
        edited(value, cropped),
        edited(value, short),
        value[:-1],
        b"x",
    ]
    for content in wrong:
        folder.blobs.put([(key, [content])])
        assert folder.load(ids, model, LOSSY).get_seq_length() == (SINKS + CHUNK_TOKENS if chunk else 0)
        assert folder.blobs.sizes([key]) == [None]
    newer = edited(value, lambda header, sections: None)
    newer = seal(*unseal(newer), version=9)
    folder.blobs.put([(key, [newer])])
    assert folder.load(ids, model, LOSSY).get_seq_length() == (SINKS + CHUNK_TOKENS if chunk else 0)
    assert folder.blobs.sizes([key]) == [len(newer)], "a newer kvcomp's value is not this one's to remove"
    folder.blobs.put([(key, [value])])
    assert folder.load(ids, model, LOSSY).get_seq_length() == stored


def sealed_chunks(spec: CodecSpec, channels: int, value_channels: int) -> KVStore:
    store = KVStore(spec.layer(0, 1))
    shape = 1, 2, spec.sinks + 2 * CHUNK_TOKENS + spec.window
    store.append(torch.randn(*shape, channels), torch.randn(*shape, value_channels))
    store.seal()
    return store


def test_a_chunk_of_another_shape_than_the_calibration_is_damaged() -> None:
    made = calibrated(1, 2, 32)
    origin = chain.Origin({}, 1, [0], "float32", made.spec("balanced", "patched"), made)
    value = b"".join(chain.pack(origin, {0: sealed_chunks(origin.spec, 64, 64)}, 0, "key"))
    with pytest.raises(CorruptData, match="another shape than the calibration"):
        chain.unpack(origin, value, 0, "key", "cpu")


def test_chunks_whose_values_are_wider_are_not_joined() -> None:
    spec = CodecSpec.resolve("packed")
    origin = chain.Origin({}, 1, [0], "float32", spec)
    stores = []
    for chunk, channels in enumerate((64, 16)):
        value = b"".join(chain.pack(origin, {0: sealed_chunks(spec, 64, channels)}, chunk, "key"))
        stores.append(chain.unpack(origin, value, chunk, "key", "cpu")[1][0])
    with pytest.raises(CorruptData, match="different value_channels"):
        chain.join_chunks(stores)


def test_chunks_with_and_without_books_of_their_own_are_not_joined() -> None:
    trained = sealed_chunks(CodecSpec.resolve("kvcomp"), 64, 64)
    sinks = trained.spec.sinks
    untrained = KVStore(trained.spec)
    untrained.append(*torch.randn(2, 1, 2, sinks + 64 + trained.spec.window, 64))
    untrained.seal()
    stores = [trained.slice(0, 4, sinks), untrained.slice(0, 1, 0)]
    for chunks in (stores, stores[::-1]):
        with pytest.raises(CorruptData, match="different codebooks"):
            chain.join_chunks(chunks)


def test_a_chunk_of_another_dtype_than_the_model_is_damaged() -> None:
    spec = CodecSpec.resolve("packed")
    origin = chain.Origin({}, 1, [0], "bfloat16", spec)
    value = b"".join(chain.pack(origin, {0: sealed_chunks(spec, 64, 64)}, 0, "key"))
    with pytest.raises(CorruptData, match="other pages than a chunk has"):
        chain.unpack(origin, value, 0, "key", "cpu")


# Values that are right, where they cannot be used


def test_a_load_for_a_gpu_needs_none_and_removes_nothing(model: PreTrainedModel, folder: PrefixStore) -> None:
    ids = prompt(700)
    stored = folder.save(ids, computed(model, ids), model)
    before = files_of(folder)
    for backend in ("gpu", "reference"):
        loaded = folder.load(ids, model, LOSSY, backend=backend)
        assert same(loaded, folder.load(ids, model, LOSSY))
        assert loaded.get_seq_length() == stored
    with pytest.raises(BackendUnavailable, match="there is no backend 'tpu'"):
        folder.load(ids, model, LOSSY, backend="tpu")
    assert files_of(folder) == before


def test_a_value_beyond_the_limits_is_a_miss_and_stays(model: PreTrainedModel, folder: PrefixStore) -> None:
    ids = prompt(700)
    stored = folder.save(ids, computed(model, ids), model)
    for path in files_of(folder):
        value = path.read_bytes()
        path.write_bytes(edited(value, lambda header, sections: header.update(rows=1 << 20)))
        assert folder.load(ids, model, LOSSY).get_seq_length() < stored
        assert path.exists()
        path.write_bytes(value)
    assert folder.load(ids, model, LOSSY).get_seq_length() == stored


@pytest.mark.parametrize("error", [InvalidInput, BackendUnavailable, UnsupportedModel])
def test_an_error_that_is_not_the_values_is_raised_and_removes_nothing(
    model: PreTrainedModel, folder: PrefixStore, monkeypatch: pytest.MonkeyPatch, error: type[KVCompError]
) -> None:
    ids = prompt(700)
    folder.save(ids, computed(model, ids), model)
    before = files_of(folder)

    def fail(*_: Any, **__: Any) -> None:
        raise error("the calibration is for 4 KV heads")

    monkeypatch.setattr("kvcomp.files.load", fail)
    with pytest.raises(error, match="4 KV heads"):
        folder.load(ids, model, LOSSY)
    assert files_of(folder) == before


def test_another_calibration_is_refused_and_removes_nothing(model: PreTrainedModel, folder: PrefixStore) -> None:
    made, other = (
        calibrated(2, 2, 16, model=fingerprint_of(model.config), centred=centred) for centred in (True, False)
    )
    ids = prompt(700)
    cache = folder.load(ids, model, made.spec("balanced"), calibration=made)
    run(model, cache, ids)
    folder.save(ids, cache, model)
    before = files_of(folder)
    with pytest.raises(InvalidInput, match="calibration"):
        folder.load(ids, model, made.spec("balanced"), calibration=other)
    with pytest.raises(InvalidInput, match="calibration"):
        folder.load(ids, model, made.spec("balanced"))
    assert files_of(folder) == before


# Others at the same time


def test_a_store_that_evicts_gives_shorter_prefixes(model: PreTrainedModel, tmp_path: Path) -> None:
    ids = [prompt(700, seed=seed) for seed in range(6)]
    caches = [computed(model, x) for x in ids]
    all_of_them = PrefixStore(tmp_path / "all")
    stored = all_of_them.save(ids[0], caches[0], model)
    size = sum(path.stat().st_size for path in files_of(all_of_them))
    store = PrefixStore(tmp_path / "some", limit=5 * size // 2)
    for x, cache in zip(ids, caches, strict=True):
        assert store.save(x, cache, model) == stored
    found = [store.load(x, model, LOSSY).get_seq_length() for x in ids]
    assert found[-2:] == [stored, stored]
    assert found[:3] == [0, 0, 0]
    assert sum(path.stat().st_size for path in files_of(store)) <= 5 * size // 2


def test_a_store_smaller_than_a_prompt_keeps_its_beginning(model: PreTrainedModel, tmp_path: Path) -> None:
    ids = prompt(SINKS + 3 * CHUNK_TOKENS + LOSSY.window)
    cache = computed(model, ids)
    whole = PrefixStore(tmp_path / "whole")
    assert whole.save(ids, cache, model) == SINKS + 3 * CHUNK_TOKENS
    sizes = sorted(path.stat().st_size for path in files_of(whole))
    for chunks in (1, 2):
        store = PrefixStore(tmp_path / str(chunks), limit=sum(sizes[-chunks:]) + sizes[0] // 2)
        for _ in range(3):
            stored = store.save(ids, cache, model)
            assert stored == SINKS + chunks * CHUNK_TOKENS
            assert store.load(ids, model, LOSSY).get_seq_length() == stored


def test_threads_that_load_and_save_the_same(model: PreTrainedModel, store: PrefixStore) -> None:
    model.set_attn_implementation("kvcomp")
    system = prompt(SHARED)
    prompts = [torch.cat([system, prompt(200, seed=seed)], dim=1) for seed in range(3)]
    loaded: list[tuple[torch.Tensor, KVCompCache]] = []
    lock = threading.Lock()

    def work(seed: int) -> int:
        draw, last = random.Random(seed), 0
        for _ in range(8):
            ids = prompts[draw.randrange(3)]
            cache = store.load(ids, model, LOSSY)
            last = cache.get_seq_length()
            with lock:  # the model's attention setting is of the process
                run(model, cache, ids[:, last:])
            store.save(ids, cache, model)
            if last:
                loaded.append((ids, cache))
        return last

    with ThreadPoolExecutor(3) as pool:
        assert all(last > 0 for last in pool.map(work, range(3)))
    for ids, cache in loaded:  # other codebooks, the same bound
        assert compare(cache.compressed_layers[0].store, *exact(model, ids)[0], rounding=1e-5).missed == 0


def test_of_two_that_store_a_beginning_at_once_the_first_decides(
    model: PreTrainedModel, store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = prompt(SHARED)
    ids = [torch.cat([system, prompt(200, seed=seed)], dim=1) for seed in range(2)]
    caches = [computed(model, x) for x in ids]
    check = recompute.check_recomputed

    def the_other_first(*args: Any) -> None:
        """The other one stores after this one saw that nothing is there."""
        monkeypatch.setattr(recompute, "check_recomputed", check)
        assert store.save(ids[1], caches[1], model) > 0
        check(*args)

    monkeypatch.setattr(recompute, "check_recomputed", the_other_first)
    assert store.save(ids[0], caches[0], model) == 0
    mine, theirs = (store.load(x, model, LOSSY) for x in ids)
    assert mine.get_seq_length() == theirs.get_seq_length() == SHARED
    same = caches[1].compressed_layers[0].store.rows.books[0]
    assert mine.compressed_layers[0].store.rows.books[0] == same


def test_a_beginning_that_is_of_no_use_is_replaced(
    model: PreTrainedModel, folder: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another process put it there after this one looked."""
    ids, put_new = prompt(700), folder.blobs.put_new

    def too_late(key: str, value: Any) -> bool:
        folder.blobs.put([(key, [b"x"])])
        return put_new(key, value)

    monkeypatch.setattr(folder.blobs, "put_new", too_late)
    assert folder.save(ids, computed(model, ids), model) == SHARED
    assert folder.load(ids, model, LOSSY).get_seq_length() == SHARED


# A store that is not there


def test_a_dead_store_says_so(model: PreTrainedModel) -> None:
    ids = prompt(400)
    cache = computed(model, ids)
    with PrefixStore(f"redis://127.0.0.1:{free_port()}", timeout=1) as store:
        for call in (lambda: store.load(ids, model, LOSSY), lambda: store.save(ids, cache, model)):
            with pytest.raises(StoreUnavailable, match="cannot be used"):
                call()
        assert store.load(prompt(50), model, LOSSY).get_seq_length() == 0, "too short to be asked for"


def test_a_slow_store_says_so(model: PreTrainedModel) -> None:
    done = threading.Event()

    def answer(connection: Any) -> None:
        connection.recv(1 << 20)
        done.wait(10)

    with answering(answer) as url, PrefixStore(url, timeout=0.3) as store:
        with pytest.raises(StoreUnavailable, match=r"longer than 0\.3 s"):
            store.load(prompt(400), model, LOSSY)
        done.set()


def test_a_chunk_is_a_file_that_can_be_inspected(model: PreTrainedModel, folder: PrefixStore) -> None:
    from typer.testing import CliRunner

    from kvcomp.cli import app

    ids = prompt(700)
    assert folder.save(ids, computed(model, ids), model) == SHARED
    for path in files_of(folder):
        for command in ("verify", "inspect"):
            assert CliRunner().invoke(app, [command, str(path)]).exit_code == 0
