"""Values in Redis or Valkey. Every call has one deadline for all it does, retries included.

A socket's own time-out is for each piece that arrives: a server that sends a byte now and then would hold a caller for
ever. So the client is redis-py's asynchronous one, on a thread of its own, and a call is cancelled as a whole when its
time is up.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from selectors import PollSelector
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError, ResponseError

from kvcomp.errors import InvalidInput, StoreUnavailable
from kvcomp.serve.blobs.values import Buffer, check_keys

RETRIES = 2
GRACE = 2.0  # seconds after a deadline in which a cancelled call must have ended

T = TypeVar("T")


class RedisBlobs:
    """The values of ``kvcomp.serve.blobs.Blobs`` as Redis strings; the server keeps its memory in bounds (maxmemory,
    allkeys-lru).

    url: as redis-py takes it. timeout: seconds of one call in all, whatever it moves.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url, timeout
        parts = urlsplit(url)
        self.name = parts.hostname or parts.path or "localhost"  # not the URL, which may hold a password
        self.lock = threading.Lock()
        _stores.add(self)
        self.process, self.advised = 0, False
        try:
            self._client().connection_pool.make_connection()
        except (ValueError, TypeError) as error:
            raise InvalidInput(f"this is no URL of a Redis: {error}") from None

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        check_keys(keys)

        async def action(client: Any) -> Any:
            async with client.pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.strlen(key)
                found = await pipeline.execute(raise_on_error=False)
            for answer in found:
                if isinstance(answer, ResponseError) and not str(answer).startswith("WRONGTYPE"):
                    raise answer  # of the server, not of what is under this key
            return found

        found = self._call(action, len(keys))
        return [size if isinstance(size, int) and size > 0 else None for size in found]

    def get(self, keys: Sequence[str]) -> list[Buffer | None]:
        check_keys(keys)
        found = self._call(lambda client: client.mget(keys), len(keys)) if keys else []
        return [value if isinstance(value, bytes) and value else None for value in found]

    def touch(self, keys: Sequence[str]) -> None:
        check_keys(keys)
        if keys:
            self._call(lambda client: client.touch(*reversed(keys)))

    def put(self, items: Sequence[tuple[str, Sequence[Buffer]]], kept: Sequence[str] = ()) -> None:
        check_keys([key for key, _ in items])
        values = [(key, b"".join(pieces)) for key, pieces in items]
        advise, self.advised = not self.advised, True

        async def action(client: Any) -> Any:
            if advise:
                await _advise(client)
            async with client.pipeline(transaction=False) as pipeline:
                for key, value in values:
                    pipeline.set(key, value)
                return await pipeline.execute()

        self._call(action, len(values))

    def put_new(self, key: str, value: Sequence[Buffer]) -> bool:
        check_keys([key])
        return bool(self._call(lambda client: client.set(key, b"".join(value), nx=True)))

    def delete(self, keys: Sequence[str]) -> None:
        check_keys(keys)
        if keys:
            self._call(lambda client: client.delete(*keys))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy connects for itself."""
        return RedisBlobs, (self.url, self.timeout)

    def close(self) -> None:
        with self.lock:
            if self.process:
                self.end()
            self.process = 0

    def _client(self) -> Any:
        return redis.asyncio.Redis.from_url(
            self.url,
            socket_timeout=self.timeout,
            socket_connect_timeout=self.timeout,
            retry=Retry(ExponentialBackoff(cap=self.timeout / 4, base=0.02), RETRIES),
            protocol=2,
        )

    def _connect(self) -> None:
        """Start the loop and the client of this process: a fork has no such thread, and may not share connections."""
        if self.process != os.getpid():
            # Poll's state is this process' own: of epoll's a fork would remove the connections that it gives back.
            self.loop, self.client = asyncio.SelectorEventLoop(PollSelector()), self._client()
            thread = threading.Thread(target=self.loop.run_forever, name="kvcomp-redis", daemon=True)
            thread.start()
            self.process = os.getpid()
            # Also when nobody has this store any more, and when the process ends.
            self.end = weakref.finalize(self, _stop, self.process, self.loop, thread, self.client, self.timeout + GRACE)

    def _call(self, action: Callable[[Any], Awaitable[T]], answers: int | None = None) -> Any:
        """The result of an action, a list of so many answers if a number is given. Raises StoreUnavailable."""

        async def bounded(client: Any, timeout: float) -> T:  # without self, which may go while this ends
            async with asyncio.timeout(timeout):
                return await action(client)

        try:
            with self.lock:  # a loop that is closed meanwhile would take nothing
                self._connect()
                future = asyncio.run_coroutine_threadsafe(bounded(self.client, self.timeout), self.loop)
        except (OSError, RuntimeError) as error:  # no descriptors are left, or no threads
            raise StoreUnavailable(f"Redis at {self.name} cannot be asked: {error}") from error
        try:
            found = future.result(self.timeout + GRACE)
        except CancelledError:
            raise StoreUnavailable(f"Redis at {self.name}: the store was closed meanwhile") from None
        except TimeoutError:
            raise StoreUnavailable(f"Redis at {self.name} took longer than {self.timeout} s: is it up?") from None
        except ResponseError as error:
            raise StoreUnavailable(f"Redis at {self.name} refuses: {error}") from error
        except (RedisError, OSError, EOFError, ValueError) as error:
            raise StoreUnavailable(f"Redis at {self.name} cannot be used: {error}") from error
        finally:
            future.cancel()
        if answers is not None and (not isinstance(found, list) or len(found) != answers):
            raise StoreUnavailable(f"Redis at {self.name} gives other answers than Redis does")
        return found


def _forget_locks() -> None:
    """In a fork: a thread may have held a lock, and is not there."""
    for store in _stores:
        store.lock = threading.Lock()


_stores = weakref.WeakSet[RedisBlobs]()
os.register_at_fork(after_in_child=_forget_locks)


def _stop(process: int, loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: Any, most: float) -> None:
    """End the calls, connections and loop of a process; another one, a fork, has none of them."""
    if process != os.getpid():
        return
    with suppress(RedisError, OSError):  # a server that does not say goodbye holds nobody
        asyncio.run_coroutine_threadsafe(_end(client), loop).result(most)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(GRACE)
    loop.close()


async def _end(client: Any) -> None:
    """Cancel the calls that run, and close the connections."""
    calls = asyncio.all_tasks() - {asyncio.current_task()}
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await client.aclose()


async def _advise(client: Any) -> None:
    """Say it if this Redis would fill up and then refuse. What may not be asked is not said."""
    try:
        about = await client.info("memory")
    except RedisError:
        return
    if isinstance(about, dict) and (not about.get("maxmemory") or about.get("maxmemory_policy") == "noeviction"):
        logging.getLogger("kvcomp").warning(
            "this Redis has no limit or does not evict: set maxmemory, and maxmemory-policy allkeys-lru, or it fills up"
        )
