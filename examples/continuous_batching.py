"""Continuous batching with a KVCompCache: requests join a batch and leave it while the others go on. Runs on the CPU in
seconds.

    python examples/continuous_batching.py

A request's prompt is read into a cache of its own, whose row then joins the batch; when a request has all of its
tokens, its row leaves. Nothing is compressed anew and no other row changes: every request gets the tokens that it gets
alone, which is checked at the end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvcomp.integrations.transformers import KVCompCache

MODEL = Path(__file__).parent / "tiny-lm"
PLACES = 3  # rows that the batch has at most


@dataclass
class Request:
    prompt: torch.Tensor  # int64 (tokens,)
    wanted: int
    tokens: list[int] = field(default_factory=list)


def read_prompt(model: PreTrainedModel, request: Request) -> KVCompCache:
    """A cache of the prompt; the request gets its first token."""
    cache = KVCompCache(model.config)
    logits = model(request.prompt[None], past_key_values=cache, logits_to_keep=1).logits
    request.tokens.append(int(logits[0, -1].argmax()))
    return cache


def step(model: PreTrainedModel, cache: KVCompCache, running: list[Request]) -> None:
    """One more token for every row."""
    mask = cache.attention_mask()
    logits = model(
        torch.tensor([[request.tokens[-1]] for request in running]),
        attention_mask=mask,
        position_ids=mask.sum(1, keepdim=True) - 1,
        past_key_values=cache,
    ).logits
    for request, row in zip(running, logits[:, -1], strict=True):
        request.tokens.append(int(row.argmax()))


@torch.inference_mode()
def serve(model: PreTrainedModel, requests: list[Request]) -> None:
    """Answer all requests."""
    waiting, running = deque(requests), list[Request]()
    cache: KVCompCache | None = None
    while waiting or running:
        while waiting and len(running) < PLACES:
            request = waiting.popleft()
            new = read_prompt(model, request)
            if cache is None or not running:
                cache = new
            else:
                cache.join(new)
            running.append(request)
            print(f"request of {len(request.prompt)} tokens joins: {cache}")
        assert cache is not None
        step(model, cache, running)
        staying = [row for row, request in enumerate(running) if len(request.tokens) < request.wanted]
        if 0 < len(staying) < len(running):
            cache.batch_select_indices(torch.tensor(staying))
        running = [running[row] for row in staying]


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model.set_attn_implementation("kvcomp")
    text = tokenizer(Path(__file__).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    lengths = ((350, 40), (60, 90), (200, 25), (120, 60), (280, 80))
    requests = [Request(text[7 * i : 7 * i + tokens], wanted) for i, (tokens, wanted) in enumerate(lengths)]
    serve(model, requests)
    for request in requests:
        alone = Request(request.prompt, request.wanted)
        serve(model, [alone])
        assert alone.tokens == request.tokens
        print(repr(tokenizer.decode(request.tokens[:20])))
    print("every request got the tokens that it gets alone")


if __name__ == "__main__":
    main()
