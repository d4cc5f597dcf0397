"""Stores of values: one contract for the folder and for a real Redis, and what each does when it goes wrong."""

from __future__ import annotations

import asyncio
import errno
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from kvcomp import disk
from kvcomp.errors import InvalidInput, LimitExceeded, StoreUnavailable
from kvcomp.serve.blobs import Blobs, open_blobs
from kvcomp.serve.blobs.folder import FolderBlobs
from redis_server import MEMORY, answering, free_port, running

KEYS = [f"kvcomp:{name}" for name in "abcdef"]


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["folder", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    if request.param == "folder":
        return str(tmp_path / "store")
    import redis

    found = str(request.getfixturevalue("redis_url"))
    with redis.Redis.from_url(found) as client:
        client.flushall()
    return found


@pytest.fixture
def blobs(url: str) -> Iterator[Blobs]:
    store = open_blobs(url, timeout=30)
    yield store
    store.close()


def values(store: Blobs, keys: list[str]) -> list[bytes | None]:
    return [None if value is None else bytes(value) for value in store.get(keys)]


# The contract


def test_what_is_put_is_there_until_it_is_deleted(blobs: Blobs) -> None:
    assert blobs.sizes(KEYS) == values(blobs, KEYS) == [None] * 6
    blobs.delete(KEYS)
    blobs.touch(KEYS)
    large = random.Random(0).randbytes(3_000_000)
    blobs.put([(KEYS[0], [b"one"]), (KEYS[3], [memoryview(large)[:1000], large[1000:], b""])])
    assert blobs.sizes(KEYS) == [3, None, None, 3_000_000, None, None]
    assert values(blobs, [KEYS[3], KEYS[1], KEYS[0]]) == [large, None, b"one"]
    blobs.put([(KEYS[0], [b"another"])])
    assert values(blobs, KEYS[:1]) == [b"another"]
    blobs.touch(KEYS)
    blobs.delete([KEYS[0], KEYS[1]])
    assert blobs.sizes(KEYS[:4]) == [None, None, None, 3_000_000]
    for nothing in (blobs.get([]), blobs.sizes([])):
        assert nothing == []
    blobs.put([])
    blobs.touch([])
    blobs.delete([])


def test_of_several_that_put_a_new_value_one_does(blobs: Blobs, url: str) -> None:
    others = [open_blobs(url, timeout=30) for _ in range(4)]
    begin = threading.Barrier(len(others))

    def put(number: int) -> bool:
        begin.wait()
        return others[number].put_new(KEYS[0], [b"value ", b"%d" % number])

    with ThreadPoolExecutor(len(others)) as pool:
        stored = list(pool.map(put, range(len(others))))
    assert sum(stored) == 1
    assert values(blobs, KEYS[:1]) == [b"value %d" % stored.index(True)]
    blobs.delete(KEYS[:1])
    assert blobs.put_new(KEYS[0], [b"again"])
    for store in others:
        store.close()


def test_a_value_that_was_read_outlives_its_key(blobs: Blobs) -> None:
    data = random.Random(1).randbytes(300_000)
    blobs.put([(KEYS[0], [data])])
    (value,) = blobs.get(KEYS[:1])
    blobs.put([(KEYS[0], [b"x" * 300_000])])
    blobs.delete(KEYS[:1])
    assert value == data


def test_another_connection_sees_it(blobs: Blobs, url: str) -> None:
    blobs.put([(KEYS[0], [b"one"])])
    other = open_blobs(url)
    assert values(other, KEYS[:1]) == [b"one"]
    other.close()
    other.close()
    assert values(other, KEYS[:1]) == [b"one"]  # it connects again
    other.close()


@pytest.mark.parametrize("key", ["", "a/b", "../a", "a\nb", "é", "a" * 251, b"a", None])
def test_keys_that_are_none(blobs: Blobs, key: Any) -> None:
    for call in (
        lambda: blobs.get([key]),
        lambda: blobs.sizes([key]),
        lambda: blobs.put([(key, [b""])]),
        lambda: blobs.put_new(key, [b""]),
        lambda: blobs.touch([key]),
        lambda: blobs.delete([key]),
    ):
        with pytest.raises(InvalidInput, match="a key must be"):
            call()


def test_threads_and_processes_see_whole_values_only(blobs: Blobs, url: str) -> None:
    """Two processes and two threads write the same keys while others read."""
    kinds = [bytes([kind]) * 200_000 for kind in range(4)]
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_again_and_again, args=(url, kinds[kind])) for kind in (0, 1)]
    for writer in writers:
        writer.start()
    done = threading.Event()

    def write(kind: int) -> None:
        for _ in range(30):
            blobs.put([(key, [kinds[kind][:777], kinds[kind][777:]]) for key in KEYS])

    def read() -> None:
        while not done.is_set():
            assert set(values(blobs, KEYS)) <= {None, *kinds}

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for future in [pool.submit(write, kind) for kind in (2, 3)]:
                future.result()
            for writer in writers:
                writer.join(60)
        finally:
            done.set()
        for future in readers:
            future.result()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert set(blobs.sizes(KEYS)) == {200_000}


def write_again_and_again(url: str, value: bytes) -> None:
    store = open_blobs(url, timeout=30)
    for _ in range(30):
        store.put([(key, [value]) for key in KEYS])
    store.close()


def test_a_process_that_was_forked_has_a_connection_of_its_own(blobs: Blobs) -> None:
    blobs.put([(KEYS[0], [b"parent"])])
    child = os.fork()
    if child == 0:
        try:
            ok = values(blobs, KEYS[:1]) == [b"parent"]
            blobs.put([(KEYS[1], [b"child"])])
            os._exit(0 if ok else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert values(blobs, KEYS[:2]) == [b"parent", b"child"]


def test_a_fork_beside_a_thread_that_calls_a_redis_is_not_stuck(redis_url: str) -> None:
    with closing(open_blobs(redis_url, timeout=30)) as store:
        with store.lock:  # type: ignore[attr-defined]  # as a thread has it for a moment of each call
            child = os.fork()
            if child == 0:
                signal.alarm(5)
                store.get(KEYS)
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_fork_that_gives_its_store_back_leaves_the_connections_of_its_parent(redis_url: str) -> None:
    store = open_blobs(redis_url, timeout=5)
    store.get(KEYS)
    child = os.fork()
    if child == 0:
        del store
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert store.get(KEYS) is not None
    store.close()


KILLED = """
import os, random, signal, sys, time
from kvcomp.serve.blobs import open_blobs

url, rounds = sys.argv[1], int(sys.argv[2])
draw = random.Random(7)
keys = [f"key{i}" for i in range(3)]
kinds = [bytes([kind]) * 300_000 for kind in (1, 2)]
seen = set()
for number in range(rounds):
    begun, say = os.pipe()
    child = os.fork()
    if child == 0:
        store = open_blobs(url, timeout=30)
        while True:
            for kind in kinds[:: 1 - 2 * (number % 2)]:  # on a busy machine a child may come to its first only
                os.write(say, b".")
                store.put([(key, [kind[:100_000], kind[100_000:]]) for key in keys])
    os.read(begun, 1)  # on a busy machine a child may take long to begin
    time.sleep(draw.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(begun)
    os.close(say)
    store = open_blobs(url, timeout=30)
    for value in store.get(keys):
        assert value is None or bytes(value) in kinds, len(value)
        seen.add(None if value is None else value[0])
    store.close()
store = open_blobs(url, timeout=30)
store.put([(key, [b"x"]) for key in keys])
store.close()
print(len(seen & {1, 2}))
"""


@pytest.mark.parametrize("rounds", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_kill_in_the_middle_of_a_put(url: str, rounds: int) -> None:
    command = [sys.executable, "-c", KILLED, url, str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"]
    if not url.startswith("redis"):
        files = [path.name for path in Path(url).glob("*/*")]
        assert sorted(files) == ["key0.kvc", "key1.kvc", "key2.kvc"], "what killed processes left, the next one removes"


# Where it is


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_blobs(f"file://{tmp_path}/a%20b").put([(KEYS[0], [b"x"])])
    assert values(open_blobs(tmp_path / "a b"), KEYS[:1]) == [b"x"]
    monkeypatch.chdir(tmp_path)
    assert values(open_blobs("a b"), KEYS[:1]) == [b"x"]
    for url, match in (
        ("s3://bucket", "no store s3://"),
        ("file://host/path", "of this machine"),
        ("redis://127.0.0.1:port", "no URL of a Redis"),
        ("redis://127.0.0.1/0?no_such_option=1", "no URL of a Redis"),
    ):
        with pytest.raises(InvalidInput, match=match):
            open_blobs(url)
    with pytest.raises(InvalidInput, match="maxmemory"):
        open_blobs("redis://127.0.0.1", limit=1000)
    for timeout in (0, -1, float("nan"), float("inf"), "1", None):
        with pytest.raises(InvalidInput, match="timeout must be"):
            open_blobs(tmp_path, timeout=timeout)  # type: ignore[arg-type]
    for limit in (0, -1, 1.5, True):
        with pytest.raises(InvalidInput, match="limit must be"):
            open_blobs(tmp_path, limit=limit)  # type: ignore[arg-type]


def test_redis_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kvcomp.serve.blobs.redis", raising=False)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(InvalidInput, match=r"pip install '\.\[serve\]'"):
        open_blobs("redis://127.0.0.1")


# Redis by its other names


def test_a_server_by_valkeys_name_and_by_its_socket(tmp_path: Path) -> None:
    place = Path(tempfile.mkdtemp(dir="/tmp")) / "s"  # a socket's path has 107 bytes at most
    with running(tmp_path, "--unixsocket", str(place)) as url:
        for other in (url.replace("redis", "valkey"), f"unix://{place}"):
            store = open_blobs(other, timeout=30)
            store.put([("key", [other.encode()])])
            assert values(store, ["key"]) == [other.encode()]
            store.close()
    shutil.rmtree(place.parent)


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_encrypted_names_do_not_speak_in_the_clear(scheme: str) -> None:
    """What reaches the server is the beginning of a TLS handshake, not a command."""
    heard: list[bytes] = []

    def listen(connection: socket.socket) -> None:
        heard.append(connection.recv(3))

    with answering(listen) as url:
        store = open_blobs(url.replace("redis", scheme), timeout=1)
        with pytest.raises(StoreUnavailable):
            store.get(["key"])
        store.close()
    assert {x[:2] for x in heard} == {b"\x16\x03"}


# The folder


def test_the_least_recently_used_values_go_first(tmp_path: Path) -> None:
    store = open_blobs(tmp_path, limit=5000)
    for number, key in enumerate(KEYS[:5]):
        store.put([(key, [bytes([number]) * 1000])])
    assert store.sizes(KEYS) == [1000] * 5 + [None]
    store.get([KEYS[0]])
    store.touch([KEYS[1], KEYS[2]])  # the first counts as the last one used
    store.put([(KEYS[5], [b"x" * 1500])])
    assert store.sizes(KEYS) == [1000, 1000, 1000, None, None, 1500]
    store.put([("more", [b"x" * 2000])])
    assert store.sizes([*KEYS, "more"]) == [None, 1000, None, None, None, 1500, 2000]
    with pytest.raises(LimitExceeded, match="5001 bytes do not fit in a store of at most 5000"):
        store.put([("most", [b"x" * 5001])])
    assert store.sizes(["more", "most"]) == [2000, None]


def test_a_value_stored_anew_needs_no_room_for_what_it_replaces(tmp_path: Path) -> None:
    store = open_blobs(tmp_path, limit=1000)
    store.put([(key, [b"x" * 500]) for key in KEYS[:2]])
    store.put([(KEYS[0], [b"y" * 500])])
    assert store.sizes(KEYS[:2]) == [500, 500]
    store.put([(KEYS[0], [b"y" * 501])])
    assert store.sizes(KEYS[:2]) == [501, None]


def test_writers_at_the_same_time_keep_the_limit(tmp_path: Path) -> None:
    store = open_blobs(tmp_path, limit=100_000, timeout=30)

    def write(writer: int) -> None:
        for number in range(25):
            store.put([(f"{writer}:{number}", [bytes(10_000)])])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    held = sum(path.stat().st_size for path in tmp_path.glob("*/*.kvc"))
    assert 90_000 <= held <= 100_000 + 3 * 10_000


def test_a_process_that_holds_the_folder_is_not_waited_for(tmp_path: Path) -> None:
    store = open_blobs(tmp_path, limit=1000, timeout=0.2)
    with FileLock(tmp_path / "lock"):
        begin = time.monotonic()
        with pytest.raises(StoreUnavailable, match="is it stopped"):
            store.put([(KEYS[0], [b"x"])])
    assert time.monotonic() - begin < 5
    store.put([(KEYS[0], [b"x"])])


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store = open_blobs(tmp_path)
    store.put([(KEYS[0], [b"old"])])

    def failing(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "utime", failing)
    assert values(store, KEYS[:1]) == [b"old"]
    store.touch(KEYS[:1])


def test_a_link_in_a_folder_leads_no_value_elsewhere(tmp_path: Path) -> None:
    """Who may write to a folder may not have others write for him where he may not."""
    store = FolderBlobs(tmp_path / "store", limit=None, timeout=5)
    place = store._place(KEYS[0])
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "elsewhere")
    assert store.put_new(KEYS[0], [b"x"])
    assert values(store, KEYS[:1]) == [b"x"]
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "utime"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_folder_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    store = open_blobs(tmp_path)
    store.put([(KEYS[0], [b"old"])])

    def failing(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        with pytest.raises(StoreUnavailable, match=os.strerror(code)):
            store.get([KEYS[0]]) if call == "utime" else store.put([(KEYS[0], [b"new"])])
    assert values(store, KEYS[:1]) == [b"old"]
    assert not list(tmp_path.glob("*/.*"))


@pytest.mark.parametrize("url", ["redis:/host", "redis:host:6379", "REDIS:/host", "file:/a", "unix:/a", "redis://[::1"])
def test_a_url_that_looks_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match="is no URL"):
        open_blobs(url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["redis:user:secret@host", "redis://:secret@[::1", "file://user:secret@host/a"])
def test_a_url_that_is_none_shows_no_password(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        open_blobs(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "a\0b", b"a", None, 3, "file://"])
def test_what_names_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput):
        open_blobs(url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["~/store", "store", "./a:b", "file://{home}/store"])
def test_a_folder_stays_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    store = open_blobs(url.format(home=tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.put([(KEYS[0], [b"x"])])
    assert values(store, KEYS[:1]) == [b"x"]
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "a:b" if ":b" in url else "store"}
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = open_blobs(tmp_path / "file")
    for call in (lambda: store.get(KEYS), lambda: store.sizes(KEYS), lambda: store.put([(KEYS[0], [b"x"])])):
        with pytest.raises(StoreUnavailable, match="cannot be used"):
            call()
    store = open_blobs(tmp_path / "store")
    store.put([(KEYS[0], [b"x"])])
    (path,) = (tmp_path / "store").glob("*/*.kvc")
    path.write_bytes(b"")
    assert values(store, KEYS[:1]) == [None]
    path.unlink()
    path.mkdir()
    assert values(store, KEYS[:1]) == [None]
    path.rmdir()
    os.mkfifo(path)
    assert values(store, KEYS[:1]) == [None]


def test_temporaries_are_no_values(tmp_path: Path) -> None:
    """Those of a process that was killed go when another one first writes; those of one at work stay."""
    store = open_blobs(tmp_path)
    store.put([(KEYS[0], [b"x"])])
    (path,) = tmp_path.glob("*/*.kvc")
    descriptor, at_work = disk._create(path)
    abandoned = path.with_name(f".{'0' * 16}.{'1' * 16}.tmp")
    abandoned.write_bytes(b"half")
    foreign = path.with_name(".something.tmp")
    foreign.write_bytes(b"not ours")
    open_blobs(tmp_path, limit=10).put([(KEYS[1], [b"x"])])
    assert not abandoned.exists()
    assert at_work.exists()
    assert foreign.exists()
    os.close(descriptor)


# Redis


def test_a_redis_that_is_full_evicts_and_one_that_may_not_refuses(
    tmp_path: Path, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_blobs(redis_url, timeout=30)
    keys = [f"full:{number}" for number in range(2 * MEMORY >> 23)]
    for key in keys:
        store.put([(key, [bytes(8 << 20)])])
    there = [size is not None for size in store.sizes(keys)]
    assert there[-1]
    assert 0 < sum(there) < len(keys)
    assert not caplog.records
    store.close()
    with running(tmp_path, "--maxmemory", "16mb", "--maxmemory-policy", "noeviction") as url:
        store = open_blobs(url, timeout=30)
        with pytest.raises(StoreUnavailable, match=r"refuses: .*maxmemory"):
            store.put([(key, [bytes(2 << 20)]) for key in keys])
        assert "maxmemory-policy allkeys-lru" in caplog.text
        store.close()


def test_a_redis_that_may_not_evict_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        running(tmp_path, "--maxmemory-policy", "noeviction") as url,
        closing(open_blobs(url, timeout=30)) as store,
    ):
        for key in KEYS[:3]:
            store.put([(key, [b"x"])])
    assert caplog.text.count("maxmemory-policy allkeys-lru") == 1


def test_a_value_of_another_type_is_none(redis_url: str) -> None:
    import redis

    with redis.Redis.from_url(redis_url) as client:
        client.delete(KEYS[0])
        client.lpush(KEYS[0], "a")
    store = open_blobs(redis_url)
    assert store.sizes(KEYS[:1]) == values(store, KEYS[:1]) == [None]
    store.put([(KEYS[0], [b"x"])])
    assert values(store, KEYS[:1]) == [b"x"]
    store.close()


def test_a_server_that_does_not_tell_sizes_refuses(tmp_path: Path) -> None:
    """As in a cluster, or without the right to ask: nobody may take that for an empty store."""
    with running(tmp_path, "--rename-command", "STRLEN", "") as url, closing(open_blobs(url, timeout=30)) as store:
        store.put([(KEYS[0], [b"x"])])
        with pytest.raises(StoreUnavailable, match="refuses"):
            store.sizes(KEYS)


def test_a_server_that_dies_and_comes_back(tmp_path: Path) -> None:
    with running(tmp_path) as url:
        store = open_blobs(url)
        store.put([(KEYS[0], [b"x"])])
    with pytest.raises(StoreUnavailable, match="cannot be used"):
        store.get(KEYS)
    with running(tmp_path, port=int(url.rpartition(":")[2])):
        assert values(store, KEYS[:1]) == [None]
        store.put([(KEYS[0], [b"x"])])
        assert values(store, KEYS[:1]) == [b"x"]
        store.close()


def test_a_connection_that_breaks_once_is_made_anew() -> None:
    connections = list[socket.socket]()

    def answer(connection: socket.socket) -> None:
        connections.append(connection)
        while request := connection.recv(1 << 20):
            if connection is connections[0]:
                return
            connection.sendall(b"+OK\r\n" * request.count(b"SETINFO") + b":3\r\n" * request.count(b"STRLEN"))

    with answering(answer) as url, closing(open_blobs(url, timeout=5)) as store:
        assert store.sizes(KEYS[:1]) == [3]
    assert len(connections) > 1


def test_an_empty_file_is_no_value(tmp_path: Path) -> None:
    store = open_blobs(tmp_path)
    store.put([(KEYS[0], [b"old"])])
    next(tmp_path.glob("??/*")).write_bytes(b"")
    assert (store.sizes(KEYS[:1]), store.get(KEYS[:1])) == ([None], [None])
    assert store.put_new(KEYS[0], [b"new"])
    assert values(store, KEYS[:1]) == [b"new"]


def test_calls_beside_one_that_closes_end_well_or_typed(redis_url: str) -> None:
    store = open_blobs(redis_url, timeout=5)

    def ask() -> None:
        for _ in range(200):
            with suppress(StoreUnavailable):
                store.sizes(KEYS)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        for _ in range(50):
            store.close()
        for one in asking:
            one.result()
    store.close()


def test_a_store_that_nobody_has_any_more_gives_back_its_thread_and_connections(redis_url: str) -> None:
    before = threading.active_count()
    for number in range(5):
        store = open_blobs(redis_url, timeout=5)
        store.put([(KEYS[0], [str(number).encode()])])
        del store
        gc.collect()
    assert threading.active_count() == before


def test_a_process_that_does_not_close_ends_in_silence(redis_url: str) -> None:
    code = f"from kvcomp.serve.blobs import open_blobs; s = open_blobs({redis_url!r}); print(s.sizes(['none']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[None]\n", "")


def test_a_copy_in_another_process_connects_for_itself(redis_url: str) -> None:
    with closing(open_blobs(redis_url, timeout=5)) as store:
        store.put([(KEYS[0], [b"x"])])
        with closing(pickle.loads(pickle.dumps(store))) as copy:
            assert values(copy, KEYS[:1]) == [b"x"]


def test_a_client_that_does_not_close_holds_nobody(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import redis.asyncio

    aclose = redis.asyncio.Redis.aclose

    async def fails(client: Any) -> None:
        await aclose(client)
        raise redis.exceptions.TimeoutError("Timeout closing connection")

    store = open_blobs(redis_url, timeout=5)
    store.put([(KEYS[0], [b"x"])])
    before = threading.active_count()
    monkeypatch.setattr(redis.asyncio.Redis, "aclose", fails)
    store.close()
    assert threading.active_count() == before - 1


def test_a_server_that_stands_still(tmp_path: Path) -> None:
    program = running(tmp_path)
    with program as url:
        store = open_blobs(url, timeout=0.5)
        store.put([(KEYS[0], [b"x"])])
        import redis

        with redis.Redis.from_url(url) as client:
            process = int(client.info("server")["process_id"])
        os.kill(process, signal.SIGSTOP)
        try:
            begin = time.monotonic()
            with pytest.raises(StoreUnavailable, match=r"took longer than 0\.5 s"):
                store.get(KEYS)
            assert time.monotonic() - begin < 3
        finally:
            os.kill(process, signal.SIGCONT)
        assert values(store, KEYS[:1]) == [b"x"]
        store.close()


def silent(connection: socket.socket) -> None:
    connection.recv(1 << 20)
    time.sleep(5)


def dripping(connection: socket.socket) -> None:
    connection.recv(1 << 20)
    connection.sendall(b"*6\r\n$1000\r\n")
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


def flooding(connection: socket.socket) -> None:
    connection.recv(1 << 20)
    connection.sendall(b"$8\r\n")
    while True:
        connection.sendall(b"x" * 1000)
        time.sleep(0.01)


def saying(*answers: bytes) -> Callable[[socket.socket], None]:
    """Answers the greetings of the client with OK, then all else with these bytes."""

    def answer(connection: socket.socket) -> None:
        while request := connection.recv(1 << 20):
            greetings = request.count(b"SETINFO")
            connection.sendall(b"+OK\r\n" * greetings if greetings else b"".join(answers))

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        silent,
        dripping,
        flooding,
        lambda connection: None,
        saying(b"-ERR no\r\n" * 12),
        saying(b"$-1\r\n" * 12),
        saying(b"*5\r\n" + b"$-1\r\n" * 5),
        saying(b"*7\r\n" + b"$-1\r\n" * 7),
        saying(b"HTTP/1.1 200 OK\r\n\r\n"),
        saying(b"$99999999999999999999\r\n"),
        saying(b"*-7\r\n"),
        saying(b"*6\r\n$3\r\nabc"),
        saying(b"\x00\xff" * 100),
    ],
)
def test_a_server_that_is_no_redis(answer: Any) -> None:
    """Never a hang: an error that says so."""
    with answering(answer) as url:
        store = open_blobs(url, timeout=0.6)
        begin = time.monotonic()
        with pytest.raises(StoreUnavailable, match="Redis at 127"):
            store.get(KEYS)
        assert time.monotonic() - begin < 3
        store.close()


@pytest.mark.parametrize("answer", [b"*6\r\n" + b":5\r\n" * 6, b"*6\r\n" + b"+OK\r\n" * 6, b"*6\r\n" + b"*0\r\n" * 6])
def test_answers_that_are_no_values(answer: bytes) -> None:
    with answering(saying(answer)) as url:
        store = open_blobs(url, timeout=2)
        assert [value for value in store.get(KEYS) if value is not None] in ([], [b"OK"] * 6)
        store.close()


def test_a_process_that_may_open_no_more_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(asyncio, "SelectorEventLoop", none_left)
    with pytest.raises(StoreUnavailable, match="Too many open files"):
        open_blobs("redis://127.0.0.1").get(KEYS)


def test_nobody_listens() -> None:
    store = open_blobs(f"redis://user:secret@127.0.0.1:{free_port()}", timeout=1)
    for call in (lambda: store.get(KEYS), lambda: store.put([(KEYS[0], [b"x"])])):
        with pytest.raises(StoreUnavailable) as caught:
            call()
        assert "secret" not in str(caught.value)
    store.close()
