"""Sliding windows beside calibrated layers: coded by the plain spec that belongs to the level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from calibrating import calibrated
from containers import open_bytes
from families import FAMILIES
from generating import assert_same, forward, generate, prompt
from kvcomp import Calibration, PrefixStore, files, load
from kvcomp.calibration.budget import Plan
from kvcomp.calibration.windows import SCALES, window_spec
from kvcomp.errors import CorruptData, InvalidInput, LimitExceeded
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers.layer import CompressedLayer
from kvcomp.integrations.transformers.models import fingerprint_of
from kvcomp.integrations.transformers.sliding import SlidingLayer
from kvcomp.spec import CALIBRATED_CODINGS, LEVELS, CodecSpec, TensorSpec, WindowSpec
from sealing import Sections, seal, unseal
from tiny_models import TINY, exact, random_model

WINDOW = 512


def gemma(*kinds: str) -> tuple[PreTrainedModel, Calibration]:
    """A model whose layers are ``sliding`` or ``full``, and a calibration of the full ones, fitted to the last."""
    kind, settings = FAMILIES["Gemma 3"]
    types = [f"{name}_attention" for name in kinds]
    about = {**TINY, **settings, "num_hidden_layers": len(kinds), "layer_types": types, "sliding_window": WINDOW}
    model = random_model(AutoConfig.for_model(kind, **{**about, "max_position_embeddings": 4096}))
    full = [index for index, name in enumerate(kinds) if name == "full"]
    sample = exact(model, prompt(1024, seed=9)["input_ids"])[full[-1]]
    made = calibrated(len(kinds), 2, 16, model=fingerprint_of(model.config), sample=sample, only=full)
    return model, made


@pytest.fixture(scope="module")
def both() -> tuple[PreTrainedModel, Calibration]:
    return gemma("sliding", "full")


def windows(cache: KVCompCache) -> list[SlidingLayer]:
    return [layer for layer in cache.layers if isinstance(layer, SlidingLayer)]


def test_a_level_has_windows_for_the_layers_that_the_calibration_lacks() -> None:
    made, whole = calibrated(4, only=[1, 3]), calibrated(2)
    linear = calibrated(4, only=[3], model={"sliding_window": None})  # whose other layers have no K and V
    for coding in CALIBRATED_CODINGS.values():
        for level in LEVELS:
            scales = SCALES[level]
            key, value = TensorSpec("channel", scales.key, coding), TensorSpec("token", scales.value, coding)
            spec = made.spec(level, coding)
            assert spec.windows == WindowSpec((0, 2), key, value)
            assert spec.layer(2, 4) == CodecSpec(key, value)
            assert made.levels_of(spec) == {1: level, 3: level}
            assert made.layer(2, spec) is None
            assert whole.spec(level, coding).windows is None
            assert linear.spec(level, coding).windows is None
    assert window_spec([1], "of one's own", "huffman") == window_spec([1], LEVELS[0], "huffman")
    mixed = made.mixed({1: LEVELS[2], 3: LEVELS[1]})
    assert mixed.windows == made.spec(LEVELS[0]).windows
    assert [scales.key for scales in SCALES.values()] == sorted(scales.key for scales in SCALES.values())
    with pytest.raises(InvalidInput, match="no level 'none'"):
        made.mixed({1: LEVELS[0], 3: LEVELS[0]}, windows="none")


def test_any_coding_of_windows_is_of_the_calibration_but_not_of_its_own_layers() -> None:
    made = calibrated(4, only=[1, 3])
    spec = made.spec()
    assert spec.windows is not None
    for other in (None, replace(spec.windows, layers=(2,), key=TensorSpec("block", 0.3))):
        assert made.levels_of(replace(spec, windows=other)) == made.levels_of(spec)
    with pytest.raises(InvalidInput, match=r"windows are in \(0, 1\)"):
        made.levels_of(replace(spec, windows=replace(spec.windows, layers=(0, 1))))


def test_windows_are_compressed_where_they_are_without_a_calibration(both: tuple[PreTrainedModel, Calibration]) -> None:
    model, made = both

    def kinds(spec: Any = "kvcomp-klt", **options: Any) -> list[type]:
        return [type(layer) for layer in KVCompCache(model.config, spec, calibration=made, **options).layers]

    assert kinds() == kinds("packed-klt:aggressive") == kinds(backend="reference") == [SlidingLayer, CompressedLayer]
    raw = [DynamicSlidingWindowLayer, CompressedLayer]
    assert kinds(backend="gpu") == kinds(replace(made.spec(), windows=None)) == raw
    assert kinds(replace(made.spec(), window=400)) == raw


@pytest.mark.parametrize("name", ["kvcomp-klt:aggressive", "packed-klt"])
def test_generation_is_that_of_the_reference(both: tuple[PreTrainedModel, Calibration], name: str) -> None:
    model, made = both
    inputs, results = prompt(640), []
    for backend in ("cpu", "reference"):
        cache = KVCompCache(model.config, name, calibration=made, backend=backend)
        results.append(generate(model, inputs, cache, max_new_tokens=3))
        (layer,) = windows(cache)
        assert layer.store.compressed
        assert layer.store.spec == cache.spec.layer(0, 2)
        assert layer.store.spec.calibration is None
        assert cache.compressed_layers[-1].store.spec.calibration == made.fingerprint
    assert_same(*results)


@pytest.mark.parametrize("name", ["kvcomp-klt:near-lossless", "packed-klt"])
def test_windows_hold_what_their_plain_spec_alone_gives(both: tuple[PreTrainedModel, Calibration], name: str) -> None:
    model, made = both
    cache = KVCompCache(model.config, name, calibration=made)
    plain = KVCompCache(model.config, cache.spec.layer(0, 2))
    for part in prompt(800)["input_ids"].split([640, 1, 159], 1):
        forward(model, cache, input_ids=part)
        forward(model, plain, input_ids=part)
    (mine,), (theirs,) = windows(cache), windows(plain)
    assert mine.store.rows.dropped[0] > 0
    for x, y in zip(mine.dense(WINDOW - 1), theirs.dense(WINDOW - 1), strict=True):
        assert torch.equal(x, y)


def test_coded_windows_take_fewer_bytes(both: tuple[PreTrainedModel, Calibration]) -> None:
    model, made = both
    sizes = []
    for spec in (made.spec("aggressive"), made.spec("near-lossless"), replace(made.spec(), windows=None)):
        cache = KVCompCache(model.config, spec, calibration=made)
        forward(model, cache, **prompt(900))
        forward(model, cache, input_ids=torch.full((1, 1), 5))
        sizes.append(cache.memory().total - cache.layers[1].store.memory().total)
    assert sizes[0] < 0.9 * sizes[1] < 0.5 * sizes[2]


# Files


def filled(both: tuple[PreTrainedModel, Calibration], spec: Any = "kvcomp-klt", tokens: int = 700) -> KVCompCache:
    model, made = both
    cache = KVCompCache(model.config, spec, calibration=made)
    forward(model, cache, **prompt(tokens))
    return cache


@pytest.mark.parametrize("name", CALIBRATED_CODINGS)
def test_a_cache_goes_on_from_a_file(both: tuple[PreTrainedModel, Calibration], name: str, tmp_path: Path) -> None:
    model, made = both
    cache = filled(both, name)
    cache.save(tmp_path / "a.kvc", model)
    again = KVCompCache.load(tmp_path / "a.kvc", model.config, model, calibration=made)
    assert [type(layer) for layer in again.layers] == [SlidingLayer, CompressedLayer]
    for part in prompt(150, seed=2)["input_ids"].split([1, 100, 49], 1):
        assert torch.equal(forward(model, again, input_ids=part), forward(model, cache, input_ids=part))
    assert windows(again)[0].store.rows.dropped.tolist() == windows(cache)[0].store.rows.dropped.tolist() != [0]
    container = files.open_container(tmp_path / "a.kvc")
    assert [len(parts.offsets) > 0 for parts in container.layers()] == [True, True]  # no calibration is at hand
    with pytest.raises(InvalidInput, match="calibration"):
        KVCompCache.load(tmp_path / "a.kvc", model.config, model)


def test_a_window_on_a_gpu_is_decompressed_and_alone_it_is_read(
    both: tuple[PreTrainedModel, Calibration], tmp_path: Path
) -> None:
    model, made = both
    cache = filled(both)
    cache.save(tmp_path / "a.kvc", model)
    want = windows(cache)[0].dense(WINDOW - 1)
    gpu = KVCompCache.load(tmp_path / "a.kvc", model.config, model, calibration=made, backend="gpu")
    assert type(gpu.layers[0]) is DynamicSlidingWindowLayer
    alone = load(tmp_path / "a.kvc", layer=0, calibration=made).decompress()
    for mine, k_or_v, theirs in zip((gpu.layers[0].keys, gpu.layers[0].values), alone, want, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(k_or_v[:, :, 1 - WINDOW :], theirs)


def test_raw_windows_of_older_files_stay_raw(both: tuple[PreTrainedModel, Calibration], tmp_path: Path) -> None:
    model, made = both
    old = filled(both, replace(made.spec(), windows=None))
    old.save(tmp_path / "a.kvc", model)
    header, _ = unseal((tmp_path / "a.kvc").read_bytes())
    assert header["spec"]["kvcomp_spec"] == 1
    again = KVCompCache.load(tmp_path / "a.kvc", model.config, model, calibration=made)
    assert not windows(again)
    for part in prompt(60, seed=3)["input_ids"].split([1, 59], 1):
        assert torch.equal(forward(model, again, input_ids=part), forward(model, old, input_ids=part))


def test_rows_join(both: tuple[PreTrainedModel, Calibration]) -> None:
    model, _ = both
    alone = [filled(both, tokens=tokens) for tokens in (700, 600)]
    joined = filled(both)
    joined.join(alone[1])
    mask, token = joined.attention_mask(1), torch.full((2, 1), 5)
    found = forward(model, joined, input_ids=token, attention_mask=mask, position_ids=mask.cumsum(1)[:, -1:] - 1)
    for row, cache in enumerate(alone):
        want = forward(model, cache, input_ids=token[:1])
        torch.testing.assert_close(found[row : row + 1], want, atol=1e-3, rtol=0)


def without_a_book(header: dict[str, Any], sections: Sections) -> None:
    """Rows of the window name no book of their own, as those of calibrated layers need none."""
    rows = np.frombuffer(sections[0]["rows"], "<i8").copy().reshape(1, -1)
    assert rows[0, 3] >= 0
    rows[0, 3:5] = -1
    sections[0]["rows"] = rows.tobytes()


def of_the_calibration(header: dict[str, Any], sections: Sections) -> None:
    """The window is coded as the calibrated layers."""
    header["spec"]["windows"]["layers"] = [1]


def of_version_1(header: dict[str, Any], sections: Sections) -> None:
    header["spec"]["kvcomp_spec"] = 1


def of_no_layer(header: dict[str, Any], sections: Sections) -> None:
    header["spec"]["windows"]["layers"] = [2]


def of_too_many(header: dict[str, Any], sections: Sections) -> None:
    header["spec"]["windows"]["layers"] = list(range(100_000))


def of_steps(header: dict[str, Any], sections: Sections) -> None:
    header["spec"]["windows"]["key"] = header["spec"]["key"]


def of_nothing(header: dict[str, Any], sections: Sections) -> None:
    header["spec"]["windows"] = None


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (without_a_book, "needs the sequence's own codebook"),
        (of_the_calibration, "another number of classes"),
        (of_version_1, "spec in the header is wrong"),
        (of_no_layer, "spec in the header is wrong"),
        (of_too_many, "spec in the header is wrong"),
        (of_steps, "spec in the header is wrong"),
        (of_nothing, "spec in the header is wrong"),
    ],
)
def test_hostile_files_are_refused(
    both: tuple[PreTrainedModel, Calibration],
    tmp_path: Path,
    edit: Callable[[dict[str, Any], Sections], None],
    match: str,
) -> None:
    filled(both).save(tmp_path / "a.kvc")
    header, sections = unseal((tmp_path / "a.kvc").read_bytes())
    assert list(open_bytes(seal(header, sections)).layers())
    edit(header, sections)
    with pytest.raises(CorruptData, match=match):
        list(open_bytes(seal(header, sections)).layers())


# Prefix stores


@pytest.mark.parametrize("name", CALIBRATED_CODINGS)
def test_a_prefix_store_goes_on_from_a_state_with_coded_windows(name: str, tmp_path: Path) -> None:
    """Those before the first layer of all tokens are raw there, those behind it are coded."""
    model, made = gemma("sliding", "full", "sliding")
    model.set_attn_implementation("kvcomp")
    ids = prompt(900)["input_ids"]
    longer = torch.cat([ids, prompt(40, seed=2)["input_ids"]], 1)
    with PrefixStore(tmp_path / "prefixes") as store:
        cache = store.load(ids, model, name, calibration=made)
        store.prefill(ids, cache, model)
        forward(model, cache, input_ids=ids[:, cache.get_seq_length() :])
        assert store.save(ids, cache, model) == 900
        again = store.load(longer, model, name, calibration=made)
        raw = replace(cache.spec, windows=None)
        assert store.load(longer, model, raw, calibration=made).get_seq_length() == 0
    assert again.get_seq_length() == 900
    assert [type(layer) for layer in again.layers] == [DynamicSlidingWindowLayer, CompressedLayer, SlidingLayer]
    assert windows(again)[0].store.rows.dropped.tolist() == windows(cache)[0].store.rows.dropped.tolist() != [0]
    for part in longer[:, 900:].split([1, 39], 1):
        assert torch.equal(forward(model, again, input_ids=part), forward(model, cache, input_ids=part))


# Budgets


def priced(both: tuple[PreTrainedModel, Calibration]) -> Calibration:
    made = both[1]
    bits = dict(zip(LEVELS, ((5.0, 0.001), (4.0, 0.01), (3.0, 0.1)), strict=True))
    levels = {level: {"layers": {"1": dict(zip(("bits", "kl"), bits[level], strict=True))}} for level in LEVELS}
    return replace(made, about=replace(made.about, levels=levels))


def test_a_budget_counts_coded_windows(both: tuple[PreTrainedModel, Calibration]) -> None:
    """At the bytes that they take, coded on a CPU and raw on a GPU."""
    model, made = both[0], priced(both)

    def size(tokens: int, backend: str = "cpu") -> int:
        cache = KVCompCache(
            model.config, "kvcomp-klt", calibration=made, budget="1GiB", context=tokens, backend=backend
        )
        assert cache.plan is not None
        assert cache.spec == made.spec(LEVELS[0])
        return cache.plan.nbytes

    token = 2 * 2 * 16  # values of K and V in a layer
    for tokens, pages, raw, window in ((100, 0, 4 + 100, 100), (400, 320, 4 + 128, 400), (4000, 448, 4 + 128, 512)):
        coded = token * (pages * SCALES[LEVELS[0]].bits / 8 + raw * 4)
        assert size(tokens) - size(tokens, "gpu") == pytest.approx(coded - token * window * 4, abs=2)
    cache = filled(both, made.spec(LEVELS[0]), 3000)
    held = cache.memory().total - cache.layers[1].store.memory().total
    rest = token * (448 * SCALES[LEVELS[0]].bits / 8 + 132 * 4)
    assert 0.7 * rest < held < 1.3 * rest


def test_windows_are_not_finer_than_what_a_budget_leaves_to_the_other_layers(
    both: tuple[PreTrainedModel, Calibration],
) -> None:
    model, made = both[0], priced(both)

    def plan(budget: int) -> Plan:
        found = KVCompCache(model.config, "kvcomp-klt", calibration=made, budget=budget, context=4000).plan
        assert found is not None
        return found

    most = plan(1 << 30).nbytes
    seen = []
    for budget in range(most, most - 69_000, -1000):
        found = plan(budget)
        assert found.nbytes <= budget
        windows = next(level for level in LEVELS if made.spec(level).windows == found.spec.windows)
        seen.append((LEVELS.index(windows), LEVELS.index(found.levels[1])))
    assert list(dict.fromkeys(seen)) == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]
    with pytest.raises(LimitExceeded, match="at the coarsest levels"):
        plan(most - 100_000)


def test_windows_are_as_fine_as_half_of_the_other_layers() -> None:
    model, made = gemma("sliding", "full", "full")
    levels = {
        level: {"layers": {"1": {"bits": bits, "kl": kl}, "2": {"bits": bits, "kl": 10 * kl}}}
        for level, bits, kl in zip(LEVELS, (4.0, 2.0, 1.0), (0.001, 0.01, 0.1), strict=True)
    }
    made = replace(made, about=replace(made.about, levels=levels))
    budget, found = 1 << 30, []
    for _ in range(7):
        plan = KVCompCache(model.config, "kvcomp-klt", calibration=made, budget=budget, context=4000).plan
        assert plan is not None
        windows = next(level for level in LEVELS if made.spec(level).windows == plan.spec.windows)
        found.append(tuple(LEVELS.index(level) for level in (windows, *plan.levels.values())))
        budget = plan.nbytes - 1
    assert found == [(0, 0, 0), (0, 1, 0), (1, 1, 0), (1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2)]
