"""The cache of one layer behind the interface of transformers, and what the layers of one cache share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar, cast
from weakref import ref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from kvcomp.calibration import LayerCalibration
from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.integrations.transformers.identity import configuration_of, difference, rope_switch
from kvcomp.integrations.transformers.models import identity_of, position_limit
from kvcomp.spec import CodecSpec
from kvcomp.store import Store, new_store

HIDDEN = -3e4  # an additive mask below this hides: softmax gives 0 in float32

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Keep a function out of the graphs of torch.compile, which cannot follow it."""
    return cast(F, torch.compiler.disable(function))


@dataclass(frozen=True)
class MaskPlan:
    """What a mask means, found once for all layers of a forward pass.

    starts: int64, for each row of the batch the first position that any query sees. causal: whether the mask says nothing but
    "from there on, and not ahead".
    """

    mask: ref[Tensor]
    starts: npt.NDArray[np.int64]
    causal: bool


class Session:
    """The model a cache belongs to, the mask of the forward pass that is under way, and the layer that a GPU compresses meanwhile."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = ref(config)
        self.identity = identity_of(config)
        self.configuration = configuration_of(config)
        self.rope_switch = rope_switch(config)
        self.limit = position_limit(config)
        self.plan: MaskPlan | None = None
        self.sealing: Store | None = None
        self.before = 0  # tokens before the forward pass
        self.longest = 0  # tokens at the end of the longest one
        self.failed = False  # it did: some layers may have its tokens, others not
        self.recording = False  # a step that a graph will repeat: what depends on its number is done outside

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raise InvalidInput if this is the configuration of another model."""
        other = identity_of(config)
        for name, mine in self.identity.items():
            if other[name] != mine:
                raise InvalidInput(
                    f"this cache was made for a model with {name} {mine!r}, not {other[name]!r}: make a KVCompCache for each model"
                )
        self.config = ref(config)

    def begin(self, new: int, before: int) -> None:
        """A forward pass over so many new tokens begins, after those before."""
        self.plan = None
        self.before = before
        self.longest = max(self.longest if before else 0, before + new)

    def length_matters(self, tokens: int) -> bool:
        """Whether the rotary frequencies of a forward pass that ends at so many tokens are others than those of a short one."""
        return self.rope_switch is not None and tokens >= self.rope_switch

    def check_lengths(self, *lengths: int) -> None:
        """Raise InvalidInput if the K of sequences of different lengths would come together, and depend on the length."""
        if len(set(lengths)) > 1 and self.length_matters(max(lengths)):
            raise InvalidInput(
                f"the model's rotary frequencies depend on the length from {self.rope_switch} tokens on, so K of {max(lengths)} tokens "
                f"is not that of {min(lengths)}: compute it anew"
            )

    def check_configuration(self, configuration: Mapping[str, Any]) -> None:
        """Raise InvalidInput if this is the configuration of a model whose K and V are others."""
        other = difference(self.configuration, configuration)
        if other:
            raise InvalidInput(f"this cache is of {other}: make a KVCompCache for each model")

    def plan_for(self, mask: Tensor, batch: int, queries: int, tokens: int) -> MaskPlan:
        if self.plan is None or self.plan.mask() is not mask:
            self.plan = read_mask(mask, batch, queries, tokens)
        return self.plan

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        twin = Session.__new__(Session)
        vars(twin).update(vars(self), plan=None, sealing=None)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InvalidInput("a KVCompCache cannot be pickled: its pages are addressed in this process's memory")


def read_mask(mask: Tensor, batch: int, queries: int, tokens: int) -> MaskPlan:
    """mask: (batch or 1, 1 or heads, queries, tokens), boolean (True: sees) or additive. Raises InvalidInput for another shape."""
    if (
        mask.ndim != 4
        or mask.shape[0] not in (1, batch)
        or mask.shape[2] not in (1, queries)
        or mask.shape[3] != tokens
    ):
        raise InvalidInput(
            f"the attention mask must be (batch, heads, queries, tokens) = ({batch}, 1, {queries}, {tokens}), not {tuple(mask.shape)}"
        )
    seen, plain = mask, True
    if mask.dtype != torch.bool:
        seen = mask > HIDDEN
        plain = bool((seen <= (mask == 0)).all())
    seen = seen.expand(batch, -1, queries, -1)
    anywhere = seen.any(2).any(1)  # (batch, tokens)
    first = torch.where(anywhere.any(1), anywhere.to(torch.uint8).argmax(1), tokens).cpu().numpy()
    causal = plain and seen.shape[1] == 1
    if causal and queries == 1:
        causal = bool((anywhere.sum(1).cpu().numpy() == tokens - first).all())
    elif causal:
        position = torch.arange(tokens, device=mask.device)
        for row, start in zip(seen[:, 0], first.tolist(), strict=True):
            behind = position[start:] <= position[tokens - queries :, None]
            causal = causal and torch.equal(row[:, start:], behind)
    return MaskPlan(ref(mask), first, causal)


class Source:
    """What the K and V of one update come from; as long as the layer holds nothing older, the new tokens themselves."""

    __slots__ = ("fresh", "layer", "tokens", "unread")

    def __init__(self, layer: CompressedLayer, fresh: tuple[Tensor, Tensor] | None) -> None:
        self.layer = layer
        self.tokens = layer.store.tokens
        self.fresh = fresh
        self.unread: dict[int, Tensor] = {}

    def dense(self, part: int) -> Tensor:
        """K (0) or V (1), (batch, KV heads, tokens, head_dim). Both are decompressed at once and kept until they are read."""
        self.check()
        if self.fresh is not None:
            return self.fresh[part]
        if part not in self.unread:
            self.unread = dict(enumerate(self.layer.store.dense()))
        return self.unread.pop(part)

    def check(self) -> None:
        """Raise InvalidInput if the layer has changed since."""
        if self.layer.store.tokens != self.tokens:
            raise InvalidInput(
                "these keys and values are from before the cache changed: take them from its last update"
            )


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
        shape = (store.batch, store.heads, store.tokens, store.channels)
        handle: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=store.dtype, device=store.device)
        handle.source, handle.part = source, part
        return handle

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{'KV'[self.part]} in a KVCompCache, {tuple(self.shape)}, {self.dtype}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.source.dense(self.part).clone()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def dense(x: Any) -> Any:
            return x.source.dense(x.part) if isinstance(x, Handle) else x

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


class CompressedLayer(CacheLayerMixin):
    """The cache of one full-attention layer: a KVStore behind the interface of a transformers cache layer."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(
        self, spec: CodecSpec, backend: str, session: Session, calibrated: LayerCalibration | None = None
    ) -> None:
        self.spec = spec
        self.calibrated = calibrated
        self.backend = backend
        self.session = session
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next update may have another batch size and dtype."""
        self.store: Store = new_store(self.spec, self.backend, self.calibrated)
        self.unsealed = False
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append K and V, both (batch, KV heads, new tokens, head_dim), and return all of both as handles.

        Raises UnsupportedModel if K and V differ in shape, InvalidInput or BackendUnavailable if they do not fit what is held;
        the layer is then as it was.
        """
        if key_states.shape != value_states.shape:
            raise UnsupportedModel(
                f"K is {tuple(key_states.shape)}, V {tuple(value_states.shape)}: kvcomp needs both of one shape (so no MLA)"
            )
        if self.unsealed:  # another attention implementation has the last word on when it has read its keys and values
            self.seal()
        self.upload(key_states.device)
        if self.session.sealing is not None:  # the device has the work up to this layer's attention to do
            self.session.sealing.proceed()
        self.store.append(key_states, value_states)
        self.unsealed = self.is_initialized = True
        source = Source(self, (key_states, value_states) if self.store.tokens == key_states.shape[2] else None)
        return Handle(source, 0), Handle(source, 1)

    def upload(self, device: torch.device) -> None:
        """Move to a GPU what was read from a file for the backend ``gpu``."""
        if self.backend == "gpu":
            self.store = self.store.to(device)

    def seal(self) -> None:
        """Compress what is older than the window. On a GPU a prompt is done when the next layer has come as far."""
        if self.session.recording:
            return
        self.unsealed = False
        before, self.session.sealing = self.session.sealing, None
        if before is not None:
            before.finish()
        self.store.seal()
        self.session.sealing = self.store

    def undo(self, tokens: int) -> None:
        """Take back an update of this many tokens that nothing has been sealed after."""
        if tokens == self.store.tokens:
            self.reset()
        else:
            self.store.crop(self.store.tokens - tokens)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All keys as a handle; None before the first update."""
        return Handle(Source(self, None), 0) if self.store.batch else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All values as a handle; None before the first update."""
        return Handle(Source(self, None), 1) if self.store.batch else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first update tells batch size, heads and dtype."""

    def get_seq_length(self) -> int:
        return self.store.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """``get_max_length`` before transformers 5.14."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """See ``KVCompCache.crop``."""
        if self.store.batch:
            kept = int(tokens_to_remove) if tokens_to_remove > 0 else self.store.tokens + int(tokens_to_remove)
            self.store.crop(min(max(0, kept), self.store.tokens))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store.batch:
            self.store.select(torch.arange(self.store.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store.batch:
            self.store.select(indices.nonzero() if indices.dtype == torch.bool else indices)

    def offload(self) -> None:
        raise InvalidInput("a KVCompCache cannot be offloaded: it is in main memory already")

    def prefetch(self) -> None:
        raise InvalidInput("a KVCompCache cannot be prefetched: it is never offloaded")
