"""The CUDA decompression kernel, run on the CPU, against the readable reference: the same bits."""

from __future__ import annotations

import numpy as np
import pytest

from attention_cases import Case, build
from emulated_decompression import decompress
from emulator import COMPILER
from kvcomp.kernels import reference

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++"), pytest.mark.emulated]

CASES = {
    "the preset": Case(pages=(3,)),
    "fixed width, float32": Case(channels=80, pages=(2,), coding=("fixed", "fixed"), value="float32", raw=True),
    "channel and vector": Case(channels=192, pages=(2,), units=("channel", "vector"), classes=(4, 4), raw=True),
    "steps of heads": Case(channels=64, pages=(2,), units=("head", "head"), classes=(4, 4), scales=(0.02, 0.1)),
    "pieces": Case(channels=80, pages=(3,), units=("channel", "token"), coding=("patched", "patched"), raw=True),
    "pieces, steps of heads": Case(
        channels=256,
        pages=(2,),
        units=("head", "head"),
        coding=("patched", "patched"),
        scales=(0.01, 0.3),
        value="float32",
    ),
    "token and channel, float16": Case(channels=256, pages=(2,), units=("token", "channel"), value="float16"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_reference(case: Case) -> None:
    cache = build(case)
    out_k, out_v = decompress(cache)
    expected_k, expected_v = np.empty_like(out_k), np.empty_like(out_v)
    pages = cache.view.pages[0, : case.pages[0]]
    reference.decompress(pages, case.units, *cache.view.books[0], expected_k, expected_v, cache.view.steps)
    np.testing.assert_array_equal(out_k, expected_k)
    np.testing.assert_array_equal(out_v, expected_v)
