"""A store that may be down: stop asking it for a while, and delete from it only what is damaged."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import TypeVar

from kvcomp.errors import CorruptData, StoreUnavailable
from kvcomp.serve.blobs import Blobs

PAUSE = 1.0  # seconds in which a store that just did not answer is not asked again
MOST_PAUSE = 60.0  # the same for one that has not answered for long: each failure doubles it

T = TypeVar("T")


class CircuitBreaker:
    """Lets calls to a store through unless it has just failed. A serving engine cannot wait for every
    deadline in turn.
    """

    def __init__(self) -> None:
        self._until, self._pause, self._lock = 0.0, PAUSE, Lock()

    @property
    def open(self) -> bool:
        """Whether the store has just failed and is not asked."""
        return time.monotonic() < self._until

    def ask(self, call: Callable[[], T]) -> T:
        """The result of a call. Raises StoreUnavailable, also without a call."""
        before = self._until
        if self.open:
            raise StoreUnavailable("the store did not answer just now, so it is not asked")
        try:
            result = call()
        except StoreUnavailable:
            with self._lock:
                if self._until == before:  # of calls that fail together the first counts
                    self._until, self._pause = time.monotonic() + self._pause, min(2 * self._pause, MOST_PAUSE)
            raise
        self._pause = PAUSE
        return result

    def drop_damaged(self, blobs: Blobs, key: str, error: Exception) -> None:
        """The same as the function, but a store that does not answer is let be."""
        with suppress(StoreUnavailable):
            self.ask(lambda: drop_damaged(blobs, key, error))


def drop_damaged(blobs: Blobs, key: str, error: Exception) -> None:
    """Delete a value if reading it raised CorruptData. Any other error says nothing of the value, which others may be
    able to use.
    """
    if isinstance(error, CorruptData):
        blobs.delete([key])
