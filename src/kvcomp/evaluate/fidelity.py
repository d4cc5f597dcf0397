"""How far a compressed cache moves a model's predictions from those of the uncompressed one.

A prompt is read once and its K and V are kept; each method codes the prompt's cache, and the text that follows is then scored,
teacher-forced, from what came back. K and V of the scored text itself are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from kvcomp.evaluate.text import LookupList
from kvcomp.spec import PAGE_TOKENS, CodecSpec
from kvcomp.store import KVStore, Memory


@dataclass(frozen=True)
class Coded:
    """K and V of one layer as they come back, (1, KV heads, tokens, head_dim), and the bytes it took."""

    k: Tensor
    v: Tensor
    memory: Memory


Codec = Callable[[int, Tensor, Tensor], Coded]  # (layer, K, V) -> Coded


@dataclass(frozen=True)
class Sample:
    """A prompt's uncompressed cache and what the model says of the text after it.

    cache: K and V of every layer, (1, KV heads, prompt tokens, head_dim). text: int64 (1, tokens), scored. log_probs: float32 (tokens,
    vocabulary), uncompressed.
    """

    cache: list[tuple[Tensor, Tensor]]
    text: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Score:
    """Of each sample: mean KL(uncompressed || compressed) in nats and share of equal likeliest tokens. memory: of all samples."""

    kl: tuple[float, ...]
    top1: tuple[float, ...]
    memory: Memory


@torch.inference_mode()
def sample(model: Any, ids: Tensor, prompt: int) -> Sample:
    """Read ``ids[:, :prompt]`` into a cache and score the rest of ``ids`` (int64, (1, tokens)) from it."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
    layers: list[Any] = list(cache.layers)
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
    log_probs = model(ids[:, prompt:], past_key_values=cache).logits[0].float().log_softmax(-1)
    return Sample(kept, ids[:, prompt:], log_probs)


@torch.inference_mode()
def score(model: Any, samples: Iterable[Sample], codec: Codec) -> Score:
    """Code the caches of the samples and compare the predictions."""
    kl, top1, memory = [], [], Memory()
    for each in samples:
        log_probs, used = _predict(model, each, codec)
        memory += used
        kl.append(float((each.log_probs.exp() * (each.log_probs - log_probs)).sum(-1).mean()))
        top1.append(float((each.log_probs.argmax(-1) == log_probs.argmax(-1)).float().mean()))
    return Score(tuple(kl), tuple(top1), memory)


def lookup_sample(model: Any, lookups: LookupList) -> Sample:
    """The records as the prompt, the look-ups as the scored text."""
    return sample(model, torch.from_numpy(lookups.tokens)[None], lookups.context)


@torch.inference_mode()
def lookups_right(model: Any, lookups: LookupList, each: Sample, codec: Codec | None) -> list[bool]:
    """For each look-up, whether every token of its value is the likeliest; ``codec`` None takes the uncompressed cache."""
    log_probs = each.log_probs if codec is None else _predict(model, each, codec)[0]
    likeliest = log_probs.argmax(-1).numpy()
    offset = lookups.context + 1  # the prediction of a token stands one before it
    return [
        bool((likeliest[begin - offset : end - offset] == lookups.tokens[begin:end]).all())
        for begin, end in lookups.answers
    ]


def _predict(model: Any, each: Sample, codec: Codec) -> tuple[Tensor, Memory]:
    cache, memory = DynamicCache(config=model.config), Memory()
    for layer, (k, v) in enumerate(each.cache):
        coded = codec(layer, k, v)
        memory += coded.memory
        cache.update(coded.k, coded.v, layer)
    return model(each.text, past_key_values=cache).logits[0].float().log_softmax(-1), memory


def kvcomp_codec(spec: CodecSpec, layers: int) -> Codec:
    """kvcomp itself: a KVStore for each layer, sealed, and read back."""

    def code(layer: int, k: Tensor, v: Tensor) -> Coded:
        store = KVStore(spec.layer(layer, layers))
        store.append(k, v)
        store.seal()
        return Coded(*store.dense(), store.memory())

    return code


def kivi_codec(key_bits: int, value_bits: int, group: int = 32, window: int = 64, sinks: int = 4) -> Codec:
    """KIVI-style (arXiv 2402.02750): K in groups of tokens of a channel, V in groups of channels of a token, float16 scale and zero.

    The sinks and the window are raw and as long as kvcomp's, so that both compress the same tokens.
    """

    def code(layer: int, k: Tensor, v: Tensor) -> Coded:
        tokens = max(0, k.shape[2] - window - sinks) // PAGE_TOKENS * PAGE_TOKENS
        part = slice(sinks, sinks + tokens)
        k, v = k.clone(), v.clone()
        k[:, :, part] = _round_groups(k[:, :, part].mT, key_bits, group).mT
        v[:, :, part] = _round_groups(v[:, :, part], value_bits, group)
        values = tokens * k.shape[1] * k.shape[3]
        held = k.numel() + v.numel()
        return Coded(
            k,
            v,
            Memory(
                codes=values * (key_bits + value_bits) // 8,
                scales=2 * values // group * 4,
                window=(held - 2 * values) * k.itemsize,
                sealed_values=2 * values,
                values=held,
                dense=held * k.itemsize,
            ),
        )

    return code


def _round_groups(x: Tensor, bits: int, group: int) -> Tensor:
    """Asymmetric rounding to ``bits`` bits in groups along the last axis, as min-max quantisers do."""
    groups = x.float().unflatten(-1, (-1, group))
    low = groups.amin(-1, keepdim=True).half().float()
    step = ((groups.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float()
    step = torch.where(step == 0, 1.0, step)
    codes = ((groups - low) / step).round().clamp(0, 2**bits - 1)
    back: Tensor = (codes * step + low).flatten(-2).to(x.dtype)
    return back


def bits_at(kl: float, bits: Sequence[float], kls: Sequence[float]) -> float:
    """Bits at which a method reaches ``kl``, log KL interpolated between its rates; infinite outside of what was measured."""
    order = np.argsort(kls)
    x, y = np.log(np.asarray(kls, float)[order]), np.asarray(bits, float)[order]
    return float(np.interp(np.log(kl), x, y)) if x[0] <= np.log(kl) <= x[-1] else float("inf")
