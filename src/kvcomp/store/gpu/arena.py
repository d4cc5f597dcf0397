"""Memory for pages whose sizes only the device knows, and how the host learns them.

A chunk's next free byte is a number on the device, which the encoder moves on. The host reads it late and without
waiting.
Until then it takes every page for as large as pages can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.errors import LimitExceeded


@contextmanager
def enough_memory() -> Iterator[None]:
    """Raise LimitExceeded where the device has no memory left; the cache then holds what it held."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LimitExceeded(
            "the device has no memory left for the cache: use a smaller batch, a shorter context "
            f"or a coarser spec ({error})"
        ) from None


class Readback:
    """A copy of a tensor on its way to the host, behind the work of the current stream."""

    def __init__(self, x: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if not x.is_cuda:
            self._there = x.clone()
            return
        self._there = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
        self._there.copy_(x, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    @property
    def arrived(self) -> bool:
        return self._arrived is None or self._arrived.query()

    def wait(self) -> npt.NDArray[Any]:
        """The copy, once it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._there.numpy()


@dataclass(eq=False)
class Chunk:
    """Memory for pages, which is never moved."""

    memory: Tensor
    """uint8 (bytes,)"""
    cursor: Tensor
    """int64 (1,), on the device: the next free byte."""


class Arena:
    """The chunk that pages go into while a sequence grows, and the next one when it may be full.

    A chunk has ``chunk_bytes``, and ``spare`` more that must be readable behind the last page.
    """

    def __init__(self, chunk_bytes: int, spare: int, device: torch.device) -> None:
        self._chunk_bytes, self._spare, self._device = chunk_bytes, spare, device
        self._chunk: Chunk | None = None
        self._used = 0  # at most so many bytes of the chunk
        self._since = 0  # of these, what was given out after the cursor's readback began
        self._cursor: Readback | None = None

    def chunk_for(self, size: int) -> Chunk:
        """A chunk that surely has room for so many more bytes."""
        if self._cursor is not None and self._cursor.arrived:
            self._used, self._since, self._cursor = int(self._cursor.wait()[0]) + self._since, 0, None
        if self._chunk is None or self._used + size + self._spare > self._chunk.memory.shape[0]:
            memory = torch.empty(max(size, self._chunk_bytes) + self._spare, dtype=torch.uint8, device=self._device)
            self._chunk = Chunk(memory, torch.zeros(1, dtype=torch.int64, device=self._device))
            self._used, self._since, self._cursor = 0, 0, None
        self._used += size
        self._since += size
        return self._chunk

    def ask(self) -> None:
        """Read the cursor back, behind the work of the current stream, unless it is on its way."""
        if self._chunk is not None and self._cursor is None:
            self._since = 0
            self._cursor = Readback(self._chunk.cursor)
