"""Asking a store that may be down, without waiting for its deadline at every question."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from kvcomp.errors import CorruptData, StoreUnavailable
from kvcomp.serve.blobs import Blobs

PAUSE = 1.0  # seconds in which a store that just did not answer is not asked again

T = TypeVar("T")


class Patience:
    """Lets calls to a store through unless it has just failed: a serving engine that waited for each deadline in turn would stand still."""

    def __init__(self) -> None:
        self._until = 0.0

    @property
    def lost(self) -> bool:
        """Whether the store has just failed and is not asked."""
        return time.monotonic() < self._until

    def ask(self, call: Callable[[], T]) -> T:
        """The result of a call. Raises StoreUnavailable, also without a call."""
        if self.lost:
            raise StoreUnavailable("the store did not answer just now, so it is not asked")
        try:
            return call()
        except StoreUnavailable:
            self._until = time.monotonic() + PAUSE
            raise

    def drop(self, blobs: Blobs, key: str, error: Exception) -> None:
        """Remove a value that is damaged, as an error says, so that whoever computes it anew finds its place empty."""
        if isinstance(error, CorruptData):
            with suppress(StoreUnavailable):
                self.ask(lambda: blobs.delete([key]))
