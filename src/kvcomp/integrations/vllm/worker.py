"""The vLLM worker whose cache is compressed. vLLM takes it by its name:

    vllm serve MODEL --block-size 64 --worker-cls kvcomp.integrations.vllm.worker.KVCompWorker
        --additional-config '{"kvcomp": {"spec": "kvcomp"}}'

It replaces vLLM's attention in its own process, so one engine runs in a process. A model with other layers than plain
full attention keeps vLLM's own cache and attention, and a line of the log says so.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker

from kvcomp.errors import UnsupportedModel
from kvcomp.integrations.vllm.attention import Engine, KVCompAttentionBackend, KVCompAttentionImpl, give_back
from kvcomp.integrations.vllm.live import Live, check_engine, is_plain
from kvcomp.integrations.vllm.scheduler import DEAD, OUTSIDE
from kvcomp.store.paged import Blocks, PagedCache, PagedLayer, Room, Shape

logger = init_logger("vllm.kvcomp.worker")

NAME = f"{KVCompAttentionBackend.__module__}.{KVCompAttentionBackend.__qualname__}"


class KVCompWorker(CPUWorker):
    """vLLM's worker on the CPU, with kvcomp's pages as its cache.

    Raises
    ------
    UnsupportedModel, UnsupportedVersion, InvalidInput
        For a version or setting with which no cache can be compressed, when the engine starts.
    """

    _cache: PagedCache | None = None
    """None until vLLM has allocated its memory, and for a model that keeps vLLM's own."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        hook = AttentionBackendEnum.CPU_ATTN
        check_engine(vllm_config, vllm.__version__, hook.is_overridden() and hook.get_path() != NAME)
        self._live: Live | None = Live.of(vllm_config)
        register_backend(hook, NAME)
        super().__init__(vllm_config, *args, **kwargs)

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """What each layer's cache is, with fewer bytes for a token than its K and V have."""
        specs: dict[str, Any] = super().get_kv_cache_spec()
        layers = self._layers()
        if self._live and (other := _other(specs, layers)):
            logger.warning("kvcomp: this model keeps vLLM's own cache, nothing is compressed: %s", other)
            self._live = None
            for layer in layers.values():
                if isinstance(layer.impl, KVCompAttentionImpl):
                    give_back(layer)
        return {name: self._live.declared(spec) for name, spec in specs.items()} if self._live else specs

    def _layers(self) -> dict[str, Any]:
        """The model's attention layers by name."""
        layers = self.compilation_config.static_forward_context
        return {name: layer for name, layer in layers.items() if hasattr(layer, "impl")}

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Lay pages into the memory that vLLM allocates for its cache."""
        super().initialize_from_config(kv_cache_config)
        if self._live is None:
            return
        found = self._layers()
        if len(kv_cache_config.kv_cache_groups) != 1 or not found:
            raise UnsupportedModel(
                "kvcomp's cache knows models whose layers are all of one kind: leave --worker-cls out for this model"
            )
        spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        shape = Shape(spec.num_kv_heads, spec.head_size, spec.dtype)
        memories = {name: _memory(name, layer) for name, layer in found.items()}
        room, blocks = Room(list(memories.values()), spec.head_size), kv_cache_config.num_blocks
        pages = {}
        for name, memory in memories.items():
            of_layer, calibrated = self._live.layer(extract_layer_index(name), len(found))
            pages[name] = PagedLayer(of_layer, shape, blocks, room, memory, calibrated)
        shared = bool(self.cache_config.enable_prefix_caching)
        cache = PagedCache(Blocks(blocks, self._live.spec), room, pages, shared)
        self._cache, engine = cache, Engine(cache)
        for name, layer in found.items():
            layer.impl.engine, layer.impl.pages = engine, pages[name]
        dense = 2 * spec.num_kv_heads * spec.head_size * spec.dtype.itemsize
        logger.info(
            "kvcomp: attention on compressed pages, %d bytes a token and layer declared in place of %d",
            spec.page_size_bytes // spec.block_size,
            dense,
        )

    def execute_model(self, scheduler_output: Any) -> Any:
        """One step of the engine, after what it says of sequences that came and went."""
        if self._cache is not None:
            self._follow(self._cache, scheduler_output)
        return self._told(super().execute_model(scheduler_output))

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The end of a step."""
        return self._told(super().sample_tokens(grammar_output))

    def kvcomp_memory(self) -> dict[str, int]:
        """Bytes of the cache, for ``LLM.collective_rpc("kvcomp_memory")``; nothing if none is compressed."""
        return vars(self._cache.memory()) if self._cache is not None else {}

    def _told(self, output: Any) -> Any:
        """What a step returns, with what the scheduler must know."""
        if output is not None and self._cache is not None:
            memory = self._cache.memory()
            setattr(output, OUTSIDE, memory.outside / memory.room)
        return output

    @staticmethod
    def _follow(cache: PagedCache, output: Any) -> None:
        """Take over which sequence holds which blocks."""
        if output.kv_cache_block_copies or output.new_block_ids_to_zero:
            raise UnsupportedModel("vLLM copies or clears blocks, which kvcomp's cache does not know")
        for name in {*output.finished_req_ids, *(output.preempted_req_ids or ())}:
            cache.end(name)
        for new in output.scheduled_new_reqs:
            cache.end(new.req_id)
            cache.hold(new.req_id, new.block_ids[0])
        old = output.scheduled_cached_reqs
        for name, blocks in zip(old.req_ids, old.new_block_ids, strict=True):
            if name in old.resumed_req_ids:
                cache.end(name)
            if blocks:
                cache.hold(name, blocks[0])
        cache.drop(getattr(output, DEAD, ()))


def _other(specs: dict[str, Any], layers: dict[str, Any]) -> str:
    """Which layer is none of plain full attention, and why; nothing if all are."""
    for name, layer in layers.items():
        if isinstance(layer.impl, KVCompAttentionImpl) and (unknown := layer.impl.unknown()):
            return f"{name} has {', '.join(unknown)}"
    return next((f"{name} has a {type(spec).__name__}" for name, spec in specs.items() if not is_plain(spec)), "")


def _memory(name: str, layer: Any) -> Any:
    """What vLLM allocated for a layer, uint8. Raises UnsupportedModel if it is not the layer's own."""
    if not isinstance(layer.impl, KVCompAttentionImpl) or not layer.kv_cache.is_contiguous():
        raise UnsupportedModel(
            f"{name} has the attention {type(layer.impl).__name__} or memory that is not its own: "
            "leave --worker-cls out for this model"
        )
    return layer.kv_cache.view(torch.uint8).flatten().numpy()
