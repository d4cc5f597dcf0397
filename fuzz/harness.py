"""What the fuzz targets share: memory that must not be read past its end, checksums made right again, and mutations of
parts.

A fuzzer that does not mend checksums tests nothing but checksums. So ``mend`` puts right ones into whatever bytes came
up, as far as they look like a .kvc file at all, and ``mutate`` changes sections and numbers of the header, besides
libFuzzer's own changes.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import re
import struct
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import atheris
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64

Bytes = npt.NDArray[np.uint8]

PREFIX = 24  # bytes before the header's text
SECTION = re.compile(rb'\[(\d{1,12}), ?(\d{1,12}), ?"([0-9a-f]{16})"\]')
NUMBER = re.compile(rb"(?<=[ :\[,])\d+(?=[,\]}])")
NUMBERS = 0, 1, 2, 15, 16, 17, 63, 64, 65, 255, 1 << 16, 1 << 27, 1 << 31, 1 << 63
LARGEST = 1 << 16


class Guarded:
    """Memory behind whose last byte lies a page that kills whoever reads it."""

    def __init__(self, capacity: int = 4 * LARGEST) -> None:
        size = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        self.map = mmap.mmap(-1, size + mmap.PAGESIZE)
        self.memory: Bytes = np.frombuffer(self.map, np.uint8)[:size]
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self.memory.ctypes.data + size), mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "the page behind cannot be protected")

    def place(self, data: bytes) -> Bytes:
        """A copy of the data whose last byte is the last that may be read."""
        target = self.memory[self.memory.size - len(data) :]
        target[:] = np.frombuffer(data, np.uint8)
        return target


def mend(data: bytes) -> bytes:
    """The same with right checksums of the header and of all sections that it places within the file."""
    if len(data) < PREFIX:
        return data
    end = PREFIX + int.from_bytes(data[12:16], "little")
    if end > len(data):
        return data
    base = -(-end // 64) * 64

    def mended(match: re.Match[bytes]) -> bytes:
        begin, size = base + int(match[1]), int(match[2])
        digest = xxh3_64(data[begin : begin + size]).hexdigest().encode()
        return match[0].replace(match[3], digest)

    text = SECTION.sub(mended, data[PREFIX:end])
    head = data[:16] + struct.pack("<Q", xxh3_64(data[:16] + text).intdigest()) + text
    return head + data[end:]


def mutate(data: bytes, largest: int, draw: random.Random) -> bytes:
    """libFuzzer's change of all bytes, or of one section, or a number of the header that becomes another."""
    end = PREFIX + int.from_bytes(data[12:16], "little")
    if draw.random() < 0.2 or not PREFIX < end <= len(data):
        return mend(atheris.Mutate(data, largest))
    text, base = data[PREFIX:end], -(-end // 64) * 64
    if draw.random() < 0.25 and (places := list(NUMBER.finditer(text))):
        place = draw.choice(places)
        near = int(place[0]) + draw.choice([-64, -16, -1, 1, 16, 64])
        new = str(draw.choice([near, near, *NUMBERS])).encode()
        text = text[: place.start()] + new + text[place.end() :]
        head = data[:12] + struct.pack("<I", len(text)) + bytes(8) + text
        return mend((head + bytes(-len(head) % 64) + data[base:])[:largest])
    sections = [match for match in SECTION.finditer(text) if int(match[2]) and base + int(match[1]) < len(data)]
    if not sections:
        return mend(atheris.Mutate(data, largest))
    # The section as long as before, so that it stays where the header says it is; pages most often, they are most of a
    # file.
    match = sections[0] if draw.random() < 0.4 else draw.choice(sections)
    begin, size = base + int(match[1]), int(match[2])
    part = data[begin : begin + size]
    at = draw.randrange(len(part))
    window = part[at : at + draw.choice([4, 16, 64, len(part)])]
    changed = atheris.Mutate(window, len(window))[: len(window)].ljust(len(window), b"\0")
    part = part[:at] + changed + part[at + len(window) :]
    return mend(data[:begin] + part + data[begin + size :])


def instrumented(*names: str) -> Any:
    """A context in which these modules of kvcomp are imported with coverage, which tells the fuzzer what is new, and no
    others: coverage takes time, and the modules that decide are those that check bytes."""
    root = Path(str(find_spec("kvcomp").origin)).parent  # type: ignore[union-attr]
    found = (path.relative_to(root.parent).with_suffix("").parts for path in root.rglob("*.py"))
    modules = {".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in found}
    return atheris.instrument_imports(include=["kvcomp"], exclude=sorted(modules - set(names)))


def fuzz(target: Callable[[bytes], None], mutator: Callable[[bytes, int, random.Random], bytes], seeds: Path) -> None:
    """Run libFuzzer over a target. The seeds are tried first, and once before, so that all kernels are compiled.

    Most of what libFuzzer keeps is refused, each for a reason of its own; every fourth input is made of a seed, so that
    enough of them are accepted and decoded.
    """
    valid = [path.read_bytes() for path in sorted(seeds.iterdir())]
    for data in valid:
        target(data)

    def mutate_some(data: bytes, largest: int, seed: int) -> bytes:
        draw = random.Random(seed)
        return mutator(data if draw.random() < 0.75 else draw.choice(valid), largest, draw)

    atheris.Setup([*sys.argv, str(seeds)], target, custom_mutator=mutate_some)
    atheris.Fuzz()


def bits(x: npt.NDArray[Any]) -> bytes:
    """The bytes of values, for a comparison in which NaN equals itself."""
    return np.ascontiguousarray(x).tobytes()
