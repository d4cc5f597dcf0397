"""Bytes in files: written whole or not at all, read by mapping them into memory.

A file is either the old one or the new one, never a part: what is written gets another name until it is whole and on
the disk.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64

from kvcomp.errors import CorruptData, InvalidInput

WRITE_BYTES = 1 << 24
OPENED = re.compile(r"/dev/(stdin|stdout|stderr|fd/)|/proc/")
MARK = 16  # hex digits of a file's mark, and of what tells its temporaries apart

Bytes = npt.NDArray[np.uint8]


def place(path: str | Path) -> Path:
    """A path that someone gave, with ``~`` expanded. Raises InvalidInput for what names no file."""
    if not isinstance(path, str | Path):
        raise InvalidInput(f"a path must be a str or a Path, not {type(path).__name__}")
    text = str(path)
    if not text or "\0" in text:
        raise InvalidInput(f"{text!r} is no path: give one without zero bytes that is not empty")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InvalidInput(f"{text} cannot be expanded: {error}") from None


def read(path: str | Path) -> Bytes:
    """The bytes of a file, mapped into memory; they are read when they are first looked at.

    Raises CorruptData if there are none, InvalidInput if it is no file, and OSError.
    """
    wait = os.O_NONBLOCK  # opening a pipe must not wait for its writer
    descriptor = os.open(place(path), os.O_RDONLY | os.O_CLOEXEC | wait)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInput(f"{path} is a folder, a pipe or a device: only a file can be mapped into memory")
        if not status.st_size:
            raise CorruptData(f"{path} is empty")
        return np.frombuffer(mmap.mmap(descriptor, status.st_size, prot=mmap.PROT_READ), np.uint8)
    finally:
        os.close(descriptor)


def write(path: str | Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Put a file of these bytes in the place of ``path``: all of them, on the disk, or nothing.

    Raises OSError, and InvalidInput if something other than a file is there.
    """
    target = Path(os.path.realpath(place(path)))  # a link stays a link
    if is_other(path):
        raise InvalidInput(f"{path} is a folder, a pipe or a device, which no file replaces: give another path")
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder: make it first", str(target.parent))
    replace(target, pieces)


def replace(target: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """The same where others may have put a link: it goes, and what it leads to stays. Raises OSError."""
    remove_abandoned(target.parent, _mark(target))
    descriptor, temporary = _create(target)
    try:
        try:
            for piece in pieces:
                _write_all(descriptor, memoryview(piece))
            os.fsync(descriptor)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    finally:
        os.close(descriptor)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def put(path: str | Path, data: bytes) -> None:
    """Write a file of these bytes as ``write`` does. A pipe or a device, such as /dev/stdout, takes them as they come,
    behind what it has already.

    Raises InvalidInput for a path that is none, and OSError.
    """
    if is_other(path):
        with place(path).open("ab") as output:
            output.write(data)
    else:
        write(path, [data])


def is_other(path: str | Path) -> bool:
    """Whether something other than a file is there, or what a process has open: the name of a pipe behind /dev/stdout
    does not exist, and a file behind it must stay the one that was opened.
    """
    given = place(path)
    return OPENED.match(str(given.absolute())) is not None or (given.exists() and not given.is_file())


def _write_all(descriptor: int, data: memoryview) -> None:
    """A write may take less than it is given."""
    while data:
        data = data[os.write(descriptor, data[:WRITE_BYTES]) :]


def _create(target: Path) -> tuple[int, Path]:
    """A new file beside the target, locked as long as it is open."""
    while True:
        temporary = target.with_name(f".{_mark(target)}.{secrets.token_hex(MARK // 2)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system without locks: what is abandoned there stays
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)  # someone took it for abandoned before it was locked


def remove_abandoned(folder: Path, mark: str = "?" * MARK) -> None:
    """Remove what processes left that were killed while they wrote files here: it has the name of a temporary, but no
    lock.

    mark: what the temporaries of one file share; of all files if it is left out.
    """
    for path in folder.glob(f".{mark}.{'?' * MARK}.tmp"):
        with suppress(OSError):  # another process was faster, or still writes
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def _mark(target: Path) -> str:
    """What the names of all temporaries of a file share; short, whatever the file is called."""
    return str(xxh3_64(os.fsencode(target.name)).hexdigest())
