"""The Fisher information predicts the KL of small errors in K and V."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import Cache

from kvcomp.evaluate.gradients import draw, label_gradients
from tiny_models import HYBRIDS, TINY, random_model

PROMPT, CODED, ERRORS = 60, slice(4, 50), 60


def fisher(model: Any, layers: list[Any], text: torch.Tensor, wanted: list[int], labels: int) -> dict[Any, Any]:
    """E[g g^T] summed over the coded tokens, for a mean over the text, (KV heads, D, D)."""
    found: dict[Any, Any] = {}
    for gradients in label_gradients(model, layers, text, wanted, labels, seed=0):
        for key, gradient in gradients.items():
            g = gradient[0, :, CODED].double()
            found[key] = found.get(key, 0) + g.mT @ g / (labels * text.shape[1])
    return found


@pytest.mark.parametrize("config", [LlamaConfig(**TINY), HYBRIDS["gemma3"]], ids=lambda config: config.model_type)
@torch.no_grad()
def test_small_errors_cost_what_is_predicted(config: Any) -> None:
    model: Any = random_model(config)
    ids = torch.randint(1, 97, (1, PROMPT + 12), generator=torch.Generator().manual_seed(0))
    prompt: Any = DynamicCache(config=config)
    model(ids[:, :PROMPT], past_key_values=prompt)
    layers, text = list(prompt.layers), ids[:, PROMPT:]
    wanted = [1]
    before = layers[1].keys.clone()
    found = fisher(model, layers, text, wanted, labels=200)
    assert torch.equal(layers[1].keys, before)
    assert set(found) == {(1, 0), (1, 1)}

    def log_probs(changed: list[Any]) -> torch.Tensor:
        cache = Cache(layers=[deepcopy(layer) for layer in changed])
        logits: torch.Tensor = model(text, past_key_values=cache).logits[0].double()
        return logits.log_softmax(-1)

    exact, generator = log_probs(layers), torch.Generator().manual_seed(1)
    for (index, kind), matrix in found.items():
        name = "values" if kind else "keys"
        for head in range(matrix.shape[0]):
            size, kls = 1e-2 * float(getattr(layers[index], name).std()), []
            for _ in range(ERRORS):
                changed = [copy(layer) for layer in layers]
                x = getattr(layers[index], name).clone()
                x[0, head, CODED] += size * torch.randn(x[0, head, CODED].shape, generator=generator)
                setattr(changed[index], name, x)
                kls.append(float((exact.exp() * (exact - log_probs(changed))).sum(-1).mean()))
            predicted = float(matrix[head].trace()) * size**2 / 2
            assert predicted == pytest.approx(sum(kls) / ERRORS, rel=0.25)


def test_labels_are_drawn_anew_for_each_seed() -> None:
    model = random_model(LlamaConfig(**TINY))
    cache: Any = DynamicCache(config=model.config)
    ids = torch.randint(1, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
    several = [next(label_gradients(model, cache.layers, ids[:, 30:], [0], 1, seed))[0, 0] for seed in (0, 0, 1)]
    assert torch.equal(several[0], several[1])
    assert not torch.equal(several[0], several[2])


def test_indices_are_drawn_as_often_as_their_probabilities_say() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = draw(probabilities.repeat(20_000, 1), torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 1)
    shares = torch.bincount(drawn[:, 0], minlength=6) / 20_000
    assert torch.allclose(shares, probabilities, atol=0.02)
    assert not shares[probabilities == 0].any()


def test_the_least_random_number_draws_nothing_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(size))
    assert draw(torch.tensor([[0.0, 0.5, 0.5]]), torch.Generator()).tolist() == [[1]]
