# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Memory that a reader of pages works in, and blocks decoded into it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcomp.codec.block import MAX_CHANNELS, STREAMS
from kvcomp.codec.dtypes import FIXED, HEAD, TOKEN
from kvcomp.codec.quantise import HEAD_ZERO
from kvcomp.kernels.cpu.bits import compiled, fill, floats_at, integers_at, load_f32
from kvcomp.kernels.cpu.decode import CLASSES, FIRST, FORM, MOST_CLASSES, K, V, class_of, of_class
from kvcomp.kernels.cpu.page import (
    TOKENS,
    book_at,
    decode_words,
    fixed_width,
    load_scales,
    table_places,
    token_scales_at,
)

SLOTS = 4

f32, i64 = np.float32, np.int64


class Scratch(NamedTuple):
    """What a task runner works in, by address; float32 where nothing is said.

    It holds addresses, as passing arrays on counts references. A *slot* is one of a row's four books.
    """

    queries: int
    key_channels: int
    value_channels: int
    padded: int  # floats of a row of q: at least the channels of K and of V and the tokens, a multiple of 32
    q: int  # [queries, padded], scaled
    factors: int  # int16 [queries, padded]: those of a block (``factors``)
    steps: int  # [queries]: of the factors
    of_zero: int  # [queries]: sums of factors times zeros
    of_first: int  # and times first codes
    score: int  # [queries, tokens], then weights
    part: int  # [queries, channels of V], or those of K
    rest: int  # [queries]: what every channel of the output gets
    seen: int  # int64 [queries]: a query sees the tokens of the block before this one
    hidden: int  # int64 [queries]: and not those before this one
    scale: int  # [units of a block]
    zero: int
    ones: int
    first: int  # [slots, channels]: the first code of the class of each channel, plus a zero that is always the same
    form: int  # int64 [slots]: whether it is there, and (2) whether any ``first`` is not 0
    values: int  # [tokens, channels]: raw values, or int16 [channels, half the streams]: codes of fixed width
    pairs: int  # uint16 [tokens * channels / 2]: decoded codes
    low: int  # uint16 [tokens * channels / 2]: their low bits, where these are apart
    streams: int  # int64 [streams]
    begin: int  # int64 [books, classes]: where the tables lie
    built: int  # int64 [books]
    tables: int
    end: int


@compiled
def lay_out(base, queries, key_channels, value_channels, table_bytes):
    """Lay scratch out from an address on."""
    channels = max(key_channels, value_channels)
    padded = max((channels + 31) & ~31, TOKENS)
    line = 64
    q = (base + line - 1) & ~i64(line - 1)
    factors = q + 4 * queries * padded
    steps = factors + 2 * queries * padded
    of_zero = steps + 4 * ((queries + 15) & ~15)
    of_first = of_zero + 4 * ((queries + 15) & ~15)
    score = of_first + 4 * ((queries + 15) & ~15)
    part = score + 4 * queries * TOKENS
    rest = part + 4 * queries * padded
    seen = rest + 4 * ((queries + 15) & ~15)
    hidden = seen + 8 * ((queries + 7) & ~7)
    scale = hidden + 8 * ((queries + 7) & ~7)
    zero = scale + 4 * MAX_CHANNELS
    ones = zero + 4 * MAX_CHANNELS
    first = ones + 4 * MAX_CHANNELS
    form = first + 4 * SLOTS * MAX_CHANNELS
    values = form + line
    pairs = values + 4 * TOKENS * channels
    low = pairs + TOKENS * channels
    streams = low + TOKENS * channels
    begin = streams + 8 * STREAMS
    built = begin + 2 * line
    tables = built + line
    end = tables + table_bytes
    return Scratch(
        queries, key_channels, value_channels, padded, q, factors, steps, of_zero, of_first, score, part, rest, seen,
        hidden, scale, zero, ones, first, form, values, pairs, low, streams, begin, built, tables, end,
    )  # fmt: skip


@compiled
def prepare(s):
    """Fill what does not change."""
    floats_at(s.q, (s.queries, s.padded))[:] = f32(0)
    floats_at(s.ones, MAX_CHANNELS)[:] = f32(1)
    floats_at(s.scale, MAX_CHANNELS)[:] = f32(1)
    floats_at(s.zero, MAX_CHANNELS)[:] = f32(0)


@compiled
def channels_of(kind, s):
    """Channels of K or of V."""
    return s.value_channels if kind == V else s.key_channels


@compiled
def take_books(books, s):
    """Make room for the tables of a row's books, which lie at an address. The tables are built when first needed."""
    begin = integers_at(s.begin, (4, MOST_CLASSES))
    table_places(books, begin)
    for slot in range(4):
        for index in range(MOST_CLASSES):
            begin[slot, index] += s.tables
    integers_at(s.built, 4)[:] = 0
    integers_at(s.form, SLOTS)[:] = 0


@compiled
def set_form(kind, value_unit, slot, books, s):
    """Fill ``first`` of a slot.

    For the unit ``head``, whose zero is always the same, ``first`` takes in the zero.
    """
    form = integers_at(s.form, SLOTS)
    if form[slot]:
        return
    form[slot] = 1
    channels = channels_of(kind, s)
    first = floats_at(s.first, (SLOTS, MAX_CHANNELS))[slot]
    book = book_at(books, slot)
    for c in range(MAX_CHANNELS):
        index = class_of(kind, channels, book[CLASSES], min(c, channels - 1))
        lowest = of_class(book, index, FIRST)
        if value_unit == HEAD:
            lowest += HEAD_ZERO
        first[c] = f32(lowest)
        if lowest:
            form[slot] = 2


@compiled
def run_of_form(index, slot, books, count):
    """Find the channels, or other parts of a block, of the classes from one on that have pairs of the same form.

    Returns (begin, end, form) among ``count`` of them; none for a class that the run from an earlier one takes in.
    """
    book = book_at(books, slot)
    form = of_class(book, index, FORM)
    if index and of_class(book, index - 1, FORM) == form:
        return i64(0), i64(0), form
    end = index + 1
    while end < MOST_CLASSES and of_class(book, end, FORM) == form:
        end += 1
    return count * index // 4, count * end // 4, form


@compiled
def take_scales(page, block, mode, kind, head, heads, k_unit, v_unit, steps, s):
    """Load the scales of a coded block, and the zeros that are not in ``first``. Returns the address of its codes.

    ``steps`` is the address of float32 [K or V, heads].
    """
    unit, channels = k_unit if kind == K else v_unit, channels_of(kind, s)
    if unit == TOKEN:
        load_scales(token_scales_at(page, heads, k_unit, kind), TOKEN, channels, s.scale, s.zero)
        return block
    if unit == HEAD:
        zero = 0 if mode < FIXED else -(1 << (fixed_width(mode) - 1))
        fill(s.scale, load_f32(steps + 4 * (kind * heads + head)), TOKENS)
        fill(s.zero, f32(zero), TOKENS)
        return block
    return block + load_scales(block, unit, channels, s.scale, s.zero)


@compiled
def take_pairs(codes, mode, kind, unit, books, s):
    """Decode a Huffman block to pairs in scratch. Returns the slot of its book."""
    slot = decode_words(codes, mode, kind, channels_of(kind, s), books, s.begin, s.built, s.streams, s.pairs, s.low)
    set_form(kind, unit, slot, books, s)
    return slot
