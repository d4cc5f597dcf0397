"""Where K and V lie in a block of vLLM's cache, found by writing known values, so that chunks fit every engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcomp.errors import UnsupportedModel

DIGIT = 128  # numbers up to it are exact in bfloat16

Write = Callable[[Tensor, Tensor, Tensor], None]
"""Writes K and V of a block's tokens, (tokens, 1, head_dim), into a cache, (1, 1, tokens, 2 head_dim)."""


@dataclass(frozen=True)
class BlockLayout:
    """How a head's block is laid out.

    where: (tokens * 2 head_dim,), the place in the block of each channel of each token, those of K before those of V;
    None where they lie so.
    """

    where: Tensor | None = None

    def read(self, blocks: Tensor) -> Tensor:
        """Blocks as vLLM holds them -> (blocks, heads, tokens, 2 head_dim), K before V."""
        if self.where is None:
            return blocks
        return blocks.reshape(*blocks.shape[:2], -1)[..., self.where].view(blocks.shape)

    def write(self, blocks: Tensor) -> Tensor:
        """Undo ``read``."""
        if self.where is None:
            return blocks
        result = torch.empty_like(blocks).view(*blocks.shape[:2], -1)
        result[..., self.where] = blocks.reshape(result.shape)
        return result.view(blocks.shape)


def find_layout(write: Write, tokens: int, channels: int, dtype: torch.dtype) -> BlockLayout:
    """The layout that a kernel writes.

    Parameters
    ----------
    write
        The kernel.
    tokens
        Of a block.
    channels
        head_dim.
    dtype
        Of the cache.

    Returns
    -------
    BlockLayout

    Raises
    ------
    UnsupportedModel
        If the kernel does not write each value to a place of its own.
    """
    cache = torch.zeros(1, 1, tokens, 2 * channels, dtype=dtype)
    nothing = torch.zeros(tokens, 1, channels, dtype=dtype)
    number = torch.arange(tokens * channels).view(tokens, 1, channels)
    where = torch.full((tokens, 2 * channels), -1)
    for kind in (0, 1):
        found = torch.zeros(cache.numel(), dtype=torch.long)
        for unit in (1, DIGIT, DIGIT**2):  # each number in digits above 0, so that 0 is what was not written
            digit = (number // unit % DIGIT + 1).to(dtype)
            write(nothing if kind else digit, digit if kind else nothing, cache.zero_())
            found += (cache.flatten().round().long() - 1) * unit
        places = (found >= 0).nonzero().flatten()
        if not found[places].sort().values.equal(torch.arange(tokens * channels)):
            break
        where[found[places] // channels, found[places] % channels + kind * channels] = places
    if not where.flatten().sort().values.equal(torch.arange(cache.numel())):
        raise UnsupportedModel(
            f"vLLM lays blocks of {tokens} tokens of {dtype} out in a way that this connector does not know"
        )
    return BlockLayout(where.flatten())


def layout_of(cache: Tensor, dtype: torch.dtype) -> BlockLayout:
    """The layout of a layer's cache, (blocks, heads, tokens, 2 head_dim). Raises UnsupportedModel."""
    if cache.device.type != "cpu":
        return BlockLayout()  # flash_attn, triton and flashinfer split the last dimension
    tokens, channels = cache.shape[2], cache.shape[3] // 2
    return find_layout(_cpu_kernel(dtype, tokens, channels), tokens, channels, dtype)


def _cpu_kernel(dtype: torch.dtype, tokens: int, channels: int) -> Write:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa: Any = _get_attn_isa(dtype, tokens, channels, "auto")
    slots = torch.arange(tokens)

    def write(k: Tensor, v: Tensor, cache: Tensor) -> None:
        halves = cache.view(1, 1, 2 * tokens, channels).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(k, v, *halves, slots, isa)

    return write
