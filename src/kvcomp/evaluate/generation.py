"""Generate from a compressed cache, and hold the result against the uncompressed one."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from kvcomp.integrations.transformers import KVCompCache
from kvcomp.store import Memory


@dataclass(frozen=True)
class Timing:
    """first: seconds to the first token (the prompt). each: seconds of every later token."""

    first: float
    each: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        return len(self.each) / sum(self.each) if self.each else 0.0


@dataclass(frozen=True)
class Generation:
    """A generation from a compressed cache.

    tokens: the new token ids. logits: float32 (tokens, vocabulary), what each was chosen from.
    memory: the cache at the end. peak: largest resident memory of the process so far, in bytes.
    """

    prompt: int
    tokens: list[int]
    logits: Tensor
    timing: Timing
    memory: Memory
    peak: int


@dataclass(frozen=True)
class Agreement:
    """The uncompressed cache, fed the same tokens.

    top1: share of tokens at which both caches rank the same token first. kl: mean KL(uncompressed || compressed) in nats.
    dense: bytes of the uncompressed cache at the end.
    """

    top1: float
    kl: float
    timing: Timing
    dense: int


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


def generate(
    model: Any,
    ids: Tensor,
    cache: KVCompCache,
    max_new_tokens: int,
    on_token: Callable[[int], None] = lambda token: None,
    **sampling: Any,
) -> Generation:
    """Generate greedily, or as ``sampling`` says, from a compressed cache.

    ids: int64 (1, tokens). on_token: called with each new token's id as it comes.
    """
    model.set_attn_implementation("kvcomp")
    clock = _Clock(on_token)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        streamer=clock,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **sampling},
    )
    return Generation(
        prompt=ids.shape[1],
        tokens=out.sequences[0, ids.shape[1] :].tolist(),
        logits=torch.cat(out.logits).float(),
        timing=clock.timing,
        memory=cache.memory(),
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


@torch.inference_mode()
def compare(
    model: Any, ids: Tensor, run: Generation, on_token: Callable[[int], None] = lambda token: None
) -> Agreement:
    """Feed the tokens of ``run`` to the same model with an uncompressed cache (and transformers' own attention, sdpa)."""
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    step, agree, kl, seconds = ids, 0, 0.0, []
    for token, compressed in zip(run.tokens, run.logits, strict=True):
        begin = time.perf_counter()
        logits = model(input_ids=step, past_key_values=cache, logits_to_keep=1).logits[0, -1].float()
        seconds.append(time.perf_counter() - begin)
        reference, ours = logits.log_softmax(-1), compressed.log_softmax(-1)
        agree += int(reference.argmax() == ours.argmax())
        kl += float((reference.exp() * (reference - ours)).sum())
        step = torch.tensor([[token]])
        on_token(token)
    layers: list[Any] = list(cache.layers)
    dense = sum(x.untyped_storage().nbytes() for layer in layers for x in (layer.keys, layer.values))
    count = max(1, len(run.tokens))
    return Agreement(agree / count, kl / count, Timing(seconds[0], tuple(seconds[1:])), dense)
