"""Values under keys, in a folder or in Redis, for several processes at once: what the prefix stores keep their bytes
in.

A value is there whole or not at all. Nothing here trusts a value: whoever reads one checks it.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from kvcomp import disk
from kvcomp.errors import InvalidInput
from kvcomp.serve.blobs.folder import FolderBlobs
from kvcomp.serve.blobs.values import Blobs, Buffer

__all__ = ["Blobs", "Buffer", "open_blobs"]

REDIS_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss", "unix": "unix"}
TIMEOUT = 5.0


def open_blobs(url: str | Path, *, limit: int | None = None, timeout: float = TIMEOUT) -> Blobs:
    """The store at a URL: a folder's path or ``file://``, or ``redis://``, ``rediss://``, ``valkey://``,
    ``valkeys://``, ``unix://``.

    limit: bytes that a folder may hold; the least recently used values go first. Redis has its own: maxmemory with
    allkeys-lru.
    timeout: seconds that any one call to Redis, and any wait for another process, may take in all.
    Raises InvalidInput; a store that does not answer is found out at the first call.
    """
    if not isinstance(url, str | Path):
        raise InvalidInput(f"a store is a URL or a folder's path, not {type(url).__name__}")
    if not isinstance(timeout, int | float) or not 0 < timeout < 1e6:
        raise InvalidInput(f"timeout must be a number of seconds above 0, not {timeout!r}")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InvalidInput(f"limit must be a number of bytes above 0, not {limit!r}")
    scheme, colon, rest = str(url).partition(":")
    if isinstance(url, Path) or not colon or not (rest.startswith("//") or scheme.lower() in (*REDIS_SCHEMES, "file")):
        return FolderBlobs(_folder(url), limit, timeout)
    if not rest.startswith("//"):
        raise InvalidInput(f"this is no URL: one begins with {scheme}://, not with {scheme}:")  # a password may follow
    try:
        parts = urlsplit(str(url))
    except ValueError as error:
        raise InvalidInput(f"this is no URL: {error}") from None
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise InvalidInput(f"a file URL names a folder of this machine (file:///path), not of {parts.hostname!r}")
        return FolderBlobs(_folder(unquote(parts.path)), limit, timeout)
    if parts.scheme not in REDIS_SCHEMES:
        raise InvalidInput(
            f"no store {parts.scheme}://: use a folder's path, file:// or {'://, '.join(REDIS_SCHEMES)}://"
        )
    if limit is not None:
        raise InvalidInput(
            "a limit is for folders: give Redis its own, with maxmemory and maxmemory-policy allkeys-lru"
        )
    try:
        from kvcomp.serve.blobs.redis import RedisBlobs
    except ImportError:
        raise InvalidInput(f"{parts.scheme}:// needs redis-py: pip install '.[serve]'") from None
    return RedisBlobs(REDIS_SCHEMES[parts.scheme] + str(url)[len(parts.scheme) :], timeout)


def _folder(path: str | Path) -> Path:
    """The folder, wherever the process goes later. Raises InvalidInput for what names none."""
    return disk.place(path).absolute()
