"""The decompression kernel on the emulator, called as the GPU backend calls it."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

import emulator
from attention_cases import NUMPY, Cache
from emulator import Arena, Array, Emulator, address
from kvcomp.kernels.cuda import launch as gpu_launch
from kvcomp.kernels.cuda.layout import (
    BFLOAT16_128,
    BOOKS,
    Book,
    DecompressArguments,
    describe_book,
    page_build,
    table_entries,
)


def decompress(cache: Cache) -> tuple[Array, Array]:
    """K and V of the first row's pages, which end where memory ends; what the kernel should write holds NaN before."""
    case = cache.case
    chosen = page_build(case.spec, case.channels, case.value)
    library = emulator.build("decompress", chosen.defines)
    count, buffer = case.pages[0], cache.owners[0]
    arena = Arena(library, buffer)
    pages = cache.view.pages[0, :count] - buffer.ctypes.data + arena.address
    books = (Book * BOOKS)()
    kept: list[Any] = []
    for index, book in enumerate(book for of_kind in cache.view.books[0] for book in of_kind):
        bits = (chosen.k_bits, chosen.v_bits)[index // 2]
        if book is not None and bits:
            kept.append(table_entries(book, bits))
            books[index] = describe_book(book, address(kept[-1]))
    shape = case.heads, 64 * count, case.channels
    out_k, out_v = (np.full(shape, 0x7FFF, np.int16).view(np.uint16).astype(NUMPY[case.value]) for _ in "KV")
    a = DecompressArguments(page_count=count, heads=case.heads, ones=BFLOAT16_128)
    a.pages, a.books = address(pages), ctypes.addressof(books)
    for name, steps in zip(("k_steps", "v_steps"), cache.view.steps, strict=True):
        if steps is not None:
            kept.append(np.array(steps, np.float32))
            setattr(a, name, address(kept[-1]))
    a.out_k, a.out_v = address(out_k), address(out_v)
    a.k_head = a.v_head = 64 * count * case.channels
    a.k_token = a.v_token = case.channels
    gpu_launch.decompress(Emulator(), chosen, a)
    return out_k, out_v
