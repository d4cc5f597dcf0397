"""CacheView: one layer's cache as attention kernels read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcomp.codec.codebook import Codebook
from kvcomp.spec import Unit

Array = npt.NDArray[Any]
Books = tuple[Codebook | None, Codebook | None]  # the default book and the sequence's own
Steps = tuple[tuple[float, ...] | None, tuple[float, ...] | None]
NO_STEPS: Steps = (None, None)


@dataclass(frozen=True)
class CacheView:
    """The rows of a batch, in memory that the caller keeps alive. Once read, only values of the tail change.

    Values are float32, float16, or bfloat16 as its bits in uint16: one dtype in pages, sinks and tail.
    """

    pages: npt.NDArray[np.int64]
    """(rows, capacity) addresses of pages, with as many readable bytes behind each run as a head has channels."""
    valid: npt.NDArray[np.int32]
    """(rows, capacity) how many of a page's tokens count."""
    count: npt.NDArray[np.int64]
    """(rows,) entries used of ``pages``."""
    units: tuple[Unit, Unit]
    """Units of K and V."""
    books: Sequence[tuple[Books, Books]]
    """For each row the codebooks of K and V."""
    sinks_k: Array
    """(rows, KV heads, sinks, channels of K); of this and the next three the channels of a token lie side by side."""
    sinks_v: Array
    """(rows, KV heads, sinks, channels of V)."""
    sink_count: npt.NDArray[np.int64]
    """(rows,) how many of the sinks count."""
    tail_k: Array
    """(rows, KV heads, tokens, channels of K)."""
    tail_v: Array
    """(rows, KV heads, tokens, channels of V)."""
    tail_begin: npt.NDArray[np.int64]
    """(rows,) the first token of the tail that counts."""
    steps: Steps = NO_STEPS
    """Steps of the KV heads, for K and V, where the unit is ``head``."""
    derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What a backend makes of the view once, under its name."""

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of a head, of K and of V."""
        return self.tail_k.shape[-1], self.tail_v.shape[-1]
