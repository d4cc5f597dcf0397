"""The vLLM connector: an engine's steps, played with the calls that vLLM's scheduler and model runner make in turn."""

from __future__ import annotations

import inspect
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import field as empty
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import vllm_standin
from kvcomp import CodecSpec, InvalidInput, StoreUnavailable, TensorSpec, UnsupportedModel, compress
from redis_server import free_port, running

with vllm_standin.importable():
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

    from kvcomp.integrations.vllm import connector as module
    from kvcomp.integrations.vllm.connector import KVCompConnector, Transfers
    from kvcomp.integrations.vllm.layout import BlockLayout, find_layout

TINY_LM = Path(__file__).parents[2] / "examples" / "tiny-lm"
LAYERS, HEADS, DIM, BLOCK, CHUNK, BLOCKS = 3, 2, 32, 16, 128, 64


class FullAttentionSpec(SimpleNamespace):
    """As much of vLLM's class of this name as the connector reads."""


@pytest.fixture(params=["redis", "folder"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path / "store")
        return
    with running(tmp_path) as address:
        yield address


@pytest.fixture(autouse=True)
def _layout_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caches here lie as on a GPU, where nothing else is said."""
    monkeypatch.setattr(module, "layout_of", lambda cache, dtype: BlockLayout())


def connector(url: str, role: KVConnectorRole, rank: int = 0, ranks: int = 1, **other: Any) -> KVCompConnector:
    block = other.pop("block", BLOCK)
    spec: dict[str, Any] = {"num_kv_heads": HEADS, "head_size": DIM, "dtype": torch.bfloat16, "block_size": block}
    names = other.pop("layer_names", [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)])
    group = SimpleNamespace(layer_names=names, kv_cache_spec=FullAttentionSpec(**spec | other.pop("spec_fields", {})))
    model = {"model": "a/model", "revision": None, "hf_config": SimpleNamespace(to_json_string=lambda: "{}")}
    model["quantization"] = None
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=block),
        model_config=SimpleNamespace(**model | other.pop("model_fields", {})),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks, rank=rank, **other.pop("parallel_fields", {})),
        kv_transfer_config=SimpleNamespace(
            is_kv_producer=other.pop("produces", True),
            is_kv_consumer=other.pop("consumes", True),
            kv_connector_extra_config={"url": url, "chunk_tokens": CHUNK, **other},
            kv_load_failure_policy="recompute",
        ),
    )
    return KVCompConnector(config, role, SimpleNamespace(kv_cache_groups=[group]))


@dataclass
class Engine:
    """A scheduler and a worker with their connectors, and the worker's cache."""

    url: str
    options: dict[str, Any] = empty(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = connector(self.url, KVConnectorRole.SCHEDULER, **self.options)
        self.worker = connector(self.url, KVConnectorRole.WORKER, **self.options)
        self.block = self.options.get("block", BLOCK)
        shape = BLOCKS, HEADS, self.block, 2 * DIM
        self.new: list[Any] = []
        self.failed: set[int] = set()
        self.caches = {f"layer{i}": torch.full(shape, 9.0, dtype=torch.bfloat16) for i in range(LAYERS)}
        self.worker.register_kv_caches(self.caches)

    def start(
        self, request: Any, blocks: list[int], computed: int = 0, between: Callable[[], None] = lambda: None
    ) -> int:
        """What the scheduler does with a new request: ask until the store has answered, and load what it has beyond
        the computed tokens. Returns how many these are, loaded or not. between: what happens after the answer.
        """
        external = None
        while external is None:
            external, later = self.scheduler.get_num_new_matched_tokens(request, computed)
            assert later is bool(external)
        held = SimpleNamespace(get_block_ids=lambda: (blocks,))
        self.scheduler.update_state_after_alloc(request, held, external)
        between()
        if external:
            self.load(request.request_id)
            valid = [block not in self.failed for block in blocks]
            computed += min(external, (*valid, False).index(False) * self.block - computed)
            self.scheduler.update_state_after_alloc(request, held, 0)
        fields = {"req_id": request.request_id, "block_ids": (blocks,), "num_computed_tokens": computed}
        self.new = [SimpleNamespace(**fields)]
        return external

    def load(self, name: str) -> None:
        """A step in which nothing is computed, and those after it until the load has ended."""
        self.new = []
        self.loads = self.step({}).loads[name]
        until = time.monotonic() + 20
        while self.worker.get_finished(set()) != (None, {name}):
            assert time.monotonic() < until
        self.failed = self.worker.get_block_ids_with_load_errors()

    def step(self, scheduled: dict[str, int], old: Any = None, compute: Callable[[], None] = lambda: None) -> Transfers:
        """One step: plan, begin loads, compute, save. The plan crosses to the worker's process."""
        none = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
        output = SimpleNamespace(
            scheduled_new_reqs=self.new, scheduled_cached_reqs=old or none, num_scheduled_tokens=scheduled
        )
        self.new = []
        plan: Transfers = pickle.loads(pickle.dumps(self.scheduler.build_connector_meta(output)))
        self.worker.bind_connector_metadata(plan)
        self.worker.start_load_kv(SimpleNamespace())
        compute()
        self.worker.wait_for_save()
        self.worker.clear_connector_metadata()
        return plan

    def fill(self, blocks: list[int], kv: torch.Tensor, first: int = 0) -> None:
        """Put K and V, (layers, heads, tokens, 2 DIM), into blocks, from a token on: what the model's forward does."""
        layout = self.worker._layout
        for layer, cache in zip(kv, self.caches.values(), strict=True):
            plain = layout.read(cache)
            for at in range(first, layer.shape[1]):
                plain[blocks[at // self.block], :, at % self.block] = layer[:, at]
            cache.copy_(layout.write(plain))

    def held(self, blocks: list[int], tokens: int) -> torch.Tensor:
        """(layers, heads, tokens, 2 DIM) of blocks."""
        plain = [self.worker._layout.read(cache)[blocks] for cache in self.caches.values()]
        return torch.stack([x.transpose(0, 1).reshape(HEADS, -1, 2 * DIM)[:, :tokens] for x in plain])

    def close(self) -> None:
        self.scheduler.shutdown()
        self.worker.shutdown()


def request(name: str, tokens: list[int], **other: Any) -> Any:
    fields = {"lora_request": None, "mm_features": [], "prompt_embeds": None, "cache_salt": None} | other
    return SimpleNamespace(request_id=name, prompt_token_ids=tokens, **fields)


def values(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, HEADS, tokens, 2 * DIM, generator=generator).to(torch.bfloat16)


def coded(kv: torch.Tensor, spec: str = "kvcomp") -> torch.Tensor:
    """What whole chunks come back as, by the library's front door."""
    chunks = []
    for begin in range(0, kv.shape[2], CHUNK):
        part = kv[:, :, begin : begin + CHUNK]
        pairs = [compress(x[None, ..., :DIM], x[None, ..., DIM:], spec).decompress() for x in part]
        chunks.append(torch.stack([torch.cat(pair, dim=3)[0] for pair in pairs]))
    return torch.cat(chunks, dim=2)


PROMPT = list(range(1000, 1000 + 3 * CHUNK + 40))


def stored(url: str, prompt: list[int] = PROMPT, **options: Any) -> torch.Tensor:
    """Run a prompt through an engine in one step, so that its chunks are in the store; its K and V."""
    engine, kv = Engine(url, options), values(len(prompt))
    blocks = list(range(2, 2 + -(-len(prompt) // BLOCK)))
    assert engine.start(request("first", prompt), blocks) == 0
    plan = engine.step({"first": len(prompt)}, compute=lambda: engine.fill(blocks, kv))
    assert len(plan.stores) == len(prompt) // CHUNK
    engine.close()
    return kv


def test_a_prompt_that_begins_alike_gets_what_another_engine_stored(url: str) -> None:
    kv = stored(url)
    engine, prompt = Engine(url), PROMPT[: 2 * CHUNK + 70] + [1] * 60
    blocks = list(range(40, 63))
    assert engine.start(request("second", prompt), blocks) == 2 * CHUNK
    plan = engine.step({"second": len(prompt) - 2 * CHUNK})
    assert (len(engine.loads), len(plan.stores)) == (2, 1)  # the third chunk is another one
    assert torch.equal(engine.held(blocks, 2 * CHUNK), coded(kv[:, :, : 2 * CHUNK]))
    assert engine.failed == set()
    others = [block for block in range(BLOCKS) if block not in blocks[: 2 * CHUNK // BLOCK]]
    assert all((cache[others] == 9).all() for cache in engine.caches.values())
    engine.close()


def test_a_consumer_only_loads_and_a_producer_only_stores(tmp_path: Path) -> None:
    blocks = list(range(30))
    consumer, producer = Engine(str(tmp_path), {"produces": False}), Engine(str(tmp_path), {"consumes": False})
    assert consumer.start(request("empty", PROMPT), blocks) == 0
    assert consumer.step({"empty": len(PROMPT)}).stores == []
    stored(str(tmp_path), consumes=False)
    assert consumer.start(request("full", PROMPT), blocks) == 3 * CHUNK
    assert producer.start(request("again", PROMPT), blocks) == 0
    assert producer.step({"again": len(PROMPT)}).stores == []  # they are there
    consumer.close(), producer.close()


def test_blocks_that_vllm_has_are_left_alone(url: str) -> None:
    """Of a chunk whose first tokens are in vLLM's own prefix cache only the others are loaded."""
    kv = stored(url)
    engine, blocks, computed = Engine(url), list(range(10, 40)), CHUNK + 3 * BLOCK
    assert engine.start(request("second", PROMPT), blocks, computed) == 3 * CHUNK - computed
    engine.step({"second": len(PROMPT) - 3 * CHUNK})
    assert (engine.held(blocks, computed) == 9).all()
    assert torch.equal(engine.held(blocks, 3 * CHUNK)[:, :, computed:], coded(kv[:, :, : 3 * CHUNK])[:, :, computed:])
    engine.close()


def test_one_token_of_a_prompt_is_always_left_to_compute(url: str) -> None:
    stored(url)
    engine = Engine(url)
    assert engine.start(request("whole", PROMPT[: 3 * CHUNK]), list(range(24))) == 2 * CHUNK
    assert engine.start(request("more", PROMPT[: 3 * CHUNK + 1]), list(range(25))) == 3 * CHUNK
    assert engine.start(request("less", PROMPT[: CHUNK - 1]), list(range(8))) == 0
    engine.close()


def test_a_prefill_in_pieces_stores_each_chunk_once_when_it_is_whole(tmp_path: Path) -> None:
    engine, kv, blocks = Engine(str(tmp_path)), values(len(PROMPT)), list(range(30))
    engine.start(request("first", PROMPT), blocks[:5])
    seen, computed, have = [], 0, 5
    for tokens in (80, 100, 100, 144):
        old = None
        if computed:
            more = blocks[have : -(-(computed + tokens) // BLOCK)]
            have += len(more)
            old = SimpleNamespace(
                req_ids=["first"], new_block_ids=[(more,)], num_computed_tokens=[computed], resumed_req_ids=set()
            )
        begin, computed = computed, computed + tokens
        plan = engine.step({"first": tokens}, old, lambda b=begin, c=computed: engine.fill(blocks, kv[:, :, :c], b))
        seen.append(len(plan.stores))
    assert seen == [0, 1, 1, 1]
    engine.close()
    again = Engine(str(tmp_path))
    assert again.start(request("second", PROMPT), blocks) == 3 * CHUNK
    again.step({"second": 40})
    assert torch.equal(again.held(blocks, 3 * CHUNK), coded(kv[:, :, : 3 * CHUNK]))
    again.close()


def test_a_request_that_was_preempted_loads_into_its_new_blocks(tmp_path: Path) -> None:
    kv = stored(str(tmp_path))
    engine, again = Engine(str(tmp_path)), request("second", PROMPT)
    engine.start(again, list(range(30)))
    engine.step({"second": 40})
    blocks = list(range(30, 60))
    assert engine.start(again, blocks) == 3 * CHUNK
    engine.new = []
    old = SimpleNamespace(
        req_ids=["second"], new_block_ids=[(blocks,)], num_computed_tokens=[3 * CHUNK], resumed_req_ids={"second"}
    )
    engine.step({"second": 40}, old)
    assert torch.equal(engine.held(blocks, 3 * CHUNK), coded(kv[:, :, : 3 * CHUNK]))
    engine.close()


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "swapped"])
def test_what_is_gone_or_damaged_when_it_is_loaded_is_reported_and_never_written(tmp_path: Path, damage: str) -> None:
    kv = stored(str(tmp_path))
    engine, blocks = Engine(str(tmp_path)), list(range(30))
    names = [engine.worker._name(key, 0) for key in engine.scheduler._keys(PROMPT, None)]
    (value, other) = (bytes(x) for x in engine.worker._blobs.get(names[1:]) if x is not None)
    bad = {"cut": value[:-1], "flipped": value[:5000] + bytes([value[5000] ^ 4]) + value[5001:], "swapped": other}

    def between() -> None:
        if damage == "gone":
            engine.worker._blobs.delete(names[1:2])
        else:
            engine.worker._blobs.put([(names[1], [bad[damage]])])

    assert engine.start(request("second", PROMPT), blocks, between=between) == 3 * CHUNK
    per_chunk = CHUNK // BLOCK
    assert engine.failed == set(blocks[per_chunk : 2 * per_chunk])
    assert engine.worker.get_block_ids_with_load_errors() == set()
    found, expected = engine.held(blocks, 3 * CHUNK), coded(kv[:, :, : 3 * CHUNK])
    assert (found[:, :, CHUNK : 2 * CHUNK] == 9).all()
    assert torch.equal(found[:, :, :CHUNK], expected[:, :, :CHUNK])
    assert torch.equal(found[:, :, 2 * CHUNK :], expected[:, :, 2 * CHUNK :])
    plan = engine.step({"second": len(PROMPT) - CHUNK}, compute=lambda: engine.fill(blocks, kv))
    assert [names.index(engine.worker._name(store.key, 0)) for store in plan.stores] == [1, 2]  # stored again
    engine.close()
    again = Engine(str(tmp_path))
    assert again.start(request("third", PROMPT), blocks) == 3 * CHUNK
    assert torch.equal(again.held(blocks, 3 * CHUNK), expected)
    again.close()


def test_what_was_loaded_before_the_store_went_away_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kv = stored(str(tmp_path))
    engine, blocks = Engine(str(tmp_path)), list(range(30))
    get, asked = engine.worker._blobs.get, []

    def once(keys: list[str]) -> Any:
        asked.append(keys)
        if len(asked) > 1:
            raise StoreUnavailable
        return get(keys)

    monkeypatch.setattr(engine.worker._blobs, "get", once)
    assert engine.start(request("second", PROMPT), blocks) == 3 * CHUNK
    assert engine.failed == set(blocks[CHUNK // BLOCK : 3 * CHUNK // BLOCK])
    assert torch.equal(engine.held(blocks, CHUNK), coded(kv[:, :, : 3 * CHUNK])[:, :, :CHUNK])
    engine.close()


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(TINY_LM)
    options = {"spec": "kvcomp-klt", "calibration": str(TINY_LM / "model.kvcal")}
    connector(str(tmp_path), KVConnectorRole.WORKER, model_fields={"hf_text_config": config}, **options)
    config.num_hidden_layers += 1
    with pytest.raises(InvalidInput, match="run kvcomp calibrate on this model"):
        connector(str(tmp_path), KVConnectorRole.WORKER, model_fields={"hf_text_config": config}, **options)


def test_a_request_none_of_whose_chunks_could_be_loaded_is_computed(tmp_path: Path) -> None:
    """vLLM asks again once a load has ended with nothing: the same answer would load the same for ever."""
    stored(str(tmp_path))
    engine, blocks = Engine(str(tmp_path)), list(range(30))
    names = [engine.worker._name(key, 0) for key in engine.scheduler._keys(PROMPT, None)]
    again = request("second", PROMPT)
    assert engine.start(again, blocks, between=lambda: engine.worker._blobs.delete(names)) == 3 * CHUNK
    assert engine.failed == set(blocks[: 3 * CHUNK // BLOCK])
    assert engine.start(again, blocks) == 0
    assert len(engine.step({"second": len(PROMPT)}).stores) == 3
    engine.close()


def pairs_of_tokens(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor) -> None:
    """A kernel as CPUs have them: K with its channels first, V with tokens in pairs, each in a half of the block."""
    tokens, channels = k.shape[0], k.shape[2]
    cache.view(2, -1)[0] = k[:, 0].T.flatten()
    cache.view(2, -1)[1] = v[:, 0].view(tokens // 2, 2, channels).transpose(1, 2).flatten()


def test_what_a_cpu_stored_fits_engines_of_another_layout_and_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "layout_of", lambda cache, dtype: find_layout(pairs_of_tokens, cache.shape[2], DIM, dtype)
    )
    kv = stored(str(tmp_path), block=64)
    monkeypatch.undo()
    monkeypatch.setattr(module, "layout_of", lambda cache, dtype: BlockLayout())
    engine, blocks = Engine(str(tmp_path)), list(range(30))
    assert engine.start(request("second", PROMPT), blocks) == 3 * CHUNK
    assert torch.equal(engine.held(blocks, 3 * CHUNK), coded(kv[:, :, : 3 * CHUNK]))
    engine.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "channels"), [(16, 32), (128, 64), (32, 80), (256, 256)])
def test_a_layout_is_found_and_undone(dtype: torch.dtype, tokens: int, channels: int) -> None:
    layout = find_layout(pairs_of_tokens, tokens, channels, dtype)
    k, v = torch.randn(2, tokens, 1, channels).to(dtype)
    block = torch.empty(1, 1, tokens, 2 * channels, dtype=dtype)
    pairs_of_tokens(k, v, block)
    plain = torch.cat([k, v], dim=2).transpose(0, 1)[None]
    assert torch.equal(layout.read(block), plain)
    assert torch.equal(layout.write(plain), block)


def test_a_kernel_that_loses_values_has_no_layout() -> None:
    def lossy(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor) -> None:
        pairs_of_tokens(k, v, cache)
        cache.view(-1)[3] = cache.view(-1)[4]

    with pytest.raises(UnsupportedModel, match="out in a way"):
        find_layout(lossy, 32, 32, torch.float32)


class Stuck:
    """A store that answers when it is let."""

    def __init__(self, blobs: Any) -> None:
        self.blobs, self.go = blobs, threading.Event()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            assert self.go.wait(20)
            return getattr(self.blobs, name)(*args)

        return call


def test_a_store_that_hangs_holds_no_step_up(tmp_path: Path) -> None:
    """Neither the question nor a load nor a chunk that is sent: only the request that needs an answer waits a while."""
    stored(str(tmp_path))
    engine, blocks = Engine(str(tmp_path)), list(range(30))
    stuck = [Stuck(side._blobs) for side in (engine.scheduler, engine.worker)]
    engine.scheduler._blobs, engine.worker._blobs = stuck  # type: ignore[assignment]
    answers, answer, asked = 0, (None, False), request("second", PROMPT)
    begin = time.monotonic()
    while answer[0] is None:
        answer = engine.scheduler.get_num_new_matched_tokens(asked, 0)
        answers += 1
    assert answer == (0, False)
    assert 0.4 < time.monotonic() - begin < 5
    assert answers > 10  # a call that waited for the store would be the only one
    stuck[0].go.set()
    other = request("third", PROMPT)
    while (found := engine.scheduler.get_num_new_matched_tokens(other, 0)[0]) is None:
        pass
    engine.scheduler.update_state_after_alloc(other, SimpleNamespace(get_block_ids=lambda: (blocks,)), found)
    before = time.monotonic()
    engine.step({})
    assert engine.worker.get_finished(set()) == (None, None)
    assert time.monotonic() - before < 5  # of the 20 seconds that the store hangs
    stuck[1].go.set()
    engine.close()


def test_a_step_that_computes_nothing_waits_for_a_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the thread which loads has Python to itself; a step that computes waits for nothing."""
    monkeypatch.setattr("kvcomp.integrations.vllm.connector.PAUSE", 1.0)
    stored(str(tmp_path))
    engine, blocks = Engine(str(tmp_path)), list(range(30))
    stuck = Stuck(engine.worker._blobs)
    engine.worker._blobs = stuck  # type: ignore[assignment]
    asked = request("second", PROMPT)
    while (found := engine.scheduler.get_num_new_matched_tokens(asked, 0)[0]) is None:
        pass
    engine.scheduler.update_state_after_alloc(asked, SimpleNamespace(get_block_ids=lambda: (blocks,)), found)
    took: list[float] = []
    steps: list[dict[str, int]] = [{}, {"other": 1}]
    for scheduled in steps:
        engine.step(scheduled)
        before = time.monotonic()
        assert engine.worker.get_finished(set()) == (None, None)
        took.append(time.monotonic() - before)
    assert took[0] > 0.9 > took[1]
    stuck.go.set()
    engine.close()


def test_errors_are_said_once_a_second_with_the_chunk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored(str(tmp_path))
    engine, blocks = Engine(str(tmp_path)), list(range(30))
    names = [engine.worker._name(key, 0) for key in engine.scheduler._keys(PROMPT, None)]
    engine.worker._blobs.put([(name, [b"nonsense"]) for name in names])
    engine.start(request("second", PROMPT), blocks)
    assert [record.name for record in caplog.records] == ["vllm.kvcomp.connector"]
    assert names[0] in caplog.text
    engine.close()


def test_a_spec_that_saves_nothing_is_said_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = tmp_path / "fine.json"
    spec.write_text(CodecSpec(TensorSpec("channel", 0.01), TensorSpec("token", 0.01)).to_json())
    stored(str(tmp_path / "store"), spec=str(spec))
    assert caplog.text.count("stored uncompressed") == 1


@pytest.mark.parametrize(
    "other",
    [
        {"cache_salt": "tenant"},
        {"lora_request": object()},
        {"mm_features": [object()]},
        {"prompt_token_ids": None},
        {"prompt_embeds": torch.zeros(len(PROMPT), 8)},  # beside ids, which stand for tokens and embeddings in turn
    ],
)
def test_requests_whose_values_do_not_follow_from_the_same_tokens_alone_get_nothing(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    stored(str(tmp_path))
    engine, asked = Engine(str(tmp_path)), request("second", PROMPT)
    vars(asked).update(other)
    assert engine.start(asked, list(range(30))) == 0
    if "cache_salt" not in other:
        assert not engine.step({"second": len(PROMPT)}).stores
    engine.close()


@pytest.mark.parametrize(
    "other",
    [
        {"spec": "packed"},
        {"model_id": "finetuned"},
        {"model_fields": {"model": "b/model"}},
        {"model_fields": {"revision": "1"}},
        {"model_fields": {"quantization": "fp8"}},
        {"model_fields": {"hf_config": SimpleNamespace(to_json_string=lambda: '{"rope_theta": 1}')}},
        {"ranks": 2},
    ],
)
def test_another_model_or_spec_finds_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    stored(str(tmp_path))
    engine = Engine(str(tmp_path), other)
    assert engine.start(request("second", PROMPT), list(range(30))) == 0
    engine.close()


def test_after_a_reset_nothing_is_found_that_was_stored_before(tmp_path: Path) -> None:
    """vLLM resets caches before it gets other weights: K and V of the old ones are no longer this model's."""
    stored(str(tmp_path))
    engine, blocks = Engine(str(tmp_path)), list(range(30))
    assert engine.start(request("second", PROMPT), blocks) == 3 * CHUNK
    assert engine.scheduler.reset_cache()
    for name in ("second", "third"):  # one that was preempted for it, and a new one
        assert engine.start(request(name, PROMPT), blocks) == 0
    assert len(engine.step({"third": len(PROMPT)}).stores) == 3
    while engine.scheduler._held(engine.scheduler._keys(PROMPT, None)) < 3:
        time.sleep(0.01)
    assert engine.start(request("fourth", PROMPT), blocks) == 3 * CHUNK
    engine.close()
    other = Engine(str(tmp_path))
    assert other.start(request("fifth", PROMPT), blocks) == 3 * CHUNK
    other.close()


def test_a_chunk_counts_when_all_ranks_have_it(tmp_path: Path) -> None:
    engines = [Engine(str(tmp_path), {"ranks": 2, "rank": rank}) for rank in (0, 1)]
    for count, engine in enumerate(engines):
        assert engine.start(request("first", PROMPT), list(range(30))) == 0, count
        engine.step(
            {"first": len(PROMPT)}, compute=lambda e=engine, c=count: e.fill(list(range(30)), values(len(PROMPT), c))
        )
        engine.worker.shutdown()
    for rank in (0, 1):
        later = Engine(str(tmp_path), {"ranks": 2, "rank": rank})
        assert later.start(request("second", PROMPT), list(range(30))) == 3 * CHUNK
        later.step({"second": 40})
        assert torch.equal(later.held(list(range(30)), 3 * CHUNK), coded(values(len(PROMPT), rank)[:, :, : 3 * CHUNK]))
        later.close()


def test_data_parallel_engines_share_chunks(tmp_path: Path) -> None:
    """An external launcher's ranks count on over them."""
    stored(str(tmp_path), rank=1)
    other = Engine(str(tmp_path))
    assert other.start(request("second", PROMPT), list(range(30))) == 3 * CHUNK
    assert not other.failed
    other.close()


def test_a_dead_store_costs_one_deadline_and_no_request(tmp_path: Path) -> None:
    engine = Engine(f"redis://127.0.0.1:{free_port()}", {"timeout": 0.5})
    begin = time.monotonic()
    for number in range(20):
        assert engine.start(request(str(number), PROMPT), list(range(30))) == 0
    engine.step({"19": len(PROMPT)})
    engine.close()
    assert time.monotonic() - begin < 6


def test_a_store_slower_than_the_model_is_not_waited_for(tmp_path: Path) -> None:
    engine = Engine(str(tmp_path))
    while engine.worker._waiting.acquire(blocking=False):
        pass
    engine.start(request("first", PROMPT), list(range(30)))
    assert len(engine.step({"first": len(PROMPT)}).stores) == 3
    engine.close()
    later = Engine(str(tmp_path))
    assert later.start(request("second", PROMPT), list(range(30))) == 0
    later.close()


@pytest.mark.parametrize(
    "fields",
    [{"dtype": torch.uint8}, {"head_size_v": 16}, {"num_head_slots": 1}, {"tokens_per_state": 4}, {"head_size": 576}],
)
def test_caches_that_are_not_plain_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel):
        connector(str(tmp_path), KVConnectorRole.WORKER, spec_fields=fields)


@pytest.mark.parametrize(
    "shape", [(BLOCKS, BLOCK, HEADS, 2 * DIM), (2, BLOCKS, BLOCK, HEADS, DIM), (BLOCKS, HEADS, BLOCK, DIM)]
)
def test_layers_in_another_layout_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    worker = connector(str(tmp_path), KVConnectorRole.WORKER)
    with pytest.raises(UnsupportedModel):
        worker.register_kv_caches({f"layer{i}": torch.zeros(shape, dtype=torch.bfloat16) for i in range(LAYERS)})


@pytest.mark.parametrize(
    "other", [{"chunk_tokens": 100}, {"url": None}, {"port": 1}, {"spec": "none"}, {"timeout": -1}]
)
def test_parameters_are_checked(tmp_path: Path, other: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        connector(other.pop("url", str(tmp_path)), KVConnectorRole.SCHEDULER, **other)


@pytest.mark.parametrize("kind", ["pipeline", "prefill_context", "decode_context"])
def test_other_parallelism_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UnsupportedModel, match="tensor parallelism only"):
        connector(str(tmp_path), KVConnectorRole.SCHEDULER, parallel_fields={f"{kind}_parallel_size": 2})


def test_the_connector_is_what_vllm_asks_for() -> None:
    """Every abstract method is there with the parameters of the base class, and so is each that is overridden."""
    assert not inspect.isabstract(KVCompConnector)
    for name, method in vars(KVCompConnector).items():
        base = getattr(KVConnectorBase_V1, name, None)
        if callable(method) and base is not None and name not in ("__init__", "__abstractmethods__"):
            assert list(inspect.signature(method).parameters) == list(inspect.signature(base).parameters), name
    assert list(inspect.signature(KVCompConnector).parameters) == ["vllm_config", "role", "kv_cache_config"]
