"""What an attention mask means for a compressed cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import ref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from kvcomp.errors import InvalidInput

HIDDEN = -3e4  # an additive mask below this hides: softmax gives 0 in float32


@dataclass(frozen=True)
class MaskPlan:
    """What a mask means, found once for all layers of a forward pass."""

    mask: ref[Tensor]
    starts: npt.NDArray[np.int64]
    """For each row of the batch the first position that any query sees."""
    causal: bool
    """Whether the mask says nothing but "from there on, not ahead, and not behind the sliding window"."""


def read_mask(mask: Tensor, batch: int, queries: int, tokens: int, seen: int, sliding_window: int | None) -> MaskPlan:
    """The plan of a mask, boolean (True: sees) or additive.

    Parameters
    ----------
    mask
        (batch or 1, 1 or heads, queries, seen).
    batch, queries, tokens
        Of the cache, the new tokens included.
    seen
        How many of the last tokens the mask is of.
    sliding_window
        A token sees so many of the last ones, itself included; None for all.

    Raises
    ------
    InvalidInput
        For another shape.
    """
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, queries) or mask.shape[3] != seen:
        raise InvalidInput(
            f"the attention mask must be (batch, heads, queries, tokens) = ({batch}, 1, {queries}, {seen}), "
            f"not {tuple(mask.shape)}"
        )
    sees, plain = mask, True
    if mask.dtype != torch.bool:
        sees = mask > HIDDEN
        plain = bool((sees <= (mask == 0)).all())
    sees = sees.expand(batch, -1, queries, -1)
    anywhere = sees.any(2).any(1)  # (batch, seen)
    first = torch.where(anywhere.any(1), anywhere.to(torch.uint8).argmax(1), seen).cpu().numpy()
    causal = plain and sees.shape[1] == 1
    if causal and queries == 1:
        causal = bool((anywhere.sum(1).cpu().numpy() == seen - first).all())
    elif causal:
        token = torch.arange(seen, device=mask.device)
        query = token[seen - queries :, None]
        visible = token <= query
        if sliding_window is not None:
            visible &= token > query - sliding_window
        for row, start in zip(sees[:, 0], first.tolist(), strict=True):
            causal = causal and torch.equal(row[:, start:], visible[:, start:])
    return MaskPlan(ref(mask), first + tokens - seen, causal)


def kvcomp_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of transformers' sdpa attention.

    Raises InvalidInput unless a 2-D mask has an entry for each token that a growing cache holds and for each new one:
    transformers would hide the last tokens, or read the entries of others.
    """
    given = None if attention_mask is None else attention_mask.shape[-1]
    if given not in (None, kv_length + kv_offset) and kv_length + kv_offset == q_offset + q_length:
        raise InvalidInput(
            f"the attention mask has {given} entries, and there are {int(q_offset)} tokens in the cache and "
            f"{q_length} new ones: give the mask of all of them, and ids that go beyond those in the cache; assisted "
            "decoding gives all ids again, so it needs an empty cache"
        )
    plain = kwargs.get("local_size") is None and kwargs.get("allow_is_causal_skip", True)
    if plain and attention_mask is None and q_length == 1:
        return None  # as sdpa_mask does, though not in every version while a CUDA graph is captured
    mask: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, **kwargs
    )
    return mask
