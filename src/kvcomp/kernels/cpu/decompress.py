# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Pages -> values (docs/format.md, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvcomp.codec.block import MAX_CHANNELS
from kvcomp.codec.dtypes import CHANNEL, FIXED, FLOAT32, HEAD, PATCHED, RAW
from kvcomp.codec.quantise import HEAD_ZERO
from kvcomp.kernels.cpu.bits import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    address_of,
    at,
    compiled,
    copy_bytes,
    emitted,
    floats_at,
    halves_at,
    integers,
    narrow,
    splat,
    vector,
)
from kvcomp.kernels.cpu.decode import (
    CLASSES,
    EMPTY,
    FIRST,
    FORM,
    MOST_CLASSES,
    NARROW,
    NARROW_A,
    NARROW_B,
    PAIR_STEP,
    WIDE,
    K,
    V,
    class_of,
    of_class,
)
from kvcomp.kernels.cpu.fixed import decode_fixed
from kvcomp.kernels.cpu.page import TOKENS, block_at, book_at, fixed_width, prefetch_block, table_places
from kvcomp.kernels.cpu.patched import decode_patched
from kvcomp.kernels.cpu.scratch import lay_out, prepare, run_of_form, take_books, take_pairs, take_scales

f32, i64 = np.float32, np.int64
FLOATS = vector(F32)
TILE = 8


def _transpose_tile(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    """(source, source_step, target, target_step): 8 x 8 words, rows ``step`` bytes apart."""
    source, source_step, target, target_step = args
    rows = [
        builder.load(at(builder, builder.add(source, builder.mul(source_step, I64(i)))), align=2, typ=vector(I16, TILE))
        for i in range(TILE)
    ]
    for stride in (1, 2, 4):  # swap the off-diagonal quarters of ever larger squares
        for i in range(TILE):
            if not i & stride:
                first, second = rows[i], rows[i | stride]
                low = [lane if not lane & stride else TILE + lane - stride for lane in range(TILE)]
                high = [lane + stride if not lane & stride else TILE + lane for lane in range(TILE)]
                rows[i] = builder.shuffle_vector(first, second, integers(I32, low))
                rows[i | stride] = builder.shuffle_vector(first, second, integers(I32, high))
    for i, row in enumerate(rows):
        builder.store(row, at(builder, builder.add(target, builder.mul(target_step, I64(i)))), align=2)


transpose_tile = emitted(types.void, [types.int64] * 4, _transpose_tile)


def _restorer(interleaved: bool, by_channel: bool) -> Any:
    """``restore(pairs, count, scale, zero, out_a, out_b)``: ``count`` pairs to (code + zero) * scale.

    Interleaved: the codes are neighbours, out_a gets both, a before b. Else they go to two rows.
    By channel: scale and zero are arrays along the output. Else the first is for out_a, the second for out_b, or the
    first for both if interleaved.
    """

    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        pairs, count, scale, zero, out_a, out_b = args
        shared = {
            (address, second): splat(builder, builder.load(at(builder, address, 4 * second), align=4, typ=F32))
            for address in (scale, zero)
            for second in range(2)
            if not by_channel
        }
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES // 2), I64) as (i, _):
            # Half a vector at a time, as a row may have eight pairs.
            half = vector(I16, LANES // 2)
            words = builder.load(at(builder, builder.add(pairs, builder.shl(i, I64(1)))), align=2, typ=half)
            words = builder.shuffle_vector(words, words, integers(I32, [lane // 2 for lane in range(LANES)]))
            words = builder.zext(words, vector(I32))  # each pair twice
            amounts = integers(I32, [lane % 2 * 8 for lane in range(LANES)])
            codes = builder.sitofp(builder.and_(builder.lshr(words, amounts), integers(I32, [255] * LANES)), FLOATS)
            if interleaved:
                place = builder.shl(i, I64(3))
                z, s = (
                    builder.load(at(builder, builder.add(x, place)), align=4, typ=FLOATS)
                    if by_channel
                    else shared[x, 0]
                    for x in (zero, scale)
                )
                x = builder.fmul(builder.fadd(codes, z), s)
                builder.store(x, at(builder, builder.add(out_a, place)), align=4)
            else:
                place = builder.shl(i, I64(2))
                for second, out in enumerate((out_a, out_b)):
                    row = builder.shuffle_vector(codes, codes, integers(I32, range(second, LANES, 2)))
                    lanes = vector(F32, LANES // 2)
                    z, s = (
                        builder.load(at(builder, builder.add(x, place)), align=4, typ=lanes)
                        if by_channel
                        else builder.shuffle_vector(
                            shared[x, second], shared[x, second], integers(I32, [0] * (LANES // 2))
                        )
                        for x in (zero, scale)
                    )
                    x = builder.fmul(builder.fadd(row, z), s)
                    builder.store(x, at(builder, builder.add(out, place)), align=4)

    return emitted(types.void, [types.int64] * 6, emit)


_keys_by_channel, _keys_by_token = _restorer(True, True), _restorer(True, False)
_values_by_channel, _values_by_token = _restorer(False, True), _restorer(False, False)


def _widener(form: int) -> Any:
    """``widen(pairs, count, first)``: pairs of a form to ``a : 8 | b : 8``, in place.

    first: uint16 at an address, added to each.
    """

    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        pairs, count, first = args
        half = vector(I16, TILE)

        def constant(x: int) -> ir.Constant:
            return integers(I16, [x] * TILE)

        with cgutils.for_range_slice(builder, I64(0), count, I64(TILE), I64) as (i, _):
            place = builder.shl(i, I64(1))
            words = (
                constant(0)
                if form == EMPTY
                else builder.load(at(builder, builder.add(pairs, place)), align=2, typ=half)
            )
            if form == NARROW:
                a = builder.and_(builder.lshr(words, constant(NARROW_A)), constant(31))
                words = builder.or_(a, builder.shl(builder.lshr(words, constant(NARROW_B)), constant(8)))
            words = builder.add(words, builder.load(at(builder, builder.add(first, place)), align=2, typ=half))
            builder.store(words, at(builder, builder.add(pairs, place)), align=2)

    return emitted(types.void, [types.int64] * 3, emit)


_widen_wide, _widen_narrow, _widen_empty = _widener(WIDE), _widener(NARROW), _widener(EMPTY)


@compiled
def widen(form, pairs, count, first):
    """Widen pairs of a form to codes of eight bits each; all are addresses but form and count."""
    if form == WIDE:
        _widen_wide(pairs, count, first)
    elif form == NARROW:
        _widen_narrow(pairs, count, first)
    else:
        _widen_empty(pairs, count, first)


@compiled
def to_rows(kind, channels, pairs, rows):
    """Bring pairs from the order of their streams to rows, address to address: [channel pair][token] of K, [token
    pair][channel] of V.
    """
    of_j = channels // 8
    for stream in range(8):
        s, j = stream // 4, stream % 4
        if kind == K:
            for t in range(4):
                for row in range(j * of_j, (j + 1) * of_j):
                    copy_bytes(pairs, rows + 2 * (TOKENS * row + TILE * (t + 4 * s)), PAIR_STEP)
                    pairs += PAIR_STEP
        else:
            for tile in range(s * channels // 16, (s + 1) * channels // 16):
                for row in range(j, TOKENS // 2, 4):
                    copy_bytes(pairs, rows + 2 * (channels * row + TILE * tile), PAIR_STEP)
                    pairs += PAIR_STEP


@compiled
def widen_pairs(kind, slot, books, channels, rows, first):
    """Widen rows of pairs of a block to codes of eight bits each, in place.

    books, rows and first are addresses; ``first`` is scratch, uint16 [channels or tokens].
    """
    book = book_at(books, slot)
    if kind == K:
        twice = halves_at(first, TOKENS)
        for index in range(MOST_CLASSES):
            twice[:] = of_class(book, index, FIRST) * 0x0101
            for row in range(channels // 8 * index, channels // 8 * (index + 1)):
                widen(of_class(book, index, FORM), rows + 2 * TOKENS * row, TOKENS, first)
        return
    twice = halves_at(first, channels)
    for c in range(channels):
        twice[c] = of_class(book, class_of(V, channels, book[CLASSES], c), FIRST) * 0x0101
    for index in range(MOST_CLASSES):
        begin, end, form = run_of_form(index, slot, books, channels)
        for i in range(TOKENS // 2):
            widen(form, rows + 2 * (channels * i + begin), end - begin, first + 2 * begin)


@compiled
def restore(kind, rows, by_channel, scale, zero, turned, channels, values):
    """Restore rows of pairs of codes of eight bits each to float32 values [token, channel].

    rows, scale, zero, turned and values are addresses; ``turned`` is scratch for the pairs of K, token by token.
    """
    half, row_bytes = channels // 2, 4 * channels
    if kind == K:
        for i in range(0, half, TILE):
            for t in range(0, TOKENS, TILE):
                transpose_tile(rows + 2 * (TOKENS * i + t), 2 * TOKENS, turned + 2 * (half * t + i), 2 * half)
        for t in range(TOKENS):
            words, out = turned + 2 * half * t, values + row_bytes * t
            if by_channel:
                _keys_by_channel(words, half, scale, zero, out, out)
            else:
                _keys_by_token(words, half, scale + 4 * t, zero + 4 * t, out, out)
        return
    for i in range(TOKENS // 2):
        words, out = rows + 2 * channels * i, values + 2 * row_bytes * i
        if by_channel:
            _values_by_channel(words, channels, scale, zero, out, out + row_bytes)
        else:
            _values_by_token(words, channels, scale + 8 * i, zero + 8 * i, out, out + row_bytes)


@compiled(entry=True)
def decompress_pages(pages, units, books, steps, heads, channels, dtype, out, strides):
    """Decode the pages at these addresses to K and V at the two addresses ``out``, (heads, 64*pages, channels of each).

    units, channels: int64 (2,). books: int64 (4,), as ``book_addresses`` gives them. steps: float32 (2, heads), for
    the unit ``head``. dtype: its number. strides: int64 (2, 3), those of K and V in bytes.
    """
    size = 4 if dtype == FLOAT32 else 2
    table_bytes = table_places(address_of(books), np.empty((4, MOST_CLASSES), i64))
    memory = np.empty(lay_out(i64(0), 1, channels[0], channels[1], table_bytes).end + 64, np.uint8)
    s = lay_out(address_of(memory), 1, channels[0], channels[1], table_bytes)
    prepare(s)
    take_books(address_of(books), s)
    first = np.empty(MAX_CHANNELS, np.uint16)
    pair_rows = np.empty(TOKENS * max(channels[0], channels[1]) // 2, np.uint16)
    of_pairs = address_of(pair_rows)
    for index in range(pages.size):
        page = pages[index]
        for number in range(2 * heads):
            kind, head = number // heads, number % heads
            width = channels[kind]
            rows = out[kind] + head * strides[kind, 0] + index * TOKENS * strides[kind, 1]
            if number + 1 < 2 * heads:
                prefetch_block(page, number + 1)
            block, mode = block_at(page, number)
            if mode == RAW:
                for t in range(TOKENS):
                    copy_bytes(block + t * width * size, rows + t * strides[kind, 1], width * size)
                continue
            codes = take_scales(page, block, mode, kind, head, heads, units[0], units[1], address_of(steps), s)
            if mode == PATCHED:
                decode_patched(codes, kind, width, s.values, of_pairs)
                zeros = floats_at(s.zero, max(width, TOKENS))
                zeros += f32(HEAD_ZERO)
            elif mode >= FIXED:
                decode_fixed(codes, width, fixed_width(mode), s.values, s.pairs)
                to_rows(kind, width, s.pairs, of_pairs)
            else:
                slot = take_pairs(codes, mode, kind, units[kind], address_of(books), s)
                to_rows(kind, width, s.pairs, of_pairs)
                widen_pairs(kind, slot, address_of(books), width, of_pairs, address_of(first))
                if units[kind] == HEAD:
                    floats_at(s.zero, TOKENS)[:] = f32(HEAD_ZERO)
            restore(kind, of_pairs, units[kind] == CHANNEL, s.scale, s.zero, s.pairs, width, s.values)
            for t in range(TOKENS):
                narrow(dtype, s.values + 4 * t * width, rows + t * strides[kind, 1], width)
    return memory.size + pair_rows.size  # mentioned here, so that Numba keeps them until here
