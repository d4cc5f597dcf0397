"""Arena: pieces of any size out of one range of bytes, best fit, neighbours that are free joined at once."""

from __future__ import annotations

from bisect import bisect_left, insort

from kvcomp.errors import InvalidInput

ALIGNMENT = 16  # bytes; pages lie at multiples


class Arena:
    """Gives out pieces of the range 0 to ``size``.

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
