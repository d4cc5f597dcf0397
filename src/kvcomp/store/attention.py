"""Attention over a store: fused where the queries are few, tile by tile where they are many.

Both are softmax(cap(scaling q.K)) V with the softmax taken online (Milakov & Gimelshein, 2018), so that parts of the
cache merge exactly. Nothing larger than a block (fused) or a tile is ever decompressed (KVComp, arXiv 2509.00579,
"Fetch").
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kvcomp.calibration.product import product
from kvcomp.calibration.rotary import Rotation
from kvcomp.calibration.transform import Transform
from kvcomp.errors import InvalidInput
from kvcomp.store.checks import check_tensor
from kvcomp.store.protocol import Store
from kvcomp.store.sink_logits import check_sink_logits, take_share
from kvcomp.store.tensors import NAMES

FUSED_QUERIES = 64  # most queries of a KV head (group x new tokens) for which the fused kernel is used
TILE_QUERIES = 128
MOST = 1e18  # a factor: with larger ones scores leave float32
LEAST = -80.0  # a weight of e^-80 of the largest is lost in float32


def attend(store: Store, q: Tensor, scaling: float, softcap: float = 0.0, sink_logits: Tensor | None = None) -> Tensor:
    """Fused attention of the last tokens, decoding the sealed pages on the fly.

    q: (batch, heads, queries, head_dim); query i is at position ``tokens - queries + i`` and sees what is not after it.
    scaling: factor on q.K. softcap: scores become softcap * tanh(score / softcap), 0 for none. sink_logits: (heads,),
    one more logit in the softmax of each head, which has no value; None for none.
    Returns (batch, heads, queries, head_dim of V) in q's type. Raises InvalidInput if q does not fit the store.
    """
    _check(store, q, scaling, softcap, sink_logits)
    if store.can_attend(q.shape[2]):
        return store.attend(q, scaling, softcap, sink_logits)
    return attend_tiled(store, q, scaling, softcap, sink_logits=sink_logits)


def attend_tiled(
    store: Store,
    q: Tensor,
    scaling: float,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """The same for many queries or any mask: decompresses one tile of pages at a time.

    mask: None for causal, or boolean (True: sees) or additive, broadcastable to (batch, heads, queries, tokens). Over a
    sliding window its tokens may be the last ones; no query sees those before.
    """
    _check(store, q, scaling, softcap, sink_logits)
    queries = q.shape[2]
    if mask is not None:
        shape = store.batch, q.shape[1], queries, mask.shape[-1]
        fits = mask.shape[-1] == store.tokens or (
            store.sliding_window is not None and queries <= mask.shape[-1] <= store.tokens
        )
        try:
            mask = mask.expand(shape)
        except RuntimeError:
            fits = False
        if not fits:
            raise InvalidInput(f"a mask of {tuple(mask.shape)} does not fit {shape}")
    transform = store.transform
    inner = q.detach().to(torch.float32) if transform is None else transform.queries(q)
    turning = None if transform is None else transform.turning(q)
    rows = [
        attend_tiles(
            store.tiles(row),
            store.heads,
            store.tokens,
            inner[row],
            scaling,
            softcap,
            None if turning is None else (turning[0][row], turning[1]),
            None if mask is None else mask[row],
            store.held_channels[1],
            int(store.starts[row]),
            store.sliding_window,
        )
        for row in range(store.batch)
    ]
    out, lse = (torch.stack(of) for of in zip(*rows, strict=True))
    out = out if transform is None else transform.outputs(out)
    if sink_logits is not None:
        out = take_share(out, lse, sink_logits, q, scaling, transform)
    return out.to(q.dtype)


def attend_tiles(
    tiles: Iterator[tuple[int, Tensor, Tensor]],
    heads: int,
    tokens: int,
    q: Tensor,
    scaling: float,
    softcap: float,
    turning: tuple[Tensor, Rotation] | None,
    mask: Tensor | None = None,
    width: int | None = None,
    start: int = 0,
    sliding_window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence's last tokens, tile by tile.

    Parameters
    ----------
    tiles
        All of its tokens, as ``Store.tiles`` gives them.
    heads
        KV heads.
    tokens
        Of the sequence.
    q
        float32 (heads, queries, head_dim).
    scaling, softcap
        As for ``attend``.
    turning
        ``Transform.turning`` of the sequence's queries; None for none.
    mask
        None for causal, or (heads, queries, the last tokens); no query sees those before.
    width
        head_dim of V; that of q if None.
    start
        Position of the token at the place 0.
    sliding_window
        Without a mask: a query sees so many of the last tokens, itself included; None for all.

    Returns
    -------
    out, lse
        float32 (heads, queries, width), and the logarithm of the softmax denominators, (heads, queries).
    """
    _, queries, channels = q.shape
    # (KV heads, group, queries, ...): the heads that share K and V lie together
    whole = q if turning is None else torch.cat([q, turning[0]], -1)
    grouped = (whole * scaling).view(heads, -1, queries, whole.shape[-1])
    mask = None if mask is None else mask.view(*grouped.shape[:3], -1)
    peak = torch.full((*grouped.shape[:3], 1), -torch.inf, device=q.device)
    total = torch.zeros_like(peak)
    out = q.new_zeros((*grouped.shape[:3], channels if width is None else width))
    unseen = 0  # by any query
    if mask is not None:
        unseen = tokens - mask.shape[-1]
    elif sliding_window is not None:
        unseen = max(0, tokens - queries + 1 - sliding_window)
    for begin, k, v in tiles:
        if begin + k.shape[1] <= unseen:
            continue
        cut = max(0, unseen - begin)
        begin, k, v = begin + cut, k[:, cut:].to(torch.float32), v[:, cut:].to(torch.float32)
        end = begin + k.shape[1]
        if turning is not None:
            waves = turning[1].waves(_numbers(begin - start, end - start, q))
            k = torch.cat([k, waves.expand(heads, -1, -1)], -1)
        for first in range(0, queries, TILE_QUERIES):
            part = slice(first, first + TILE_QUERIES)
            score = _matmul(grouped[:, :, part], k.mT)
            if softcap:
                score = softcap * torch.tanh(score / softcap)
            if mask is None:
                score = _causal(score, begin, tokens - queries + first, sliding_window)
            else:
                score = _masked(score, mask[:, :, part, begin - unseen : end - unseen])
            before = peak[:, :, part]
            higher = torch.maximum(before, score.amax(-1, keepdim=True))
            finite = torch.where(higher == -torch.inf, 0.0, higher)  # a query that has seen nothing yet
            weight, shrink = _exp(score.sub_(finite)), torch.exp(before - finite)
            total[:, :, part] = total[:, :, part] * shrink + weight.sum(-1, keepdim=True)
            out[:, :, part] = out[:, :, part] * shrink + _matmul(weight, v)
            peak[:, :, part] = higher
    result: Tensor = out / total.clamp_min(torch.finfo(torch.float32).tiny)
    lse: Tensor = (peak + total.log()).view(q.shape[:2])
    return result.view(*q.shape[:2], -1), lse


def _masked(score: Tensor, mask: Tensor) -> Tensor:
    """Scores under a mask, boolean (True: sees) or additive."""
    return score.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score + mask


def _causal(score: Tensor, begin: int, position: int, sliding_window: int | None) -> Tensor:
    """Scores (.., queries, tokens) of what queries see, the first at ``position``, of tokens from ``begin`` on."""
    end = begin + score.shape[3]
    token, at = _numbers(begin, end, score), _numbers(position, position + score.shape[2], score)[:, None]
    if end > position + 1:
        score = score.masked_fill(token > at, -torch.inf)
    if sliding_window is not None:
        score = score.masked_fill(token <= at - sliding_window, -torch.inf)
    return score


def _exp(x: Tensor) -> Tensor:
    """e^x in place, 0 below e^LEAST: torch's own exp takes ten times as long where the result underflows."""
    return torch.nn.functional.threshold(x.clamp_(min=LEAST - 1).exp_(), math.exp(LEAST), 0.0, inplace=True)


def _numbers(first: int, last: int, like: Tensor) -> Tensor:
    return torch.arange(first, last, device=like.device)


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """(KV heads, group, queries, n) times (KV heads, n, m), one product for each KV head."""
    found: Tensor = product(x.flatten(1, 2), y).unflatten(1, x.shape[1:3])
    return found


def _check(store: Store, q: Tensor, scaling: float, softcap: float, sink_logits: Tensor | None) -> None:
    """Raise InvalidInput if q does not fit the store, or a transform leaves out of the scores what a soft cap would
    notice.
    """
    check_tensor("q", q)
    if q.dtype not in NAMES:
        raise InvalidInput(f"q must be float32, float16 or bfloat16, not {q.dtype}")
    for name, factor in (("scaling", scaling), ("softcap", softcap)):
        if not isinstance(factor, int | float) or not abs(factor) <= MOST:
            raise InvalidInput(f"{name} must be a number up to {MOST:g}, not {str(factor)[:40]}")
    if softcap < 0:
        raise InvalidInput(f"softcap must be 0, for none, or above, not {softcap}")
    fits = q.ndim == 4 and (q.shape[0], q.shape[3]) == (store.batch, store.channels)
    if not store.batch or not fits or not q.shape[1] or q.shape[1] % store.heads or not 0 < q.shape[2] <= store.tokens:
        raise InvalidInput(
            f"queries must be (batch, heads, tokens, head_dim) = ({store.batch}, a multiple of {store.heads}, "
            f"1 to {store.tokens}, {store.channels}), not {tuple(q.shape)}"
        )
    if sink_logits is not None:
        check_sink_logits(sink_logits, q)
    if q.device != store.device:
        raise InvalidInput(f"the cache is on {store.device}, the queries are on {q.device}")
    if softcap and isinstance(store.transform, Transform) and store.transform.key.has_still:
        raise InvalidInput(
            "this calibration has means of K, which a soft cap does not allow: calibrate this model itself"
        )
