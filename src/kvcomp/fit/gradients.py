"""How much the K and V of each head matter: the Fisher information of what a model predicts from them.

An error e in the K or V of a token moves the prediction by a KL of 1/2 e^T F e, with F = E[g g^T] and g the gradient of
log p(label), for labels drawn from the prediction itself. One backward pass gives g of all layers and heads at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvcomp.evaluate.fidelity import attend_plainly


def fisher(
    model: Any,
    layers: Sequence[Any],
    text: Tensor,
    wanted: Collection[int],
    coded: slice,
    labels: int,
    seed: int,
) -> dict[tuple[int, int], Tensor]:
    """The Fisher information of cached tokens, for the mean KL of a text that follows them.

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
    coded
        The tokens of the prompt that count.
    labels
        Backward passes, each with a label drawn for every token of the text.
    seed
        Of the labels.

    Returns
    -------
    dict
        By layer and K (0) or V (1): float64 (KV heads, D, D), summed over the coded tokens.
    """
    attend_plainly(model)
    generator = torch.Generator(text.device).manual_seed(seed)
    leaves: dict[tuple[int, int], Tensor] = {}
    own: list[Any] = []
    for index, layer in enumerate(layers):
        own.append(copy(layer) if type(layer) is DynamicLayer else deepcopy(layer))
        if index in wanted:
            own[-1].keys, own[-1].values = (x.detach().clone().requires_grad_() for x in (layer.keys, layer.values))
            leaves[index, 0], leaves[index, 1] = own[-1].keys, own[-1].values
    found = {key: x.new_zeros((x.shape[1], x.shape[3], x.shape[3]), dtype=torch.float64) for key, x in leaves.items()}
    with torch.enable_grad():
        log_probs = model(text, past_key_values=Cache(layers=own)).logits[0].float().log_softmax(-1)
        for label in range(labels):
            drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
            total = log_probs.gather(1, drawn).sum()
            gradients = torch.autograd.grad(total, list(leaves.values()), retain_graph=label + 1 < labels)
            for key, gradient in zip(leaves, gradients, strict=True):
                g = gradient[0, :, coded].double()
                found[key] += g.mT @ g / (text.shape[1] * labels)
    return found
