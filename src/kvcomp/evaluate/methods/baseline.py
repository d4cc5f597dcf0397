"""A baseline: what codes K and V of tokens that are old enough, and nothing else. The smallest way to add a method.

    class Halves(Baseline):                          # mine.py, for `kvcomp evaluate --baseline ./mine.py`
        name = "halves"

        def coded(self, tokens, kind):
            return tokens // 64 * 64                 # every 64 tokens, no window

        def encode(self, x, kind):
            return {"codes": x.to(torch.float8_e5m2)}

        def decode(self, parts, kind):
            return parts["codes"].float()

What ``encode`` returns is what is held and counted: no size is computed from a formula.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from kvcomp.errors import InvalidInput
from kvcomp.evaluate.methods.method import Method, Pair
from kvcomp.integrations.transformers.cache import stock_memory
from kvcomp.spec import KINDS, Kind
from kvcomp.store import Memory
from kvcomp.store.memory import PARTS

Parts = dict[str, Tensor]
FURTHEST = 1024  # tokens in one pass of a baseline that codes more rarely than that


class Baseline(Method):
    """A method that is told by how it codes tokens; those not coded yet are raw, in the model's type."""

    def __init__(self) -> None:
        if not getattr(self, "name", None):
            raise InvalidInput(f"{type(self).__name__} needs a name for the tables: set the class attribute name")

    @abstractmethod
    def coded(self, tokens: int, kind: Kind) -> int:
        """How many of the first ``tokens`` tokens of a layer are coded; never falls as they get more."""

    @abstractmethod
    def encode(self, x: Tensor, kind: Kind) -> Parts:
        """What is held of the tokens coded next: tensors named by their part of ``Memory``, such as codes and scales.

        ``x`` is (batch, KV heads, tokens, head_dim), in the model's type.
        """

    @abstractmethod
    def decode(self, parts: Parts, kind: Kind) -> Tensor:
        """The values from what ``encode`` returned and nothing else, (batch, KV heads, tokens, head_dim), any float."""

    def cache(self, config: PreTrainedConfig) -> Cache:
        layers: list[Any] = DynamicCache(config=config).layers
        return Cache(layers=[BaselineLayer(self) if type(layer) is DynamicLayer else layer for layer in layers])

    def memory(self, cache: Cache) -> Memory:
        layers = cache.layers
        return sum((x.memory() if isinstance(x, BaselineLayer) else stock_memory(x) for x in layers), Memory())

    def values(self, cache: Cache) -> list[Pair]:
        layers: list[Any] = list(cache.layers)
        return [layer.dense() if isinstance(layer, BaselineLayer) else (layer.keys, layer.values) for layer in layers]

    def room(self, cache: Cache) -> int:
        layers = [layer for layer in cache.layers if isinstance(layer, BaselineLayer)]
        return min((layer.room() for layer in layers), default=FURTHEST)


class BaselineLayer(CacheLayerMixin):
    """One layer of a baseline's cache.

    What has been decoded is kept for speed and not counted: a decoder would make it anew each time.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, method: Baseline) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.method = method
        self.reset()

    def reset(self) -> None:
        self.parts: dict[Kind, list[Parts]] = {"K": [], "V": []}
        self.decoded: dict[Kind, Tensor] = {}
        self.tail: dict[Kind, Tensor] = {}
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Append K and V, (batch, KV heads, new tokens, head_dim); the new tokens themselves are returned exact."""
        self.settle()
        for kind, new in zip(KINDS, (key_states, value_states), strict=True):
            if not self.is_initialized:
                self.decoded[kind] = self.tail[kind] = new[:, :, :0]
            self.tail[kind] = torch.cat([self.tail[kind], new], 2)
        self.is_initialized = True
        return self.dense(settled=False)

    def settle(self) -> None:
        """Code what is due. Raises InvalidInput if the baseline does not do what ``Baseline`` asks for."""
        if not self.is_initialized:
            return
        tokens = self.get_seq_length()
        for kind in KINDS:
            done, end = self.decoded[kind].shape[2], self.method.coded(tokens, kind)
            if not done <= end <= tokens:
                raise InvalidInput(
                    f"{self.method.name}: coded({tokens}, {kind!r}) is {end}; "
                    f"it must lie between {done}, already coded, and {tokens}"
                )
            if end == done:
                continue
            x = self.tail[kind][:, :, : end - done]
            parts = {name: part.clone() for name, part in self.method.encode(x.contiguous(), kind).items()}
            if not parts or not set(parts) <= set(PARTS):
                raise InvalidInput(
                    f"{self.method.name}: encode returned {sorted(parts)}: "
                    "name the parts as in Memory, such as codes and scales"
                )
            back = self.method.decode(parts, kind).to(x.dtype)
            if back.shape != x.shape:
                raise InvalidInput(
                    f"{self.method.name}: decode gave {tuple(back.shape)} for {tuple(x.shape)} that went into encode"
                )
            self.parts[kind].append(parts)
            self.decoded[kind] = torch.cat([self.decoded[kind], back], 2)
            self.tail[kind] = self.tail[kind][:, :, end - done :].clone()

    def dense(self, settled: bool = True) -> Pair:
        """K and V as they are seen; ``settled`` False: before what is due is coded."""
        if settled:
            self.settle()
        k, v = (torch.cat([self.decoded[kind], self.tail[kind]], 2) for kind in KINDS)
        return k, v

    def memory(self) -> Memory:
        self.settle()
        memory = Memory()
        for kind in KINDS if self.is_initialized else ():
            decoded, tail = self.decoded[kind], self.tail[kind]
            values = decoded.numel() + tail.numel()
            sinks = sum(parts["sinks"].numel() for parts in self.parts[kind] if "sinks" in parts)
            memory += Memory(
                window=tail.numel() * tail.itemsize,
                sealed_values=decoded.numel() - sinks,
                values=values,
                dense=values * tail.itemsize,
            )
            for parts in self.parts[kind]:
                memory += Memory(**{name: part.numel() * part.itemsize for name, part in parts.items()})
        return memory

    def room(self) -> int:
        """Tokens until something is coded."""
        tokens = self.get_seq_length()
        now = [self.method.coded(tokens, kind) for kind in KINDS]
        later = ([self.method.coded(tokens + new, kind) for kind in KINDS] for new in range(1, FURTHEST))
        return next((new for new, then in enumerate(later, 1) if then != now), FURTHEST)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first update brings all that is needed."""

    def get_seq_length(self) -> int:
        return sum(x["K"].shape[2] for x in (self.decoded, self.tail)) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """``get_max_length`` before transformers 5.14."""
        return -1
