"""The harness that the quality figures come from, on the shipped model."""

from typing import Any

import numpy as np
import pytest
import torch

from kvcomp.evaluate.fidelity import (
    Coded,
    Sample,
    bits_at,
    kivi_codec,
    kvcomp_codec,
    lookup_sample,
    lookups_right,
    sample,
    score,
)
from kvcomp.evaluate.models import held_out_ids, load_model, shipped_model
from kvcomp.evaluate.text import LookupLists
from kvcomp.spec import PRESETS
from kvcomp.store import Memory


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[Any, Any]:
    return load_model(shipped_model())


@pytest.fixture(scope="module")
def text(model_and_tokenizer: tuple[Any, Any]) -> Sample:
    model, tokenizer = model_and_tokenizer
    return sample(model, torch.tensor([held_out_ids(tokenizer, shipped_model())[:640]]), 512)


def exact(layer: int, k: torch.Tensor, v: torch.Tensor) -> Coded:
    return Coded(k, v, Memory())


def test_an_exact_codec_has_no_kl(model_and_tokenizer: tuple[Any, Any], text: Sample) -> None:
    result = score(model_and_tokenizer[0], [text], exact)
    assert result.kl == (0.0,)
    assert result.top1 == (1.0,)


def test_fewer_bits_cost_more_kl_and_sizes_are_counted_in_full(
    model_and_tokenizer: tuple[Any, Any], text: Sample
) -> None:
    model = model_and_tokenizer[0]
    four, two = (score(model, [text], kivi_codec(bits, bits)) for bits in (4, 2))
    assert 0 < four.kl[0] < two.kl[0]
    assert four.memory.coded_bits == 5.0  # 4 bits and a float16 scale and zero for 32 values
    assert two.memory.coded_bits == 3.0
    ours = score(model, [text], kvcomp_codec(PRESETS["kvcomp"], model.config.num_hidden_layers))
    assert ours.kl[0] > 0
    assert ours.memory.sealed_values == four.memory.sealed_values
    assert ours.memory.values == four.memory.values


def test_look_ups_are_right_uncompressed_and_wrong_without_the_records(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    drawn = LookupLists(tokenizer).draw(np.random.default_rng(0), 1024)
    records = lookup_sample(model, drawn)
    assert np.mean(lookups_right(model, drawn, records, None)) > 0.95

    def erased(layer: int, k: torch.Tensor, v: torch.Tensor) -> Coded:
        return Coded(k, torch.zeros_like(v), Memory())

    assert np.mean(lookups_right(model, drawn, records, erased)) < 0.2


def test_bits_are_interpolated_in_log_kl_and_not_beyond_what_was_measured() -> None:
    assert bits_at(1e-3, [4.0, 2.0], [1e-4, 1e-2]) == pytest.approx(3.0)
    assert bits_at(1e-5, [4.0, 2.0], [1e-4, 1e-2]) == float("inf")
