"""The CUDA decompression kernel, run on the CPU, against the readable reference: the same bits."""

from __future__ import annotations

import ctypes
from typing import Any

import emulator
import numpy as np
import pytest
from emulator import COMPILER, Arena, Emulator, address
from gpu_cases import NUMPY, Case, build

from kvcomp.kernels import gpu_launch, reference
from kvcomp.kernels.gpu_layout import (
    BFLOAT16_128,
    BOOKS,
    Book,
    DecompressArguments,
    describe_book,
    page_build,
    table_entries,
)

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++"), pytest.mark.emulated]

CASES = {
    "the preset": Case(pages=(3,)),
    "fixed width, float32": Case(channels=80, pages=(2,), coding=("fixed", "fixed"), value="float32", raw=True),
    "channel and vector": Case(channels=192, pages=(2,), units=("channel", "vector"), classes=(4, 4), raw=True),
    "steps of heads": Case(channels=64, pages=(2,), units=("head", "head"), classes=(4, 4), scales=(0.02, 0.1)),
    "token and channel, float16": Case(channels=256, pages=(2,), units=("token", "channel"), value="float16"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_reference(case: Case) -> None:
    cache = build(case)
    chosen = page_build(cache.spec, case.channels, case.value)
    library = emulator.build("decompress", chosen.defines)
    count, buffer = case.pages[0], cache.owners[0]
    arena = Arena(library, buffer)
    pages = cache.pages[0, :count] - buffer.ctypes.data + arena.address
    books = (Book * BOOKS)()
    kept: list[Any] = []
    for index, book in enumerate(book for of_kind in cache.books[0] for book in of_kind):
        bits = (chosen.k_bits, chosen.v_bits)[index // 2]
        if book is not None and bits:
            kept.append(table_entries(book, bits))
            books[index] = describe_book(book, address(kept[-1]))
    shape = case.heads, 64 * count, case.channels
    out_k, out_v = (np.full(shape, 0x7FFF, np.int16).view(np.uint16).astype(NUMPY[case.value]) for _ in "KV")
    a = DecompressArguments(page_count=count, heads=case.heads, ones=BFLOAT16_128)
    a.pages, a.books = address(pages), ctypes.addressof(books)
    for name, steps in zip(("k_steps", "v_steps"), cache.steps, strict=True):
        if steps is not None:
            kept.append(np.array(steps, np.float32))
            setattr(a, name, address(kept[-1]))
    a.out_k, a.out_v = address(out_k), address(out_v)
    a.k_head = a.v_head = 64 * count * case.channels
    a.k_token = a.v_token = case.channels
    gpu_launch.decompress(Emulator(), chosen, a)
    expected_k, expected_v = np.empty_like(out_k), np.empty_like(out_v)
    reference.decompress(cache.pages[0, :count], case.units, *cache.books[0], expected_k, expected_v, cache.steps)
    np.testing.assert_array_equal(out_k, expected_k)
    np.testing.assert_array_equal(out_v, expected_v)
