"""Generate from a compressed cache, and hold the result against the uncompressed one."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from kvcomp.evaluate.fidelity import token_kls
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers.stock import stock_memory
from kvcomp.store import Memory


@dataclass(frozen=True)
class Timing:
    """How long the tokens of a generation took, in seconds."""

    first: float
    """To the first token (the prompt)."""
    each: tuple[float, ...]
    """Of every later token."""

    @property
    def tokens_per_second(self) -> float:
        return len(self.each) / sum(self.each) if self.each else 0.0


@dataclass(frozen=True)
class Generation:
    """A generation from a compressed cache."""

    prompt: int
    """Tokens of the prompt."""
    tokens: list[int]
    """The new token ids."""
    logits: Tensor
    """float32 (tokens, vocabulary), what each was chosen from."""
    timing: Timing
    memory: Memory
    """The cache at the end."""
    peak: int
    """Largest resident memory of the process so far, on a GPU what torch allocated there, in bytes."""


@dataclass(frozen=True)
class Agreement:
    """The uncompressed cache, fed the same tokens."""

    top1: float
    """Share of tokens at which both caches rank the same token first."""
    kl: float
    """Mean KL(uncompressed || compressed), nats."""
    timing: Timing
    dense: int
    """Bytes of the uncompressed cache at the end."""


class _Clock(BaseStreamer):
    """Times the tokens as ``generate`` hands them over, and passes them on."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token, self.ticks = on_token, [time.perf_counter()]
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:  # generate first puts the prompt itself
            self.prompt_seen = True
            return
        self.ticks.append(time.perf_counter())
        self.on_token(int(value.ravel()[0]))

    def end(self) -> None: ...

    @property
    def timing(self) -> Timing:
        steps = [after - before for before, after in zip(self.ticks, self.ticks[1:], strict=False)]
        return Timing(steps[0] if steps else 0.0, tuple(steps[1:]))


class _Follow(LogitsProcessor):
    """Makes ``generate`` take given tokens, whatever the model says."""

    def __init__(self, prompt: int, tokens: list[int]) -> None:
        self.prompt, self.tokens = prompt, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[input_ids.shape[1] - self.prompt]] = 0
        return forced


def generate(
    model: Any,
    ids: Tensor,
    cache: KVCompCache,
    max_new_tokens: int,
    on_token: Callable[[int], None] = lambda token: None,
    **sampling: Any,
) -> Generation:
    """Generate greedily, or as ``sampling`` says, from a compressed cache.

    Parameters
    ----------
    ids
        int64 (1, tokens).
    on_token
        Is called with each new token's id as it comes.
    """
    model.set_attn_implementation("kvcomp")
    tokens, logits, timing = _run(model, ids, cache, on_token, max_new_tokens=max_new_tokens, **sampling)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated(ids.device) if ids.is_cuda else host
    return Generation(ids.shape[1], tokens, logits, timing, cache.memory(), peak)


def compare(model: Any, ids: Tensor, run: Generation) -> Agreement:
    """Generate the tokens of ``run`` again with an uncompressed cache and transformers' own attention (sdpa)."""
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    follow = LogitsProcessorList([_Follow(ids.shape[1], run.tokens)])
    count = len(run.tokens)
    _, logits, timing = _run(
        model, ids, cache, lambda token: None, max_new_tokens=count, min_new_tokens=count, logits_processor=follow
    )
    reference, ours = logits.log_softmax(-1), run.logits.log_softmax(-1)
    return Agreement(
        top1=float((reference.argmax(-1) == ours.argmax(-1)).float().mean()),
        kl=float(token_kls(reference, ours).mean()),
        timing=timing,
        dense=sum(stock_memory(layer).other for layer in cache.layers),
    )


def _run(
    model: Any, ids: Tensor, cache: Any, on_token: Callable[[int], None], **options: Any
) -> tuple[list[int], Tensor, Timing]:
    """Token ids, the logits (float32, (tokens, vocabulary)) they were chosen from, and the times."""
    clock = _Clock(on_token)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        streamer=clock,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **options},
    )
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits).float(), clock.timing
