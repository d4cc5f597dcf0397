"""vLLM's scheduler, which waits when compressed pages are larger than declared. vLLM takes it by its name:

    vllm serve MODEL --scheduler-cls kvcomp.integrations.vllm.scheduler.KVCompScheduler ...

Without it such pages lie outside of vLLM's memory without a limit.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from kvcomp.integrations.vllm.live import Live
from kvcomp.spec import PAGE_TOKENS

OUTSIDE = "kvcomp_outside"  # of what the worker returns: pages outside of vLLM's memory, as a share of it
DEAD = "kvcomp_dead"  # of what the worker is told: blocks whose pages nobody will read


class KVCompScheduler(Scheduler):
    """Takes free blocks out of use as long as more pages than the reserve lie outside.

    Requests then wait, or are preempted by those before them, and none is lost: blocks for the longest sequence are
    always left, so that the first request goes on to its end.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._reserve = Live.of(vllm_config).reserve
        self._outside = 0.0
        self._held: list[Any] = []
        self._pool = self.kv_cache_manager.block_pool
        needed = -(-vllm_config.model_config.max_model_len // PAGE_TOKENS)
        self._most = max(0, self._pool.num_gpu_blocks - 1 - needed)  # one block is vLLM's own

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Plan a step, after blocks are taken or given back."""
        taken = []
        if self._outside > self._reserve:
            taken = self._pool.get_new_blocks(min(self._pool.get_num_free_blocks(), self._most - len(self._held)))
            self._held += taken
        else:
            self._give_back()
        output = super().schedule(*args, **kwargs)
        setattr(output, DEAD, [block.block_id for block in taken])
        return output

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Forget what sequences may begin with, for which vLLM must have all blocks."""
        self._give_back()
        return bool(super().reset_prefix_cache(*args, **kwargs))

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take over what a step came to."""
        self._outside = getattr(model_runner_output, OUTSIDE, 0.0)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _give_back(self) -> None:
        if self._held:
            self._pool.free_blocks(self._held)
            self._held = []
