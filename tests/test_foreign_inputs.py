"""What is given to a public function and is not what it takes: InvalidInput or another typed error, with the fix."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig

import kvcomp
from kvcomp.errors import BackendUnavailable, InvalidInput, KVCompError
from kvcomp.integrations.transformers import KVCompCache
from tiny_models import TINY, random_model

CONFIG = LlamaConfig(**TINY)
K = torch.randn(1, 2, 200, 16, generator=torch.Generator().manual_seed(0))
Q = torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(1))
ANY: Any = None

NO_TENSORS: dict[str, tuple[Any, str]] = {
    "array": (K.numpy(), "torch.from_numpy"),
    "list": (K.tolist(), "must be a torch tensor, not list"),
    "nothing": (None, "must be a torch tensor, not NoneType"),
    "text": ("K", "must be a torch tensor, not str"),
    "sparse": (K.to_sparse(), "dense"),
    "without values": (K.to("meta"), "meta"),
    "complex": (K.to(torch.complex64), "float32, float16 or bfloat16"),
    "whole numbers": (K.to(torch.int64), "float32, float16 or bfloat16"),
    "yes or no": (K > 0, "float32, float16 or bfloat16"),
    "of eight bytes": (K.double(), "float32, float16 or bfloat16"),
}


@pytest.mark.parametrize("kind", [*NO_TENSORS, "of one head"])
def test_k_and_v_that_are_none(kind: str) -> None:
    x, message = {
        **NO_TENSORS,
        "of one head": (K[0], "batch, KV heads, tokens, head_dim"),
    }[kind]
    cache = KVCompCache(CONFIG)
    for call in (lambda: kvcomp.compress(x, x), lambda: cache.update(x, x, 0)):
        with pytest.raises(BackendUnavailable if kind == "without values" else InvalidInput, match=message):
            call()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("kind", NO_TENSORS)
def test_queries_that_are_none(kind: str) -> None:
    x, message = NO_TENSORS[kind]
    x = x[:, :, :1] if isinstance(x, np.ndarray | torch.Tensor) and kind != "sparse" else x
    with pytest.raises(InvalidInput, match=message):
        kvcomp.compress(K, K).attend(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": float("nan")}, "number up to"),
        ({"scaling": 10**400}, "number up to"),
        ({"softcap": 1e39}, "number up to"),
        ({"scaling": "a"}, "number up to"),
        ({"softcap": float("inf")}, "number up to"),
        ({"softcap": -1.0}, "above"),
    ],
)
def test_factors_of_attention_that_are_none(options: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        kvcomp.compress(K, K).attend(Q, **options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"spec": None}, InvalidInput),
        ({"spec": 3}, InvalidInput),
        ({"spec": "a\0.json"}, InvalidInput),
        ({"spec": "none.json"}, InvalidInput),
        ({"spec": "kvcomp-klt:balanced", "calibration": 3}, InvalidInput),
        ({"spec": "kvcomp-klt:balanced", "calibration": "none.kvcal"}, InvalidInput),
        ({"backend": None}, BackendUnavailable),
    ],
)
def test_specs_calibrations_and_backends_that_are_none(options: Any, error: type[KVCompError]) -> None:
    for call in (lambda: kvcomp.compress(K, K, **options), lambda: KVCompCache(CONFIG, **options)):
        with pytest.raises(error):
            call()


@pytest.mark.parametrize("layer", ["a", -1, None, 0.5])
def test_layers_that_are_none(layer: Any) -> None:
    for call in (lambda: kvcomp.compress(K, K, layer=layer), lambda: KVCompCache(CONFIG).update(K, K, layer)):
        with pytest.raises(InvalidInput, match="layer"):
            call()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where we are, with a file, a folder and a pipe."""
    monkeypatch.chdir(tmp_path)
    kvcomp.compress(K, K).save("a.kvc")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize("path", [None, b"a.kvc", "", "a\0b", 3, "folder", "pipe", "~nobody-of-this-name/a"])
def test_paths_that_are_no_files(folder: Path, path: Any) -> None:
    cache = KVCompCache(CONFIG)
    for layer in range(2):
        cache.update(K, K, layer)
    before = sorted(folder.rglob("*"))
    for call in (
        lambda: kvcomp.load(path),
        lambda: kvcomp.compress(K, K).save(path),
        lambda: cache.save(path),
        lambda: KVCompCache.load(path, CONFIG),
        lambda: KVCompCache.load([path], CONFIG),
    ):
        with pytest.raises(InvalidInput):
            call()
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "options",
    [{"layer": "0"}, {"layer": 5}, {"rows": ["a"]}, {"rows": 3}, {"tokens": "a"}, {"tokens": -1}, {"tokens": 64.5}],
)
def test_parts_of_a_file_that_are_not_there(folder: Path, options: Any) -> None:
    with pytest.raises(InvalidInput):
        kvcomp.load("a.kvc", **options)


CALLS: dict[str, Callable[[KVCompCache], Any]] = {
    "crop to nothing": lambda cache: cache.crop(ANY),
    "crop to text": lambda cache: cache.crop("a"),  # type: ignore[arg-type]
    "crop to a part": lambda cache: cache.crop(1.5),  # type: ignore[arg-type]
    "rows that are none": lambda cache: cache.reorder_cache(torch.tensor([0.5])),  # type: ignore[arg-type]
    "rows that are not there": lambda cache: cache.reorder_cache(torch.tensor([3])),  # type: ignore[arg-type]
    "no rows": lambda cache: cache.batch_select_indices(ANY),
    "no repeats": lambda cache: cache.batch_repeat_interleave(0),
    "fewer than no repeats": lambda cache: cache.batch_repeat_interleave(-1),
    "repeats in words": lambda cache: cache.batch_repeat_interleave("twice"),  # type: ignore[arg-type]
    "join nothing": lambda cache: cache.join(ANY),
    "join another cache": lambda cache: cache.join(DynamicCache()),  # type: ignore[arg-type]
    "a mask of words": lambda cache: cache.attention_mask("a"),  # type: ignore[arg-type]
    "save as a number": lambda cache: cache.save("b.kvc", model_id=3),  # type: ignore[arg-type]
    "save rows that are none": lambda cache: cache.save("b.kvc", rows=["a"]),  # type: ignore[list-item]
    "save rows that are not there": lambda cache: cache.save("b.kvc", rows=[5]),
    "save layers that are none": lambda cache: cache.save("b.kvc", layers=["a"]),  # type: ignore[list-item]
    "save layers in number": lambda cache: cache.save("b.kvc", layers=3),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_a_cache_that_mean_nothing(folder: Path, call: str) -> None:
    cache = KVCompCache(CONFIG)
    for layer in range(2):
        cache.update(K, K, layer)
    with pytest.raises(InvalidInput):
        CALLS[call](cache)
    assert cache.get_seq_length() == K.shape[2]
    assert not (folder / "b.kvc").exists()


@pytest.mark.parametrize("call", ["crop to nothing", "crop to text", "a mask of words", "join nothing"])
def test_calls_of_an_empty_cache_that_mean_nothing(call: str) -> None:
    with pytest.raises(InvalidInput):
        CALLS[call](KVCompCache(CONFIG))
    with pytest.raises(InvalidInput, match="holds 0 rows"):
        KVCompCache(CONFIG).attention_mask()


def test_rows_may_be_a_list() -> None:
    cache = KVCompCache(CONFIG)
    for layer in range(2):
        cache.update(torch.cat([K, 2 * K]), K.repeat(2, 1, 1, 1), layer)
    cache.reorder_cache([1, 0])  # type: ignore[arg-type]
    cache.batch_select_indices([1])  # type: ignore[arg-type]
    torch.testing.assert_close(cache.layers[0].keys + 0, K, atol=0.2, rtol=0)


IDS: dict[str, Any] = {
    "nothing": None,
    "text": "abc",
    "parts": [1.5],
    "too large": [2**70],
    "of two lengths": [[1, 2], [3]],
    "of two prompts": [[1, 2], [3, 4]],
    "below zero": [-5] * 300,
}


@pytest.mark.parametrize("ids", IDS)
def test_ids_that_are_none(tmp_path: Path, ids: str) -> None:
    store, model = kvcomp.PrefixStore(tmp_path / "store"), random_model(CONFIG)
    cache = KVCompCache(CONFIG)
    for layer in range(2):
        cache.update(K, K, layer)
    for call in (lambda: store.load(IDS[ids], model), lambda: store.save(IDS[ids], cache, model)):
        with pytest.raises(InvalidInput, match="ids"):
            call()


def test_models_and_caches_that_are_none(tmp_path: Path) -> None:
    store, model, cache = kvcomp.PrefixStore(tmp_path / "store"), random_model(CONFIG), KVCompCache(CONFIG)
    for other in (None, CONFIG, "model"):
        with pytest.raises(InvalidInput, match="model must be a transformers model"):
            store.load([1, 2], other)
        with pytest.raises(InvalidInput, match="model must be a transformers model"):
            store.save([1, 2], cache, other)
    for nothing in (None, DynamicCache()):
        with pytest.raises(InvalidInput, match="only a KVCompCache can be stored"):
            store.save([1, 2], nothing, model)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="holds 0 rows"):
        store.save([1, 2], cache, model)
    with pytest.raises(InvalidInput, match="model_id"):
        store.load([1, 2], model, model_id=3)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="configuration"):
        KVCompCache(ANY)


def test_calibrations_and_specs_that_are_none(folder: Path) -> None:
    for path in (None, b"", "", "folder", "none.kvcal"):
        with pytest.raises(InvalidInput):
            kvcomp.Calibration.read(path)  # type: ignore[arg-type]
    for text in (None, 3, "{", "[]"):
        with pytest.raises(InvalidInput):
            kvcomp.CodecSpec.from_json(text)  # type: ignore[arg-type]
