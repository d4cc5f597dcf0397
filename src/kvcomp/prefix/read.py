"""What a store has of a prompt: its chunks without a gap, and the states from which a cache can go on.

Whatever cannot be used counts as none; what is damaged is deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvcomp.errors import CorruptData, InvalidInput, LimitExceeded, UnsupportedVersion
from kvcomp.files.header import Header, Shapes
from kvcomp.prefix.chain import CHUNK_TOKENS, Origin, books_of, key_of, unpack
from kvcomp.prefix.state import State, unpack_state
from kvcomp.serve.blobs import Blobs, Buffer
from kvcomp.serve.breaker import drop_damaged
from kvcomp.spec import PAGE_TOKENS
from kvcomp.store import KVStore

CALL_BYTES = 1 << 24  # values of so many bytes travel in one call
CALL_KEYS = 1 << 10  # so many are asked for in one call

T = TypeVar("T")

logger = logging.getLogger("kvcomp")


@dataclass(frozen=True)
class Chain:
    """The chunks of a prompt that a store has: the first one, and whether the others are there."""

    blobs: Blobs
    origin: Origin
    backend: str
    hashes: Sequence[bytes]
    """Of all chunks that the prompt has."""
    books: bytes
    """What tells the first one's codebooks from others."""
    keys: Sequence[str]
    sizes: Sequence[int | None]
    """Of all but the first one, None for those that are not there."""
    first: dict[int, KVStore]

    @classmethod
    def find(cls, blobs: Blobs, origin: Origin, tokens: Sequence[int], backend: str) -> Chain | None:
        """The chain of a prompt, of which at least one token is left to compute; None without its first chunk."""
        hashes = origin.hashes(tokens, origin.chunks(len(tokens) - 1))
        if not hashes:
            return None
        first_key = key_of(hashes[0])
        first = open_chunk(blobs, origin, first_key, blobs.get([first_key])[0], 0, backend)
        if first is None:
            return None
        books = books_of(first[0])
        keys = [first_key, *(key_of(x, books) for x in hashes[1:])]
        return cls(blobs, origin, backend, hashes, books, keys, blobs.sizes(keys[1:]), first[1])

    @property
    def there(self) -> int:
        """Chunks without a gap."""
        return 1 + (self.sizes.index(None) if None in self.sizes else len(self.sizes))

    def read(self, most: int) -> list[dict[int, KVStore]]:
        """The layers of the first chunks, as many as can be used."""
        step = max(1, CALL_BYTES // max([1, *(size or 0 for size in self.sizes)]))
        found = [self.first]
        while len(found) < most:
            some = self.keys[len(found) : min(len(found) + step, most)]
            for key, value in zip(some, self.blobs.get(some), strict=True):
                opened = open_chunk(self.blobs, self.origin, key, value, len(found), self.backend, self.books)
                if opened is None:
                    most = len(found)
                    break
                found.append(opened[1])
        self.blobs.touch(self.keys[: len(found)])
        return found

    def resume(
        self, tokens: Sequence[int], shapes: Shapes, fill: Callable[[State, list[dict[int, KVStore]]], T]
    ) -> T | None:
        """What ``fill`` makes of the longest state of a prompt and the chunks before it; None if there is no state.

        shapes: what the model's layers hold.
        """
        there = self.there
        for length, key in self._states(tokens):
            (value,) = self.blobs.get([key])
            if value is None:
                continue
            try:
                state = unpack_state(self.origin, value, key, length, self.books, shapes, self.backend)
                if state.chunks > there:
                    continue
                chunks = self.read(state.chunks)
                if len(chunks) == state.chunks:
                    return fill(state, chunks)
                there = len(chunks)
            except InvalidInput as error:  # of a layer that is given what does not fit it
                self._drop(key, CorruptData(str(error)))
            except (CorruptData, UnsupportedVersion, LimitExceeded) as error:
                self._drop(key, error)
        return None

    def _states(self, tokens: Sequence[int]) -> Iterator[tuple[int, str]]:
        """The places at which a prompt's states stand, and their keys, the longest first."""
        beyond = CHUNK_TOKENS + PAGE_TOKENS + self.origin.spec.window  # behind the last chunk of a cache there is less
        last = min(len(tokens) - 1, self.origin.end(self.there - 1) + beyond)
        lengths = range(last, self.origin.end(0) - 1, -1)
        for begin in range(0, len(lengths), CALL_KEYS):
            some = lengths[begin : begin + CALL_KEYS]
            keys = [key_of(x, self.books) for x in self.origin.state_hashes(tokens, some, self.hashes)]
            for length, key, size in zip(some, keys, self.blobs.sizes(keys), strict=True):
                if size is not None:
                    yield length, key

    def _drop(self, key: str, error: Exception) -> None:
        logger.warning("a stored state is not used: %s", error)
        drop_damaged(self.blobs, key, error)


def open_chunk(
    blobs: Blobs, origin: Origin, key: str, value: Buffer | None, chunk: int, backend: str, books: bytes | None = None
) -> tuple[Header, dict[int, KVStore]] | None:
    """A chunk; None if there is none that can be used. What is damaged is deleted. books: what it must have been coded
    with.
    """
    if value is None:
        return None
    try:
        header, stores = unpack(origin, value, chunk, key, backend)
        if books is not None and books_of(header) != books:
            raise CorruptData("the value has other codebooks than the chunks before it")
        return header, stores
    except (CorruptData, UnsupportedVersion, LimitExceeded) as error:
        logger.warning("a stored prefix is not used: %s", error)
        drop_damaged(blobs, key, error)
        return None
