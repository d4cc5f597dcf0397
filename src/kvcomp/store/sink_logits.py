"""Attention sinks as parameters: one more logit for each query head, which has no value (gpt-oss)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.calibration.transform import Transform
from kvcomp.errors import InvalidInput
from kvcomp.store.padding import Padding


def check_sink_logits(sink_logits: Tensor, q: Tensor) -> None:
    """Raise InvalidInput unless there is a logit for each head of q, (batch, heads, queries, head_dim)."""
    if tuple(sink_logits.shape) != (q.shape[1],) or sink_logits.device != q.device:
        raise InvalidInput(
            f"sink_logits must be ({q.shape[1]},) on {q.device}, not {tuple(sink_logits.shape)} on {sink_logits.device}"
        )


def take_share(
    out: Tensor, lse: Tensor, sink_logits: Tensor, q: Tensor, scaling: float, transform: Transform | Padding | None
) -> Tensor:
    """Attention as it is where the softmax has one more logit.

    Parameters
    ----------
    out
        (batch, heads, queries, head_dim of V), attention without it.
    lse
        float32 (batch, heads, queries), the logarithm of its softmax denominator, over K as it is held.
    sink_logits
        (heads,).
    q
        (batch, heads, queries, head_dim) as the model makes them.
    scaling
        Factor on q.K.
    transform
        What K passed before it was held: a calibration takes its mean from K, and of that scores lack what does not
        turn.

    Returns
    -------
    Tensor
        ``out``, float32, times e^lse / (e^lse + e^logit).
    """
    if isinstance(transform, Transform):
        mean = transform.key.still.repeat_interleave(q.shape[1] // transform.heads, 0)
        lse = lse + scaling * (q.detach().to(torch.float32) * mean[:, None]).sum(-1)
    share = torch.sigmoid(lse - sink_logits.detach().to(torch.float32)[:, None])
    return out.to(torch.float32) * share[..., None]
