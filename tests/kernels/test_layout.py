"""What Python and the CUDA sources both name is the same number."""

from __future__ import annotations

import re

import pytest

from kvcomp.codec import block, dtypes, patched, quantise
from kvcomp.kernels.cuda import layout
from kvcomp.spec import KINDS, PAGE_TOKENS

OF_PYTHON = {
    "page.cuh": {
        **{name: getattr(dtypes, name) for name in ("RAW", "DEFAULT_BOOK", "OWN_BOOK", "PATCHED", "FIXED")},
        **{unit.upper(): number for unit, number in dtypes.UNIT_NUMBERS.items()},
        **{name.upper(): dtype.number for name, dtype in dtypes.DTYPES.items()},
        **{kind: index for index, kind in enumerate(KINDS)},
        "TOKENS": PAGE_TOKENS,
        "LANES": layout.LANES,
    },
    "encode.cuh": {
        "STREAMS": block.STREAMS,
        "MAX_BASE": block.MAX_BASE,
        **{name: getattr(quantise, name) for name in ("MAX_CODES", "MAX_LEVELS", "MAX_ZERO", "LARGEST_FLOAT16")},
        "COUNTED": layout.COUNTED,
    },
    "choose.cuh": {name: getattr(patched, name) for name in ("EXCEPTION_BITS", "MOST_EXCEPTIONS", "MOST_OFFSET")},
}


def literals(source: str) -> dict[str, float]:
    """The constants of a CUDA source that are defined by a number."""
    text = re.sub("//.*", "", (layout.SOURCES / source).read_text())
    lists = re.findall(r"^constexpr \w+ ([^;(]+);", text, re.MULTILINE)
    found = re.findall(r"(\w+) = (\d+(?:\.\d*)?)f?(?:,|$)", ",".join(lists))
    return {name: float(number) for name, number in found}


@pytest.mark.parametrize("source", OF_PYTHON)
def test_constants_of_cuda_and_python_are_equal(source: str) -> None:
    assert literals(source) == OF_PYTHON[source]
