"""The attention function "kvcomp", which reads compressed layers where they lie."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.integrations.transformers.handle import Source, source_of, uncompiled, without_gradient
from kvcomp.integrations.transformers.masks import MaskPlan
from kvcomp.store import Store
from kvcomp.store.attention import FUSED_QUERIES, attend, attend_tiled

NAME = "kvcomp"
OWN_MASKS = {"deepseek_v4"}
SCORES = 1 << 24  # scores held at a time by attention with a soft cap or sinks


@uncompiled
def kvcomp_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, over a KVCompCache or over plain tensors.

    query: (batch, heads, new tokens, head_dim). key, value: what ``update`` returned, or (batch, KV heads, tokens,
    head_dim).
    attention_mask: None for causal, or (batch, 1 or heads, new tokens, tokens), boolean or additive.
    s_aux: (heads,), a logit beside the scores of each head, which has no value (gpt-oss).
    position_ids: of the new tokens, (batch or 1, new tokens), if the model tells; they are compared with what the cache
    holds.
    Returns (batch, new tokens, heads, head_dim) in the query's dtype, and no weights.
    Raises UnsupportedModel or InvalidInput for what it cannot do; a KVCompCache layer is then as it was before its
    update.
    """
    source = source_of(key, value)
    if getattr(getattr(module, "config", None), "model_type", None) in OWN_MASKS:
        raise UnsupportedModel(
            f'the attention "{NAME}" makes boolean masks, to which this model adds: use attn_implementation="eager"'
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if source is not None:
        source.check()
    with source.layer.session.forward or nullcontext() if source is not None else nullcontext():
        if position_bias is not None:
            raise UnsupportedModel(
                f'the attention "{NAME}" does not know a position bias: use another attn_implementation'
            )
        if output_attentions:
            raise InvalidInput(
                f'the attention "{NAME}" computes no weights: use attn_implementation="eager" for output_attentions'
            )
        if source is None:
            out = _dense(module, query, key, value, attention_mask, scaling, softcap, causal, s_aux, dropout, **kwargs)
            return out, None
        if dropout or (module.training and query.requires_grad and torch.is_grad_enabled()):
            raise InvalidInput("a KVCompCache is for inference, and this model is training: call model.eval()")
        config = getattr(module, "config", None)
        session = source.layer.session
        if session.config() is not config and config is not None:
            session.check_model(config)
        return _over_store(module, query, source, attention_mask, position_ids, scaling, softcap, causal, s_aux), None


def _over_store(
    module: torch.nn.Module,
    query: Tensor,
    source: Source,
    mask: Tensor | None,
    positions: Tensor | None,
    scaling: float,
    softcap: float | None,
    causal: bool,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention over a compressed layer, which may compress the new tokens afterwards."""
    layer, store = source.layer, source.layer.store
    _, heads, queries, _ = query.shape
    tokens = store.tokens
    if mask is None and queries > 1 and not causal:
        mask = torch.ones((1, 1, queries, source.seen), dtype=torch.bool, device=query.device)
    if layer.session.recording and mask is not None:
        raise UnsupportedModel("a step with an attention mask cannot be recorded: use the model's forward pass")
    plain = mask is None or _is_plain(store, layer.session.plan_for(mask, queries, store, source.seen), queries)
    waits = query.is_cuda and queries == 1  # for the device, at every step
    if plain and positions is not None and positions.ndim == 2 and not waits:
        layer.session.check_positions(positions, tokens - 1 - store.starts)
    fresh, source.fresh = source.fresh, None
    cap = softcap or 0.0
    if fresh is not None:
        out = _dense(module, query, *fresh, mask, scaling, softcap, causal, sink_logits)
    elif plain and queries * heads // store.heads <= FUSED_QUERIES:
        out = without_gradient(
            lambda: _tokens_first(attend(store, query, scaling, cap, sink_logits=sink_logits)), query
        )
    elif store.compressed or store.sliding_window is not None:
        seen = None if plain else mask
        out = without_gradient(
            lambda: _tokens_first(attend_tiled(store, query, scaling, cap, seen, sink_logits=sink_logits)), query
        )
    else:
        if mask is None and queries > 1:
            mask = torch.ones((queries, tokens), dtype=torch.bool, device=query.device).tril(tokens - queries)[
                None, None
            ]
        out = without_gradient(
            lambda: _dense(module, query, *store.dense(), mask, scaling, softcap, causal, sink_logits), query
        )
    if not plain:
        layer.session.not_from_ids = "it was filled under a mask that is not causal over the whole prompt"
    del fresh  # not needed while the layer is compressed
    layer.seal()
    return out


def _tokens_first(out: Tensor) -> Tensor:
    """(batch, heads, tokens, head_dim) as transformers wants it."""
    return out.transpose(1, 2).contiguous()


def _is_plain(store: Store, plan: MaskPlan, queries: int) -> bool:
    """Whether causal attention over the store is what the mask asks for. Tells the store where its rows begin.

    A row can only begin later as long as it holds nothing but padding. What came in as padding stays invisible.
    """
    empty = store.starts >= store.tokens - queries
    if empty.any():
        store.set_starts(np.where(empty, plan.starts, store.starts).tolist())
    window = store.tokens if store.sliding_window is None else store.sliding_window
    seen = np.maximum(store.starts, store.tokens - queries + 1 - window)
    return plan.causal and bool((plan.starts <= seen).all())


def _dense(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    causal: bool,
    sink_logits: Tensor | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """Attention over plain tensors, (batch, new tokens, heads, head_dim): sdpa, or by hand with a soft cap or sinks.

    Without a mask causal queries are the first tokens, as for sdpa: a static cache is longer than what it holds.
    """
    queries = query.shape[2]
    if softcap or sink_logits is not None:
        if mask is None and causal and queries > 1:
            mask = torch.ones((queries, key.shape[2]), dtype=torch.bool, device=query.device).tril()[None, None]
        return _by_hand(query, key, value, mask, scaling, softcap, sink_logits, dropout)
    out: Tensor = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal, **kwargs
    )[0]
    return out


def _by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    dropout: float,
) -> Tensor:
    """softmax(softcap tanh(scaling q.K / softcap)) V, with one more logit a head if there are any, some queries at a
    time.
    """
    batch, heads, queries, channels = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    step = max(1, SCORES // (batch * heads * tokens))
    parts = []
    for first in range(0, queries, step):
        part = query[:, :, first : first + step]
        new = part.shape[2]
        grouped = part.reshape(batch, kv_heads, -1, channels)
        score = (grouped @ key.mT).view(batch, heads, new, tokens) * scaling
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if mask is not None:
            seen = mask.expand(-1, -1, queries, -1)[:, :, first : first + step]
            hidden = torch.finfo(score.dtype).min
            score = score.masked_fill(~seen, hidden) if mask.dtype == torch.bool else score + seen
        if sink_logits is not None:
            sinks = sink_logits.to(score.dtype).view(1, heads, 1, 1).expand(batch, heads, new, 1)
            score = torch.cat([score, sinks], dim=-1)
        weight = score.softmax(-1, dtype=torch.float32).to(query.dtype)[..., :tokens]
        weight = torch.nn.functional.dropout(weight, dropout)
        out = weight.reshape(batch, kv_heads, -1, tokens) @ value
        parts.append(out.view(batch, heads, new, -1).transpose(1, 2))
    return torch.cat(parts, dim=1).contiguous()
