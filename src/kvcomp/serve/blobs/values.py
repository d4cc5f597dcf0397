"""What a store of values is: the contract that the folder and Redis keep."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from kvcomp.errors import InvalidInput

Buffer = bytes | memoryview

KEY = re.compile(r"[0-9A-Za-z:_.@-]{1,250}")


class Blobs(Protocol):
    """Values under keys. All methods may be called from several threads and raise StoreUnavailable if the store cannot
    be used.
    """

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """Bytes of each value, None where there is none."""
        ...

    def get(self, keys: Sequence[str]) -> list[Buffer | None]:
        """Each value, None where there is none. What is read counts as used."""
        ...

    def touch(self, keys: Sequence[str]) -> None:
        """Count values as used, the first as the last one used: where room is made, the others go before it."""
        ...

    def put(self, items: Sequence[tuple[str, Sequence[Buffer]]], kept: Sequence[str] = ()) -> None:
        """Store values, each given in pieces that follow each other, in place of what was there; readers see all of one
        or nothing. Raises LimitExceeded, and stores none, if a folder has no room for all of them.

        kept: keys of values that a folder may not remove to make room.
        """
        ...

    def put_new(self, key: str, value: Sequence[Buffer]) -> bool:
        """Store a value unless there is one. Says whether it was stored: of several at the same time only one is.

        Raises LimitExceeded as ``put``.
        """
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove values; a key that has none is no error."""
        ...

    def close(self) -> None:
        """Give back connections."""
        ...


def check_keys(keys: Sequence[Any]) -> None:
    for key in keys:
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise InvalidInput(f"a key must be 1 to 250 letters, digits and any of :_.@-, not {str(key)[:300]!r}")
