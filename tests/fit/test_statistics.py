"""What a calibration measures of a model's attention: how keys turn, and which tokens count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from kvcomp.calibration.rotary import Rotation
from kvcomp.errors import UnsupportedModel
from kvcomp.fit.rotation import SAMPLE, rotations
from kvcomp.fit.statistics import Statistics, observe
from tiny_models import tiny_model

IDS = torch.zeros(1, SAMPLE, dtype=torch.int64)
CHANNELS = 16


class Turning:
    """A model whose keys turn with their places; the last half of their channels may move besides."""

    def __init__(self, rotation: Rotation, moved: float = 0.0) -> None:
        self.rotation, self.moved = rotation, moved
        self.device, self.config = torch.device("cpu"), LlamaConfig(num_hidden_layers=1)
        self.keys = torch.randn(1, 2, SAMPLE, CHANNELS, dtype=torch.float64)

    def set_attn_implementation(self, name: str) -> None: ...

    def __call__(self, ids: Any, past_key_values: DynamicCache, position_ids: Any, logits_to_keep: int) -> None:
        k = self.rotation.turned(self.keys, position_ids[0]).clone()
        if position_ids[0, 0] > 0:
            k[..., CHANNELS // 2 :] += self.moved
        past_key_values.update(k, k, 0)


def test_channels_that_move_and_do_not_turn_are_no_rotation() -> None:
    turn = Rotation.of(np.array([[0, 4], [1, 5], [2, 6], [3, 7]]), np.full(4, 0.5), CHANNELS)
    assert rotations(Turning(turn), IDS, [0], 8192)[0].speed == pytest.approx(turn.speed)
    assert rotations(Turning(turn, moved=1.0), IDS, [0], 8192) == {}


@pytest.mark.parametrize(("context", "turning"), [(8192, 4), (100_000, 8)])
def test_pairs_that_hardly_turn_within_the_context_stay(context: int, turning: int) -> None:
    pairs = np.arange(CHANNELS).reshape(2, -1).T
    turn = Rotation.of(pairs, np.repeat([0.5, 1e-6], 4), CHANNELS)
    assert len(rotations(Turning(turn), IDS, [0], context)[0].speed) == turning


def test_sinks_do_not_count() -> None:
    statistics = Statistics()
    observe(tiny_model(), torch.randint(1, 97, (1, 40)), 4, statistics, {})
    assert [sums.tokens for sums in statistics.layers.values()] == [36, 36]


def test_a_model_with_an_attention_of_its_own_cannot_be_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    with pytest.raises(UnsupportedModel, match="does not go through"):
        observe(model, torch.randint(1, 97, (1, 40)), 4, Statistics(), {})
