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
from kvcomp.integrations.transformers.layers import is_compressed_window
from kvcomp.integrations.transformers.stock import stock_memory
from kvcomp.spec import KINDS, PAGE_TOKENS, PRESETS, Kind
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
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[index] = BaselineLayer(self)
            elif is_compressed_window(layer, config, PRESETS["kvcomp"]):  # those that kvcomp compresses
                layers[index] = BaselineLayer(self, layer.sliding_window)
        return Cache(layers=layers)

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

    What has been decoded is kept for speed and not counted: a decoder would make it anew each time. With a sliding
    window tokens are coded in pieces, as if they came one by one, and a piece that the window has left is dropped.
    """

    supports_early_init = False

    def __init__(self, method: Baseline, sliding_window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.method = method
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.reset()

    def reset(self) -> None:
        self.parts: dict[Kind, list[Parts]] = {"K": [], "V": []}
        self.sizes: dict[Kind, list[int]] = {"K": [], "V": []}
        self.decoded: dict[Kind, Tensor] = {}
        self.tail: dict[Kind, Tensor] = {}
        self.tokens = 0
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Append K and V, (batch, KV heads, new tokens, head_dim); the new tokens themselves are returned exact."""
        self.settle()
        for kind, new in zip(KINDS, (key_states, value_states), strict=True):
            if not self.is_initialized:
                self.decoded[kind] = self.tail[kind] = new[:, :, :0]
            self.tail[kind] = torch.cat([self.tail[kind], new], 2)
        self.is_initialized = True
        self.tokens += key_states.shape[2]
        return self._last(key_states.shape[2])

    def settle(self) -> None:
        """Code what is due. Raises InvalidInput if the baseline does not do what ``Baseline`` asks for."""
        if not self.is_initialized:
            return
        tokens = self.tokens
        for kind in KINDS:
            done, end = tokens - self.tail[kind].shape[2], self.method.coded(tokens, kind)
            if not done <= end <= tokens:
                raise InvalidInput(
                    f"{self.method.name}: coded({tokens}, {kind!r}) is {end}; "
                    f"it must lie between {done}, already coded, and {tokens}"
                )
            for last in self._ends(done, end, kind):
                if last > self._needed:
                    self._code(kind, last - done)
                self.tail[kind] = self.tail[kind][:, :, last - done :].clone()
                done = last
            self._drop(kind)

    def _code(self, kind: Kind, tokens: int) -> None:
        """Code the first tokens of the tail."""
        x = self.tail[kind][:, :, :tokens]
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
        self.sizes[kind].append(tokens)
        self.decoded[kind] = torch.cat([self.decoded[kind], back], 2)

    def _ends(self, done: int, end: int, kind: Kind) -> list[int]:
        """Where the pieces of the tokens to code end: one for all, with a sliding window pages as they became due."""
        if self.sliding_window is None or done == end:
            return [end] if end > done else []
        ends = [done]
        for tokens in range(done + 1, self.tokens + 1):
            due = self.method.coded(tokens, kind)
            if due >= ends[-1] + PAGE_TOKENS:
                ends.append(due)
        return [*ends[1:], *([end] if end > ends[-1] else [])]

    def _drop(self, kind: Kind) -> None:
        """Drop pieces that the next token does not see."""
        sizes = self.sizes[kind]
        begin = self.tokens - self.tail[kind].shape[2] - self.decoded[kind].shape[2]
        while sizes and begin + sizes[0] <= self._needed:
            begin += sizes[0]
            self.decoded[kind] = self.decoded[kind][:, :, sizes.pop(0) :]
            self.parts[kind].pop(0)

    @property
    def _needed(self) -> int:
        """The first position that the next token sees."""
        return self.tokens - self._seen(self.tokens)

    def dense(self) -> Pair:
        """K and V as the next token sees them."""
        self.settle()
        return self._last(0)

    def _last(self, new: int) -> Pair:
        """K and V that the last ``new`` tokens, or the next one, see."""
        seen = self._seen(self.tokens - new) + new
        k, v = (torch.cat([self.decoded[kind], self.tail[kind]], 2)[:, :, -seen:] for kind in KINDS)
        return k, v

    def _seen(self, tokens: int) -> int:
        """How many of so many tokens the next one sees, beside itself."""
        return tokens if self.sliding_window is None else min(tokens, self.sliding_window - 1)

    def memory(self) -> Memory:
        self.settle()
        memory = Memory()
        for kind in KINDS if self.is_initialized else ():
            decoded, tail = self.decoded[kind], self.tail[kind]
            batch, heads, _, channels = tail.shape
            values = batch * heads * self._seen(self.tokens) * channels
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
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen(self.tokens) + query_length, self._needed

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window
