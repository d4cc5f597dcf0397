"""Threads share codebooks, and kernels read their descriptions by address."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event
from typing import Any

import pytest

from kvcomp.codec.codebook import default
from kvcomp.kernels.cpu import tables

THREADS = 4


@pytest.mark.parametrize("late", range(THREADS))
def test_threads_that_first_use_a_book_together_read_the_description_that_stays(
    monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    """All have described it before one keeps what it made, and one comes when the others have read theirs."""
    default.cache_clear()
    book, describe = default(0.08, 1, 12), tables._describe
    described, order, others = Barrier(THREADS), iter(range(THREADS)), Event()

    def slowly(*arguments: Any) -> tuple[int, ...]:
        found = describe(*arguments)
        if described.wait(timeout=60) == late:
            others.wait(timeout=1)
        return found

    def address(_: int) -> int:
        found = int(tables.book_addresses([(book, None), (None, None)], 128)[0])
        if next(order) == THREADS - 2:
            others.set()
        return found

    monkeypatch.setattr(tables, "_describe", slowly)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(address, range(THREADS)))
    (kept,) = tables.describe_books([(book, None), (None, None)], 128)[:1]
    assert found == [kept.ctypes.data] * THREADS
    assert kept.tolist() == list(describe(book, True))
