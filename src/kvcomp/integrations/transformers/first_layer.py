"""K and V of a model's first layer: they follow from token ids and positions alone, without any attention."""

from __future__ import annotations

from typing import Any, Never

import torch
from torch import Tensor
from transformers import DynamicCache

from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.integrations.transformers.layer import matched, uncompiled
from kvcomp.store import KVStore
from kvcomp.store.pages import compare

TOKENS = 1024  # of one forward pass, which ends in the first layer
ROUNDING = {torch.float32: 2.0**-10, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
"""What other batches, devices and TF32 change, over the largest value of a token's head."""


class _Found(Exception):
    """Ends the forward pass; holds K and V."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.both = k, v


class _Ending(DynamicCache):
    """A cache that takes the first layer's K and V and ends the forward pass."""

    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Never:
        raise _Found(*matched(key_states, value_states))


def first_layer(model: Any, ids: list[int]) -> tuple[Tensor, Tensor]:
    """K and V of a model's first layer for the token ids of a prompt, on the CPU.

    Both are (1, KV heads, tokens, head_dim). Raises UnsupportedModel if the model fills no cache, InvalidInput if it
    does not run.
    """
    parts = []
    for begin in range(0, len(ids), TOKENS):
        some = torch.tensor([ids[begin : begin + TOKENS]], device=model.device)
        places = torch.arange(begin, begin + some.shape[1], device=model.device)[None]
        try:
            with torch.no_grad():
                model(input_ids=some, position_ids=places, past_key_values=_Ending(config=model.config), use_cache=True)
        except _Found as found:
            parts.append([x.cpu() for x in found.both])
        except (RuntimeError, TypeError, ValueError) as error:
            raise InvalidInput(
                f"the model cannot compute its first layer, to compare the cache with: {error}"
            ) from error
        else:
            raise UnsupportedModel(f"{type(model).__name__} fills no cache: no prefix of it can be stored")
    k, v = (torch.cat(of_kind, dim=2) for of_kind in zip(*parts, strict=True))
    return k, v


def check_first_layer(store: KVStore, model: Any, ids: list[int]) -> None:
    """Raise InvalidInput unless a store of one row holds the first layer's K and V of these ids, within the bound."""
    k, v = first_layer(model, ids[: store.tokens])
    if k.dtype != store.dtype:
        raise InvalidInput(f"the cache holds {store.dtype}, and the model computes {k.dtype}: fill it as it is saved")
    found = compare(store, k, v, ROUNDING[k.dtype])
    if found.missed:
        raise InvalidInput(
            f"{found.missed} of {found.values} values in the first layer are not those of these token ids under this "
            "model: give the ids that filled the cache from position 0 on, not embeddings or images, and the model "
            "with the adapters that it had then"
        )
