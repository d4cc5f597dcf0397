"""A connector for vLLM (0.33) that keeps K and V of prompts compressed, for all engines that share its store.

The store is Redis, Valkey or a folder. vLLM loads the connector by its name:

    vllm serve MODEL --disable-hybrid-kv-cache-manager --kv-transfer-config '{"kv_connector": "KVCompConnector",
      "kv_connector_module_path": "kvcomp.integrations.vllm", "kv_role": "kv_both",
      "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"url": "redis://127.0.0.1:6379"}}'

A prompt is stored in chunks of tokens under hashes of all tokens up to their end. They are compressed and sent on a
thread of its own after the step that computed them. A later prompt that begins alike gets them back, decompressed when
they are loaded. vLLM's attention reads its own format, so this saves storage, network and prefill, not GPU memory.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.logger import init_logger

from kvcomp.calibration import resolve
from kvcomp.codec.block import check_channels
from kvcomp.errors import InvalidInput, KVCompError, UnsupportedModel
from kvcomp.serve.blobs import TIMEOUT, Buffer, open_blobs
from kvcomp.serve.breaker import CircuitBreaker
from kvcomp.serve.chunks import ChunkShape, chunk_key, open_chunk, pack_chunk, unpack
from kvcomp.store.tensors import TYPES

PARAMETERS = "url", "spec", "calibration", "chunk_tokens", "timeout", "limit", "model_id"
CHUNK_TOKENS = 256
MOST_WAITING = 64  # chunks on their way to the store; when it is slower than the model, later ones are not stored

logger = init_logger(__name__)


@dataclass
class Transfer:
    """A chunk on its way."""

    key: str
    """Without the rank."""
    blocks: list[int]
    """Those of vLLM's cache that hold it."""
    skip: int = 0
    """Blocks at its start to leave."""


@dataclass
class Transfers(KVConnectorMetadata):
    """What the scheduler tells the workers of one step."""

    loads: list[Transfer] = field(default_factory=list)
    stores: list[Transfer] = field(default_factory=list)


@dataclass
class _Prompt:
    """A request as the scheduler knows it."""

    keys: list[str]
    """Of its whole chunks."""
    stored: int
    """How many of them the store has, or will have."""
    found: tuple[int, int] = (0, 0)
    """(first, last) token that could be loaded."""
    load: tuple[int, int] | None = None
    """The same once vLLM has decided to."""
    blocks: list[int] = field(default_factory=list)


class KVCompConnector(KVConnectorBase_V1):
    """vLLM's interface to other places of K and V, over ``kvcomp.serve.blobs``.

    ``kv_connector_extra_config`` needs ``url``, that of the store. It may have

    - ``spec``: a preset's name or a JSON file (kvcomp);
    - ``calibration``: a .kvcal file, for the preset ``kvcomp-klt``;
    - ``chunk_tokens``: a multiple of vLLM's block (256);
    - ``timeout``: seconds that one call to the store may take;
    - ``limit``: bytes a folder may hold;
    - ``model_id``: tells weights apart whose name and configuration are the same.

    Raises
    ------
    InvalidInput
        For any other configuration.
    UnsupportedModel
        For caches that are not plain K and V in float32, float16 or bfloat16, and for parallelism other than tensors'.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        config = self._kv_transfer_config
        extra = dict(config.kv_connector_extra_config)
        if set(extra) - set(PARAMETERS) or not isinstance(extra.get("url"), str):
            raise InvalidInput(
                f"kv_connector_extra_config needs url, and knows {', '.join(PARAMETERS)}, not {sorted(extra)}"
            )
        self._spec, self._calibration = resolve(extra.get("spec", "kvcomp"), extra.get("calibration"))
        self._block = vllm_config.cache_config.block_size
        self._chunk = extra.get("chunk_tokens", CHUNK_TOKENS)
        if type(self._chunk) is not int or self._chunk < 1 or self._chunk % self._block:
            raise InvalidInput(
                f"chunk_tokens must be a multiple of vLLM's block of {self._block} tokens, not {self._chunk!r}"
            )
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size != 1 or getattr(parallel, "decode_context_parallel_size", 1) != 1:
            raise UnsupportedModel("this connector knows tensor parallelism only: set the other parallel sizes to 1")
        self._ranks, self._rank = parallel.tensor_parallel_size, parallel.rank
        self._shape = _shape(kv_cache_config, self._chunk)
        self._about = _about(vllm_config, self._shape, extra.get("model_id"))
        if getattr(config, "kv_load_failure_policy", "recompute") != "recompute":
            logger.warning(
                "kvcomp: a chunk that is gone when it is loaded fails its request: set kv_load_failure_policy to "
                "recompute"
            )
        self._blobs = open_blobs(extra["url"], limit=extra.get("limit"), timeout=extra.get("timeout", TIMEOUT))
        self._breaker = CircuitBreaker()
        self._prompts: dict[str, _Prompt] = {}
        self._layers: list[Tensor] = []
        self._failed: set[int] = set()
        self._sender = ThreadPoolExecutor(1, "kvcomp-send")
        self._waiting = threading.BoundedSemaphore(MOST_WAITING)

    # The scheduler's side

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Count the tokens that the store has beyond those computed.

        The last token of a prompt is never among them: vLLM has to compute one.
        """
        tokens = request.prompt_token_ids
        if not tokens or request.lora_request is not None or request.mm_features:
            return 0, False  # K and V that do not follow from the tokens alone
        keys = self._keys(tokens, request.cache_salt)
        try:
            held = self._held(keys)
        except KVCompError as error:
            logger.error("kvcomp: %s", error)
            held = 0
        end = min(held, (len(tokens) - 1) // self._chunk) * self._chunk
        self._prompts[request.request_id] = _Prompt(keys, held, (num_computed_tokens, max(num_computed_tokens, end)))
        return max(0, end - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note which tokens vLLM has decided to load."""
        prompt = self._prompts.get(request.request_id)
        if prompt is not None:
            first = prompt.found[0]
            prompt.load = (first, first + num_external_tokens) if num_external_tokens else None

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Plan what the workers load and store in this step."""
        transfers, scheduled = Transfers(), scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            if prompt := self._prompts.get(new.req_id):
                prompt.blocks = list(new.block_ids[0])
                self._plan(prompt, new.num_computed_tokens + scheduled[new.req_id], transfers)
        old = scheduler_output.scheduled_cached_reqs
        for request, blocks, computed in zip(old.req_ids, old.new_block_ids, old.num_computed_tokens, strict=True):
            if prompt := self._prompts.get(request):
                kept = [] if request in old.resumed_req_ids else prompt.blocks
                prompt.blocks = kept + list(blocks[0] if blocks else [])
                self._plan(prompt, computed + scheduled[request], transfers)
        return transfers

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; vLLM may free its blocks at once."""
        self._prompts.pop(request.request_id, None)
        return False, None

    def _plan(self, prompt: _Prompt, computed: int, transfers: Transfers) -> None:
        """Add what a request loads before this step, and what is whole after ``computed`` tokens and not stored."""
        if prompt.load is not None:
            first, last = prompt.load
            for chunk in range(first // self._chunk, last // self._chunk):
                skip = max(0, first - chunk * self._chunk) // self._block
                transfers.loads.append(self._transfer(prompt, chunk, skip))
            prompt.load = None
        whole = min(computed // self._chunk, len(prompt.keys))
        for chunk in range(prompt.stored, whole):
            transfers.stores.append(self._transfer(prompt, chunk))
        prompt.stored = max(prompt.stored, whole)

    def _transfer(self, prompt: _Prompt, chunk: int, skip: int = 0) -> Transfer:
        blocks = self._chunk // self._block
        return Transfer(prompt.keys[chunk], prompt.blocks[chunk * blocks : (chunk + 1) * blocks], skip)

    def _keys(self, tokens: Sequence[int], salt: str | None) -> list[str]:
        """The keys of the whole chunks of a prompt; each depends on all tokens before its end."""
        ids, last, keys = np.asarray(tokens, "<i8"), b"", []
        for begin in range(0, len(tokens) - self._chunk + 1, self._chunk):
            last = hashlib.sha256(last + ids[begin : begin + self._chunk].tobytes()).digest()
            keys.append(chunk_key(self._spec, {**self._about, "tokens": last.hex(), "salt": salt or ""}))
        return keys

    def _held(self, keys: Sequence[str]) -> int:
        """How many chunks from the first on the store has, of all ranks."""
        names = [self._name(key, rank) for key in keys for rank in range(self._ranks)]
        sizes = self._breaker.ask(lambda: self._blobs.sizes(names)) if names else []
        there = [None not in sizes[first : first + self._ranks] for first in range(0, len(sizes), self._ranks)]
        return (*there, False).index(False)

    def _name(self, key: str, rank: int) -> str:
        return f"kvcomp:{key}:{rank}of{self._ranks}"

    # The workers' side

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Take the caches of all layers, (blocks, KV heads, tokens of a block, 2 head_dim), K before V.

        Raises UnsupportedModel.
        """
        expected = self._shape.heads, self._block, 2 * self._shape.channels
        for name, layer in kv_caches.items():
            if layer.ndim != 4 or tuple(layer.shape[1:]) != expected or layer.dtype != self._shape.dtype:
                raise UnsupportedModel(
                    f"the cache of {name} is {tuple(layer.shape)} of {layer.dtype}: this connector knows (blocks, "
                    f"{expected}) of "
                    f"{self._shape.dtype}, which vLLM 0.33 gives for plain attention"
                )
        if len(kv_caches) != self._shape.layers:
            raise UnsupportedModel(f"vLLM has caches of {len(kv_caches)} layers, and said {self._shape.layers}")
        self._layers = list(kv_caches.values())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Fill the blocks of all loads of this step.

        Those of a chunk that is gone or wrong are left, and vLLM is told.
        """
        loads = self._transfers().loads
        if not loads:
            return
        names = [self._name(load.key, self._rank) for load in loads]
        values: Sequence[Buffer | None] = [None] * len(loads)
        try:
            values = self._breaker.ask(lambda: self._blobs.get(names))
        except KVCompError as error:
            logger.error("kvcomp: %s", error)
        for load, name, value in zip(loads, names, values, strict=True):
            if value is None or not self._fill(load, name, value):
                self._failed.update(load.blocks[load.skip :])

    def _fill(self, load: Transfer, name: str, value: Buffer) -> bool:
        try:
            stores = open_chunk(value, name, self._spec, self._shape, self._calibration)
        except KVCompError as error:
            logger.error("kvcomp: %s", error)
            self._breaker.drop_damaged(self._blobs, name, error)
            return False
        blocks = torch.tensor(load.blocks[load.skip :])
        for store, layer in zip(stores, self._layers, strict=True):
            both = torch.cat(unpack(store), dim=2)
            pages = both.view(self._shape.heads, -1, self._block, both.shape[2]).transpose(0, 1)
            layer[blocks.to(layer.device)] = pages[load.skip :].to(layer.device)
        return True

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads end before the step begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing yet: what a step computed is taken at its end, which also holds where a CUDA graph replays it."""

    def wait_for_save(self) -> None:
        """Copy the whole chunks of this step out of the cache; what follows needs it no more."""
        for store in self._transfers().stores:
            if not self._waiting.acquire(blocking=False):
                logger.warning("kvcomp: the store is slower than the model: a chunk is not stored")
                continue
            taken = [layer[torch.tensor(store.blocks, device=layer.device)].cpu() for layer in self._layers]
            self._sender.submit(self._send, self._name(store.key, self._rank), taken)

    def _send(self, name: str, taken: Sequence[Tensor]) -> None:
        try:
            kv = []
            for pages in taken:
                both = pages.transpose(0, 1).reshape(self._shape.heads, self._shape.tokens, -1)
                kv.append((both[..., : self._shape.channels], both[..., self._shape.channels :]))
            pieces = pack_chunk(name, self._spec, kv, self._calibration)
            self._breaker.ask(lambda: self._blobs.put([(name, pieces)]))
        except KVCompError as error:
            logger.error("kvcomp: %s", error)
        except Exception:
            logger.exception("kvcomp: a chunk could not be stored")
        finally:
            self._waiting.release()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks that could not be filled since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def shutdown(self) -> None:
        """Wait for what is on its way, which the store's deadline bounds."""
        self._sender.shutdown(wait=True)
        self._blobs.close()

    def _transfers(self) -> Transfers:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Transfers)
        return metadata


def _shape(kv_cache_config: Any, tokens: int) -> ChunkShape:
    """What a chunk holds on one rank. Raises UnsupportedModel for caches that are not plain K and V."""
    groups = kv_cache_config.kv_cache_groups
    spec = groups[0].kv_cache_spec if len(groups) == 1 else None
    plain = (
        spec is not None
        and type(spec).__name__ == "FullAttentionSpec"
        and getattr(spec, "head_size_v", spec.head_size) == spec.head_size
        and getattr(spec, "num_head_slots", None) is None
        and getattr(spec, "state_content_bytes", None) is None
        and getattr(spec, "tokens_per_state", 1) == 1
    )
    if spec is None or not plain or spec.dtype not in TYPES.values():
        raise UnsupportedModel(
            "this connector knows caches of plain attention in float32, float16 or bfloat16, all layers in one "
            "group: use "
            "--disable-hybrid-kv-cache-manager for models with sliding windows, and kv_cache_dtype auto; not "
            "latent attention (MLA)"
        )
    try:
        check_channels(spec.head_size)
    except InvalidInput as error:
        raise UnsupportedModel(str(error)) from None
    return ChunkShape(len(groups[0].layer_names), spec.num_kv_heads, tokens, spec.head_size, spec.dtype)


def _about(vllm_config: Any, shape: ChunkShape, model_id: str | None) -> Mapping[str, Any]:
    """All that K and V depend on besides the tokens."""
    model = vllm_config.model_config
    configuration = model.hf_config.to_json_string()
    return {
        "model": model.model,
        "revision": model.revision,
        "model_id": model_id,
        "configuration": hashlib.sha256(configuration.encode()).hexdigest(),
        "ranks": vllm_config.parallel_config.tensor_parallel_size,
        "shape": [shape.layers, shape.heads, shape.tokens, shape.channels, str(shape.dtype)],
    }
