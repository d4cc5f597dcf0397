"""A model of a GPU's multiprocessor: cycles that warps take for the same instructions over and over.

Four schedulers issue in order, as the compiler's stall counts and barriers allow; the warp that was issued last goes
on if it can. Each has its own pipes; loads, stores
and shuffles of all four share one, which takes a wavefront a cycle. Memory behind shared memory is free: copies land in
time, and what is read of global memory is in the first-level cache. Not validated on a device: ``gpu_rates.py``
measures what it takes for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from gpu_pipes import LATENCY, MEMORY, NO_PIPE, PIPE_OF, PIPES, SCHEDULERS, busy
from sass import Control, Instruction

QUEUE = 8  # loads and stores that a scheduler hands over before they are begun
HANDING_OVER = 4  # cycles until one may be begun
SPECIAL_LATENCY = 20
BRANCH = 5  # cycles that a branch stalls more than the compiler says


def pipe_of(instruction: Instruction) -> int:
    """Number in PIPES; NO_PIPE for what only takes its turn."""
    return PIPE_OF.get(instruction.name, NO_PIPE)


def floors(trace: Sequence[Instruction], wavefronts: Sequence[float], architecture: int) -> dict[str, float]:
    """Cycles of a scheduler below which a trace cannot run, whatever else is free: to issue it, and in each pipe.

    wavefronts: what each instruction takes of the memory pipe, on average.
    """
    cycles = busy(architecture)
    found = {"issue": float(len(trace))}
    for pipe, name in enumerate(PIPES[:MEMORY]):
        found[name] = float(cycles[pipe] * sum(pipe_of(one) == pipe for one in trace))
    return found | {"memory": SCHEDULERS * float(sum(wavefronts))}


def cycles(
    trace: Sequence[Instruction],
    wavefronts: Callable[[Instruction], npt.NDArray[np.int64]],
    warps: int,
    architecture: int,
    turns: int = 6,
    seed: int = 0,
) -> float:
    """Cycles for one run of the trace, of each scheduler, when ``warps`` of them share the multiprocessor.

    Parameters
    ----------
    trace
        Instructions of one turn.
    wavefronts
        For a load or store, how many wavefronts it may take, each as often as it does; drawn at random.
    warps
        Warps of the multiprocessor, which begin at different times.
    turns
        How often each runs the trace while it is timed, after once to warm up.

    Returns
    -------
    float
        The multiprocessor ends so many traces as it has schedulers in this time.

    Raises
    ------
    ValueError
        If the trace never waits, so that one warp of a scheduler keeps the others from running.
    """
    program = np.array([_encoded(one) for one in trace], np.int64)
    drawn = [wavefronts(one) if pipe_of(one) == MEMORY else np.zeros(1, np.int64) for one in trace]
    kinds = {id(one): one for one in drawn}
    rows = {key: row for row, key in enumerate(kinds)}
    table = np.zeros((len(kinds), max(len(one) for one in kinds.values())), np.int64)
    sizes = np.array([len(one) for one in kinds.values()], np.int64)
    for row, one in enumerate(kinds.values()):
        table[row, : len(one)] = one
    of_kind = np.array([rows[id(one)] for one in drawn], np.int64)
    pipes = busy(architecture)
    held = np.array([pipes.get(pipe, 0) for pipe in range(NO_PIPE + 1)], np.int64)
    periods = _simulate(program, of_kind, table, sizes, held, warps, turns, seed)
    if periods.min() <= 0:
        raise ValueError("a warp never came to its turns: the trace never waits")
    return float(SCHEDULERS / (1 / periods).sum())


def _encoded(one: Instruction) -> tuple[int, int, int, int, int]:
    control: Control = one.control
    stall = max(1, control.stall) + (BRANCH if one.name in ("BRA", "BRX") else 0)
    return pipe_of(one), stall, control.sets, control.frees, control.waits


@njit(cache=True)
def _simulate(
    program: Any, of_kind: Any, table: Any, sizes: Any, held: Any, warps: int, turns: int, seed: int
) -> Any:  # cycles of a turn, for each warp
    np.random.seed(seed)
    length = program.shape[0]
    at, turn = np.zeros(warps, np.int64), np.zeros(warps, np.int64)
    ready = np.random.randint(0, length, warps)  # when the next instruction may be issued
    barriers = np.zeros((warps, 8), np.int64)  # when each is released
    free = np.zeros((SCHEDULERS, NO_PIPE + 1), np.int64)  # when each pipe takes the next
    queued = np.zeros((SCHEDULERS, QUEUE), np.int64)  # when those in the queue begin
    in_queue = np.zeros(SCHEDULERS, np.int64)
    memory_free = 0
    last = np.zeros(SCHEDULERS, np.int64)  # who was issued last goes first
    begun, ended = np.zeros(warps, np.int64), np.zeros(warps, np.int64)
    running, now = warps, 0
    while running and now < 64 * warps * length * (turns + 1):
        for scheduler in range(SCHEDULERS):
            its_warps = (warps - scheduler + SCHEDULERS - 1) // SCHEDULERS
            for k in range(its_warps):
                warp = scheduler + SCHEDULERS * ((last[scheduler] + k) % its_warps)
                if ready[warp] > now:
                    continue
                pipe, stall, sets, frees, waits = program[at[warp]]
                blocked = free[scheduler, pipe] > now
                for barrier in range(6):
                    blocked |= waits >> barrier & 1 and barriers[warp, barrier] > now
                slot = in_queue[scheduler] % QUEUE
                if blocked or (pipe == MEMORY and queued[scheduler, slot] > now):
                    continue
                last[scheduler] = warp // SCHEDULERS
                free[scheduler, pipe] = now + held[pipe]
                done, read = now + SPECIAL_LATENCY, now + 8
                if pipe == MEMORY:
                    kind = of_kind[at[warp]]
                    passes = table[kind, np.random.randint(0, sizes[kind])]
                    begins = max(now + HANDING_OVER, memory_free)
                    memory_free = begins + passes
                    done = begins - HANDING_OVER + LATENCY + max(passes - 1, 0)
                    read = begins + HANDING_OVER
                    queued[scheduler, slot] = begins
                    in_queue[scheduler] += 1
                    free[scheduler, pipe] = now + 2
                barriers[warp, sets] = max(barriers[warp, sets], done)
                barriers[warp, frees] = max(barriers[warp, frees], read)
                ready[warp] = now + stall
                at[warp] += 1
                if at[warp] == length:
                    at[warp] = 0
                    turn[warp] += 1
                    if turn[warp] == 1:
                        begun[warp] = now
                    elif turn[warp] == turns + 1:
                        ended[warp] = now
                        running -= 1
                break
        now += 1
    return (ended - begun) / turns
