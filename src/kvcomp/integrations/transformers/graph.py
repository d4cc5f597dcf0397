"""Decoding with CUDA graphs: what a step does on the device is recorded once, and the host repeats it with one call.

    from kvcomp.integrations.transformers.graph import DecodeGraph

    cache = KVCompCache(model.config, backend="gpu")
    model.set_attn_implementation("kvcomp")
    logits = model(prompt, attention_mask=mask, past_key_values=cache).logits[:, -1]
    graph = DecodeGraph(model, cache)
    while ...:
        logits = graph.step(logits.argmax(-1))

That works because a step is a function of what lies on the device: how many tokens there are is a number there, and
neither pages, tail nor books move while tokens are added. Pages are compressed between two steps, outside the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcomp.errors import InvalidInput, KVCompError, UnsupportedModel
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers.attention import NAME
from kvcomp.store.tensors import to_pinned


class DecodeGraph:
    """The decoding step of a model over a cache that holds a prompt.

    model: a causal language model of transformers with the attention "kvcomp", all of it on one GPU. cache: with the
    backend ``gpu``. Between two steps rows may join and leave, and tokens be cropped; the next steps then record anew.

    Raises UnsupportedModel if a layer's cache is not kvcomp's, and InvalidInput for another attention, an empty cache
    or several GPUs.
    """

    def __init__(self, model: PreTrainedModel, cache: KVCompCache) -> None:
        self._model = model
        self._cache = cache
        self._layers = cache.compressed_layers
        if len(self._layers) != len(cache.layers):
            raise UnsupportedModel(
                "only a model of which every layer has full attention can be recorded: use its forward pass"
            )
        attention = model.config._attn_implementation
        if attention != NAME:
            raise InvalidInput(
                f'the model has the attention "{attention}": call model.set_attn_implementation("{NAME}")'
            )
        for layer in self._layers:
            layer.upload(model.device)
        if not all(layer.backend == "gpu" and layer.store.tokens for layer in self._layers):
            raise InvalidInput('only a cache with backend="gpu" that holds a prompt can be recorded')
        if len({store.device for store in self._stores}) > 1:
            raise InvalidInput("a model on several GPUs cannot be recorded: use its forward pass")
        self._ids = torch.empty((0, 1), dtype=torch.int64)
        self._places: list[tuple[Any, ...]] = []
        self._repeat: Callable[[], None] | None = None
        self._logits = torch.empty(0)

    @property
    def _stores(self) -> list[Any]:
        return [layer.store for layer in self._layers]

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Add one token to each row and return what the model makes of it: logits (batch, vocabulary), valid until the
        next step.

        ids: int64 (batch,) or (batch, 1), on the model's device. The first step, and the first with another batch, is
        an ordinary one.
        Raises InvalidInput for another shape, LimitExceeded if the model's positions end or memory does; the cache is
        then as it was.
        """
        stores, batch = self._stores, self._stores[0].batch
        if ids.numel() != batch:
            raise InvalidInput(f"ids must be one token for each of {batch} rows, not {tuple(ids.shape)}")
        tokens = self._cache.get_seq_length()
        self._cache.get_mask_sizes(1, 0)  # which checks the model's positions
        for layer in self._layers:
            layer.settle()
        for store in stores:
            store.prepare(1)
        ordinary = self._ids.shape[0] != batch
        if ordinary:
            self._ids = ids.new_empty((batch, 1))
            self._positions = torch.empty_like(self._ids)
            self._places = []
        self._ids.copy_(ids.view(batch, 1))
        positions = to_pinned(np.int64(tokens) - stores[0].starts, ids.device)
        self._positions.copy_(positions.view(batch, 1), non_blocking=True)
        if ordinary:
            self._logits = self._forward()
            return self._logits
        places = [store.places for store in stores]
        if places == self._places:
            for store in stores:
                store.advance(1)
        else:
            self._record(tokens)
            self._places = places
        assert self._repeat is not None
        self._repeat()
        try:
            for layer in self._layers:
                layer.seal()
        except KVCompError:
            for store in stores:
                store.crop(tokens)
            raise
        return self._logits

    def _forward(self) -> Tensor:
        out = self._model(self._ids, position_ids=self._positions, past_key_values=self._cache, use_cache=True)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _record(self, tokens: int) -> None:
        """Record a step; the stores count its token, which the device does not have yet."""
        self._repeat = None  # whose memory is free again
        self._places = []
        session = self._cache.session
        session.recording = True
        try:
            self._logits, self._repeat = recorded(self._forward, self._stores[0].device)
        except BaseException:
            for store in self._stores:
                store.crop(tokens)
            raise
        finally:
            session.recording = False
            for layer in self._layers:
                layer.unsealed = False


def recorded(step: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], None]]:
    """Where a step's result will be, and what does its work on the device, of which nothing is done yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=_capture_stream_of(device)):
        result = step()
    return result, graph.replay


@lru_cache(maxsize=64)
def _capture_stream_of(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings on a device; torch's own is of the device of the first recording."""
    return torch.cuda.Stream(device)
