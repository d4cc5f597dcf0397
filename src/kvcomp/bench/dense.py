"""Decode attention on an uncompressed cache, in every form that this machine offers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

GPU_ONLY = {"FlashAttention": "flash_attn", "FlashInfer": "flashinfer"}


def dense_methods(k: Tensor, v: Tensor, q: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to compute softmax(q.K) V in torch; each call returns (batch, KV heads, queries of a head, channels).

    - sdpa_gqa: torch's scaled_dot_product_attention with enable_gqa
    - sdpa_folded: the same, the queries of a KV head as if they were of several tokens
    - sdpa_repeated: the same, K and V repeated for each query head
    - matmul: two grouped products with a softmax between

    k, v: (batch, KV heads, tokens, channels); q: (batch, KV heads, queries of a head, channels), all of one dtype.
    """
    batch, heads, group, channels = q.shape
    scaling = channels**-0.5
    apart = q.reshape(batch, heads * group, 1, channels)

    def matmul() -> Tensor:
        return torch.softmax((q @ k.mT).float() * scaling, -1).to(q.dtype) @ v

    def repeated() -> Tensor:
        all_k, all_v = (x.repeat_interleave(group, 1) for x in (k, v))
        return sdpa(apart, all_k, all_v, scale=scaling).view(q.shape)

    methods: dict[str, Callable[[], Tensor]] = {
        "sdpa_gqa": lambda: sdpa(apart, k, v, enable_gqa=True, scale=scaling).view(q.shape),
        "sdpa_folded": lambda: sdpa(q, k, v, scale=scaling),
        "matmul": matmul,
    }
    if group > 1:  # with one query a head nothing is repeated
        methods["sdpa_repeated"] = repeated
    return methods


def missing() -> dict[str, str]:
    """Methods that are not compared, and why."""
    installed = {name: find_spec(package) is not None for name, package in GPU_ONLY.items()}
    return {
        name: "needs an NVIDIA GPU, and kvcomp's cache is on the CPU" if there else "not installed; needs an NVIDIA GPU"
        for name, there in installed.items()
    }
