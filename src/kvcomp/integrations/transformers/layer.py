"""The cache of one layer behind the interface of transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvcomp.calibration import LayerCalibration
from kvcomp.errors import InvalidInput
from kvcomp.integrations.transformers.handle import Handle, Source, without_gradient
from kvcomp.integrations.transformers.session import Session
from kvcomp.spec import CodecSpec
from kvcomp.store import Store, new_store


def matched(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of one dtype: under ``torch.autocast`` rotary embeddings leave K in float32, and attention casts it."""
    kind = k.device.type
    if k.dtype == v.dtype or not torch.is_autocast_enabled(kind):
        return k, v
    dtype = torch.get_autocast_dtype(kind)
    return k.to(dtype), v.to(dtype)


class CompressedLayer(CacheLayerMixin):
    """The cache of one full-attention layer: a store behind the interface of a transformers cache layer."""

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

        Raises InvalidInput or BackendUnavailable if they do not fit what is held; the layer is then as it was.
        """
        key_states, value_states = matched(key_states, value_states)
        self.settle()
        self.upload(key_states.device)
        if self.session.sealing is not None:  # the device has the work up to this layer's attention to do
            self.session.sealing.step()
        self.store.append(key_states, value_states)
        self.unsealed = self.is_initialized = True
        new = key_states.shape[2]
        source = Source(self, self.seen(new), (key_states, value_states) if self.store.tokens == new else None)
        return (
            without_gradient(partial(Handle, source, 0), key_states),
            without_gradient(partial(Handle, source, 1), value_states),
        )

    def seen(self, new: int) -> int:
        """How many of the last tokens the last ``new`` ones see."""
        return self.store.tokens

    def holds(self, seen: int) -> bool:
        """Whether so many of the last tokens are there."""
        return seen <= self.store.tokens

    def dense(self, seen: int) -> tuple[Tensor, Tensor]:
        """K and V of so many of the last tokens, decompressed: (batch, KV heads, seen, head_dim) each."""
        return self.store.dense()

    def upload(self, device: torch.device) -> None:
        """Move to a GPU what was read from a file for the backend ``gpu``."""
        if self.backend == "gpu":
            self.store = self.store.to_gpu(device)

    def settle(self) -> None:
        """Compress what another attention implementation has read: it does not say when it has done so."""
        if self.unsealed:
            self.session.another_attention()
            self.seal()

    def seal(self) -> None:
        """Compress what is older than the window. On a GPU a prompt is done when the next layer has come as far."""
        if self.session.recording:
            return
        before, self.session.sealing = self.session.sealing, None
        if before is not None:
            before.drain()
        self.store.seal()
        self.session.sealing = self.store
        self.unsealed = False

    def roll_back(self, tokens: int) -> None:
        """Keep the first tokens; with none, forget batch size and dtype too."""
        if tokens:
            self.store.crop(tokens)
        else:
            self.reset()

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All keys as a handle; None before the first update."""
        return Handle(Source(self, self.seen(0), None), 0) if self.store.batch else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All values as a handle; None before the first update."""
        return Handle(Source(self, self.seen(0), None), 1) if self.store.batch else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first update tells batch size, heads and dtype."""

    def get_seq_length(self) -> int:
        return self.store.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """See ``KVCompCache.crop``."""
        if self.store.batch:
            self.store.crop(self.kept(tokens_to_remove))

    def kept(self, tokens_to_remove: int) -> int:
        """How many tokens ``crop`` keeps."""
        kept = int(tokens_to_remove) if tokens_to_remove > 0 else self.store.tokens + int(tokens_to_remove)
        return min(max(0, kept), self.store.tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.store.batch:
            self.store.select(beam_idx)

    def offload(self) -> None:
        raise InvalidInput("a KVCompCache cannot be offloaded: it is in main memory already")

    def prefetch(self) -> None:
        raise InvalidInput("a KVCompCache cannot be prefetched: it is never offloaded")
