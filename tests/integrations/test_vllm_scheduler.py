"""vLLM's scheduler with blocks taken out of use, over a stand-in of the class that it extends."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvcomp.spec import PAGE_TOKENS

MODULE = "kvcomp.integrations.vllm.scheduler"
BLOCKS, LONGEST = 41, 8  # of the pool, one of which is vLLM's own; and of the longest sequence


class Pool:
    """The blocks that no request has."""

    def __init__(self) -> None:
        self.num_gpu_blocks = BLOCKS
        self.free = [SimpleNamespace(block_id=number) for number in range(1, BLOCKS)]

    def get_num_free_blocks(self) -> int:
        return len(self.free)

    def get_new_blocks(self, count: int) -> list[Any]:
        assert 0 <= count <= len(self.free)
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def free_blocks(self, blocks: list[Any]) -> None:
        self.free += blocks


class Plain:
    """vLLM's scheduler, as far as it is extended."""

    def __init__(self, vllm_config: Any) -> None:
        self.kv_cache_manager = SimpleNamespace(block_pool=Pool())

    def schedule(self) -> Any:
        return SimpleNamespace()

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        return len(self.kv_cache_manager.block_pool.free) == BLOCKS - 1

    def update_from_output(self, planned: Any, found: Any) -> Any:
        return found


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    parts = ["vllm", "v1", "core", "sched", "scheduler"]
    modules = {".".join(parts[: end + 1]): ModuleType(parts[end]) for end in range(len(parts))}
    modules["vllm.v1.core.sched.scheduler"].__dict__["Scheduler"] = Plain
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop(MODULE, None)
    of = importlib.import_module(MODULE).KVCompScheduler
    model = SimpleNamespace(max_model_len=LONGEST * PAGE_TOKENS - 1)
    yield of(SimpleNamespace(additional_config={"kvcomp": {"reserve": 0.2}}, model_config=model))
    sys.modules.pop(MODULE, None)


def step(scheduler: Any, outside: float) -> list[int]:
    """The blocks that a step takes out of use, after which so large a share of pages lies outside."""
    planned = scheduler.schedule()
    scheduler.update_from_output(planned, SimpleNamespace(kvcomp_outside=outside))
    dead: list[int] = planned.kvcomp_dead
    return dead


def test_blocks_are_out_of_use_while_more_than_the_reserve_lies_outside(scheduler: Any) -> None:
    pool = scheduler.kv_cache_manager.block_pool
    assert step(scheduler, 0.2) == []
    assert step(scheduler, 0.3) == []
    assert step(scheduler, 0.3) == [*range(1, BLOCKS - LONGEST)]
    assert len(pool.free) == LONGEST, "the longest sequence can always go on"
    assert step(scheduler, 0.1) == []
    assert step(scheduler, 0.1) == []
    assert len(pool.free) == BLOCKS - 1


def test_blocks_that_requests_have_are_taken_when_they_are_free(scheduler: Any) -> None:
    pool = scheduler.kv_cache_manager.block_pool
    running = pool.get_new_blocks(30)
    step(scheduler, 0.9)
    assert len(step(scheduler, 0.9)) == 10
    assert not pool.free
    pool.free_blocks(running[:25])
    assert len(step(scheduler, 0.9)) == BLOCKS - 1 - LONGEST - 10
    assert len(pool.free) + 5 == LONGEST


def test_an_output_that_says_nothing_takes_nothing(scheduler: Any) -> None:
    planned = scheduler.schedule()
    assert scheduler.update_from_output(planned, SimpleNamespace()) is not None
    assert step(scheduler, 0.0) == []


def test_the_prefix_cache_can_be_reset_while_blocks_are_out_of_use(scheduler: Any) -> None:
    """As after an update of the weights; vLLM does so only if no block is in use."""
    step(scheduler, 0.9)
    assert step(scheduler, 0.9)
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert step(scheduler, 0.9)
