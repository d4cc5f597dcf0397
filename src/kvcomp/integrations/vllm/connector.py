"""A connector for vLLM (0.32) that keeps K and V of prompts compressed, for all engines that share its store.

The store is Redis, Valkey or a folder. vLLM loads the connector by its name:

    vllm serve MODEL --disable-hybrid-kv-cache-manager --kv-transfer-config '{"kv_connector": "KVCompConnector",
      "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"url": "redis://127.0.0.1:6379"}}'

A prompt is stored in chunks of tokens under hashes of all tokens up to their end. They are compressed and sent on a
thread of its own after the step that computed them. A later prompt that begins alike gets them back, decompressed when
they are loaded. The store is asked and read on threads too: no step of a running request waits for it. vLLM's attention
reads its own format, so this saves storage, network and prefill, not GPU memory.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.logger import init_logger

from kvcomp.calibration import resolve
from kvcomp.errors import InvalidInput, KVCompError, UnsupportedModel
from kvcomp.integrations.transformers.models import fingerprint_of
from kvcomp.integrations.vllm.chunks import check_parallel, chunk_shape, origin
from kvcomp.integrations.vllm.layout import BlockLayout, layout_of
from kvcomp.serve.blobs import TIMEOUT, Buffer, open_blobs
from kvcomp.serve.breaker import CircuitBreaker
from kvcomp.serve.chunks import chunk_key, open_chunk, pack_chunk, unpack
from kvcomp.serve.notices import Notices

PARAMETERS = "url", "spec", "calibration", "chunk_tokens", "timeout", "limit", "model_id"
CHUNK_TOKENS = 256
MOST_WAITING = 64  # chunks on their way to the store; when it is slower than the model, later ones are not stored
PATIENCE = 0.5  # seconds that a new request waits to hear what the store has
PAUSE = 0.01  # seconds that a step which computes nothing waits for a load: it would keep Python from the load's thread
LEAST_SAVED = 0.02  # of a chunk's bytes: a spec that saves less is said to save nothing

logger = init_logger("vllm.kvcomp.connector")


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

    loads: dict[str, list[Transfer]] = field(default_factory=dict)
    """By request."""
    stores: list[Transfer] = field(default_factory=list)
    idle: bool = False
    """Whether the step computes nothing."""


@dataclass
class _Prompt:
    """A request as the scheduler knows it."""

    keys: list[str]
    """Of its whole chunks."""
    answer: Future[int]
    """How many of them the store has."""
    asked: float
    """When."""
    stored: int = 0
    """How many of them the store has, or will have."""
    known: bool = False
    """Whether ``stored`` follows from the answer."""
    first: int = 0
    """First token that could be loaded."""
    loading: int = 0
    """Tokens that there will be once a load has ended; 0 if none is on its way."""
    blocks: list[int] = field(default_factory=list)

    def settle(self, computed: int, chunk: int) -> None:
        """Once a load has ended: what was not loaded is no longer in the store, and is stored again."""
        if self.loading > computed:
            self.stored = min(self.stored, computed // chunk)
        self.loading = 0


class KVCompConnector(KVConnectorBase_V1):
    """vLLM's interface to other places of K and V, over ``kvcomp.serve.blobs``.

    ``kv_connector_extra_config`` needs ``url``, that of the store. It may have

    - ``spec``: a preset's name or a JSON file (kvcomp);
    - ``calibration``: a .kvcal file, for the presets ``kvcomp-klt`` and ``packed-klt``;
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
        if self._calibration is not None:
            self._calibration.check_model(fingerprint_of(vllm_config.model_config.hf_text_config))
        self._block = vllm_config.cache_config.block_size
        self._chunk = extra.get("chunk_tokens", CHUNK_TOKENS)
        if type(self._chunk) is not int or self._chunk < 1 or self._chunk % self._block:
            raise InvalidInput(
                f"chunk_tokens must be a multiple of vLLM's block of {self._block} tokens, not {self._chunk!r}"
            )
        check_parallel(parallel := vllm_config.parallel_config)
        self._ranks, self._rank = parallel.tensor_parallel_size, parallel.rank % parallel.tensor_parallel_size
        self._shape = chunk_shape(kv_cache_config, self._chunk)
        self._about = origin(vllm_config, self._shape, extra.get("model_id"))
        if getattr(config, "kv_load_failure_policy", "recompute") != "recompute":
            logger.warning(
                "kvcomp: a chunk that is gone when it is loaded fails its request: set kv_load_failure_policy to "
                "recompute"
            )
        self._blobs = open_blobs(extra["url"], limit=extra.get("limit"), timeout=extra.get("timeout", TIMEOUT))
        self._breaker = CircuitBreaker()
        self._prompts: dict[str, _Prompt] = {}
        self._loads: dict[str, list[Transfer]] = {}
        self._layers: list[Tensor] = []
        self._layout = BlockLayout()
        self._idle = False  # whether the present step is
        self._ended = threading.Condition()  # of the next three
        self._loading = 0
        self._failed: set[int] = set()
        self._loaded: set[str] = set()
        self._asker = ThreadPoolExecutor(1, "kvcomp-ask")
        self._loader = ThreadPoolExecutor(1, "kvcomp-load")
        self._sender = ThreadPoolExecutor(1, "kvcomp-send")
        self._waiting = threading.BoundedSemaphore(MOST_WAITING)
        self._errors, self._warnings = Notices(logger.error), Notices(logger.warning)
        self._saves = True

    # The scheduler's side

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Count the tokens that the store has beyond those computed, None as long as it has not answered.

        The last token of a prompt is never among them: vLLM has to compute one. They are loaded while others compute.
        """
        tokens = request.prompt_token_ids
        if not tokens or request.lora_request is not None or request.mm_features or request.prompt_embeds is not None:
            return 0, False  # K and V that do not follow from the tokens alone
        prompt = self._prompts.get(request.request_id)
        if prompt is None:
            keys = self._keys(tokens, request.cache_salt)
            prompt = _Prompt(keys, self._asker.submit(self._held, keys), time.monotonic())
            self._prompts[request.request_id] = prompt
        if not prompt.known:
            if prompt.answer.done():
                prompt.stored = prompt.answer.result()
            elif time.monotonic() < prompt.asked + PATIENCE:
                return None, False
            prompt.known = True
        prompt.settle(num_computed_tokens, self._chunk)
        end = min(prompt.stored, (len(tokens) - 1) // self._chunk) * self._chunk
        prompt.first = num_computed_tokens
        found = max(0, end - num_computed_tokens) if self._kv_transfer_config.is_kv_consumer else 0
        return found, found > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load that vLLM has decided to do, into the blocks that it has for it."""
        prompt = self._prompts.get(request.request_id)
        if prompt is None or not num_external_tokens:
            return
        prompt.blocks, prompt.loading = list(blocks.get_block_ids()[0]), prompt.first + num_external_tokens
        self._loads[request.request_id] = [
            self._transfer(prompt, chunk, max(0, prompt.first - chunk * self._chunk) // self._block)
            for chunk in range(prompt.first // self._chunk, prompt.loading // self._chunk)
        ]

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Plan what the workers begin to load and store in this step."""
        scheduled = scheduler_output.num_scheduled_tokens
        transfers, self._loads = Transfers(self._loads, idle=not scheduled), {}
        for new in scheduler_output.scheduled_new_reqs:
            if prompt := self._prompts.get(new.req_id):
                prompt.blocks = list(new.block_ids[0])
                self._plan(prompt, new.num_computed_tokens, scheduled[new.req_id], transfers)
        old = scheduler_output.scheduled_cached_reqs
        for request, blocks, computed in zip(old.req_ids, old.new_block_ids, old.num_computed_tokens, strict=True):
            if prompt := self._prompts.get(request):
                kept = [] if request in old.resumed_req_ids else prompt.blocks
                prompt.blocks = kept + list(blocks[0] if blocks else [])
                self._plan(prompt, computed, scheduled[request], transfers)
        return transfers

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; vLLM may free its blocks at once."""
        self._prompts.pop(request.request_id, None)
        return False, None

    def reset_cache(self) -> bool:
        """Find nothing any more of what was stored: weights may be other ones from now on."""
        self._about = {**self._about, "reset": uuid4().hex}
        self._prompts.clear()
        return True

    def _plan(self, prompt: _Prompt, computed: int, scheduled: int, transfers: Transfers) -> None:
        """Add what is whole after this step and not stored."""
        prompt.settle(computed, self._chunk)
        produces = self._kv_transfer_config.is_kv_producer
        whole = min((computed + scheduled) // self._chunk, len(prompt.keys)) if produces else 0
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
        """How many chunks from the first on the store has, of all ranks; none if it does not answer."""
        names = [self._name(key, rank) for key in keys for rank in range(self._ranks)]
        try:
            sizes = self._breaker.ask(lambda: self._blobs.sizes(names)) if names else []
        except KVCompError as error:
            self._errors.say(f"kvcomp: {error}")
            return 0
        except Exception:  # the scheduler goes on without the store
            logger.exception("kvcomp: the store could not be asked")
            return 0
        there = [None not in sizes[first : first + self._ranks] for first in range(0, len(sizes), self._ranks)]
        return (*there, False).index(False)

    def _name(self, key: str, rank: int) -> str:
        return f"kvcomp:{key}:{rank}of{self._ranks}"

    # The workers' side

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Take the caches of all layers, (blocks, KV heads, tokens of a block, 2 head_dim), and find what lies where.

        Raises UnsupportedModel.
        """
        expected = self._shape.heads, self._block, 2 * self._shape.channels
        for name, layer in kv_caches.items():
            if layer.ndim != 4 or tuple(layer.shape[1:]) != expected or layer.dtype != self._shape.dtype:
                raise UnsupportedModel(
                    f"the cache of {name} is {tuple(layer.shape)} of {layer.dtype}: this connector knows (blocks, "
                    f"{expected}) of {self._shape.dtype}, which vLLM 0.32 gives for plain attention"
                )
        if len(kv_caches) != self._shape.layers:
            raise UnsupportedModel(f"vLLM has caches of {len(kv_caches)} layers, and said {self._shape.layers}")
        self._layers = list(kv_caches.values())
        self._layout = layout_of(self._layers[0], self._shape.dtype)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin the loads of this step; ``get_finished`` tells which have ended."""
        transfers = self._transfers()
        self._idle = transfers.idle
        with self._ended:
            self._loading += len(transfers.loads)
        for request, loads in transfers.loads.items():
            self._loader.submit(self._load, request, loads)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """The requests whose loads have ended, well or not."""
        with self._ended:
            if self._idle and self._loading and not self._loaded:
                self._ended.wait(PAUSE)
            loaded, self._loaded = self._loaded, set()
        return None, loaded or None

    def _load(self, request: str, loads: Sequence[Transfer]) -> None:
        """Fill the blocks of a request. Those of a chunk that is gone or wrong are left, and vLLM is told."""
        failed = {block for load in loads for block in load.blocks[load.skip :]}
        name = ""
        try:
            for load in loads:  # a call each: all chunks of a long prompt would take longer than a call may
                name = self._name(load.key, self._rank)
                (value,) = self._breaker.ask(partial(self._blobs.get, [name]))
                if value is not None and self._fill(load, name, value):
                    failed.difference_update(load.blocks)
        except KVCompError as error:
            self._errors.say(f"kvcomp: the chunks from {name} on are not loaded: {error}")
        except Exception:
            logger.exception("kvcomp: the chunks from %s on could not be loaded", name)
        with self._ended:
            self._failed |= failed
            self._loaded.add(request)
            self._loading -= 1
            self._ended.notify()

    def _fill(self, load: Transfer, name: str, value: Buffer) -> bool:
        try:
            stores = open_chunk(value, name, self._spec, self._shape, self._calibration)
        except KVCompError as error:
            self._errors.say(f"kvcomp: the chunk {name} is refused: {error}")
            self._breaker.drop_damaged(self._blobs, name, error)
            return False
        blocks = torch.tensor(load.blocks[load.skip :])
        for store, layer in zip(stores, self._layers, strict=True):
            both = torch.cat(unpack(store), dim=2)
            pages = both.view(self._shape.heads, -1, self._block, both.shape[2]).transpose(0, 1)
            layer[blocks.to(layer.device)] = self._layout.write(pages[load.skip :]).to(layer.device)
        if self._layers[0].is_cuda:
            torch.cuda.current_stream(self._layers[0].device).synchronize()
        return True

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: no step computes with what is being loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing yet: what a step computed is taken at its end, which also holds where a CUDA graph replays it."""

    def wait_for_save(self) -> None:
        """Copy the whole chunks of this step out of the cache; what follows needs it no more."""
        for store in self._transfers().stores:
            if not self._waiting.acquire(blocking=False):
                self._warnings.say(f"kvcomp: the store is slower than the model: the chunk {store.key} is not stored")
                continue
            try:
                taken = [layer[torch.tensor(store.blocks, device=layer.device)].cpu() for layer in self._layers]
                self._sender.submit(self._send, self._name(store.key, self._rank), taken)
            except BaseException:
                self._waiting.release()
                raise

    def _send(self, name: str, taken: Sequence[Tensor]) -> None:
        try:
            kv = []
            for pages in taken:
                both = self._layout.read(pages).transpose(0, 1).reshape(self._shape.heads, self._shape.tokens, -1)
                kv.append((both[..., : self._shape.channels], both[..., self._shape.channels :]))
            pieces = pack_chunk(name, self._spec, kv, self._calibration)
            self._note_saving(sum(piece.nbytes for piece in pieces), sum(pages.nbytes for pages in taken))
            self._breaker.ask(lambda: self._blobs.put([(name, pieces)]))
        except KVCompError as error:
            self._errors.say(f"kvcomp: the chunk {name} is not stored: {error}")
        except Exception:
            logger.exception("kvcomp: the chunk %s could not be stored", name)
        finally:
            self._waiting.release()

    def _note_saving(self, stored: int, dense: int) -> None:
        """Say it once if a spec is so fine that nothing is saved."""
        if self._saves and stored > (1 - LEAST_SAVED) * dense:
            self._saves = False
            logger.warning(
                "kvcomp: a chunk of %d bytes is stored uncompressed, in %d: take a coarser spec", dense, stored
            )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks that could not be filled since the last call."""
        with self._ended:
            failed, self._failed = self._failed, set()
        return failed

    def shutdown(self) -> None:
        """Wait for what is on its way, which the store's deadline bounds."""
        for threads in (self._asker, self._loader, self._sender):
            threads.shutdown(wait=True, cancel_futures=threads is not self._sender)
        self._blobs.close()

    def _transfers(self) -> Transfers:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Transfers)
        return metadata
