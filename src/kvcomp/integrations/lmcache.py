"""A second tier for LMCache (0.5.6) that keeps K and V compressed, in Redis, Valkey or a folder.

Loaded by LMCache itself, from its configuration:

    {"type": "plugin", "module_path": "kvcomp.integrations.lmcache", "class_name": "KVCompL2Adapter",
     "adapter_params": {"url": "redis://127.0.0.1:6379", "heads": 8, "head_dim": 128, "spec": "kvcomp"}}

LMCache finds and moves chunks; this compresses them on their way out and puts them back on their way in. What it stores
are .kvc files (``kvcomp.serve.chunks``). A chunk that is damaged, of another key or of another shape is a miss. So is
everything while the store does not answer: LMCache then computes the tokens anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

from lmcache.lmcache_native import Bitmap
from lmcache.logging import init_logger
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier

from kvcomp.calibration import resolve
from kvcomp.errors import InvalidInput, KVCompError, StoreUnavailable
from kvcomp.integrations.lmcache_layout import heads_of, kv_views
from kvcomp.serve.blobs import TIMEOUT, open_blobs
from kvcomp.serve.breaker import CircuitBreaker
from kvcomp.serve.chunks import chunk_key, open_chunk, pack_chunk, unpack
from kvcomp.serve.notices import Notices

PARAMETERS = (
    "url",
    "heads",
    "head_dim",
    "layers",
    "dtype",
    "spec",
    "calibration",
    "limit",
    "timeout",
    "workers",
    "capacity",
)

logger = init_logger(__name__)

T = TypeVar("T")


class KVCompL2Adapter(L2AdapterInterface):
    """LMCache's interface to a second tier, over ``kvcomp.serve.blobs``.

    ``params`` needs ``url``, that of the store, and ``heads`` and ``head_dim``, the KV heads of one rank and their
    channels. It may have

    - ``spec``: a preset's name or a JSON file (kvcomp);
    - ``calibration``: a .kvcal file, for the presets ``kvcomp-klt`` and ``packed-klt``;
    - ``timeout``: seconds that one call to the store may take;
    - ``workers``: threads that compress (2);
    - ``limit``: bytes a folder may hold;
    - ``capacity``: bytes at which LMCache's own eviction begins;
    - ``layers`` and ``dtype``: of chunks that LMCache gives as plain bytes.

    Raises InvalidInput for anything else.
    """

    def __init__(self, params: dict[str, Any], l1_memory_desc: Any = None) -> None:
        unknown = sorted(set(params) - set(PARAMETERS))
        if unknown or not isinstance(params.get("url"), str):
            raise InvalidInput(
                f"adapter_params needs url, and knows {', '.join(PARAMETERS)}, not {', '.join(unknown) or 'no url'}"
            )
        self._heads = heads_of(params)
        self._spec, self._calibration = resolve(params.get("spec", "kvcomp"), params.get("calibration"))
        workers, capacity = params.get("workers", 2), params.get("capacity", 0)
        if type(workers) is not int or not 1 <= workers <= 64 or type(capacity) is not int or capacity < 0:
            raise InvalidInput(f"workers must be 1 to 64 and capacity bytes from 0, not {workers!r} and {capacity!r}")
        super().__init__(capacity)
        self._blobs = open_blobs(params["url"], limit=params.get("limit"), timeout=params.get("timeout", TIMEOUT))
        self._breaker, self._errors = CircuitBreaker(), Notices(logger.error)
        self._events = {kind: create_event_notifier() for kind in ("store", "lookup", "load")}
        self._done: dict[str, dict[int, Any]] = {kind: {} for kind in self._events}
        self._sizes: dict[ObjectKey, int] = {}  # of what this adapter stored
        self._lock = threading.Lock()
        self._next = 0
        # Calls that wait for others run in ``_tasks``, what they wait for in ``_workers``:
        # so they cannot wait for themselves.
        self._tasks = ThreadPoolExecutor(4, "kvcomp-task")
        self._workers = ThreadPoolExecutor(workers, "kvcomp-work")

    # What LMCache waits on

    def get_store_event_fd(self) -> int:
        return int(self._events["store"].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        return int(self._events["lookup"].fileno())

    def get_load_event_fd(self) -> int:
        return int(self._events["load"].fileno())

    # Storing

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        return self._submit("store", partial(self._store, keys, objects), L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        with self._lock:
            done, self._done["store"] = self._done["store"], {}
        return done

    def _store(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> L2StoreResult:
        return L2StoreResult(True, sum(self._each(self._store_one, keys, objects)))

    def _store_one(self, key: ObjectKey, memory: MemoryObj) -> int:
        """Store a chunk and count it at once: others of its task may fail."""
        name = self._name(key)
        _, kv = kv_views(memory, self._heads)
        pieces = pack_chunk(name, self._spec, kv, self._calibration)
        self._breaker.ask(lambda: self._blobs.put([(name, pieces)]))
        size = sum(piece.nbytes for piece in pieces)
        with self._lock:
            known = key in self._sizes
            self._sizes.setdefault(key, size)
        if not known:
            self._notify_keys_stored([key], [size])
        return size

    # Finding

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        return self._submit("lookup", partial(self._look_up, keys), Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        return self._pop("lookup", task_id)

    def _look_up(self, keys: Sequence[ObjectKey]) -> Bitmap:
        found = self._breaker.ask(lambda: self._blobs.sizes([self._name(key) for key in keys]))
        self._notify_keys_accessed([key for key, size in zip(keys, found, strict=True) if size is not None])
        return _bitmap([size is not None for size in found])

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Nothing is locked: a value that goes between being found and being loaded is a miss then."""

    # Loading

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        return self._submit("load", partial(self._load, keys, objects), Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        return self._pop("load", task_id)

    def _load(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> Bitmap:
        return _bitmap(self._each(self._load_one, keys, objects))

    def _load_one(self, key: ObjectKey, memory: MemoryObj) -> bool:
        """Fill a buffer, or leave it as it is. Every check comes before the first write."""
        name = self._name(key)
        try:
            shape, kv = kv_views(memory, self._heads)
            (data,) = self._breaker.ask(lambda: self._blobs.get([name]))
            if data is None:
                return False
            for store, (k, v) in zip(open_chunk(data, name, self._spec, shape, self._calibration), kv, strict=True):
                found_k, found_v = unpack(store)
                k.copy_(found_k)
                v.copy_(found_v)
        except KVCompError as error:
            self._errors.say(f"kvcomp: {error}")
            self._breaker.drop_damaged(self._blobs, name, error)
            return False
        return True

    # The rest of the interface

    def delete(self, keys: list[ObjectKey]) -> None:
        try:
            self._breaker.ask(lambda: self._blobs.delete([self._name(key) for key in keys]))
        except StoreUnavailable as error:
            self._errors.say(f"kvcomp: {error}")
            return
        with self._lock:
            gone = [(key, self._sizes.pop(key)) for key in keys if key in self._sizes]
        self._notify_keys_deleted([key for key, _ in gone], [size for _, size in gone])

    def report_status(self) -> dict[str, Any]:
        return {
            "is_healthy": not self._breaker.open,
            "type": type(self).__name__,
            "stored": len(self._sizes),
        }

    def close(self) -> None:
        """Wait for what runs, which the store's deadline bounds, and give everything back."""
        for pool in (self._tasks, self._workers):
            pool.shutdown(wait=True, cancel_futures=True)
        self._blobs.close()
        for event in self._events.values():
            event.close()

    # Steps

    def _name(self, key: ObjectKey) -> str:
        about = {
            "model": key.model_name,
            "tokens": key.chunk_hash.hex(),
            "rank": key.kv_rank,
            "group": key.object_group_id,
            "salt": key.cache_salt,
            "heads": [self._heads.heads, self._heads.head_dim],
        }
        return f"kvcomp:{chunk_key(self._spec, about)}"

    def _submit(self, kind: str, work: Callable[[], Any], failed: Any) -> int:
        with self._lock:
            task = self._next
            self._next += 1

        def run() -> None:
            result = failed
            try:
                result = work()
            except KVCompError as error:
                self._errors.say(f"kvcomp: {error}")
            except Exception:
                logger.exception("kvcomp: a %s task failed", kind)
            finally:  # whoever waits hears of it in any case
                with self._lock:
                    self._done[kind][task] = result
                self._events[kind].notify()

        self._tasks.submit(run)
        return task

    def _each(
        self, work: Callable[[ObjectKey, MemoryObj], T], keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]
    ) -> list[T]:
        """Work on each chunk at the same time.

        All are done when this returns or raises: the buffers are LMCache's again then.
        """
        running = [self._workers.submit(work, key, memory) for key, memory in zip(keys, objects, strict=True)]
        wait(running)
        return [one.result() for one in running]

    def _pop(self, kind: str, task: int) -> Any:
        with self._lock:
            return self._done[kind].pop(task, None)


def _bitmap(found: Sequence[bool]) -> Bitmap:
    bitmap = Bitmap(len(found))
    for index, one in enumerate(found):
        if one:
            bitmap.set(index)
    return bitmap
