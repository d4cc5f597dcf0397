"""Memory for pages whose sizes only the device knows.

A chunk's next free byte is a number on the device that the encoder moves on. The host reads it with a delay, without waiting, and assumes
meanwhile that every page was as large as pages can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Chunk:
    """Memory for pages, which is never moved. memory: uint8. cursor: int64 (1,), on the device, the next free byte."""

    memory: Tensor
    cursor: Tensor


class Arena:
    """The chunk that pages go into while a sequence grows, and the next when it may be full.

    chunk_bytes: of a chunk. spare: readable bytes that must follow the last page.
    """

    def __init__(self, chunk_bytes: int, spare: int, device: torch.device) -> None:
        self._chunk_bytes, self._spare, self._device = chunk_bytes, spare, device
        self._chunk: Chunk | None = None
        self._used = 0  # at most so many bytes of the chunk
        self._since = 0  # of these, what was given out after the cursor was sent for
        self._seen: Tensor | None = None  # the cursor on its way to the host
        self._arrived: torch.cuda.Event | None = None  # after which it is there

    def chunk_for(self, size: int) -> Chunk:
        """A chunk that surely has room for so many more bytes."""
        if self._arrived is not None and self._seen is not None and self._arrived.query():
            self._used, self._since, self._arrived = int(self._seen) + self._since, 0, None
        if self._chunk is None or self._used + size + self._spare > self._chunk.memory.shape[0]:
            memory = torch.empty(max(size, self._chunk_bytes) + self._spare, dtype=torch.uint8, device=self._device)
            self._chunk = Chunk(memory, torch.zeros(1, dtype=torch.int64, device=self._device))
            self._used, self._since, self._arrived = 0, 0, None
        self._used += size
        self._since += size
        return self._chunk

    def ask(self) -> None:
        """Send for the cursor, behind what the current stream has to do, unless it is on its way."""
        if self._chunk is None or self._arrived is not None:
            return
        self._since = 0
        if self._device.type != "cuda":
            self._used = int(self._chunk.cursor)
            return
        self._seen = torch.empty(1, dtype=torch.int64, pin_memory=True)
        self._seen.copy_(self._chunk.cursor, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()
