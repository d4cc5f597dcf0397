"""The CUDA sources on the CPU: built with g++ against machine.cpp, run through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy.typing as npt

from kvcomp.kernels.cuda.launch import Launch
from kvcomp.kernels.cuda.layout import SOURCES, machine

HERE = Path(__file__).parents[1] / "emulator"
CACHE = Path(tempfile.gettempdir()) / "kvcomp-emulator"
COMPILER = shutil.which("g++")
OPTIONS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-U_FORTIFY_SOURCE", "-w")
COUNTING = ("-DKVC_WAVEFRONTS", "-fsanitize=thread")
STATUS = (
    "fine",
    "read or wrote where nothing is",
    "wrote beyond its shared memory or did not end",
    "is not launched so",
)

Array = npt.NDArray[Any]


def _object(source: Path, options: tuple[str, ...], key: str) -> Path:
    path = CACHE / f"{source.stem}-{hashlib.sha256(' '.join((*options, key)).encode()).hexdigest()[:20]}.o"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        fresh = path.with_suffix(f".{id(path)}.tmp")
        command = [
            COMPILER or "g++",
            *OPTIONS,
            *options,
            f"-I{HERE}",
            f"-I{SOURCES}",
            "-c",
            str(source),
            "-o",
            str(fresh),
        ]
        subprocess.run(command, check=True, capture_output=True, text=True)
        fresh.replace(path)
    return path


@lru_cache(maxsize=1)
def _key() -> str:
    """Hash of all sources."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.cu*"), *HERE.glob("*.cpp"), *HERE.glob("*.h"), *HERE.glob("*.cuh")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.guarded.restype = ctypes.c_void_p
    loaded.guarded.argtypes = (ctypes.c_size_t,)
    return loaded


def build(kernel: str, defines: Mapping[str, int], counting: bool = False) -> ctypes.CDLL:
    """The library of tests/emulator/<kernel>.cpp with these constants; kept on disk as long as no source changes.

    counting: whether it counts wavefronts (wavefronts.cpp), which takes several times as long.
    """
    key = _key()
    options = tuple(f"-D{name}={value}" for name, value in sorted(defines.items()))
    options += COUNTING if counting else ()
    library = CACHE / f"{kernel}-{hashlib.sha256(' '.join((*options, key)).encode()).hexdigest()[:20]}.so"
    if not library.exists():
        unit = _object(HERE / f"{kernel}.cpp", options, key)
        parts = ("machine", "wavefronts") if counting else ("machine",)
        objects = [str(_object(HERE / f"{part}.cpp", (), key)) for part in parts]
        fresh = library.with_suffix(f".{id(library)}.tmp")
        subprocess.run([COMPILER or "g++", "-shared", str(unit), *objects, "-o", str(fresh)], check=True)
        fresh.replace(library)
        unit.unlink(missing_ok=True)
    return _load(library)


class Failed(AssertionError):
    """A kernel did what a GPU would not forgive."""


class Dim3(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32))


class Emulator:
    """Stands in for a GPU (``kvcomp.kernels.cuda.launch.Launcher``). ascending: order in which the threads of a CTA get
    their turns. counting: whether it counts wavefronts.
    """

    def __init__(
        self, architecture: int = 90, processors: int = 2, ascending: bool = True, counting: bool = False
    ) -> None:
        self.machine = machine(architecture, processors)
        self.counting = counting
        self.ascending = ascending
        self.launches: list[str] = []

    def launch(self, of: Launch) -> None:
        assert of.shared <= self.machine.shared
        self.launches.append(of.kernel)
        status = build(of.source, of.build.defines, self.counting).run(
            of.kernel.encode(),
            ctypes.byref(of.arguments),
            of.extra or 0,
            Dim3(*of.grid),
            of.threads,
            ctypes.c_size_t(of.shared),
            int(self.ascending),
        )
        if status:
            raise Failed(f"{of.kernel} {STATUS[status]}")


class Arena:
    """A copy of bytes that ends exactly where memory ends: whoever reads one byte further is caught."""

    def __init__(self, library: ctypes.CDLL, content: Array) -> None:
        self.address = int(library.guarded(content.nbytes))
        ctypes.memmove(self.address, content.ctypes.data, content.nbytes)
        self._release = library.release
        self._size = content.nbytes

    def __del__(self) -> None:
        self._release(ctypes.c_void_p(self.address), ctypes.c_size_t(self._size))


def address(x: Array) -> int:
    return int(x.__array_interface__["data"][0])
