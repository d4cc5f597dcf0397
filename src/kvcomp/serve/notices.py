"""Notices: log lines of a store that fails, of which the first in a second is enough."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

INTERVAL = 1.0  # seconds


class Notices:
    """Passes on at most one message a second, and says how many it left out. Threads may share it.

    log: what takes a message.
    """

    def __init__(self, log: Callable[[str], object]) -> None:
        self._log, self._lock = log, threading.Lock()
        self._next, self._left_out = 0.0, 0

    def say(self, message: str) -> None:
        """Log a message, or count it."""
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                self._left_out += 1
                return
            more = f" ({self._left_out} messages before it not shown)" if self._left_out else ""
            self._next, self._left_out = now + INTERVAL, 0
        self._log(message + more)
