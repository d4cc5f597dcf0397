"""When not to compress: the context from which a spec makes a cache small, and attention fast, on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvcomp.bench.dense import dense_methods
from kvcomp.bench.timing import REST, clock_for, fastest, in_rounds, ratio
from kvcomp.evaluate.fidelity import Sample
from kvcomp.evaluate.methods import KVComp
from kvcomp.integrations.transformers.models import positions
from kvcomp.store import Memory
from kvcomp.store.attention import attend

USEFUL = 2.0  # times smaller than dense
FURTHEST = 1 << 20
CONTEXTS = (1024, 4096, 16384, 32768)  # to time attention at
ROUNDS, BUDGET = 15, 1.5
RAW_SHARE = 0.05  # of the sealed bytes in raw blocks, above which a model's values defeat the bound


@dataclass(frozen=True)
class Advice:
    """What was found, and what it means in sentences."""

    size: list[dict[str, Any]]
    """[{context, total_bits, measured}]; beyond the sample, bits are computed from its fixed parts."""
    size_from: int | None
    """The first context at which the cache is ``USEFUL`` times smaller than dense."""
    speed: list[dict[str, Any]]
    """[{context, ratio, fastest}]; ratio: time over the fastest dense method's, median and quartiles."""
    speed_from: int | None
    """The first context at which attention is no slower than dense."""
    sentences: list[str]


def advise(model: Any, each: Sample, method: KVComp) -> Advice:
    """Advice for a model on a sample of its text."""
    limit = min(positions(model.config), FURTHEST)
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    contexts = [context for context in CONTEXTS if context <= limit] or [limit]
    size = _sizes(model, each, method, limit)
    dense_bits = 8 * each.cache[0][0].element_size()
    size_from = next((row["context"] for row in size if dense_bits / row["total_bits"] >= USEFUL), None)
    speed = [_time(model, each, method, heads, context) for context in contexts]
    speed_from = next((row["context"] for row in speed if row["ratio"]["median"] <= 1), None)
    sentences = []
    if size_from is None:
        sentences.append(
            f"Do not compress this model with this spec: up to {size[-1]['context']:,} tokens "
            f"the cache never gets {USEFUL:g} times smaller."
        )
    else:
        sentences.append(
            f"Size: from {size_from:,} tokens on the cache is at least {USEFUL:g} times smaller than dense; "
            f"below {size_from:,} tokens the window, the first tokens and the codebooks weigh more than what is saved: "
            "do not compress such contexts."
        )
    threads = torch.get_num_threads()
    where = f"on this machine with {threads} thread{'s' if threads > 1 else ''}"
    if speed_from is None:
        worst = speed[-1]
        sentences.append(
            f"Speed: {where} attention on compressed bytes is slower than dense at every context up to "
            f"{worst['context']:,} tokens ({worst['ratio']['median']:.2f} times the time there): "
            "compress for memory, not for speed."
        )
    else:
        sentences.append(
            f"Speed: {where} attention on compressed bytes is no slower than dense from {speed_from:,} tokens on."
        )
    whole = _memory(model, each, method, each.prompt.shape[1])
    share = whole.raw_blocks / max(1, whole.pages)
    if share > RAW_SHARE:
        sentences.append(
            f"{100 * share:.0f} % of the compressed bytes are blocks kept raw, as their values defeat the bound: "
            "use larger scales or another unit for K."
        )
    return Advice(size, size_from, speed, speed_from, sentences)


def _sizes(model: Any, each: Sample, method: KVComp, limit: int) -> list[dict[str, Any]]:
    """Total bits by context: measured on the sample's first tokens, then from the fixed bytes at its end."""
    prompt = each.prompt.shape[1]
    found, context = [], 64
    while context <= prompt:
        total = _memory(model, each, method, context).total_bits
        found.append({"context": context, "total_bits": total, "measured": True})
        context *= 2
    whole = _memory(model, each, method, prompt)
    fixed = (whole.total_bits - whole.coded_bits) * prompt
    while whole.sealed_values and context <= limit:
        found.append({"context": context, "total_bits": whole.coded_bits + fixed / context, "measured": False})
        context *= 2
    return found


def _memory(model: Any, each: Sample, method: KVComp, tokens: int) -> Memory:
    cache = method.cache(model.config)
    for layer, (k, v) in enumerate(each.cache):
        cache.update(k[:, :, :tokens], v[:, :, :tokens], layer)
    return method.memory(cache)


def _time(model: Any, each: Sample, method: KVComp, heads: int, context: int) -> dict[str, Any]:
    """Attention of one new token on the first layer's K and V, repeated to this many tokens, beside dense methods."""
    k, v = (x.repeat(1, 1, -(-context // x.shape[2]), 1)[:, :, :context].contiguous() for x in each.cache[0])
    cache = method.cache(model.config)
    cache.update(k, v, 0)
    store = method.stores(cache)[0]
    q = torch.randn(1, heads, 1, k.shape[3], generator=torch.Generator().manual_seed(context)).to(k.device)
    scaling = k.shape[3] ** -0.5
    dense = dense_methods(k, v, q.view(1, k.shape[1], -1, k.shape[3]).to(k.dtype))
    methods = {"kvcomp": lambda: attend(store, q, scaling), **dense}
    taken = in_rounds(methods, ROUNDS, BUDGET, clock_for(torch.get_num_threads()), REST)
    best = fastest(taken, list(dense))
    return {"context": context, "ratio": ratio(taken, "kvcomp", best), "fastest": best, "rounds": len(taken)}
