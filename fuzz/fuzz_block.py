"""Bytes as a page: refused by the check of pages, or decoded by the CPU kernel to what the readable decoder gives, bit
by bit.

The first byte picks a layout, and whether the size in the directory is put right; the rest is the page.
"""

from __future__ import annotations

import random
from pathlib import Path

import atheris

from harness import instrumented

with instrumented("kvcomp.files.check"):
    from kvcomp.files.check import check_pages

import numpy as np
import torch
from xxhash import xxh3_64

from harness import LARGEST, Bytes, Guarded, bits, fuzz
from kvcomp.codec.page import Layout, blocks_of
from kvcomp.errors import CorruptData
from kvcomp.kernels import reference
from kvcomp.store.tensors import as_array
from layouts import LAYOUTS, store_over

READABLE = 8  # bytes that a decoder may read behind the spare ones
COMPARED = 64  # one input in so many is also decoded by the readable decoder, which takes forty times as long

guarded = Guarded()
torch.set_num_threads(1)


def with_what_follows(page: bytes, layout: Layout) -> list[tuple[int, bytes]]:
    """Blocks, each up to the end of the page: codes that run on behind their block, as none that were encoded do, are
    then the same for both decoders."""
    found, at = [], layout.first_block
    for mode, block in blocks_of(page, layout):
        found.append((mode, page[at:]))
        at += len(block)
    return found


reference.blocks_of = with_what_follows


def target(data: bytes) -> None:
    if not data:
        return
    layout = LAYOUTS[data[0] % len(LAYOUTS)]
    page = bytearray(data[1:LARGEST])
    if data[0] < 128:
        page += bytes(-len(page) % 16)
        page[8 * layout.heads : 8 * layout.heads + 4] = len(page).to_bytes(4, "little")
    arena: Bytes = guarded.place(bytes(page) + bytes(layout.channels + READABLE))[:-READABLE]
    try:
        own = check_pages(arena, np.zeros(1, np.int64), layout.page)
    except CorruptData:
        return
    if own.any() and not layout.own_books:
        return
    found = [as_array(x) for x in store_over(layout, arena, "cpu").tile(0, 0, 1)]
    if xxh3_64(data).intdigest() % COMPARED == 0:
        expected = [as_array(x) for x in store_over(layout, arena, "reference").tile(0, 0, 1)]
        if any(bits(one) != bits(other) for one, other in zip(found, expected, strict=True)):
            raise AssertionError("the kernel and the readable decoder disagree")


def mutate(data: bytes, largest: int, draw: random.Random) -> bytes:
    """libFuzzer's change of all bytes, or of some that are replaced by as many."""
    if draw.random() < 0.25 or len(data) < 2:
        return atheris.Mutate(data, largest)
    at = draw.randrange(1, len(data))
    window = data[at : at + draw.choice([4, 16, 64])]
    changed = atheris.Mutate(window, len(window))[: len(window)].ljust(len(window), b"\0")
    return data[:at] + changed + data[at + len(window) :]


if __name__ == "__main__":
    fuzz(target, mutate, Path(__file__).parent / "seeds" / "block")
