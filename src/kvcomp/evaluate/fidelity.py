"""How far a method moves a model's predictions from those of the uncompressed cache.

A prompt is read once and its K and V are kept.

- Teacher-forced: each method codes the prompt. The text that follows is scored in one pass from what came back; its own
  K and V are exact.
- Streaming: the text comes in as if it were generated. The method's window moves over it, and later tokens see earlier
  ones coded.

All attend in the same way, with sdpa, so a lossless method has a KL of 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from kvcomp.evaluate.methods import Method, Pair
from kvcomp.evaluate.models import attends_to_all
from kvcomp.store import Memory

GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"


@dataclass(frozen=True)
class Sample:
    """A prompt's uncompressed cache and what the model says of the text after it."""

    prompt: Tensor
    """int64 (1, tokens)."""
    cache: list[Pair]
    """K and V of every layer, (1, KV heads, prompt tokens, head_dim); none if some layer does not attend to all."""
    text: Tensor
    """int64 (1, tokens), scored."""
    log_probs: Tensor
    """float32 (tokens, vocabulary), from the uncompressed cache."""
    fed: Sequence[Pair] = ()
    """K and V of every layer as the model made them, those that a sliding window has left included: what any cache is
    given in one pass over the prompt. None if some layer keeps something else."""


@dataclass(frozen=True)
class Comparison:
    """A method beside the uncompressed cache on one sample."""

    kl: float
    """Mean KL(uncompressed || compressed), nats a token."""
    top1: float
    """Share of tokens with the same likeliest token."""
    loss: float
    """Mean loss, nats a token."""
    loss_uncompressed: float
    kls: tuple[float, ...] = ()
    """KL of each token, in six digits."""


def attend_plainly(model: Any) -> None:
    """Give the model transformers' own attention: sdpa, or eager where a model has no other.

    Under a mask transformers copies K and V for each query head, which CUDA's kernels need and the CPU's do not.
    """
    os.environ[GROUPED] = str(int(model.device.type == "cpu"))
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        model.set_attn_implementation("eager")


@contextmanager
def attention_setting_restored() -> Iterator[None]:
    """Afterwards the environment has what ``attend_plainly`` sets as it was: all models of the process read it."""
    before = os.environ.get(GROUPED)
    try:
        yield
    finally:
        os.environ.pop(GROUPED, None)
        if before is not None:
            os.environ[GROUPED] = before


class _Recorder(DynamicCache):
    """Keeps what each layer is given first."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.given: dict[int, Pair] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Pair:
        self.given.setdefault(layer_idx, (key_states, value_states))
        found: Pair = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return found

    def whole(self) -> list[Pair]:
        """K and V of every layer, if all layers keep nothing else; forgotten here."""
        given, self.given = self.given, {}
        plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self.layers)
        return [given[index] for index in range(len(self.layers))] if plain and len(given) == len(self.layers) else []


@torch.inference_mode()
def sample(model: Any, ids: Tensor, prompt: int) -> Sample:
    """Read ``ids[:, :prompt]`` into a cache and score the rest of ``ids`` (int64, (1, tokens)) from it."""
    attend_plainly(model)
    cache = _Recorder(config=model.config)
    model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
    fed = cache.whole()
    layers: list[Any] = list(cache.layers)
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in layers] if attends_to_all(model.config) else []
    log_probs = model(ids[:, prompt:], past_key_values=cache).logits[0].float().log_softmax(-1)
    return Sample(ids[:, :prompt], kept, ids[:, prompt:], log_probs, kept or fed)


@torch.inference_mode()
def fill(model: Any, each: Sample, method: Method) -> Cache:
    """Make a cache of the method that holds the prompt."""
    cache = method.cache(model.config)
    if each.fed:
        for layer, (k, v) in enumerate(each.fed):
            cache.update(k, v, layer)
    else:
        attend_plainly(model)
        model(each.prompt, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.inference_mode()
def predict(model: Any, ids: Tensor, cache: Cache, method: Method, streaming: bool = False) -> Tensor:
    """Predict what follows each of ``ids`` on top of what the cache holds.

    Parameters
    ----------
    ids
        int64 (1, tokens).
    streaming
        As if the tokens came one by one.

    Returns
    -------
    Tensor
        Log probabilities, float32 (tokens, vocabulary).
    """
    attend_plainly(model)
    parts, at = [], 0
    while at < ids.shape[1]:
        new = method.room(cache) if streaming else ids.shape[1]
        parts.append(model(ids[:, at : at + new], past_key_values=cache).logits[0].float().log_softmax(-1))
        at += new
    return torch.cat(parts)


def token_kls(reference: Tensor, ours: Tensor) -> Tensor:
    """KL(reference || ours) of each token in nats, (tokens,), of log probabilities (tokens, vocabulary)."""
    return (reference.exp() * (reference - ours)).sum(-1)


def compare(each: Sample, log_probs: Tensor) -> Comparison:
    """Hold predictions of a sample's text, float32 (tokens, vocabulary), against the uncompressed ones."""
    target = each.text[0, 1:, None]
    kls = token_kls(each.log_probs, log_probs)
    return Comparison(
        kl=float(kls.mean()),
        top1=float((each.log_probs.argmax(-1) == log_probs.argmax(-1)).float().mean()),
        loss=-float(log_probs[:-1].gather(1, target).mean()),
        loss_uncompressed=-float(each.log_probs[:-1].gather(1, target).mean()),
        kls=tuple(float(f"{kl:.6g}") for kl in kls.tolist()),
    )


def measure(model: Any, each: Sample, method: Method, streaming: bool = False) -> tuple[Comparison, Memory]:
    """Measure a method on a sample, and the cache's bytes: of the prompt, or, streaming, of prompt and text."""
    cache = fill(model, each, method)
    memory = method.memory(cache)
    log_probs = predict(model, each.text, cache, method, streaming)
    return compare(each, log_probs), method.memory(cache) if streaming else memory


@torch.inference_mode()
def predict_from(model: Any, each: Sample, values: Sequence[Pair]) -> Tensor:
    """Predict a sample's text from these K and V of the prompt in place of its own, as ``predict`` does."""
    attend_plainly(model)
    cache = DynamicCache(config=model.config)
    for layer, (k, v) in enumerate(values):
        cache.update(k, v, layer)
    log_probs: Tensor = model(each.text, past_key_values=cache).logits[0].float().log_softmax(-1)
    return log_probs
