"""What is loaded for layers that are not compressed has the shapes and types of the model's own, and lies where they
do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from families import config_of
from generating import forward, prompt
from kvcomp import PrefixStore, files
from kvcomp.errors import InvalidInput
from kvcomp.integrations.transformers import KVCompCache
from sealing import Sections, seal, unseal
from tiny_models import LOSSY, random_model

IDS = prompt(640, seed=1)["input_ids"]
HELD = 600

Edit = Callable[[dict[str, Any], Sections], object]


def model_of(family: str) -> PreTrainedModel:
    model = random_model(config_of(family)).to(torch.bfloat16)
    model.set_attn_implementation("kvcomp")
    return model


def filled(model: PreTrainedModel) -> KVCompCache:
    cache = KVCompCache(model.config, LOSSY)
    forward(model, cache, input_ids=IDS[:, :HELD])
    return cache


def narrower(header: dict[str, Any], sections: Sections) -> None:
    """A channel of the first state is missing, with its bytes."""
    state, parts = header["states"][0], sections[len(header["layers"])]
    parts["state"] = parts["state"][: -len(parts["state"]) // state["shape"][1]]
    state["shape"][1] -= 1


def edit_of_state(**fields: Any) -> Edit:
    return lambda header, _: header["states"][0].update(fields)


def wide_heads(header: dict[str, Any], _: Sections) -> None:
    """The layer with the sliding window has one head of as many bytes as two had."""
    header["layers"][0].update(heads=1, channels=32)


FORGED: dict[str, tuple[str, Edit]] = {
    "a channel less": ("LFM2", narrower),
    "other sides": ("LFM2", edit_of_state(shape=[1, 3, 64])),
    "another type": ("LFM2", edit_of_state(dtype="float16")),
    "fewer dimensions": ("Granite 4 hybrid", edit_of_state(shape=[1, 640])),
    "a state less": ("Granite 4 hybrid", lambda header, sections: (header["states"].pop(), sections.pop())),
    "another state": ("LFM2", edit_of_state(name="recurrent_states.0")),
    "wide heads": ("Gemma 3", wide_heads),
    "another type of a window": ("Gemma 3", lambda header, _: header["layers"][0].update(dtype="float16")),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_the_model_does_not_hold_is_refused_before_it_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, edit = FORGED[name]
    model = model_of(family)
    cache = filled(model)
    cache.save(tmp_path / "a.kvc", model)
    store = PrefixStore(tmp_path / "store")
    assert store.save(IDS, cache, model) == HELD
    states = [path for path in (tmp_path / "store").glob("*/*.kvc") if unseal(path.read_bytes())[0]["tokens"] == HELD]
    for path in (tmp_path / "a.kvc", *states):
        header, sections = unseal(path.read_bytes())
        edit(header, sections)
        path.write_bytes(seal(header, sections))
    read = files.load
    monkeypatch.setattr(files, "load", lambda container, *more, **named: read(only_chunks(container), *more, **named))
    assert store.load(IDS, model, LOSSY).get_seq_length() == 0
    assert [path.exists() for path in states] == [False]
    with pytest.raises(InvalidInput, match=r"other shapes or types|and the model needs"):
        KVCompCache.load(tmp_path / "a.kvc", model.config, model)


def only_chunks(container: Any) -> Any:
    assert container.header.tokens != HELD, "a forged value is read"
    return container


@pytest.mark.parametrize("family", ["LFM2", "Qwen3.5", "Gemma 3", "Gemma 4"])
def test_states_go_where_the_model_has_its_own(tmp_path: Path, family: str) -> None:
    """A model without memory stands for one on another device."""
    model = model_of(family)
    cache = filled(model)
    cache.save(tmp_path / "a.kvc", "a name")
    store = PrefixStore(tmp_path / "store")
    store.save(IDS, cache, model, model_id="a name")
    model.to("meta")
    loaded = store.load(IDS, model, LOSSY, model_id="a name")
    assert loaded.get_seq_length() == HELD
    for here, there in zip(cache.layers, loaded.layers, strict=True):
        for name in ("conv_states", "recurrent_states"):
            for index, x in getattr(here, name, {}).items():
                y = getattr(there, name)[index]
                assert y is x is None or (y.device.type, y.shape, y.dtype) == ("meta", x.shape, x.dtype)
        if getattr(here, "is_sliding", False):
            assert there.keys.device.type == there.values.device.type == there.device.type == "meta"
            assert there.keys.shape == here.keys.shape


def test_on_a_gpu_the_model_must_say_where_its_states_are(tmp_path: Path) -> None:
    for family, needed in (("LFM2", True), ("Gemma 3", True), ("Llama", False)):
        model = model_of(family)
        filled(model).save(tmp_path / "a.kvc", "a name")
        if needed:
            with pytest.raises(InvalidInput, match="with the model itself as model_id"):
                KVCompCache.load(tmp_path / "a.kvc", model.config, "a name", backend="gpu")
        else:
            assert KVCompCache.load(tmp_path / "a.kvc", model.config, "a name", backend="gpu").get_seq_length() == HELD


@pytest.mark.parametrize("family", ["LFM2", "Gemma 3"])
def test_files_of_several_rows_and_of_a_name(tmp_path: Path, family: str) -> None:
    """What is compared is a row's; a name for the model compares the layers alone."""
    model = model_of(family)
    for name, of in (("named", "a name"), ("whole", model)):
        cache = filled(model)
        cache.reorder_cache(torch.tensor([0, 0]))
        cache.save(tmp_path / f"{name}.kvc", of)
        again = KVCompCache.load([tmp_path / f"{name}.kvc"] * 2, model.config, of)
        cache.reorder_cache(torch.tensor([0, 1, 0, 1]))
        ids = IDS[:, HELD : HELD + 1].expand(4, 1)
        assert torch.equal(forward(model, again, input_ids=ids), forward(model, cache, input_ids=ids))
