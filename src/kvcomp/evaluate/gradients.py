"""How much the K and V of each head matter: the Fisher information of what a model predicts from them.

An error e in the K or V of tokens moves the prediction by a KL of 1/2 e^T F e, with F = E[g g^T] and g the gradient of
log p(label), for labels drawn from the prediction itself. One backward pass gives g of all layers and heads at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvcomp.evaluate.fidelity import attend_plainly

Gradients = dict[tuple[int, int], Tensor]
"""By layer and K (0) or V (1): (1, KV heads, tokens, D)."""


def label_gradients(
    model: Any,
    layers: Sequence[Any],
    text: Tensor,
    wanted: Collection[int],
    labels: int,
    seed: int,
    told: Mapping[str, Tensor] | None = None,
) -> Iterator[Gradients]:
    """Gradients of the log probability of drawn labels, by the K and V of a prompt.

    Parameters
    ----------
    model
        In float32, in evaluation mode.
    layers
        Cache layers that hold a prompt; they stay as they are.
    text
        int64 (1, tokens), what follows the prompt.
    wanted
        Numbers of the layers to look at.
    labels
        How often a label is drawn for every token of the text, each with a backward pass.
    seed
        Of the labels.
    told
        What the model is told besides: ``position_ids`` that are not those after the prompt.
    """
    attend_plainly(model)
    generator = torch.Generator().manual_seed(seed)
    leaves: Gradients = {}
    own: list[Any] = []
    for index, layer in enumerate(layers):
        own.append(copy(layer) if type(layer) is DynamicLayer else deepcopy(layer))
        if index in wanted:
            own[-1].keys, own[-1].values = (x.detach().clone().requires_grad_() for x in (layer.keys, layer.values))
            leaves[index, 0], leaves[index, 1] = own[-1].keys, own[-1].values
    with torch.enable_grad():
        log_probs = model(text, past_key_values=Cache(layers=own), **(told or {})).logits[0].float().log_softmax(-1)
        for label in range(labels):
            drawn = draw(log_probs.detach().exp(), generator)
            total = log_probs.gather(1, drawn).sum()
            gradients = torch.autograd.grad(total, list(leaves.values()), retain_graph=label + 1 < labels)
            yield dict(zip(leaves, gradients, strict=True))


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """An index of each row (rows, n) with these probabilities, int64 (rows, 1).

    By the distribution function: torch.multinomial takes a random number for each of n, a quarter of a million for some
    vocabularies. generator: of main memory, so that a model draws the same on any device.
    """
    below = probabilities.cumsum(-1)
    at = torch.rand(len(below), 1, generator=generator).to(below.device) * below[:, -1:]
    return torch.searchsorted(below, at, right=True).clamp_max(below.shape[-1] - 1)
