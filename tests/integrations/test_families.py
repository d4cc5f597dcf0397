"""The page of families and what each can do is that of the code; whole, it takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import cache_utils

from families import FAMILIES, config_of, with_images
from family_modes import MEMORY, MODES, PAGE, attends_as_densely, generates, layers_of, page, results
from generating import forward, prompt
from kvcomp import PrefixStore
from kvcomp.errors import UnsupportedModel
from kvcomp.integrations.transformers import KVCompCache
from tiny_models import random_model

IMAGES = ("LLaVA, with images", "Qwen2.5-VL, with images", "Gemma 3, with images")
SOME = ("Gemma 4", "gpt-oss", "Qwen3-Next", "DeepSeek-V3", *IMAGES)


def rows_of_the_page() -> dict[str, list[str]]:
    cells = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.skipif(not hasattr(cache_utils, "DummyLayer"), reason="the page is of the newest transformers")
def test_the_page_has_every_family_with_its_layers() -> None:
    rows = rows_of_the_page()
    assert rows["family"] == ["cache of the tiny model", *MODES, MEMORY]
    assert [name for name in rows if name in FAMILIES] == list(FAMILIES)
    for family in FAMILIES:
        assert rows[family][0] == layers_of(family), "python tests/support/family_modes.py writes the page again"


@pytest.mark.parametrize("family", SOME)
def test_a_family_generates_as_with_a_dynamic_cache(family: str, tmp_path: Path) -> None:
    assert rows_of_the_page()[family][1] == "yes"
    generates(random_model(config_of(family)), tmp_path, max_new_tokens=3)


@pytest.mark.parametrize("family", IMAGES)
def test_images_are_seen_and_no_store_takes_them(family: str, tmp_path: Path) -> None:
    model = random_model(config_of(family))
    logits = [
        forward(model, KVCompCache(model.config), **with_images(model.config, prompt(110), seed))[:, -1]
        for seed in range(2)
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-2
    store, ids = PrefixStore(tmp_path), prompt(400)["input_ids"]
    for ask in (
        lambda: store.load(ids, model),
        lambda: store.prefill(ids, KVCompCache(model.config), model),
        lambda: store.save(ids, KVCompCache(model.config), model),
    ):
        with pytest.raises(UnsupportedModel, match="takes more than text, such as images"):
            ask()


def test_sinks_and_large_heads_are_attended_as_densely(tmp_path: Path) -> None:
    for family in ("Gemma 4", "gpt-oss"):
        attends_as_densely(random_model(config_of(family)), tmp_path)


@pytest.mark.slow
def test_the_page_is_what_every_family_does() -> None:
    assert PAGE.read_text(encoding="utf-8") == page({family: results(family) for family in FAMILIES})
