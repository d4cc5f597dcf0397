"""A store that fails is let be for a while, which grows only with failures in a row, and little is said of it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomp.errors import StoreUnavailable
from kvcomp.serve.breaker import MOST_PAUSE, PAUSE, CircuitBreaker
from kvcomp.serve.notices import INTERVAL, REPEATED, Notices


class Clock:
    """The time of a test, in seconds, which nothing but the test moves."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr(time, "monotonic", lambda: self.now)

    def closes_after(self, breaker: CircuitBreaker) -> float:
        """How long from now on the store is not asked; that time is then over."""
        begin = self.now
        while breaker.open:
            self.now += 0.25
        return self.now - begin


def down() -> NoReturn:
    raise StoreUnavailable("down")


def fail(breaker: CircuitBreaker) -> None:
    with pytest.raises(StoreUnavailable, match=r"^down$"):
        breaker.ask(down)


def together(breaker: CircuitBreaker, calls: int) -> None:
    """So many calls, which all fail once all have begun."""
    begun = Barrier(calls)

    def call() -> NoReturn:
        begun.wait(timeout=60)
        down()

    def ask(_: int) -> None:
        with pytest.raises(StoreUnavailable, match=r"^down$"):
            breaker.ask(call)

    with ThreadPoolExecutor(calls) as pool:
        list(pool.map(ask, range(calls)))


@pytest.mark.parametrize("calls", [1, 8])
def test_calls_that_fail_together_double_the_pause_once(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    clock, breaker = Clock(monkeypatch), CircuitBreaker()
    found = []
    for _ in range(9):
        together(breaker, calls)
        found.append(clock.closes_after(breaker))
    assert found == [PAUSE, 2 * PAUSE, 4 * PAUSE, 8 * PAUSE, 16 * PAUSE, 32 * PAUSE, *[MOST_PAUSE] * 3]


@given(st.lists(st.booleans(), max_size=20))
def test_a_pause_counts_the_failures_since_the_last_success(answers: list[bool]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock, breaker, failures = Clock(patch), CircuitBreaker(), 0
        for answer in answers:
            if answer:
                assert breaker.ask(lambda: "found") == "found"
                failures = 0
            else:
                fail(breaker)
                assert clock.closes_after(breaker) == min(PAUSE * 2**failures, MOST_PAUSE)
                failures += 1


def test_while_it_is_open_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, breaker = Clock(monkeypatch), CircuitBreaker()
    fail(breaker)
    asked: list[bool] = []
    with pytest.raises(StoreUnavailable, match="not asked"):
        breaker.ask(lambda: asked.append(True))
    assert not asked
    clock.now += PAUSE
    breaker.ask(lambda: asked.append(True))
    assert asked


def test_another_error_says_nothing_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    breaker = CircuitBreaker()
    with pytest.raises(ZeroDivisionError):
        breaker.ask(lambda: 1 // 0)
    assert not breaker.open


def test_messages_that_were_left_out_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = Clock(monkeypatch), list[str]()
    notices = Notices(said.append)
    for message in "abc":
        notices.say(message)
    for message in "de":
        clock.now += INTERVAL
        notices.say(message)
    assert said == ["a", "d (2 messages before it not shown)", "e"]


def test_the_same_message_comes_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = Clock(monkeypatch), list[str]()
    notices = Notices(said.append)
    for _ in range(int(REPEATED) + 1):
        notices.say("a")
        clock.now += INTERVAL
    notices.say("b")
    assert said == ["a", "a (59 messages before it not shown)", "b"]
