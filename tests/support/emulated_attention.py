"""The attention kernel on the emulator, called as the GPU backend calls it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

import emulator
from attention_cases import NUMPY, Cache
from emulator import Arena, Array, Emulator, address
from kvcomp.codec.quantise import round_to, to_float32
from kvcomp.kernels.cuda import launch as gpu_launch
from kvcomp.kernels.cuda.layout import (
    BFLOAT16_128,
    BOOKS,
    AttendArguments,
    AttendBuild,
    Book,
    describe_book,
    table_entries,
)


@dataclass
class Result:
    """out: float32, whatever the queries are."""

    out: Array
    lse: Array


def attend(
    cache: Cache,
    build: AttendBuild,
    *,
    splits: int = 2,
    ascending: bool = True,
    query: str = "float32",
    counting: bool = False,
) -> Result:
    """Run the kernel on a cache whose pages end where memory ends; what it should write holds NaN.

    counting: whether the emulator counts wavefronts.
    """
    library = emulator.build("decode_attention", build.defines, counting)
    kept: list[Any] = []

    def place(x: Array) -> int:
        kept.append(np.ascontiguousarray(x))
        return address(kept[-1])

    rows, heads, queries, _ = cache.q.shape
    view = cache.view
    pages = view.pages.copy()
    for row, buffer in enumerate(cache.owners):
        arena = Arena(library, buffer)
        kept.append(arena)
        pages[row, : view.count[row]] += arena.address - buffer.ctypes.data
    a = AttendArguments(rows=rows, heads=heads, queries=queries, new_tokens=cache.case.new, capacity=pages.shape[1])
    a.scaling, a.softcap, a.ones = cache.scaling, cache.case.softcap, BFLOAT16_128
    q = round_to(cache.q, NUMPY[query])
    a.q = place(q)
    out, lse = np.full(q.shape, np.nan, np.float32), np.full(q.shape[:3], np.nan, np.float32)
    out = round_to(out, q.dtype)
    a.out, a.lse = address(out), address(lse)
    a.partial_out = place(np.full((splits, *q.shape), np.nan, np.float32))
    a.partial_peak, a.partial_total = (place(np.full((splits, rows, heads, queries), np.nan, np.float32)) for _ in "mt")
    a.pages, a.valid, a.count = place(pages), place(view.valid), place(view.count.astype(np.int32))
    books = (Book * (BOOKS * rows))()
    for row, of_row in enumerate(view.books):
        for index, book in enumerate(book for of_kind in of_row for book in of_kind):
            bits = (build.k_bits, build.v_bits)[index // 2]
            if book is not None and bits:
                books[BOOKS * row + index] = describe_book(book, place(table_entries(book, bits)))
    a.books = ctypes.addressof(books)
    for name, steps in zip(("k_steps", "v_steps"), view.steps, strict=True):
        setattr(a, name, 0 if steps is None else place(np.array(steps, np.float32)))
    for name in ("sinks_k", "sinks_v", "tail_k", "tail_v"):
        tensor, x = getattr(a, name), getattr(view, name)
        tensor.values = place(x)
        tensor.row, tensor.head, tensor.token = (stride // x.itemsize for stride in x.strides[:3])
    a.sink_count, a.tail_begin = place(view.sink_count.astype(np.int32)), place(view.tail_begin.astype(np.int32))
    a.tail_tokens = place(np.array([cache.case.tail], np.int32))
    gpu_launch.attend(Emulator(ascending=ascending, counting=counting), build, a, splits)
    return Result(to_float32(out), lse)
