"""A network of a given bandwidth on one machine: sockets over the loopback that a token bucket slows down, and a proxy
made of them; and a redis-server to reach through it.

The pace is kept by the sender: bytes leave when the bucket has tokens for them, which fill it at the bandwidth and of
which it holds ``BURST`` seconds' worth. What was reached is measured, never assumed. Latency is the loopback's, so real
networks are slower.
"""

from __future__ import annotations

import multiprocessing
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

BURST = 0.002
PIECE = 1 << 17


class Bucket:
    """Says when bytes may leave. rate: bytes a second, None for no limit."""

    def __init__(self, rate: float | None) -> None:
        self.rate, self.free_at, self.lock = rate, 0.0, threading.Lock()

    def wait(self, size: int) -> None:
        """Sleep until so many bytes may leave."""
        if self.rate is None:
            return
        with self.lock:
            now = time.perf_counter()
            self.free_at = max(self.free_at, now - BURST) + size / self.rate
            delay = self.free_at - now
        if delay > 0:
            time.sleep(delay)


def send(connection: socket.socket, data: memoryview, bucket: Bucket) -> None:
    for begin in range(0, len(data), PIECE):
        piece = data[begin : begin + PIECE]
        bucket.wait(len(piece))
        connection.sendall(piece)


def receive(connection: socket.socket, into: memoryview) -> None:
    """Fill a buffer. Raises ConnectionError if the other side ends before."""
    at = 0
    while at < len(into):
        count = connection.recv_into(into[at:])
        if not count:
            raise ConnectionError("the sender ended early")
        at += count


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), 30)
    connection.settimeout(300)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


@contextmanager
def redis_server(memory: str = "0") -> Iterator[tuple[int, int]]:
    """Process id and port of a redis-server that keeps nothing on the disk.

    memory: of its values, such as ``4gb``, beyond which the least recently used go; 0 for no limit. Raises SystemExit
    if it is not installed or does not answer.
    """
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise SystemExit("this benchmark needs redis-server: apt-get install redis-server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        command += ["--maxmemory", memory, "--maxmemory-policy", "allkeys-lru", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            _await(process, port)
            yield process.pid, port
        finally:
            process.kill()  # a benchmark may have stopped it
            process.wait()


def _await(server: subprocess.Popen[bytes], port: int) -> None:
    """Wait until a server accepts connections. Raises SystemExit if it ends before, or takes too long."""
    for _ in range(200):
        time.sleep(0.05)
        if server.poll() is not None:
            break
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
    raise SystemExit("redis-server does not answer")


@contextmanager
def proxy(target: int, rate: float) -> Iterator[int]:
    """The port of a proxy, in a process of its own, to another port; each direction has ``rate`` bytes a second."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_forward_all, args=(theirs, target, rate), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join(10)


def _forward_all(pipe: Any, target: int, rate: float) -> None:
    buckets = Bucket(rate), Bucket(rate)
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname()[1])
        while True:
            client, _ = server.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far = connect(target)
            far.settimeout(None)
            for source, sink, bucket in ((client, far, buckets[0]), (far, client, buckets[1])):
                threading.Thread(target=_forward, args=(source, sink, bucket), daemon=True).start()


def _forward(source: socket.socket, sink: socket.socket, bucket: Bucket) -> None:
    buffer = bytearray(PIECE)
    with suppress(OSError):
        while count := source.recv_into(buffer):
            bucket.wait(count)
            sink.sendall(memoryview(buffer)[:count])
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
