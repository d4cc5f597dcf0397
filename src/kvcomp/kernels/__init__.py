"""Kernels. Every backend is a module with the functions of ``kvcomp.kernels.reference``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from kvcomp.codec.codebook import Codebook
from kvcomp.codec.quantise import Quantised
from kvcomp.errors import BackendUnavailable
from kvcomp.spec import Coding, Kind, Unit

BackendName = Literal["cpu", "reference"]
Books = tuple[Codebook | None, Codebook | None]  # the default book and the sequence's own
Steps = tuple[
    tuple[float, ...] | None, tuple[float, ...] | None
]  # the heads' steps of K and of V, where the unit is ``head``
NO_STEPS: Steps = (None, None)
Array = npt.NDArray[Any]


class Backend(Protocol):
    """What a backend can do; ``kvcomp.kernels.reference`` says what each function means."""

    def quantise(self, x: Array, unit: Unit, scale: float | tuple[float, ...]) -> Quantised: ...

    def count_pairs(self, q: Quantised, kind: Kind, classes: int) -> npt.NDArray[np.uint64]: ...

    def encode_pages(
        self,
        k: Array,
        v: Array,
        kq: Quantised,
        vq: Quantised,
        coding: tuple[Coding, Coding],
        units: tuple[Unit, Unit],
        k_books: Books,
        v_books: Books,
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]: ...

    def decompress(
        self,
        pages: npt.NDArray[np.int64],
        units: tuple[Unit, Unit],
        k_books: Books,
        v_books: Books,
        out_k: Array,
        out_v: Array,
        steps: Steps = NO_STEPS,
    ) -> None: ...

    def attend(
        self,
        q: npt.NDArray[np.float32],
        pages: npt.NDArray[np.int64],
        valid: npt.NDArray[np.int32],
        count: npt.NDArray[np.int64],
        units: tuple[Unit, Unit],
        books: Sequence[tuple[Books, Books]],
        sinks_k: Array,
        sinks_v: Array,
        sink_count: npt.NDArray[np.int64],
        tail_k: Array,
        tail_v: Array,
        tail_begin: npt.NDArray[np.int64],
        tail_end: npt.NDArray[np.int64],
        scaling: float,
        softcap: float = 0.0,
        threads: int = 1,
        steps: Steps = NO_STEPS,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]: ...


def host_backend(name: str) -> str:
    """The backend of stores in main memory, where those of the backend ``gpu`` wait until their device is known."""
    return "reference" if name == "gpu" else name


def load_backend(name: str) -> Backend:
    """The backend of this name, ``cpu`` or ``reference``. Raises BackendUnavailable for any other."""
    if name not in ("cpu", "reference"):
        raise BackendUnavailable(f"there is no backend {name!r}: use 'cpu', or 'reference' to check against it")
    module = "kvcomp.kernels.cpu.backend" if name == "cpu" else "kvcomp.kernels.reference"
    return cast(Backend, import_module(module))
