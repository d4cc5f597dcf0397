"""Where pages lie: pieces of any size out of the memory that an engine gave to its layers.

An engine gives every layer the same memory, and layers take different numbers of bits. So a page that finds no room in
its own layer's memory lies in another's.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcomp.errors import InvalidInput

ALIGNMENT = 16  # bytes; pages lie at multiples
OTHERS = 2  # memories of other layers that are asked, the emptiest first


class Room:
    """The memory of all layers.

    Parameters
    ----------
    memories
        uint8, of each layer; kept.
    spare
        Bytes at the end of each that kernels may read and no page has.
    """

    def __init__(self, memories: Sequence[npt.NDArray[np.uint8]], spare: int) -> None:
        self._memories = sorted(memories, key=lambda memory: memory.ctypes.data)
        self._bases = [-(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT for memory in self._memories]
        self._arenas = [
            Arena(max(0, memory.ctypes.data + memory.nbytes - base - spare))
            for memory, base in zip(self._memories, self._bases, strict=True)
        ]

    @property
    def size(self) -> int:
        """Bytes that the engine gave."""
        return sum(memory.nbytes for memory in self._memories)

    @property
    def used(self) -> int:
        """Bytes in pages."""
        return sum(arena.used for arena in self._arenas)

    def take(self, memory: npt.NDArray[np.uint8], size: int) -> int | None:
        """The address of a new piece, in this memory if it has room; None if those that are asked have none."""
        own = self._index(memory.ctypes.data + ALIGNMENT - 1)
        offset = self._arenas[own].take(size)
        if offset is not None:
            return self._bases[own] + offset
        full = [arena.used - arena.size for arena in self._arenas]
        for other in sorted(range(len(full)), key=full.__getitem__)[:OTHERS]:
            offset = self._arenas[other].take(size)
            if offset is not None:
                return self._bases[other] + offset
        return None

    def give(self, address: int) -> None:
        """Take a piece back."""
        index = self._index(address)
        self._arenas[index].give(address - self._bases[index])

    def _index(self, address: int) -> int:
        return bisect_right(self._bases, address) - 1


class Arena:
    """Gives out pieces of the range 0 to ``size``: best fit, neighbours that are free joined at once.

    Parameters
    ----------
    size
        Bytes of the range; what is no multiple of 16 at its end is not used.
    """

    def __init__(self, size: int) -> None:
        self.size = size // ALIGNMENT * ALIGNMENT
        self.used = 0
        """Bytes in pieces."""
        self._pieces: dict[int, int] = {}  # bytes of each piece, by its offset
        self._free = [(0, self.size)] if self.size else []  # (offset, bytes), in order
        self._by_size = [(self.size, 0)] if self.size else []  # the same as (bytes, offset)

    def take(self, size: int) -> int | None:
        """The offset of a new piece of so many bytes, from the smallest gap that has them; None if no gap has."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        if size <= 0:
            raise InvalidInput(f"a piece must have a byte or more, not {size}")
        place = bisect_left(self._by_size, (size, 0))
        if place == len(self._by_size):
            return None
        found, offset = self._by_size.pop(place)
        del self._free[bisect_left(self._free, (offset, 0))]
        if found > size:
            self._add(offset + size, found - size)
        self._pieces[offset] = size
        self.used += size
        return offset

    def give(self, offset: int) -> None:
        """Take a piece back. Raises InvalidInput if none begins here."""
        size = self._pieces.pop(offset, None)
        if size is None:
            raise InvalidInput(f"no piece begins at {offset}")
        self.used -= size
        place = bisect_left(self._free, (offset, 0))
        if place < len(self._free) and self._free[place][0] == offset + size:
            size += self._remove(place)[1]
        if place and sum(self._free[place - 1]) == offset:
            before, more = self._remove(place - 1)
            offset, size = before, size + more
        self._add(offset, size)

    def _add(self, offset: int, size: int) -> None:
        insort(self._free, (offset, size))
        insort(self._by_size, (size, offset))

    def _remove(self, place: int) -> tuple[int, int]:
        offset, size = self._free.pop(place)
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        return offset, size
