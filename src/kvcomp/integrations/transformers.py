"""Hugging Face transformers: a compressed ``Cache`` and attention on its compressed bytes.

    from kvcomp.integrations.transformers import KVCompCache    # registers the attention function "kvcomp"

    cache = KVCompCache(model.config)
    model.set_attn_implementation("kvcomp")
    model.generate(**inputs, past_key_values=cache)
    print(cache.memory())

A prompt is attended exactly and then compressed; decoding reads the compressed pages where they lie. Under another attention
implementation (sdpa, eager) results are as right, but each layer's cache is decompressed whole for its turn, tokens are compressed
one forward pass late, and left padding is stored as tokens are.

Works with transformers 5.14 to 5.23.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Self, TypeVar, cast
from weakref import ref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvcomp import files
from kvcomp.attention import FUSED_QUERIES, attend, attend_tiled
from kvcomp.errors import InvalidInput, LimitExceeded, UnsupportedModel
from kvcomp.kernels import load_backend
from kvcomp.spec import CodecSpec
from kvcomp.store import KVStore, Memory

NAME = "kvcomp"
HIDDEN = -3e4  # an additive mask below this hides: softmax gives 0 in float32
SCORES = 1 << 24  # scores held at a time by attention with a soft cap

ATTENTION_SINKS = {
    "deepseek_v4", "flint", "gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "mimo_v2_flash", "openai_privacy_filter",
}  # fmt: skip
POSITION_BIAS = {"bloom", "inkling", "inkling2", "mpt"}
IDENTITY = (
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
FINGERPRINT = (*IDENTITY, "head_dim", "vocab_size", "rope_parameters", "layer_types", "sliding_window")


F = TypeVar("F", bound=Callable[..., Any])


def _uncompiled(function: F) -> F:
    """Keep a function out of the graphs of torch.compile, which cannot follow it."""
    return cast(F, torch.compiler.disable(function))


# What the layers of one cache share


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
    """The model a cache belongs to, and the mask of the forward pass that is under way."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = ref(config)
        self.identity = _identity(config)
        self.fingerprint = _fingerprint(config)
        self.limit = _position_limit(config)
        self.plan: MaskPlan | None = None

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raise InvalidInput if this is the configuration of another model."""
        other = _identity(config)
        for name, mine in self.identity.items():
            if other[name] != mine:
                raise InvalidInput(
                    f"this cache was made for a model with {name} {mine!r}, not {other[name]!r}: make a KVCompCache for each model"
                )
        self.config = ref(config)

    def plan_for(self, mask: Tensor, batch: int, queries: int, tokens: int) -> MaskPlan:
        if self.plan is None or self.plan.mask() is not mask:
            self.plan = _read_mask(mask, batch, queries, tokens)
        return self.plan

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        twin = Session.__new__(Session)
        vars(twin).update(vars(self), plan=None)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InvalidInput("a KVCompCache cannot be pickled: its pages are addressed in this process's memory")


def _identity(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: _get(config, name) for name in IDENTITY}


def _fingerprint(config: PreTrainedConfig) -> dict[str, Any]:
    """What a file keeps of the configuration: that on which K and V depend, in the form in which JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps({name: _get(config, name) for name in FINGERPRINT}, default=str))
    return found


def _check_origin(model: Mapping[str, Any] | None, fingerprint: Mapping[str, Any], model_id: str | None) -> None:
    """Raise InvalidInput if a file's cache is not of the model with this fingerprint and id."""
    if model is None:
        raise InvalidInput("the file holds tensors without a model: read it with kvcomp.load")
    theirs = model.get("configuration")
    theirs = theirs if isinstance(theirs, dict) else {}
    for name in sorted({*theirs, *fingerprint}):
        if theirs.get(name) != fingerprint.get(name):
            raise InvalidInput(
                f"the file is of a model with {name} {theirs.get(name)!r}, not {fingerprint.get(name)!r}: give that model's configuration"
            )
    if model.get("id") != model_id:
        raise InvalidInput(
            f"the file is of the model_id {model.get('id')!r}, not {model_id!r}: give the one it was saved with"
        )


def _position_limit(config: PreTrainedConfig) -> int | None:
    """Tokens the model's positions allow; None where rotary positions are stretched, which has no such limit."""
    limit = _get(config, "max_position_embeddings")
    rope = _get(config, "rope_parameters") or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    stretched = any(part.get("rope_type", "default") not in ("default", "proportional") for part in parts)
    return limit if isinstance(limit, int) and limit > 0 and not stretched else None


def _read_mask(mask: Tensor, batch: int, queries: int, tokens: int) -> MaskPlan:
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
    first = torch.where(anywhere.any(1), anywhere.to(torch.uint8).argmax(1), tokens).numpy()
    causal = plain and seen.shape[1] == 1
    if causal and queries == 1:
        causal = bool((anywhere.sum(1).numpy() == tokens - first).all())
    elif causal:
        position = torch.arange(tokens)
        for row, start in zip(seen[:, 0], first.tolist(), strict=True):
            behind = position[start:] <= position[tokens - queries :, None]
            causal = causal and torch.equal(row[:, start:], behind)
    return MaskPlan(ref(mask), first, causal)


# The cache


class _Source:
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


class _Handle(Tensor):
    """K or V of a layer, with its shape (batch, KV heads, tokens, head_dim) and dtype but no storage.

    The attention function "kvcomp" reads the store behind it. Any torch operation on it decompresses the layer.
    """

    source: _Source
    part: int
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, source: _Source, part: int) -> Self:
        store = source.layer.store
        shape = (store.batch, store.heads, store.tokens, store.channels)
        handle: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=store.dtype)
        handle.source, handle.part = source, part
        return handle

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{'KV'[self.part]} in a KVCompCache, {tuple(self.shape)}, {self.dtype}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.source.dense(self.part).clone()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def dense(x: Any) -> Any:
            return x.source.dense(x.part) if isinstance(x, _Handle) else x

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


class CompressedLayer(CacheLayerMixin):
    """The cache of one full-attention layer: a KVStore behind the interface of a transformers cache layer."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, spec: CodecSpec, backend: str, session: Session) -> None:
        self.spec = spec
        self.backend = backend
        self.session = session
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next update may have another batch size and dtype."""
        self.store = KVStore(self.spec, self.backend)
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
        self.store.append(key_states, value_states)
        self.unsealed = self.is_initialized = True
        source = _Source(self, (key_states, value_states) if self.store.tokens == key_states.shape[2] else None)
        return _Handle(source, 0), _Handle(source, 1)

    def seal(self) -> None:
        """Compress what is older than the window."""
        self.unsealed = False
        self.store.seal()

    def undo(self, tokens: int) -> None:
        """Take back an update of this many tokens that nothing has been sealed after."""
        if tokens == self.store.tokens:
            self.reset()
        else:
            self.store.crop(self.store.tokens - tokens)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All keys as a handle; None before the first update."""
        return _Handle(_Source(self, None), 0) if self.store.batch else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All values as a handle; None before the first update."""
        return _Handle(_Source(self, None), 1) if self.store.batch else None

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


class KVCompCache(Cache):
    """A transformers cache that keeps the K and V of full-attention layers compressed.

    config: the configuration of the model (``model.config``); of a multi-modal model the text part is taken. Sliding-window,
        chunked and linear-attention layers, which are small, get the cache layers that transformers gives them.
    spec: a CodecSpec, a preset's name or the path of a spec.json.
    backend: ``cpu``, or ``reference`` to check against it.

    Raises UnsupportedModel if the model's cache cannot be held, and InvalidInput or BackendUnavailable for the other arguments.
    """

    def __init__(
        self, config: PreTrainedConfig, spec: str | Path | CodecSpec = "kvcomp", *, backend: str = "cpu"
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise InvalidInput(f"config must be a model's configuration (model.config), not {type(config).__name__}")
        config = _supported(config)
        self.spec = CodecSpec.resolve(spec)
        load_backend(backend)
        self.session = Session(config)
        layers: list[Any] = DynamicCache(config=config).layers
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                _check_layer(config, index)
                layers[index] = CompressedLayer(self.spec.layer(index, len(layers)), backend, self.session)
        self.first = next((i for i, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)), 0)
        super().__init__(layers=layers)

    def save(self, path: str | Path, model_id: str | None = None, rows: Sequence[int] | None = None) -> None:
        """Write a .kvc file from which ``load`` goes on as if nothing had happened; it takes the place of what was there.

        model_id: a name for the weights, such as a commit, that ``load`` must then be given too; the configuration is always compared.
        rows: which of the batch to write, all if None. Raises InvalidInput for an empty cache, UnsupportedModel if a layer is not
        compressed (sliding windows and the like, which cannot be saved), and OSError.
        """
        self._check_saveable()
        for layer in self.compressed_layers:
            if layer.unsealed:
                layer.seal()
        stores = {index: layer.store for index, layer in enumerate(self.compressed_layers)}
        model = {"id": model_id, "configuration": self.session.fingerprint}
        files.save(path, stores, self.spec, len(stores), model, rows)

    @classmethod
    def load(
        cls,
        path: str | Path | Sequence[str | Path],
        config: PreTrainedConfig,
        model_id: str | None = None,
        tokens: int | None = None,
        rows: Sequence[int] | None = None,
        *,
        backend: str = "cpu",
    ) -> Self:
        """The cache that ``save`` wrote, without decoding anything; nobody may write into the file as long as the cache lives.

        path: a file, or several whose rows become one batch, padded on the left. tokens: how many of the first to keep, all if None.
        rows: which of each file, all if None. Raises CorruptData, UnsupportedVersion, LimitExceeded or OSError, and InvalidInput or
        UnsupportedModel for a file of another model or without what is asked for.
        """
        paths = [path] if isinstance(path, str | Path) else list(path)
        if not paths:
            raise InvalidInput("there is no file to load: give at least one path")
        containers = [files.open_container(one) for one in paths]
        cache = cls(config, containers[0].header.spec, backend=backend)
        cache._check_saveable()
        for container in containers:
            header = container.header
            _check_origin(header.model, cache.session.fingerprint, model_id)
            if header.spec != cache.spec or len(header.layers) != len(cache.layers):
                raise InvalidInput(
                    f"the file holds {len(header.layers)} layers under the spec {header.spec}: not what is needed here"
                )
            cache._check_limit(max(1, header.tokens if tokens is None else tokens), 0)
        read = [files.load(container, backend, None, rows, tokens) for container in containers]
        for index, layer in enumerate(cache.compressed_layers):
            layer.store = files.join([stores[index] for stores in read]) if len(read) > 1 else read[0][index]
            layer.is_initialized = True
        return cache

    def _check_saveable(self) -> None:
        others = [index for index, layer in enumerate(self.layers) if not isinstance(layer, CompressedLayer)]
        if others:
            raise UnsupportedModel(
                f"layers {others} are not compressed (a sliding window or the like) and cannot be saved in a file yet"
            )

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def memory(self) -> Memory:
        """Bytes by part, over all layers. Those of layers that are not compressed count as ``other``, and as much as ``dense``."""
        parts = [layer.store.memory() if isinstance(layer, CompressedLayer) else _stock(layer) for layer in self.layers]
        return reduce(add, parts, Memory())

    @_uncompiled
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the K and V of a layer, both (batch, KV heads, new tokens, head_dim); returns all of both.

        Raises InvalidInput if they are not of the model that the cache was made for, LimitExceeded for more tokens than the model's
        positions allow; the cache is then as it was.
        """
        if layer_idx == self.first:
            self.session.plan = None
            self._check_limit(key_states.shape[-2], self.get_seq_length(layer_idx))
        elif layer_idx >= len(self.layers):
            self.crop(-key_states.shape[-2])
            raise InvalidInput(f"this cache was made for a model of {len(self.layers)} layers, and this one has more")
        layer: Any = self.layers[layer_idx]
        both: tuple[Tensor, Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        return both

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask for this many new tokens. Raises LimitExceeded if the model's positions do not allow them."""
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        self._check_limit(query_length, length + offset - query_length)
        return length, offset

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number is the length to keep, as it was in older transformers."""
        layers: list[Any] = list(self.layers)
        layers.sort(key=lambda layer: isinstance(layer, CompressedLayer))  # those that may refuse go first
        for layer in layers:
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make the rows those of these indices, which may repeat; compressed pages are shared."""
        if beam_idx.tolist() != list(range(self._batch())):
            super().reorder_cache(beam_idx)

    def __repr__(self) -> str:
        compressed = self.compressed_layers
        tokens = compressed[0].store.tokens if compressed else 0
        stock = len(self.layers) - len(compressed)
        return (
            f"KVCompCache({len(compressed)} compressed layers{f', {stock} others' if stock else ''}, "
            f"{tokens} tokens, batch of {self._batch()})"
        )

    def _batch(self) -> int:
        return next((layer.store.batch for layer in self.compressed_layers), 0)

    def _check_limit(self, new: int, seen: int) -> None:
        if new < 1:
            raise InvalidInput("there are no new tokens: give at least one")
        limit = self.session.limit
        if limit is not None and seen + new > limit:
            raise LimitExceeded(
                f"the model's positions end at {limit} tokens: the cache holds {seen}, so {new} more do not fit"
            )


def _supported(config: PreTrainedConfig) -> PreTrainedConfig:
    """The text configuration. Raises UnsupportedModel for models whose K and V this cache cannot hold."""
    text = config.get_text_config(decoder=True)
    cross = _get(text, "cross_attention_layers") or _get(text, "add_cross_attention")
    bias = _get(text, "alibi") or _get(text, "relative_attention_num_buckets") or text.model_type in POSITION_BIAS
    reasons = {
        "is an encoder-decoder, whose cross-attention has a cache of its own": config.is_encoder_decoder,
        "has cross-attention layers, whose keys are not those of its tokens": cross,
        "has latent attention (MLA), whose cache the model itself compresses": _get(text, "kv_lora_rank"),
        "has attention sink parameters, which the fused kernel does not know": text.model_type in ATTENTION_SINKS,
        "adds a bias by position to its scores (as T5 and ALiBi do), which the fused kernel does not know": bias,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedModel(f"{config.model_type} cannot use a KVCompCache: it {reason}")
    return text


def _check_layer(config: PreTrainedConfig, index: int) -> None:
    """Raise UnsupportedModel if the heads of a full-attention layer do not fit the format."""
    own = getattr(config, "per_layer_config", None)
    config = own[index] if isinstance(own, Sequence) else config
    heads, width = _get(config, "num_attention_heads"), _get(config, "hidden_size")
    head_dim = _get(config, "global_head_dim") or _get(config, "head_dim") or (heads and width and width // heads)
    other = _get(config, "v_head_dim")
    if head_dim and other and other != head_dim:
        raise UnsupportedModel(
            f"{config.model_type} cannot use a KVCompCache: head_dim is {head_dim} in K and {other} in V"
        )
    if head_dim and (head_dim % 16 or head_dim > 256):
        raise UnsupportedModel(
            f"{config.model_type} cannot use a KVCompCache: head_dim is {head_dim}, not a multiple of 16 up to 256"
        )


def _get(config: PreTrainedConfig, name: str) -> Any:
    """A setting; None if there is none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' word for: ask the layer
        return None


def _stock(layer: Any) -> Memory:
    """The memory of one of transformers' own cache layers."""
    found: list[Tensor] = []
    for value in vars(layer).values():
        inside = value.values() if isinstance(value, dict) else [value]
        found += [x for x in inside if isinstance(x, Tensor) and x.is_floating_point()]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
    return Memory(
        other=sum(storages.values()),
        values=sum(x.numel() for x in found),
        dense=sum(x.numel() * x.itemsize for x in found),
    )


# Attention


@_uncompiled
def kvcomp_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, over a KVCompCache or over plain tensors.

    query: (batch, heads, new tokens, head_dim). key, value: what ``update`` returned, or (batch, KV heads, tokens, head_dim).
    attention_mask: None for causal, or (batch, 1 or heads, new tokens, tokens), boolean or additive.
    Returns (batch, new tokens, heads, head_dim) in the query's dtype, and no weights.
    Raises UnsupportedModel or InvalidInput for what it cannot do; a KVCompCache layer is then as it was before its update.
    """
    source = key.source if isinstance(key, _Handle) else None
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    try:
        if s_aux is not None or position_bias is not None:
            what = "attention sink parameters" if s_aux is not None else "a position bias"
            raise UnsupportedModel(f'the attention "{NAME}" does not know {what}: use another attn_implementation')
        if output_attentions:
            raise InvalidInput(
                f'the attention "{NAME}" computes no weights: use attn_implementation="eager" for output_attentions'
            )
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if source is None:
            out = _dense(module, query, key, value, attention_mask, scaling, softcap, causal, dropout, **kwargs)
            return out, None
        source.check()
        if dropout or (module.training and query.requires_grad and torch.is_grad_enabled()):
            raise InvalidInput("a KVCompCache is for inference, and this model is training: call model.eval()")
        config = getattr(module, "config", None)
        session = source.layer.session
        if session.config() is not config and config is not None:
            session.check_model(config)
        out = _over_store(module, query, source, attention_mask, scaling, softcap, causal)
    except (InvalidInput, UnsupportedModel):
        if source is not None and source.layer.unsealed and source.tokens == source.layer.store.tokens:
            source.layer.undo(query.shape[2])
        raise
    return out, None


def _over_store(
    module: torch.nn.Module,
    query: Tensor,
    source: _Source,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    causal: bool,
) -> Tensor:
    """Attention over a compressed layer, which may compress the new tokens afterwards."""
    layer, store = source.layer, source.layer.store
    batch, heads, queries, _ = query.shape
    tokens = store.tokens
    if mask is None and queries > 1 and not causal:
        mask = torch.ones((1, 1, queries, tokens), dtype=torch.bool)
    plain = mask is None or _is_plain(store, layer.session.plan_for(mask, batch, queries, tokens), queries)
    fresh, source.fresh = source.fresh, None
    if fresh is None and plain and queries * heads // store.heads <= FUSED_QUERIES:
        out = attend(store, query, scaling, softcap or 0.0).transpose(1, 2).contiguous()
    elif fresh is not None or not store.compressed:
        if mask is None and 1 < queries < tokens:
            mask = torch.ones((queries, tokens), dtype=torch.bool).tril(tokens - queries)[None, None]
        out = _dense(module, query, *(fresh or store.dense()), mask, scaling, softcap, causal)
    else:
        out = attend_tiled(store, query, scaling, softcap or 0.0, None if plain else mask).transpose(1, 2).contiguous()
    del fresh  # not needed while the layer is compressed
    layer.seal()
    return out


def _is_plain(store: KVStore, plan: MaskPlan, queries: int) -> bool:
    """Whether causal attention over the store is what the mask asks for. Tells the store where its rows begin.

    A row can only begin later as long as it holds nothing but padding. What came in as padding stays invisible.
    """
    empty = store.starts >= store.tokens - queries
    if empty.any():
        store.set_starts(np.where(empty, plan.starts, store.starts).tolist())
    return plan.causal and bool((plan.starts <= store.starts).all())


def _dense(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    causal: bool,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """Attention over plain tensors, (batch, new tokens, heads, head_dim): sdpa, or by hand with a soft cap.

    Without a mask causal queries are the first tokens, as for sdpa: a static cache is longer than what it holds.
    """
    queries = query.shape[2]
    if softcap:
        if mask is None and causal and queries > 1:
            mask = torch.ones((queries, key.shape[2]), dtype=torch.bool, device=query.device).tril()[None, None]
        return _softcapped(query, key, value, mask, scaling, softcap, dropout)
    out: Tensor = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal, **kwargs
    )[0]
    return out


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float, dropout: float
) -> Tensor:
    """softmax(softcap tanh(scaling q.K / softcap)) V, some queries at a time."""
    batch, heads, queries, channels = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    step = max(1, SCORES // (batch * heads * tokens))
    parts = []
    for first in range(0, queries, step):
        part = query[:, :, first : first + step]
        new = part.shape[2]
        grouped = part.reshape(batch, kv_heads, -1, channels)
        score = (grouped @ key.mT).view(batch, heads, new, tokens) * scaling
        score = softcap * torch.tanh(score / softcap)
        if mask is not None:
            seen = mask.expand(-1, -1, queries, -1)[:, :, first : first + step]
            hidden = torch.finfo(score.dtype).min
            score = score.masked_fill(~seen, hidden) if mask.dtype == torch.bool else score + seen
        weight = score.softmax(-1, dtype=torch.float32).to(query.dtype)
        weight = torch.nn.functional.dropout(weight, dropout)
        out = weight.view(batch, kv_heads, -1, tokens) @ value
        parts.append(out.view(batch, heads, new, -1).transpose(1, 2))
    return torch.cat(parts, dim=1).contiguous()


AttentionInterface.register(NAME, kvcomp_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
