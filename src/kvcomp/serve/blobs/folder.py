"""Values in the files of a folder: found by name, published by a rename, removed by age when the folder is full."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from xxhash import xxh3_64

from kvcomp import disk
from kvcomp.errors import CorruptData, InvalidInput, LimitExceeded, StoreUnavailable
from kvcomp.serve.blobs.values import Buffer, check_keys

SUFFIX = ".kvc"
LOCK, NEW_LOCK = "lock", "lock.new"  # of who makes room, and of who stores what is not there yet


class FolderBlobs:
    """The values of ``kvcomp.serve.blobs.Blobs`` in files, in 256 subfolders so that none gets long.

    path: the folder, made when something is stored. limit: bytes it may hold, None for no limit; writers that are at
    work at the same time may go beyond it by what they write. timeout: seconds to wait for a process that makes room.
    """

    def __init__(self, path: Path, limit: int | None, timeout: float) -> None:
        self.path, self.limit, self.timeout = path, limit, timeout
        self.swept = False

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        check_keys(keys)
        with _typed(self.path):
            return [_size(self._place(key)) for key in keys]

    def get(self, keys: Sequence[str]) -> list[Buffer | None]:
        check_keys(keys)
        with _typed(self.path):
            return [_read(self._place(key)) for key in keys]

    def touch(self, keys: Sequence[str]) -> None:
        check_keys(keys)
        now = time.time_ns()
        with _typed(self.path):
            for age, key in enumerate(keys):
                with suppress(FileNotFoundError):
                    _touch(self._place(key), now - age)

    def put(self, items: Sequence[tuple[str, Sequence[Buffer]]], kept: Sequence[str] = ()) -> None:
        check_keys([key for key, _ in items])
        values = [(self._place(key), [memoryview(piece).cast("B") for piece in pieces]) for key, pieces in items]
        with _typed(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.swept:
                self.swept = True
                for folder in self.path.glob("??/"):
                    disk.remove_abandoned(folder)
            if self.limit is not None:
                new = {place: sum(piece.nbytes for piece in pieces) for place, pieces in values}
                self._make_room(new, {self._place(key) for key in kept}, self.limit)
            for place, pieces in values:
                place.parent.mkdir(exist_ok=True)
                disk.replace(place, pieces)

    def put_new(self, key: str, value: Sequence[Buffer]) -> bool:
        check_keys([key])
        with _typed(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path / NEW_LOCK, timeout=self.timeout):
                new = self.sizes([key]) == [None]
                if new:
                    self.put([(key, value)])
        return new

    def delete(self, keys: Sequence[str]) -> None:
        check_keys(keys)
        with _typed(self.path):
            for key in keys:
                self._place(key).unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing is held open."""

    def _place(self, key: str) -> Path:
        return self.path / xxh3_64(key.encode()).hexdigest()[:2] / f"{key}{SUFFIX}"

    def _make_room(self, new: Mapping[Path, int], kept: Collection[Path], limit: int) -> None:
        """Remove the least recently used values until new ones of so many bytes fit; what they replace goes anyway."""
        with FileLock(self.path / LOCK, timeout=self.timeout):  # two that make room at once would remove too much
            used = sum(new.values()) + sum(_size(place) or 0 for place in kept if place not in new)
            if used > limit:
                raise LimitExceeded(f"{used} bytes do not fit in a store of at most {limit}: raise its limit")
            found = []
            for place in self.path.glob(f"??/*{SUFFIX}"):
                with suppress(FileNotFoundError):
                    status = place.stat()
                    if place not in new and place not in kept:
                        found.append((status.st_mtime_ns, status.st_size, place))
            used += sum(size for _, size, _ in found)
            for _, size, place in sorted(found):
                if used <= limit:
                    return
                place.unlink(missing_ok=True)
                used -= size


@contextmanager
def _typed(path: Path) -> Iterator[None]:
    try:
        yield
    except Timeout as error:
        raise StoreUnavailable(f"another process holds {error.lock_file} for too long: is it stopped?") from None
    except (OSError, InvalidInput) as error:
        raise StoreUnavailable(f"the store {path} cannot be used: {error}") from error


def _size(place: Path) -> int | None:
    """Bytes of a value; an empty file is none."""
    try:
        return place.stat().st_size or None
    except FileNotFoundError:
        return None


def _read(place: Path) -> Buffer | None:
    """A value; what is no file, or an empty one, is no value."""
    try:
        data = disk.read(place)
        _touch(place, time.time_ns())
    except (FileNotFoundError, CorruptData, InvalidInput):
        return None
    return data.data


def _touch(place: Path, when: int) -> None:
    """Say that a value was read, in nanoseconds of the epoch. Who may only read says nothing."""
    try:
        os.utime(place, ns=(when, when))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
