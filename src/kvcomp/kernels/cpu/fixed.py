# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Blocks of a fixed width: bit fields -> floats -> products, all in the order in which the words lie.

The words of one row and half of a block (docs/format.md, section 4) hold 32 codes at the same bits, one of each stream:
lanes [g : 8][j : 4]. Of K, g is a token and j a quarter of the channels. Of V, g is a channel and j one of four tokens.
A *run* of positions stays with eight tokens of K (D/4 positions) or eight channels of V (16 positions), so products
are sums of whole registers, and only a run's total is summed over j. Addresses are int64, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import chain
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvcomp.codec.block import STREAMS
from kvcomp.kernels.cpu.bits import (
    F32,
    FAST,
    I16,
    I32,
    I64,
    LANES,
    OF_VECTOR,
    at,
    compiled,
    emitted,
    floats_at,
    integers,
    integers_at,
    sum_of_lanes,
    vector,
)
from kvcomp.kernels.cpu.decode import V, stream_offset
from kvcomp.spec import PAGE_TOKENS as TOKENS

HALF = STREAMS // 2  # streams of a half, which a row of codes is of
GROUPS, PARTS = 8, 4  # values of g and j
PIECE = 16  # positions that are unpacked together: those of a run of V
ROW_WORDS, ROW_FLOATS = 4 * STREAMS, 4 * HALF  # bytes of a row of words, and of a row of unpacked codes
FLOATS = vector(F32)
FEW = 3  # queries whose sums 16 registers hold beside codes and factors
f32 = np.float32


def _unpack(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    """``unpack_piece(words, width, late, out)``: the codes at 16 positions, as float32 [position][lane].

    words: the first row that has any of them. late: whether they begin in the middle of its words.
    """
    words, width, late, out = args
    _of_widths(builder, width, late, lambda bits, first: _unpack_width(builder, bits, first, words, out))


def _of_widths(builder: ir.IRBuilder, width: ir.Value, late: ir.Value, emit: Callable[[int, int], None]) -> None:
    """What ``emit(bits, first bit)`` writes for the width that is there."""
    done, nothing = builder.append_basic_block("done"), builder.append_basic_block("nothing")
    chosen = builder.switch(builder.add(builder.shl(width, I64(1)), late), nothing)
    for bits in range(1, 9):
        for is_late in range(1 + bits % 2):
            case = builder.append_basic_block(f"width_{bits}_{is_late}")
            chosen.add_case(I64(2 * bits + is_late), case)
            builder.position_at_end(case)
            emit(bits, PIECE * is_late)
            builder.branch(done)
    builder.position_at_end(nothing)
    builder.branch(done)
    builder.position_at_end(done)


def _rows_of(builder: ir.IRBuilder, words: ir.Value, bits: int, first: int) -> list[ir.Value]:
    """The rows of words that have 16 codes of one width from a bit of the first row on."""
    count = (first + PIECE * bits + 31) // 32
    return [builder.load(at(builder, words, ROW_WORDS * i), align=4, typ=vector(I32)) for i in range(count)]


def _unpack_width(builder: ir.IRBuilder, bits: int, first: int, words: ir.Value, out: ir.Value) -> None:
    """The codes of one width from a bit of the first row on."""
    with cgutils.for_range_slice(builder, I64(0), I64(ROW_FLOATS), I64(4 * LANES), I64) as (lanes, _):
        rows, column = _rows_of(builder, builder.add(words, lanes), bits, first), builder.add(out, lanes)
        for position, code in enumerate(codes_of(builder, rows, first, bits)):
            builder.store(code, at(builder, column, ROW_FLOATS * position), align=4)


def codes_of(builder: ir.IRBuilder, rows: Sequence[ir.Value], first: int, bits: int) -> Iterator[ir.Value]:
    """The codes at 16 positions as floats, from rows of words that have them from bit ``first`` of the first row on."""
    for position in range(PIECE):
        index, begin = divmod(first + position * bits, 32)
        code = builder.lshr(rows[index], integers(I32, [begin] * LANES)) if begin else rows[index]
        if begin + bits > 32:
            code = builder.or_(code, builder.shl(rows[index + 1], integers(I32, [32 - begin] * LANES)))
        if begin + bits != 32:
            code = builder.and_(code, integers(I32, [(1 << bits) - 1] * LANES))
        yield builder.sitofp(code, FLOATS)


unpack_piece = emitted(types.void, [types.int64] * 4, _unpack)


@compiled
def unpack(words, width, first, last, out):
    """Unpack codes of the streams of one half to float32 [position][lane]; both positions are multiples of 16."""
    for position in range(first, last, PIECE):
        bit = position * width
        unpack_piece(words + ROW_WORDS * (bit >> 5), width, (bit & 31) >> 4, out + ROW_FLOATS * (position - first))


def _run(queries: int) -> Any:
    """``run(codes, positions, factors, factor_bytes, out, out_bytes)``: one run for so many queries.

    out[query, g] += sum over positions r and parts j of factors[query, r, j] * codes[r, g, j]

    A sum takes two vectors, and there are several of each where registers allow: an addition waits for the one before.
    Two queries are as many as 16 registers hold. Four on AVX-512 save loads and no time.
    """
    copies = max(1, 8 // (2 * queries * OF_VECTOR))

    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        codes, positions, factors, factor_bytes, out, out_bytes = args
        nothing = ir.Constant(FLOATS, [0.0] * LANES)
        sums = {
            (query, half, copy): cgutils.alloca_once_value(builder, nothing)
            for query in range(queries)
            for half in range(2)
            for copy in range(copies)
        }
        with cgutils.for_range_slice(builder, I64(0), positions, I64(4), I64) as (first, _):
            row = builder.add(codes, builder.mul(first, I64(ROW_FLOATS)))
            of_row = builder.add(factors, builder.mul(first, I64(4 * PARTS)))
            for i in range(4):
                values = [
                    builder.load(at(builder, row, ROW_FLOATS * i + 4 * LANES * half), align=4, typ=FLOATS)
                    for half in range(2)
                ]
                for query in range(queries):
                    repeated = _factors_at(builder, builder.add(of_row, builder.mul(factor_bytes, I64(query))), i)
                    for half in range(2):
                        place = sums[query, half, i % copies]
                        product = builder.fmul(values[half], repeated, flags=("contract",))
                        so_far = builder.load(place, typ=FLOATS)
                        builder.store(builder.fadd(so_far, product, flags=("contract",)), place)
        for query in range(queries):
            halves = []
            for half in range(2):
                total = builder.load(sums[query, half, 0], typ=FLOATS)
                for copy in range(1, copies):
                    total = builder.fadd(total, builder.load(sums[query, half, copy], typ=FLOATS))
                halves.append(total)
            _add_parts(builder, halves, builder.add(out, builder.mul(out_bytes, I64(query))))

    return emitted(types.void, [types.int64] * 6, emit)


def _factors_at(builder: ir.IRBuilder, factors: ir.Value, position: int) -> ir.Value:
    """The factors of a position, [j : 4], again and again."""
    parts = builder.load(at(builder, factors, 4 * PARTS * position), align=4, typ=vector(F32, PARTS))
    return builder.shuffle_vector(parts, parts, integers(I32, [*range(PARTS)] * (LANES // PARTS)))


def _add_parts(builder: ir.IRBuilder, halves: Sequence[ir.Value], out: ir.Value) -> None:
    """out[g] += sum over j of [g : 8][j : 4] in two vectors; four lanes stay together until the end: that is cheap."""

    def neighbours(x: ir.Value, y: ir.Value, lanes: int) -> ir.Value:
        """In each four lanes two sums of neighbours of x, then two of y."""
        of = [
            [base + odd + shift for base in range(0, lanes, 4) for shift in (0, 2, lanes, lanes + 2)] for odd in (0, 1)
        ]
        return builder.fadd(*(builder.shuffle_vector(x, y, integers(I32, chosen)) for chosen in of))

    first, second = halves
    pairs = neighbours(first, second, LANES)
    low, high = (builder.shuffle_vector(pairs, pairs, integers(I32, range(begin, begin + 8))) for begin in (0, 8))
    sums = neighbours(low, high, 8)  # of g = 0, 4, 2, 6, 1, 5, 3, 7
    place = at(builder, out)
    so_far = builder.load(place, align=4, typ=vector(F32, GROUPS))
    total = builder.shuffle_vector(sums, sums, integers(I32, [0, 4, 2, 6, 1, 5, 3, 7]))
    builder.store(builder.fadd(so_far, total), place, align=4)


_run_2, _run_1 = _run(2), _run(1)


@compiled
def multiply_run(codes, positions, factors, factor_bytes, queries, out, out_bytes):
    """``_run`` for any number of queries."""
    for query in range(0, queries - 1, 2):
        of, to = factors + query * factor_bytes, out + query * out_bytes
        _run_2(codes, positions, of, factor_bytes, to, out_bytes)
    if queries & 1:
        of, to = factors + (queries - 1) * factor_bytes, out + (queries - 1) * out_bytes
        _run_1(codes, positions, of, factor_bytes, to, out_bytes)


def _multiply_piece(queries: int) -> Any:
    """``multiply_piece(words, width, late, factors, factor_bytes, sums)``: 16 positions, whose codes stay in registers.

    sums[query, g, j] += sum over positions r of factors[query, r, j] * codes[r, g, j]; the first three arguments are
    those of ``unpack_piece``. Where a register holds 16 floats, both halves of a row take part at once, so factors are
    read once for them. An addition waits for the one before, so few queries have several sums.
    """
    halves = 2 if OF_VECTOR == 1 else 1
    copies = max(1, 4 // (halves * queries))

    def of_width(bits: int, first: int, args: Sequence[ir.Value], builder: ir.IRBuilder) -> None:
        words, _, _, factors, factor_bytes, sums = args
        nothing = ir.Constant(FLOATS, [0.0] * LANES)
        of_query = [builder.add(factors, builder.mul(factor_bytes, I64(query))) for query in range(queries)]
        with cgutils.for_range_slice(builder, I64(0), I64(ROW_FLOATS), I64(4 * LANES * halves), I64) as (lanes, _):
            offsets = [builder.add(lanes, I64(4 * LANES * half)) for half in range(halves)]
            places = [
                [at(builder, builder.add(sums, offset), ROW_FLOATS * query) for offset in offsets]
                for query in range(queries)
            ]
            totals = [
                [[builder.load(place, align=4, typ=FLOATS), *[nothing] * (copies - 1)] for place in of_halves]
                for of_halves in places
            ]
            rows = [_rows_of(builder, builder.add(words, offset), bits, first) for offset in offsets]
            codes = zip(*(codes_of(builder, of_half, first, bits) for of_half in rows), strict=True)
            for position, of_halves in enumerate(codes):
                for query in range(queries):
                    repeated = _factors_at(builder, of_query[query], position)
                    for total, code in zip(totals[query], of_halves, strict=True):
                        product = builder.fmul(code, repeated, flags=("contract",))
                        copy = position % copies
                        total[copy] = builder.fadd(total[copy], product, flags=("contract",))
            for place, total in zip(chain(*places), chain(*totals), strict=True):
                builder.store(reduce(builder.fadd, total), place, align=4)

    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        _of_widths(builder, args[1], args[2], lambda bits, first: of_width(bits, first, args, builder))

    return emitted(types.void, [types.int64] * 6, emit)


_piece_4, _piece_3, _piece_2, _piece_1 = (_multiply_piece(queries) for queries in (4, 3, 2, 1))


@compiled
def multiply_piece(words, width, late, factors, factor_bytes, queries, sums):
    """``_multiply_piece`` for up to four queries."""
    if queries == 4:
        _piece_4(words, width, late, factors, factor_bytes, sums)
    elif queries == 3:
        _piece_3(words, width, late, factors, factor_bytes, sums)
    elif queries == 2:
        _piece_2(words, width, late, factors, factor_bytes, sums)
    else:
        _piece_1(words, width, late, factors, factor_bytes, sums)


def _end_run(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    """``end_run(sums, out)``: out[g] += sum over j of sums[g, j], and sums of nothing."""
    sums, out = args
    places = [at(builder, sums, 4 * LANES * half) for half in range(2)]
    _add_parts(builder, [builder.load(place, align=4, typ=FLOATS) for place in places], out)
    for place in places:
        builder.store(ir.Constant(FLOATS, [0.0] * LANES), place, align=4)


end_run = emitted(types.void, [types.int64] * 2, _end_run)


@compiled
def multiply_pieces(codes, channels, width, run, factors, factor_bytes, queries, sums, out, out_bytes):
    """``multiply`` for up to four queries and runs of whole pieces. sums: scratch, float32 [queries, 32]."""
    floats_at(sums, queries * HALF)[:] = f32(0)
    for s in range(2):
        for first in range(0, channels, run):
            for position in range(first, first + run, PIECE):
                bit, of = position * width, factors + 4 * PARTS * (position - first)
                words = codes + 4 * HALF * s + ROW_WORDS * (bit >> 5)
                multiply_piece(words, width, (bit & 31) >> 4, of, factor_bytes, queries, sums)
            place = out + 4 * GROUPS * ((s * channels + first) // run)
            for query in range(queries):
                end_run(sums + ROW_FLOATS * query, place + query * out_bytes)


@compiled
def multiply(codes, kind, channels, width, factors, factor_bytes, queries, unpacked, out, out_bytes):
    """Add products of a block's codes to ``out``: float32 [query, token] for K, [query, channel] for V.

    factors: float32 [query, position of a run, j], as ``turn`` and ``turn_weights`` give them.
    unpacked: scratch, float32 [channels, 32].
    """
    run = PIECE if kind == V else channels // PARTS
    if run % PIECE == 0 and (OF_VECTOR == 1 or queries <= FEW):
        for query in range(0, queries, 4):
            of, to, some = factors + query * factor_bytes, out + query * out_bytes, min(4, queries - query)
            multiply_pieces(codes, channels, width, run, of, factor_bytes, some, unpacked, to, out_bytes)
        return
    for s in range(2):
        unpack(codes + 4 * HALF * s, width, 0, channels, unpacked)
        for first in range(0, channels, run):
            place = out + 4 * GROUPS * ((s * channels + first) // run)
            multiply_run(unpacked + ROW_FLOATS * first, run, factors, factor_bytes, queries, place, out_bytes)


def _turn(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    source, quarter, out = args
    step = builder.shl(quarter, I64(2))
    with cgutils.for_range_slice(builder, I64(0), step, I64(4 * PARTS), I64) as (first, _):
        places = [builder.add(source, builder.add(first, builder.mul(step, I64(j)))) for j in range(PARTS)]
        rows = [builder.load(at(builder, place), align=4, typ=vector(F32, PARTS)) for place in places]
        low, high = (builder.shuffle_vector(*rows[j : j + 2], integers(I32, range(8))) for j in (0, 2))
        order = [PARTS * j + channel for channel in range(PARTS) for j in range(PARTS)]
        place = at(builder, builder.add(out, builder.shl(first, I64(2))))
        builder.store(builder.shuffle_vector(low, high, integers(I32, order)), place, align=4)


turn = emitted(types.void, [types.int64] * 3, _turn)  # [quarter][channel of it], floats, to the order of K's factors


@compiled(fastmath=FAST)
def scale_keys(q, scale, zero, channels, out):
    """x = q * scale, all in the order of the factors. Returns the sum of x * zero."""
    source, scales, zeros = floats_at(q, channels), floats_at(scale, channels), floats_at(zero, channels)
    scaled, total = floats_at(out, channels), f32(0)
    for c in range(channels):
        scaled[c] = source[c] * scales[c]
        total += scaled[c] * zeros[c]
    return total


def _turn_weights(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
    weights, scale, zero, out = args
    total: ir.Value = ir.Constant(FLOATS, [0.0] * LANES)
    order = [8 * block + 2 * j + odd for block in range(LANES // 8) for odd in range(2) for j in range(PARTS)]
    for offset in range(0, 4 * TOKENS, 4 * LANES):
        x, s, z = (builder.load(at(builder, place, offset), align=4, typ=FLOATS) for place in (weights, scale, zero))
        x = builder.fmul(x, s)
        total = builder.fadd(total, builder.fmul(x, z, flags=("contract",)), flags=("contract",))
        builder.store(builder.shuffle_vector(x, x, integers(I32, order)), at(builder, out, offset), align=4)
    return sum_of_lanes(builder, total)


# turn_weights(weights, scale, zero, out): x = weights * scale, of 64 tokens, as the factors of V's runs,
# [position][one of four tokens]. Returns the sum of x * zero.
turn_weights = emitted(types.float32, [types.int64] * 4, _turn_weights)


def _pair(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    unpacked, out, step = args
    a, b = (
        [
            builder.trunc(
                builder.fptosi(
                    builder.load(at(builder, unpacked, ROW_FLOATS * second + 4 * LANES * half), align=4, typ=FLOATS),
                    vector(I32),
                ),
                vector(I16),
            )
            for half in range(2)
        ]
        for second in range(2)
    )
    pairs = [builder.or_(x, builder.shl(y, integers(I16, [8] * LANES))) for x, y in zip(a, b, strict=True)]
    for j in range(PARTS):
        streams = integers(I32, [PARTS * g + j for g in range(GROUPS)])
        run = builder.shuffle_vector(*pairs, streams)
        builder.store(run, at(builder, builder.add(out, builder.mul(step, I64(j)))), align=2)


pair_up = emitted(types.void, [types.int64] * 3, _pair)


@compiled
def decode_fixed(codes, kind, channels, width, offsets, unpacked, out):
    """Decode codes of a fixed width to wide pairs, address to address; ``unpacked`` is scratch as in ``multiply``."""
    step, place_of = stream_offset(kind, channels, 0, 1), integers_at(offsets, channels // 2)
    for s in range(2):
        unpack(codes + 4 * HALF * s, width, 0, channels, unpacked)
        for pair in range(channels // 2):
            target = out + stream_offset(kind, channels, s, 0) + place_of[pair]
            pair_up(unpacked + 2 * ROW_FLOATS * pair, target, step)
