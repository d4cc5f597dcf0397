"""The dtypes of K and V, the units and the modes of blocks: one table of each, for the format and for every kernel.

``kernels/cuda/page.cuh`` repeats the numbers for CUDA; a test holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvcomp.errors import InvalidInput
from kvcomp.spec import Unit


@dataclass(frozen=True)
class DType:
    """A dtype that K and V can have."""

    name: str
    number: int
    """What the kernels call it."""
    array: np.dtype[Any]
    """Its NumPy type; NumPy has no bfloat16, which travels as its bits in uint16."""
    significand: int
    """Bits of the significand, the hidden one included."""
    least_exponent: int
    """Exponent of the smallest normal number."""

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return self.array.itemsize


FLOAT32, FLOAT16, BFLOAT16 = range(3)
DTYPES: Final = {
    dtype.name: dtype
    for dtype in (
        DType("float32", FLOAT32, np.dtype("<f4"), 24, -126),
        DType("float16", FLOAT16, np.dtype("<f2"), 11, -14),
        DType("bfloat16", BFLOAT16, np.dtype("<u2"), 8, -126),
    )
}
_BY_ARRAY = {dtype.array: dtype for dtype in DTYPES.values()}


def dtype_of(array: np.dtype[Any]) -> DType:
    """The dtype whose values NumPy holds in this type. Raises InvalidInput if there is none."""
    if array not in _BY_ARRAY:
        raise InvalidInput(f"values must be float32, float16 or bfloat16 bits in uint16, not {array}")
    return _BY_ARRAY[array]


# Units as the kernels number them.
BLOCK, CHANNEL, VECTOR, TOKEN, HEAD = range(5)
UNIT_NUMBERS: Final[dict[Unit, int]] = {
    "block": BLOCK,
    "channel": CHANNEL,
    "vector": VECTOR,
    "token": TOKEN,
    "head": HEAD,
}

# Modes of a block (docs/format.md, section 2). FIXED + w is a width of w bits, 1 to 7; FIXED itself is 8 bits.
RAW, DEFAULT_BOOK, OWN_BOOK, PATCHED, FIXED = 0, 1, 2, 4, 8
