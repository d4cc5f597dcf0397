"""A real redis-server for tests, and servers that answer anything but what Redis would."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

MEMORY = 128 << 20


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextmanager
def running(folder: Path, *options: str, port: int | None = None) -> Iterator[str]:
    """The URL of a redis-server that keeps nothing on the disk and evicts the least recently used values beyond
    ``MEMORY``.

    Skips the test where redis-server is not installed; with KVCOMP_REQUIRE_REDIS set, as CI has it, that is a failure.
    """
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        reason = "redis-server is not installed, so nothing is tested against a real one: apt-get install redis-server"
        if os.environ.get("KVCOMP_REQUIRE_REDIS"):
            pytest.fail(reason)
        pytest.skip(reason)
    port = port or free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    command += ["--maxmemory", str(MEMORY), "--maxmemory-policy", "allkeys-lru", "--dir", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            assert process.poll() is None, f"redis-server ended with {process.returncode}"
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        else:
            pytest.fail("redis-server does not answer")
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The URL of a server that treats every connection in a way of its own, each on a thread."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)

        def serve(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                answer(connection)

        def accept() -> None:
            while not done.is_set():
                with suppress(TimeoutError):
                    connection, _ = server.accept()
                    threading.Thread(target=serve, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"redis://127.0.0.1:{server.getsockname()[1]}"
        finally:
            done.set()
            thread.join()
