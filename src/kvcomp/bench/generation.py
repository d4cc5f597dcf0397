"""Generation as a bench times it: the time of every token, and whether attention was right."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessor, LogitsProcessorList

from kvcomp.bench import checks
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.store import KVStore

SPREAD = 2.0  # of the scores of queries that attention is checked with


class _TokenTimes(LogitsProcessor):
    """The time of every token, as ``generate`` asks for it."""

    def __init__(self, note: Callable[[int], None]) -> None:
        self.ticks, self.note = [time.perf_counter()], note

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.ticks.append(time.perf_counter())
        self.note(input_ids.shape[1])
        return scores


def token_times(
    model: Any, ids: Tensor, cache: Cache, new_tokens: int, note: Callable[[int], None] = lambda tokens: None
) -> list[float]:
    """The times of the beginning and of each token. note: called with the tokens there are, before each is chosen."""
    model.set_attn_implementation("kvcomp" if isinstance(cache, KVCompCache) else "sdpa")
    times = _TokenTimes(note)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([times]),
    )
    return times.ticks


def attention_error(cache: KVCompCache) -> float:
    """The worst layer's error of attention on the model's own K and V, against the reference. Raises CheckFailed."""
    stores = [layer.store.to_main_memory() for layer in cache.compressed_layers]
    return max(checks.reference_error(store, queries(store)) for store in stores)


def queries(store: KVStore) -> Tensor:
    """Random queries, float32 (batch, KV heads, 1, head_dim), whose scores have the standard deviation ``SPREAD``.

    On a channel of K that is much larger than the others, others would have scores of 40 and more. Factors of 16 bits
    hold those less exactly, and the softmax would see one token.
    """
    q = torch.randn(store.batch, store.heads, 1, store.channels)
    scores = q @ store.dense()[0].float().mT * store.channels**-0.5
    scaled: Tensor = q * (SPREAD / scores.std(-1, keepdim=True))
    return scaled
