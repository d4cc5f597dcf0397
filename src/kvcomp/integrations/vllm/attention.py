"""vLLM's attention backend on compressed pages, in place of its own on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from kvcomp.store.paged import PagedCache, PagedLayer, Step


class Engine:
    """The cache of this process' engine, and the step that it is at."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self._planned: tuple[Any, Step] | None = None

    def step(self, metadata: Any) -> Step:
        """What a step does, planned for the first layer that asks; all layers get the same metadata."""
        if self._planned is None or self._planned[0] is not metadata:
            rows = metadata.seq_lens.shape[0]
            plan = self.cache.begin(
                *(
                    x.to(torch.int64).numpy()
                    for x in (metadata.block_table[:rows], metadata.seq_lens, metadata.query_start_loc[: rows + 1])
                )
            )
            self._planned = metadata, plan
        return self._planned[1]


class KVCompAttentionImpl(CPUAttentionBackendImpl):
    """Attention of one layer. ``KVCompWorker`` gives it its pages once vLLM has allocated their memory."""

    engine: Engine
    pages: PagedLayer

    def unknown(self) -> list[str]:
        """What this attention has that compressed pages do not serve."""
        found = {
            "ALiBi": self.alibi_slopes is not None,
            "a sliding window": self.sliding_window != -1,
            "attention sinks": self.sinks is not None,
            "K and V of another layer": self.kv_sharing_target_layer_name is not None,
            f"{self.attn_type} attention": self.attn_type != "decoder",
        }
        return [name for name, there in found.items() if there]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write, attend and seal; all are (tokens, heads, head_dim), those behind the metadata's tokens padding."""
        if attn_metadata is None:  # vLLM warms up
            return output
        step, tokens = self.engine.step(attn_metadata), attn_metadata.num_actual_tokens
        q, k, v, out = (x[:tokens].view(tokens, -1, self.head_size) for x in (query, key, value, output))
        self.pages.write(step, k, v)
        self.pages.attend(step, q, k, v, self.scale, float(self.logits_soft_cap), out)
        self.pages.seal(step.seals)
        return output


class KVCompAttentionBackend(CPUAttentionBackend):
    """What vLLM asks of a backend, where it differs from that of the CPU."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[KVCompAttentionImpl]:
        return KVCompAttentionImpl


def give_back(layer: Any) -> None:
    """Let a layer of the model have vLLM's own attention, before anything was attended."""
    layer.attn_backend = CPUAttentionBackend
    layer.impl.__class__ = CPUAttentionBackendImpl
