"""Attention and memory at the sizes of heads that the families have outside of tests."""

from __future__ import annotations

import pytest
import torch
from transformers import cache_utils

from families import FAMILIES
from family_heads import heads_of
from family_modes import layers_of, smaller
from generating import dense_attend
from kvcomp.store import KVStore
from kvcomp.store.attention import attend, attend_tiled
from tiny_models import LOSSY

pytestmark = pytest.mark.skipif(not hasattr(cache_utils, "DummyLayer"), reason="families of the newest transformers")
REFUSED = "Falcon-H1", "DeepSeek-V3.2"
NOT_FUSED = "Mistral", "DeepSeek-V3", "GLM-4.7-Flash"
"""No layer of Mistral grows, and attention of the others is given what the model makes of latents."""
FUSED = [family for family in FAMILIES if family not in (*REFUSED, *NOT_FUSED)]


def test_the_families_have_heads_of_many_kinds() -> None:
    assert [family for family in FAMILIES if layers_of(family).startswith("refused")] == list(REFUSED)
    fused = [heads for heads in map(heads_of, FUSED) if heads]
    assert len(fused) == len(FUSED)
    assert all(heads.queries for heads in fused)
    assert not any(heads and heads.queries for heads in map(heads_of, NOT_FUSED))
    assert {heads.channels for heads in fused} == {64, 80, 96, 128, 256, 512}
    assert {heads.queries // heads.heads for heads in fused} >= {1, 2, 4, 8}
    assert [family for family in FUSED if (heads := heads_of(family)) and heads.sinks] == ["gpt-oss"]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("family", FUSED)
def test_attention_is_that_of_float64(family: str) -> None:
    """Over what the cache gives back, of a row that is padded and one that is not, for one query and for many."""
    heads = heads_of(family)
    assert heads
    store = KVStore(LOSSY)
    store.append(*(x.float() for x in heads.tensors(350, batch=2)))
    store.set_starts([0, 70])
    store.seal()
    assert store.compressed
    sinks = torch.linspace(-2, 4, heads.queries) if heads.sinks else None
    for queries, attention in ((1, attend), (65, attend_tiled)):
        q = torch.randn(2, heads.queries, queries, heads.channels)
        q *= 2 / (heads.scaling * heads.channels**0.5)  # scores with a deviation of some 3
        found = attention(store, q, heads.scaling, heads.softcap, sink_logits=sinks)
        expected = dense_attend(store, q, heads.scaling, heads.softcap, sink_logits=sinks)
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("family", ["Qwen3-Next", "SmolLM3", "DeepSeek-V3"])
def test_a_growing_layer_is_less_than_a_quarter(family: str) -> None:
    assert smaller(family) >= 4


def test_nothing_grows_in_a_model_of_windows() -> None:
    assert smaller("Mistral") is None
