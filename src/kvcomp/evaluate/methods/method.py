"""The interface that every way to hold a KV cache is measured through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from kvcomp.store import Memory

Pair = tuple[Tensor, Tensor]


class Method(ABC):
    """A way to hold a KV cache. ``Baseline`` needs less to be written for what has no cache class of its own."""

    name: str
    """What tables call it."""
    attention: str = "sdpa"
    """The attention implementation of transformers that it is used with."""

    @abstractmethod
    def cache(self, config: PreTrainedConfig) -> Cache:
        """An empty cache for a model of this configuration. Raises UnsupportedModel if there can be none."""

    @abstractmethod
    def memory(self, cache: Cache) -> Memory:
        """Bytes by part of one of its caches, once all that is due to be coded is."""

    @abstractmethod
    def values(self, cache: Cache) -> list[Pair]:
        """K and V of every layer as later tokens see them, (batch, KV heads, tokens, head_dim) each."""

    def room(self, cache: Cache) -> int:
        """Tokens, at least 1, that can come in one pass and see the same values as if they came one by one."""
        return 1

    def settings(self) -> dict[str, Any]:
        """What a result says of it beside its name, as JSON."""
        return {}
