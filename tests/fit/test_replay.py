"""A pass that begins at one layer gives what a whole pass gives, or the whole pass is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import TINY, tiny_model
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig

from kvcomp.fit.reading import Reading
from kvcomp.fit.replay import Replay, decoder_layers
from kvcomp.fit.windows import Drawn, Settings, spread

LAYERS = 4
SETTINGS = Settings(4, 256, 32)


def read(model: Any) -> Reading:
    reading = Reading(model, SETTINGS, rotary=True)
    generator = torch.Generator().manual_seed(0)
    drawn = [Drawn(torch.randint(97, (1, SETTINGS.length), generator=generator), "text") for _ in range(2)]
    with torch.no_grad():
        reading.read(drawn, spread(2, SETTINGS, SETTINGS.length, model.device), None, lambda *_: None)
    return reading


@pytest.mark.parametrize("kind", [LlamaConfig, Gemma2Config])
@torch.no_grad()
def test_layers_before_the_coded_one_compute_nothing(kind: type[PreTrainedConfig]) -> None:
    model = tiny_model(kind, **{**TINY, "num_hidden_layers": LAYERS})
    reading, calls = read(model), [0] * LAYERS
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    for index in range(LAYERS):
        coded = reading.values(index, 0).round()
        found = reading.kls_together(index, 0, coded, SETTINGS.scored)
        calls[:] = [0] * LAYERS
        assert reading.kls_together(index, 0, coded, SETTINGS.scored) == found
        assert [count > 0 for count in calls] == [number >= index for number in range(LAYERS)]
        whole = [kl for _, kl in reading.kls({(index, 0): coded})]
        assert found == pytest.approx(whole, rel=1e-3)
        assert min(found) > 0


class Layer(torch.nn.Module):
    def __init__(self, number: int, seen: list[Tensor]) -> None:
        super().__init__()
        self.layer_idx, self.seen = number, seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x + self.seen[0].sum()


class Told(torch.nn.Module):
    """Each layer sees what the first one saw, past what layers hand on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.layers = torch.nn.ModuleList(Layer(number, self.seen) for number in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.clear()
        for layer in self.layers:
            x = layer(x)
        return x


class Counted(Told):
    """The last layer fails unless the others have been there."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        if len(self.seen) < LAYERS:
            raise KeyError("shared")
        return found


@pytest.mark.parametrize("kind", [Told, Counted])
def test_layers_that_do_more_than_hand_on_are_not_replayed(kind: type[Told]) -> None:
    model, x = kind(), torch.arange(3.0)
    expected = model(x)
    assert decoder_layers(model, LAYERS) == list(model.layers)
    replay = Replay(model, LAYERS, lambda: model(x))
    with replay.up_to(LAYERS - 1):
        assert torch.equal(model(x), expected)


def test_a_model_without_a_layer_for_each_of_its_cache_is_not_replayed() -> None:
    model = tiny_model()
    assert decoder_layers(model, model.config.num_hidden_layers + 1) == []
    replay = Replay(model, 3, lambda: pytest.fail("nothing to compare"))
    with replay.up_to(2):
        assert "forward" not in vars(model.model.layers[0])


def test_layers_whose_forward_another_library_replaced_keep_it() -> None:
    model = tiny_model()
    own = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *given, **named: own(*given, **named)
    assert decoder_layers(model, model.config.num_hidden_layers) == []


def test_a_pass_that_fails_leaves_the_model_as_it_was() -> None:
    model, x = Told(), torch.arange(3.0)
    for layer in model.layers:
        layer.seen = [x]  # the same whatever is replayed
    expected = model(x)
    replay = Replay(model, LAYERS, lambda: model(x))
    with pytest.raises(RuntimeError), replay.up_to(2):
        model(torch.arange(4.0).view(2, 2) @ x)
    assert not any("forward" in vars(layer) for layer in model.layers)
    assert torch.equal(model(x), expected)
