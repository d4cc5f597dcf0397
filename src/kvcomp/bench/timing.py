"""Times that can be compared: all methods in turn, round after round, so that other load hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

LEAST_ROUNDS = 5
REST = 0.02  # seconds in which OpenMP's workers stop spinning

Action = Callable[[], Any]
Clock = Callable[[], float]
Rounds = list[dict[str, float]]


def clock_for(threads: int) -> Clock:
    """The processor's clock for one thread, as other programs do not lengthen it; else the wall's."""
    return time.process_time if threads == 1 else time.perf_counter


def seconds(action: Action, clock: Clock, rest: float) -> float:
    """Time of a call after ``rest`` seconds of sleep."""
    time.sleep(rest)
    begin = clock()
    action()
    return clock() - begin


def in_rounds(
    actions: Mapping[str, Action],
    rounds: int,
    budget: float,
    clock: Clock = time.process_time,
    rest: float = 0.0,
) -> Rounds:
    """Seconds of each action in each round, after one that does not count.

    There are fewer rounds, but LEAST_ROUNDS, if they take longer than ``budget`` seconds.
    """
    for action in actions.values():
        action()
    taken: Rounds = []
    begin = time.perf_counter()
    while len(taken) < rounds and (len(taken) < LEAST_ROUNDS or time.perf_counter() - begin < budget):
        taken.append({name: seconds(action, clock, rest) for name, action in actions.items()})
    return taken


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, five significant digits each."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    named = {"median": middle, "quartile_1": low, "quartile_3": high}
    return {name: float(f"{value:.5g}") for name, value in named.items()}


def scaled(taken: Rounds, name: str, factor: float) -> dict[str, float]:
    """Quartiles of an action's time, times a factor."""
    return quartiles([factor * of_round[name] for of_round in taken])


def ratio(taken: Rounds, ours: str, theirs: str) -> dict[str, float]:
    """Quartiles of the time of one action over that of another, each within a round."""
    return quartiles([of_round[ours] / of_round[theirs] for of_round in taken])


def fastest(taken: Rounds, names: Sequence[str]) -> str:
    """The action with the lowest median."""
    return min(names, key=lambda name: float(np.median([of_round[name] for of_round in taken])))
