"""Notices: log lines of a store that fails, of which one in a second is enough, and one a minute if they are alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

INTERVAL, REPEATED = 1.0, 60.0  # seconds until the next message, and until the same one again


class Notices:
    """Passes on at most one message a second, the same one once a minute, and says how many it left out. Threads may
    share it.

    log: what takes a message.
    """

    def __init__(self, log: Callable[[str], object]) -> None:
        self._log, self._lock = log, threading.Lock()
        self._last, self._shown, self._left_out = "", -REPEATED, 0

    def say(self, message: str) -> None:
        """Log a message, or count it."""
        with self._lock:
            now = time.monotonic()
            if now < self._shown + (REPEATED if message == self._last else INTERVAL):
                self._left_out += 1
                return
            more = f" ({self._left_out} messages before it not shown)" if self._left_out else ""
            self._last, self._shown, self._left_out = message, now, 0
        self._log(message + more)
