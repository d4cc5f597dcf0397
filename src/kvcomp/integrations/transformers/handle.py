"""K and V of a compressed layer as tensors without storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Never, Self, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from kvcomp.errors import InvalidInput

if TYPE_CHECKING:
    from kvcomp.integrations.transformers.layer import CompressedLayer


F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Keep a function out of the graphs of torch.compile, which cannot follow it."""
    return cast(F, torch.compiler.disable(function))


class Source:
    """What the K and V of one update come from: the last ``seen`` tokens of a layer, and as long as it holds nothing
    older the new tokens themselves.
    """

    __slots__ = ("fresh", "layer", "seen", "tokens", "unread")

    def __init__(self, layer: CompressedLayer, seen: int, fresh: tuple[Tensor, Tensor] | None) -> None:
        self.layer = layer
        self.tokens = layer.store.tokens
        self.seen = seen
        self.fresh = fresh
        self.unread: dict[int, Tensor] = {}

    @uncompiled
    def dense(self, part: int) -> Tensor:
        """K (0) or V (1), (batch, KV heads, last tokens, head_dim). Both are decompressed at once and kept until they
        are read.
        """
        self.check()
        if self.fresh is not None:
            return self.fresh[part].contiguous()  # as the handle says that it is
        if part not in self.unread:
            self.unread = dict(enumerate(self.layer.dense(self.seen)))
        return self.unread.pop(part)

    def check(self) -> None:
        """Raise InvalidInput if the layer has changed since."""
        if self.layer.store.tokens != self.tokens or not self.layer.holds(self.seen):
            raise InvalidInput(
                "these keys and values are from before the cache changed: take them from its last update"
            )


class WithoutGradient(torch.autograd.Function):
    """Results that a compressed cache made of tensors with gradients: asking for those is an error, not a zero."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], *of: Tensor) -> Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Never:
        raise InvalidInput(
            "no gradient passes through a KVCompCache, which keeps rounded values: use a DynamicCache or none, "
            "or torch.no_grad() if no gradient is needed"
        )


def without_gradient(make: Callable[[], Tensor], *of: Tensor) -> Tensor:
    """A new tensor that follows from these, and refuses to pass a gradient on to them."""
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in of):
        return make()
    made: Tensor = WithoutGradient.apply(make, *of)  # type: ignore[no-untyped-call]
    return made


class Handle(Tensor):
    """K or V of a layer, with its shape (batch, KV heads, tokens, head_dim) and dtype but no storage.

    The attention function "kvcomp" reads the store behind it. Any torch operation on it decompresses the layer.
    """

    source: Source
    part: int
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, source: Source, part: int) -> Self:
        store = source.layer.store
        shape = (store.batch, store.heads, source.seen, (store.channels, store.value_channels)[part])
        handle: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=store.dtype, device=store.device)
        handle.source, handle.part = source, part
        return handle

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{'KV'[self.part]} in a KVCompCache, {tuple(self.shape)}, {self.dtype}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.source.dense(self.part).clone()

    def __setitem__(self, index: Any, value: Any) -> Never:
        # which else writes to what a slice was decompressed to, and is lost
        raise InvalidInput("K and V in a KVCompCache cannot change: they are compressed")

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.source.dense(self.part).__dlpack__(**kwargs)  # torch's own reads the storage there is none of

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def dense(x: Any) -> Any:
            return x.source.dense(x.part) if isinstance(x, Handle) else x

        schema, written = getattr(func, "_schema", None), (*args[:1], (kwargs or {}).get("out"))
        if schema is not None and schema.is_mutable and any(isinstance(x, Handle) for x in written):
            raise InvalidInput(f"{schema.name} cannot change K and V in a KVCompCache: they are compressed")
        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


def source_of(key: Tensor, value: Tensor) -> Source | None:
    """What both come from, if they are the K and the V of one update; None where a model has made others of them."""
    if not (isinstance(key, Handle) and isinstance(value, Handle)):
        return None
    return key.source if key.source is value.source and (key.part, value.part) == (0, 1) else None
