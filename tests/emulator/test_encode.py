"""The CUDA encoder, run on the CPU, against the readable reference: the same bytes."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

import emulator
from attention_cases import Case, values_like
from emulator import COMPILER, Arena, Array, Emulator, address
from kvcomp.codec import codebook
from kvcomp.codec.codebook import Codebook
from kvcomp.codec.quantise import MAX_CODES
from kvcomp.kernels import reference
from kvcomp.kernels.cuda import launch as gpu_launch
from kvcomp.kernels.cuda.layout import EncodeArguments, Encoder, describe_encoder, encoder_words, page_build
from kvcomp.spec import KINDS

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++"), pytest.mark.emulated]

CASES = {
    "the preset": Case(pages=(4,)),
    "fixed width, float32": Case(channels=80, pages=(2,), coding=("fixed", "fixed"), value="float32"),
    "channel and vector": Case(channels=192, pages=(2,), units=("channel", "vector"), classes=(4, 4)),
    "vector and channel, float16": Case(channels=64, pages=(3,), units=("vector", "channel"), value="float16"),
    "token and block": Case(channels=96, pages=(2,), units=("token", "block"), scales=(0.02, 0.3)),
    "steps of heads": Case(channels=64, pages=(3,), units=("head", "head"), classes=(4, 4), scales=(0.02, 0.1)),
    "pieces": Case(pages=(3,), units=("channel", "token"), coding=("patched", "patched"), scales=(0.08, 0.15)),
    "pieces, float16": Case(
        channels=80, pages=(2,), units=("block", "vector"), coding=("patched", "fixed"), value="float16"
    ),
    "pieces, steps of heads": Case(
        channels=256, pages=(2,), units=("head", "head"), coding=("patched", "patched"), scales=(0.01, 0.3)
    ),
    "pieces without bits": Case(
        channels=64,
        pages=(2,),
        units=("head", "head"),
        coding=("huffman", "patched"),
        classes=(4, 4),
        scales=(0.1, 2.0),
    ),
    "steps of heads, fixed, float16": Case(
        channels=64, pages=(2,), units=("head", "head"), coding=("fixed", "fixed"), scales=(0.02, 1.0), value="float16"
    ),
}


def awkward(x: Array, value: str) -> Array:
    """Put in what blocks are raw for, constants, and codes that a book of the first page does not have."""
    x = x.copy()
    last = x.shape[1] - 64
    infinity = {"float32": np.inf, "float16": np.inf, "bfloat16": 0x7F80}[value]
    x[0, last + 5, 3] = infinity
    x[-1, last : last + 64] = x[-1, last, 0]  # a constant block
    x[-1, last + 2] = 0
    if value != "bfloat16":
        x[0, 64:128] *= 3  # wider than the page before
    return x


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_bytes(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    spec, pages, heads, channels = case.spec, case.pages[0], case.heads, case.channels
    chosen = page_build(spec, channels, case.value)
    library = emulator.build("encode", chosen.defines)
    values = [awkward(values_like(rng, heads, 64 * pages, channels, case.value), case.value) for _ in KINDS]
    tensors = spec.key, spec.value
    quantised = [reference.quantise(x, t.unit, t.scale) for x, t in zip(values, tensors, strict=True)]
    kept: list[Any] = []

    def place(x: Array) -> int:
        kept.append(x)
        return address(x)

    counts = [np.zeros((t.classes, MAX_CODES, MAX_CODES), np.uint32) for t in tensors]
    sizes = np.full((pages, 2, heads), 0xFFFFFFFF, np.uint32)
    offsets = np.full(pages + 1, -1, np.int64)
    a = EncodeArguments(
        pages=pages, heads=heads, sizes=place(sizes), offsets=place(offsets), cursor=place(np.zeros(1, np.int64))
    )
    a.modes = place(np.full((pages, 2, heads), 255, np.uint8))
    a.lengths = place(np.full((pages, 2, heads, 64), 0xFFFF, np.uint16))
    for i, (x, tensor) in enumerate(zip(values, tensors, strict=True)):
        t = a.tensors[i]
        arena = Arena(library, x)
        kept.append(arena)
        t.values, t.head, t.token = arena.address, x.strides[0] // x.itemsize, x.strides[1] // x.itemsize
        if isinstance(tensor.scale, tuple):
            t.steps = place(np.array(tensor.scale, np.float32))
        else:
            t.relative_scale = tensor.scale
        t.codes = place(np.full((pages, heads, 64, channels), 255, np.uint8))
        t.scale = place(np.full((pages, heads, chosen.most_units), np.nan, np.float32))
        t.zero = place(np.full((pages, heads, chosen.most_units), -1, np.int32))
        t.raw = place(np.full((pages, heads), 255, np.uint8))
        t.token_range = place(np.full((pages, 64, 2), np.nan, np.float32))
        t.counts = place(counts[i])
    on = Emulator()
    gpu_launch.quantise(on, chosen, a)
    gpu_launch.count_pairs(on, chosen, a)
    books: list[tuple[Codebook | None, Codebook | None]] = []
    for i, (kind, tensor, q) in enumerate(zip(KINDS, tensors, quantised, strict=True)):
        expected = reference.count_pairs(q, kind, tensor.classes)
        if tensor.coding == "huffman":
            np.testing.assert_array_equal(counts[i], expected)
        first = type(q)(q.codes[:1], q.scale[:1], q.zero[:1], q.raw[:1])
        own = codebook.train(reference.count_pairs(first, kind, tensor.classes), tensor.limit)
        default = None if tensor.unit == "head" else codebook.default(tensor.scale, tensor.classes, tensor.limit)
        books.append((default, own) if tensor.coding == "huffman" else (None, None))
        encoders = (Encoder * 2)()
        for which, book in enumerate(books[-1]):
            if book is not None:
                encoders[which] = describe_encoder(book, place(encoder_words(book)))
        kept.append(encoders)
        a.tensors[i].books = ctypes.addressof(encoders)
    gpu_launch.measure(on, chosen, a)
    expected_bytes, expected_offsets = reference.encode_pages(
        *values, *quantised, case.coding, case.units, books[0], books[1]
    )
    np.testing.assert_array_equal(offsets, expected_offsets)
    out = np.full(offsets[-1], 255, np.uint8)
    arena = Arena(library, out)
    a.out = arena.address
    gpu_launch.pack(on, chosen, a)
    ctypes.memmove(address(out), arena.address, out.nbytes)
    np.testing.assert_array_equal(out, expected_bytes[: out.size])
