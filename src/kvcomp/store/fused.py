"""Fused attention on the CPU: what kernels get of a layer's queries, and what they give back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.calibration.transform import Transform
from kvcomp.kernels import Backend, CacheView
from kvcomp.store.padding import Padding


def attend_fused(
    kernels: Backend,
    view: CacheView,
    transform: Transform | Padding | None,
    q: Tensor,
    tail_end: npt.NDArray[np.int64],
    scaling: float,
    softcap: float,
    hidden: npt.NDArray[np.int64] | None = None,
) -> tuple[Tensor, Tensor]:
    """``Backend.attend`` on torch's threads.

    Parameters
    ----------
    kernels
        The backend.
    view
        The cache.
    transform
        What K and V passed before they were held.
    q
        (batch, heads, queries, head_dim), on the CPU.
    tail_end
        int64 (queries,): how much of the tail each sees.
    scaling, softcap
        As for ``kvcomp.store.attention.attend``.
    hidden
        int64 (batch, queries): how many of its row's first tokens a query does not see; none if None.

    Returns
    -------
    out, lse
        float32 (batch, heads, queries, head_dim of V), and the logarithm of the softmax denominators over K as held,
        (batch, heads, queries).
    """
    heads, queries = view.tail_k.shape[1], q.shape[2]
    group = q.shape[1] // heads
    exact = transform.queries(q) if isinstance(transform, Padding) else q.detach().to(torch.float32)
    out, lse = kernels.attend(
        exact.reshape(len(q), heads, group * queries, -1).contiguous().numpy(),
        view,
        np.tile(tail_end, group),
        scaling,
        softcap,
        torch.get_num_threads(),
        transform.folding if isinstance(transform, Transform) else None,
        None if hidden is None else np.tile(hidden, group),
    )
    found = torch.from_numpy(out).view(*q.shape[:3], -1)
    denominators = torch.from_numpy(lse).view(q.shape[:3])
    return transform.outputs(found) if isinstance(transform, Padding) else found, denominators
