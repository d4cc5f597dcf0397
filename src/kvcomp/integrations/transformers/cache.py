"""Hugging Face transformers: a compressed ``Cache`` and attention on its compressed bytes.

    from kvcomp.integrations.transformers import KVCompCache    # registers the attention function "kvcomp"

    cache = KVCompCache(model.config)
    model.set_attn_implementation("kvcomp")
    model.generate(**inputs, past_key_values=cache)
    print(cache.memory())

A prompt is attended exactly and then compressed; decoding reads the compressed pages where they lie. Under another
attention implementation (sdpa, eager) results are as right, but each layer's cache is decompressed whole for its turn,
tokens are compressed one forward pass late, and left padding is stored as tokens are.

Works with transformers 5.14 to 5.23.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from kvcomp import files
from kvcomp.calibration import Calibration, resolve
from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.integrations.transformers import files as transformers_files
from kvcomp.integrations.transformers.attention import NAME, kvcomp_attention
from kvcomp.integrations.transformers.budget import plan_for
from kvcomp.integrations.transformers.handle import uncompiled
from kvcomp.integrations.transformers.identity import check_origin, weights_id
from kvcomp.integrations.transformers.join import joined_layers
from kvcomp.integrations.transformers.layer import CompressedLayer
from kvcomp.integrations.transformers.layers import cache_layers, check_rows, rows_of
from kvcomp.integrations.transformers.masks import kvcomp_mask
from kvcomp.integrations.transformers.models import fingerprint_of, spec_for_latents, text_config
from kvcomp.integrations.transformers.session import ForwardPass, Session
from kvcomp.integrations.transformers.sliding import SlidingLayer
from kvcomp.integrations.transformers.stock import has_state, is_linear, stock_memory
from kvcomp.kernels import host_backend, load_backend
from kvcomp.spec import CodecSpec
from kvcomp.store import Memory
from kvcomp.store.checks import check_tensor, row_index


class KVCompCache(Cache):
    """A transformers cache that keeps K and V compressed, of full attention and of sliding windows from 512 tokens on.

    Smaller windows, chunks and linear attention get the layers that transformers gives them, and on a GPU all windows.

    Parameters
    ----------
    config
        The configuration of the model (``model.config``). Of a multi-modal model the text part is taken.
    spec
        A CodecSpec, a preset's name or the path of a spec.json. ``kvcomp-klt:balanced`` names a level of a calibration.
    calibration
        Of the model, for ``kvcomp-klt`` and ``packed-klt``: a .kvcal file of ``kvcomp calibrate``, or what was read.
    budget, context
        Bytes of the cache, or a size such as ``2GiB``, in place of a level: each layer takes one, so that a sequence of
        ``context`` tokens fits, by default all of the model's. ``plan`` then says which, and the KL to expect.
    backend
        ``cpu``, or ``gpu`` for a model on NVIDIA GPUs, or ``reference`` to check against it.

    Raises
    ------
    UnsupportedModel
        If the model's cache cannot be held.
    InvalidInput, BackendUnavailable
        For the other arguments.
    CorruptData, UnsupportedVersion, LimitExceeded
        If the calibration's file is damaged, newer or too large. LimitExceeded also if no level fits the budget.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> cache = KVCompCache(LlamaConfig())
    >>> cache.get_seq_length()
    0
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        spec: str | Path | CodecSpec = "kvcomp",
        *,
        calibration: Calibration | str | Path | None = None,
        budget: int | str | None = None,
        context: int | None = None,
        backend: str = "cpu",
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise InvalidInput(f"config must be a model's configuration (model.config), not {type(config).__name__}")
        config = text_config(config)
        resolved, self.calibration = resolve(spec, calibration)
        if backend != "gpu":  # which is found where the first tokens are
            load_backend(backend)
        self.session = Session(config)
        if self.calibration is not None:
            self.calibration.check_model(fingerprint_of(config))
            self.session.calibrated_tokens = self.calibration.tokens
        if budget is None and context is not None:
            raise InvalidInput("context says how many tokens a budget is for: give a budget too, or no context")
        self.plan = None if budget is None else plan_for(config, spec, self.calibration, budget, context, backend)
        self.spec = self.plan.spec if self.plan else spec_for_latents(config, resolved)
        layers = cache_layers(config, self.spec, self.calibration, backend, self.session)
        self.first = next((i for i, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)), 0)
        self.session.linear = frozenset(index for index, layer in enumerate(layers) if is_linear(layer))
        super().__init__(layers=layers)

    def save(
        self,
        path: str | Path,
        model_id: str | nn.Module | None = None,
        rows: Sequence[int] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Write a .kvc file, from which ``load`` goes on as if nothing had happened.

        Parameters
        ----------
        path
            Takes the place of a file that is there.
        model_id
            The model itself, whose weights are hashed, or a name for them, such as a commit. ``load`` must be given the
            same. With None only the configuration is compared, and another model of the same shape passes.
        rows
            Which of the batch to write; all if None.
        layers
            Which ones to write; all if None. ``kvcomp.load`` reads single layers.

        Raises
        ------
        InvalidInput
            For an empty cache, or a path, rows or layers that are none.
        UnsupportedModel
            If a layer is none of full attention, sliding window and linear attention.
        OSError
            If the file cannot be written; what was there is then as it was.
        """
        self.session.check_ended()
        self.session.check_lengths(self.session.longest, self.get_seq_length())
        stores = transformers_files.stores_of(self.layers, self.spec)
        chosen = sorted(stores) if layers is None else layers
        if not isinstance(chosen, Sequence) or not chosen or not all(x in tuple(stores) for x in chosen):
            raise InvalidInput(f"layers must be some of the {len(stores)} that the cache has, not {chosen}")
        model = {
            "id": weights_id(model_id),
            "configuration": self.session.configuration,
            "not_from_ids": self.session.not_from_ids,
        }
        states = transformers_files.linear_states(self.layers) if layers is None else None
        files.save(path, {index: stores[index] for index in chosen}, self.spec, len(self.layers), model, rows, states)

    @classmethod
    def load(
        cls,
        path: str | Path | Sequence[str | Path],
        config: PreTrainedConfig,
        model_id: str | nn.Module | None = None,
        tokens: int | None = None,
        rows: Sequence[int] | None = None,
        *,
        calibration: Calibration | str | Path | None = None,
        backend: str = "cpu",
    ) -> Self:
        """Read a cache that ``save`` wrote, without decoding anything. Nobody may write into the file meanwhile.

        Parameters
        ----------
        path
            A file, or several whose rows become one batch, padded on the left.
        config
            The model's configuration.
        model_id
            As it was given to ``save``. The model itself also shows what its sliding windows and linear attention hold
            and where, with which the file's are compared.
        tokens
            How many of the first to keep; all if None. Sliding windows and linear attention leave no prefix to cut.
        rows
            Which of each file; all if None.
        calibration
            The one that the cache was compressed with, if with any.
        backend
            As for a new cache.

        Raises
        ------
        CorruptData, UnsupportedVersion, LimitExceeded, OSError
            If the file, or the calibration's, is damaged, newer, too large, or cannot be read.
        InvalidInput, UnsupportedModel, BackendUnavailable
            If it is of another model, does not hold what is asked for, or there is no such backend.
        """
        paths = list(path) if isinstance(path, Sequence) and not isinstance(path, str) else [path]
        if not paths:
            raise InvalidInput("there is no file to load: give at least one path")
        containers = [files.open_container(one) for one in paths]
        cache = cls(config, containers[0].header.spec, calibration=calibration, backend=backend)
        transformers_files.check_layers(cache.layers)
        identity = weights_id(model_id)
        filled = transformers_files.filled_layers(model_id, cache.layers, backend)
        for container in containers:
            header = container.header
            check_origin(header.model, cache.session.configuration, identity)
            transformers_files.check_header(header, cache.layers, cache.spec, filled)
            kept = header.tokens if tokens is None else tokens
            cache.session.check_limit(max(1, kept), 0)
            cache.session.check_lengths(header.tokens, kept, containers[0].header.tokens)
            cache.session.longest = header.tokens
            cache.session.not_from_ids = cache.session.not_from_ids or transformers_files.not_from_ids(header)
        read = [files.load(one, host_backend(backend), None, rows, tokens, cache.calibration) for one in containers]
        whole = all(tokens in (None, one.header.tokens) for one in containers)
        for index, first in read[0].items():
            store = first.join([stores[index] for stores in read[1:]]) if len(read) > 1 else first
            transformers_files.give(cache.layers, index, store, filled and filled[index], whole)
        transformers_files.give_linear(cache.layers, containers, rows, tokens, filled)
        return cache

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def memory(self) -> Memory:
        """Bytes by part, over all layers. Those that are not compressed count as ``other`` and ``dense``."""
        parts = [x.store.memory() if isinstance(x, CompressedLayer) else stock_memory(x) for x in self.layers]
        return sum(parts, Memory())

    @uncompiled
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the K and V of a layer, as transformers calls it.

        Parameters
        ----------
        key_states, value_states
            (batch, KV heads, new tokens, head_dim) each, float32, float16 or bfloat16.
        layer_idx
            The layer's number.

        Returns
        -------
        keys, values
            All of both, old and new. They hold no values until a torch operation asks for them.

        Raises
        ------
        InvalidInput, BackendUnavailable
            If they are not of the cache's model, or on a device of another backend; the cache is then as it was.
        LimitExceeded
            For more tokens than the model's positions allow, or a GPU has memory for.
        """
        session = self.session
        check_tensor("K", key_states)
        check_tensor("V", value_states)
        if layer_idx == self.first:
            self._begin(key_states.shape[-2])
        with session.forward or nullcontext():
            if not isinstance(layer_idx, int) or not 0 <= layer_idx < len(self.layers):
                raise InvalidInput(
                    f"the model of this cache has {len(self.layers)} layers: none is number {layer_idx!r}"
                )
            layer: Any = self.layers[layer_idx]
            check_rows(layer, key_states.shape[0])
            both: tuple[Tensor, Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        return both

    @uncompiled
    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        self.session.moved.add(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    @uncompiled
    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        self.session.moved.add(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def _begin(self, new: int) -> None:
        """Begin a forward pass with so many new tokens. Raises InvalidInput if the one before did not end."""
        self.session.check_lengths_agree()
        seen = self.get_seq_length(self.first)
        self.session.check_limit(new, seen)
        self.session.begin(ForwardPass(self), seen, new)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask for this many new tokens. Raises LimitExceeded if positions end before."""
        self.session.check_whole()
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        self.session.check_limit(query_length, length + offset - query_length)
        self.session.announce(layer_idx)
        return length, offset

    @torch.inference_mode()  # in which the states of linear attention may have been made
    def reset(self) -> None:
        """Forget everything; the next tokens may be of another batch size."""
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # of which transformers before 5.15 keeps zeros that count as tokens
                layer.keys, layer.values, layer.is_initialized = None, None, False
        super().reset()  # type: ignore[no-untyped-call]
        self.session.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens. A positive number is the length to keep.

        Raises UnsupportedModel for linear attention, whose state cannot go back, and InvalidInput for windows that have
        dropped what they then need; the cache is then as it was.
        """
        try:
            tokens_to_remove = operator.index(tokens_to_remove)
        except TypeError:
            raise InvalidInput(f"tokens must be a whole number, not {tokens_to_remove!r}") from None
        self.session.check_crop(tokens_to_remove)
        if tokens_to_remove and any(has_state(layer) for layer in self.layers):
            raise UnsupportedModel("the state of linear attention cannot go back: compute the shorter text anew")
        for layer in (layer for layer in self.layers if isinstance(layer, SlidingLayer)):
            layer.check_crop(tokens_to_remove)
        stock_first: list[Any] = sorted(self.layers, key=lambda layer: isinstance(layer, CompressedLayer))
        for layer in stock_first:  # which may refuse
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make the rows those of these indices, which may repeat; compressed pages are shared."""
        self.session.check_ended()
        rows = row_index(beam_idx, self._batch())
        if rows.tolist() != list(range(self._batch())):
            super().reorder_cache(torch.as_tensor(rows))  # type: ignore[arg-type]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make the rows those of these indices, or where a boolean tensor is true."""
        boolean = isinstance(indices, Tensor) and indices.dtype == torch.bool
        self.reorder_cache(indices.nonzero()[:, 0] if boolean else indices)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each row so many times."""
        if type(repeats) is not int or repeats < 1:
            raise InvalidInput(f"repeats must be a whole number from 1, not {repeats!r}")
        if self._batch():
            self.reorder_cache(torch.arange(self._batch()).repeat_interleave(repeats))  # type: ignore[arg-type]

    def join(self, other: KVCompCache) -> None:
        """Add the rows of another cache of the same model and spec; nothing is compressed anew.

        All rows end at the same position: the shorter ones get padding on the left, and padding that every row has
        goes. The next forward pass needs ``attention_mask``, and positions that follow from it. Rows leave with
        ``batch_select_indices``.

        Parameters
        ----------
        other
            Stays as it is.

        Raises
        ------
        InvalidInput
            For a cache of another model, spec or backend or without tokens; this one is then as it was.
        UnsupportedModel
            If no layer is compressed, or one is none of full attention, sliding window and linear attention.
        LimitExceeded
            If memory ends.
        """
        if not isinstance(other, KVCompCache):
            raise InvalidInput(f"only another KVCompCache can join, not a {type(other).__name__}")
        for session in (self.session, other.session):
            session.check_ended()
        self.session.check_configuration(other.session.configuration)
        self.session.check_lengths(self.session.longest, other.session.longest)
        self.layers[:] = joined_layers(self.layers, other.layers)
        self.session.not_from_ids = self.session.not_from_ids or other.session.not_from_ids

    def attention_mask(self, new: int = 1) -> Tensor:
        """The mask that a forward pass with so many new tokens needs.

        Returns int64 (batch, tokens held + new), 0 where a row has padding. Raises InvalidInput for an empty cache.
        """
        store = next((layer.store for layer in self.compressed_layers if layer.store.batch), None)
        if store is None or not isinstance(new, int) or new < 0:
            raise InvalidInput(f"there is no mask of {new!r} new tokens for a cache that holds {self._batch()} rows")
        start = torch.from_numpy(store.starts).to(store.device)[:, None]
        return (torch.arange(store.tokens + new, device=store.device) >= start).to(torch.int64)

    def __repr__(self) -> str:
        compressed = self.compressed_layers
        tokens = max((x.get_seq_length() for x in self.layers if isinstance(x, CacheLayerMixin)), default=0)
        stock = Counter(type(layer).__name__ for layer in self.layers if not isinstance(layer, CompressedLayer))
        others = "".join(f", {count} {kind}" for kind, count in stock.items())
        return f"KVCompCache({len(compressed)} compressed layers{others}, {tokens} tokens, batch of {self._batch()})"

    def _batch(self) -> int:
        return max((rows_of(layer) for layer in self.layers), default=0)


AttentionInterface.register(NAME, kvcomp_attention)
AttentionMaskInterface.register(NAME, kvcomp_mask)
