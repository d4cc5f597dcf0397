"""The adapter under LMCache itself, over a real redis-server and a folder. `make test-lmcache` runs it where LMCache is
installed.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from redis_server import answering, free_port, running

REASON = "LMCache is not installed here, so the adapter is not tested: make test-lmcache installs it beside and does"
os.environ["LMCACHE_TRACK_USAGE"] = "false"  # a test reports to nobody
if not os.environ.get("KVCOMP_REQUIRE_LMCACHE"):
    pytest.importorskip("lmcache", reason=REASON)

from kvcomp import PRESETS, InvalidInput, compress

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what LMCache imports
    from lmcache.v1.distributed import config as settings
    from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
    from lmcache.v1.distributed.l2_adapters import create_l2_adapter
    from lmcache.v1.distributed.l2_adapters.config import L2AdaptersConfig, get_l2_adapter_config_class
    from lmcache.v1.distributed.storage_manager import StorageManager
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

    from kvcomp.integrations.lmcache import KVCompL2Adapter

pytestmark = pytest.mark.filterwarnings("ignore:.LoggingHandler. in .opentelemetry:DeprecationWarning")

LAYERS, HEADS, TOKENS, DIM = 2, 2, 256, 64
SHAPE = torch.Size([2, LAYERS, TOKENS, HEADS * DIM])
FUSED = torch.Size([LAYERS, TOKENS, HEADS * 2 * DIM])
CHUNKS = 5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["redis", "folder"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    address: str = request.getfixturevalue("server")
    redis.Redis.from_url(address).flushall()
    return address


def plugin(url: str, **params: Any) -> dict[str, Any]:
    return {
        "type": "plugin",
        "module_path": "kvcomp.integrations.lmcache",
        "class_name": "KVCompL2Adapter",
        "adapter_params": {"url": url, "heads": HEADS, "head_dim": DIM, **params},
    }


def key(number: int, **other: Any) -> ObjectKey:
    fields = {"chunk_hash": number.to_bytes(16, "big"), "model_name": "a/model", "kv_rank": 0x01000100} | other
    return ObjectKey(**fields)


def values(number: int, shape: torch.Size = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)


def coded(x: torch.Tensor, spec: str = "kvcomp") -> torch.Tensor:
    """What a chunk comes back as, by the library's front door."""
    if x.ndim == 3:
        k, v = x.view(LAYERS, TOKENS, HEADS, 2, DIM).permute(3, 0, 2, 1, 4)
    else:
        k, v = x.view(2, LAYERS, TOKENS, HEADS, DIM).transpose(2, 3)
    pairs = [compress(k[layer : layer + 1], v[layer : layer + 1], spec).decompress() for layer in range(LAYERS)]
    both = torch.stack([torch.cat(parts) for parts in zip(*pairs, strict=True)])  # (2, layers, heads, tokens, channels)
    return (both.permute(1, 3, 2, 0, 4) if x.ndim == 3 else both.transpose(2, 3)).reshape(x.shape)


def memory(x: torch.Tensor, fmt: MemoryFormat = MemoryFormat.KV_2LTD) -> TensorMemoryObj:
    raw = x.contiguous().flatten().view(torch.uint8).clone()
    about = MemoryObjMetadata(x.shape, x.dtype, 0, raw.numel(), 1, fmt=fmt, shapes=[x.shape], dtypes=[x.dtype])
    return TensorMemoryObj(raw, about, None)


def finished(adapter: KVCompL2Adapter, descriptor: int, query: Callable[[], Any], seconds: float = 60) -> Any:
    """The result of a task, waited for as LMCache's controllers do: on its file descriptor."""
    poll, end = select.poll(), time.monotonic() + seconds
    poll.register(descriptor, select.POLLIN)
    while time.monotonic() < end:
        if poll.poll(100):
            os.read(descriptor, 8)
        found = query()
        if found is not None and found != {}:
            return found
    raise AssertionError("the task did not end")


class Tier:
    """An adapter and its three kinds of task, each from its submission to its result."""

    def __init__(self, url: str, **params: Any) -> None:
        config = get_l2_adapter_config_class("plugin").from_dict(plugin(url, **params))
        self.adapter = create_l2_adapter(config)
        assert isinstance(self.adapter, KVCompL2Adapter)

    def store(self, keys: list[ObjectKey], objects: list[TensorMemoryObj]) -> Any:
        task = self.adapter.submit_store_task(keys, objects)
        done = finished(self.adapter, self.adapter.get_store_event_fd(), self.adapter.pop_completed_store_tasks)
        return done[task]

    def find(self, keys: list[ObjectKey]) -> list[bool]:
        task = self.adapter.submit_lookup_and_lock_task(keys, {})
        descriptor = self.adapter.get_lookup_and_lock_event_fd()
        bitmap = finished(self.adapter, descriptor, lambda: self.adapter.query_lookup_and_lock_result(task))
        return [bitmap.test(i) for i in range(len(keys))]

    def load(self, keys: list[ObjectKey], objects: list[TensorMemoryObj]) -> list[bool]:
        task = self.adapter.submit_load_task(keys, objects)
        descriptor = self.adapter.get_load_event_fd()
        bitmap = finished(self.adapter, descriptor, lambda: self.adapter.query_load_result(task))
        return [bitmap.test(i) for i in range(len(keys))]


@pytest.fixture
def tier(url: str) -> Iterator[Tier]:
    made = Tier(url)
    yield made
    made.adapter.close()


def manager(url: str, **params: Any) -> StorageManager:
    spec = plugin(url, **params)
    adapter = get_l2_adapter_config_class("plugin").from_dict(spec)
    memory_config = settings.L1MemoryManagerConfig(size_in_bytes=64 << 20, use_lazy=False, shm_name="")
    return StorageManager(
        settings.StorageManagerConfig(
            l1_manager_config=settings.L1ManagerConfig(memory_config=memory_config),
            eviction_config=settings.EvictionConfig(eviction_policy="LRU"),
            l2_adapter_config=L2AdaptersConfig([adapter]),
        )
    )


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come to pass")


@pytest.mark.parametrize("shape", [SHAPE, FUSED])
def test_a_chunk_that_one_manager_stored_another_loads(url: str, shape: torch.Size) -> None:
    keys, layout = [key(i) for i in range(CHUNKS)], MemoryLayoutDesc(shapes=[shape], dtypes=[torch.bfloat16])
    first = manager(url)
    for one, memory_object in first.reserve_write(keys, layout).items():
        memory_object.tensor.copy_(values(keys.index(one), shape))
    first.finish_write(keys)
    stored = until(lambda: first.get_l2_usages()[0][0])
    first.close()
    assert stored < CHUNKS * shape.numel() * 2 / 3.9

    second = manager(url)
    wanted = [*keys, key(99)]
    handle = second.submit_prefetch_task(PrefetchTaskSpec([GroupedObjectKeys(wanted, 0, layout)]))
    result = until(lambda: second.query_prefetch_status(handle))
    assert result.hit_cells[0].popcount() == result.l2_hit_cells[0].popcount() == CHUNKS
    with second.read_prefetched_results(keys, result.l1_owners) as objects:
        for number, memory_object in enumerate(objects):
            assert torch.equal(memory_object.tensor, coded(values(number, shape)))
    second.finish_read_prefetched(keys, 1, result.l1_owners)
    second.close()


def test_lmcache_measures_it(url: str) -> None:
    """LMCache's own benchmark, its check of the values included: it stores one byte over and over, which comes back
    exactly.
    """
    size = 2 * LAYERS * TOKENS * HEADS * DIM * 2 // 1024
    adapter = json.dumps(plugin(url, layers=LAYERS, dtype="bfloat16"))
    command = [sys.executable, "-m", "lmcache.cli.main", "bench", "l2", "--l2-adapter", adapter, "--num-keys", "6"]
    command += ["--data-size-kb", str(size), "--no-skip-verify", "--lookup-max-hit-rate", "0.5"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "All 6 keys data verified OK" in found.stdout, found.stdout
    assert found.stdout.count("Total success:                                                 6") == 2, found.stdout


def test_a_batch_finds_and_loads_what_is_there(tier: Tier) -> None:
    there = [key(1), key(3)]
    assert tier.store(there, [memory(values(1)), memory(values(3))]).is_successful()
    wanted = [key(i) for i in range(4)]
    buffers = [memory(torch.full(SHAPE, 7, dtype=torch.bfloat16)) for _ in wanted]
    assert tier.find(wanted) == tier.load(wanted, buffers) == [False, True, False, True]
    for number, buffer in enumerate(buffers):
        expected = coded(values(number)) if number in (1, 3) else torch.full(SHAPE, 7, dtype=torch.bfloat16)
        assert torch.equal(buffer.tensor, expected)


@pytest.mark.parametrize(
    "other", [{"model_name": "b/model"}, {"kv_rank": 0x02000200}, {"object_group_id": 1}, {"cache_salt": "tenant"}]
)
def test_keys_that_differ_in_anything_are_different(tier: Tier, other: dict[str, Any]) -> None:
    assert tier.store([key(1)], [memory(values(1))]).is_successful()
    assert tier.find([key(1), key(1, **other)]) == [True, False]


def test_what_another_spec_stored_is_not_found(tier: Tier, url: str) -> None:
    tier.store([key(1)], [memory(values(1))])
    other = Tier(url, spec="packed")
    assert other.find([key(1)]) == [False]
    assert other.store([key(1)], [memory(values(1))]).is_successful()
    buffer = memory(torch.zeros(SHAPE, dtype=torch.bfloat16))
    assert other.load([key(1)], [buffer]) == [True]
    assert torch.equal(buffer.tensor, coded(values(1), "packed"))
    other.adapter.close()


def test_damaged_and_swapped_values_are_misses_and_no_buffer_is_touched(server: str) -> None:
    client = redis.Redis.from_url(server)
    client.flushall()
    tier, keys = Tier(server), [key(i) for i in range(6)]
    assert tier.store(keys, [memory(values(i)) for i in range(6)]).is_successful()
    names = [tier.adapter._name(one) for one in keys]
    held = client.mget(names)
    client.set(names[0], held[1])  # another key's value
    client.set(names[1], held[1][: len(held[1]) // 2])
    client.set(names[2], held[2][:5000] + bytes([held[2][5000] ^ 1]) + held[2][5001:])
    client.set(names[3], b"")
    client.set(names[4], b"\x80\x04\x95" + bytes(40))  # a pickle, which nobody may open
    buffers = [memory(torch.full(SHAPE, 7, dtype=torch.bfloat16)) for _ in keys]
    assert tier.load(keys, buffers) == [False] * 5 + [True]
    for buffer in buffers[:5]:
        assert torch.equal(buffer.tensor, torch.full(SHAPE, 7, dtype=torch.bfloat16))
    assert torch.equal(buffers[5].tensor, coded(values(5)))
    assert tier.find(keys) == [False] * 5 + [True]  # what is damaged is removed, so that it is stored anew
    tier.adapter.close()


def test_a_value_of_another_length_than_the_buffer_is_a_miss(tier: Tier) -> None:
    tier.store([key(1)], [memory(values(1))])
    shorter = torch.Size([2, LAYERS, TOKENS - 64, HEADS * DIM])
    buffer = memory(torch.full(shorter, 7, dtype=torch.bfloat16))
    assert tier.load([key(1)], [buffer]) == [False]
    assert torch.equal(buffer.tensor, torch.full(shorter, 7, dtype=torch.bfloat16))


def test_a_layout_that_is_not_known_is_not_stored(tier: Tier, caplog: pytest.LogCaptureFixture) -> None:
    strange = torch.zeros(2, LAYERS, TOKENS, HEADS * DIM + 16, dtype=torch.bfloat16)
    for bad in (
        memory(strange),
        memory(strange),
        memory(values(1), MemoryFormat.KV_MLA_FMT),
        memory(values(1).to(torch.float8_e4m3fn)),
    ):
        assert not tier.store([key(1), key(2)], [memory(values(2)), bad]).is_successful()
    assert tier.find([key(2)]) == [False]
    assert caplog.text.count("kvcomp knows") == 1


def test_a_dead_redis_is_a_miss_and_a_failure_in_time() -> None:
    tier = Tier(f"redis://127.0.0.1:{free_port()}", timeout=1.0)
    buffer = memory(torch.full(SHAPE, 7, dtype=torch.bfloat16))
    begin = time.monotonic()
    assert tier.find([key(1)]) == [False]
    assert not tier.store([key(1)], [memory(values(1))]).is_successful()
    assert tier.load([key(1)], [buffer]) == [False]
    assert time.monotonic() - begin < 5
    assert not tier.adapter.report_status()["is_healthy"]
    assert torch.equal(buffer.tensor, torch.full(SHAPE, 7, dtype=torch.bfloat16))
    tier.adapter.close()


def test_a_redis_that_trickles_is_a_miss_in_time() -> None:
    def trickle(connection: Any) -> None:
        for _ in range(100):
            connection.send(b"$")
            time.sleep(0.05)

    with answering(trickle) as url:
        tier, begin = Tier(url, timeout=0.5), time.monotonic()
        assert tier.find([key(1)]) == [False]
        assert time.monotonic() - begin < 3.5
        tier.adapter.close()


def test_a_batch_ends_only_when_its_buffers_are_free_again(tmp_path: Path) -> None:
    """One chunk fails at once, another takes long: LMCache hears of the task when both are over, since it reuses the
    buffers then.
    """
    tier, began, go_on, over = Tier(str(tmp_path)), threading.Event(), threading.Event(), threading.Event()
    put = tier.adapter._blobs.put

    def slow(items: Any) -> None:
        began.set()
        assert go_on.wait(30)
        put(items)
        over.set()

    tier.adapter._blobs.put = slow  # type: ignore[method-assign]
    bad = memory(torch.zeros(2, LAYERS, TOKENS, 5, dtype=torch.bfloat16))
    task = tier.adapter.submit_store_task([key(1), key(2)], [memory(values(1)), bad])
    assert began.wait(30)
    assert tier.adapter.pop_completed_store_tasks() == {}
    go_on.set()
    descriptor = tier.adapter.get_store_event_fd()
    assert not finished(tier.adapter, descriptor, tier.adapter.pop_completed_store_tasks)[task].is_successful()
    assert over.is_set()
    tier.adapter.close()


def test_what_is_deleted_is_gone_and_not_counted(tier: Tier) -> None:
    keys = [key(1), key(2)]
    first = tier.store(keys, [memory(values(1)), memory(values(2))])
    again = tier.store(keys[:1], [memory(values(1))])
    assert tier.adapter.get_usage().total_bytes_used == first.bytes_transferred() > again.bytes_transferred() > 0
    tier.adapter.delete([*keys, key(3)])
    assert tier.find(keys) == [False, False]
    assert tier.adapter.get_usage().total_bytes_used == 0


@pytest.mark.parametrize(
    "params",
    [{"heads": 0}, {"spec": "none"}, {"workers": 0}, {"capacity": -1}, {"port": 6379}, {"url": 5}, {"timeout": 0}],
)
def test_parameters_are_checked(tmp_path: Path, params: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        KVCompL2Adapter({"url": str(tmp_path), "heads": HEADS, "head_dim": DIM, **params})


def test_the_presets_have_names_that_parameters_may_use(tmp_path: Path) -> None:
    for preset in PRESETS:
        KVCompL2Adapter({"url": str(tmp_path), "heads": HEADS, "head_dim": DIM, "spec": preset}).close()
