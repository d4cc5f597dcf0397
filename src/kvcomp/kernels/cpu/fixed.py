# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Blocks of a fixed width: bit fields -> pairs of codes -> products in integers, in the order in which the words lie.

The words of one row and half of a block (docs/format.md, section 4) hold 32 codes at the same bits, one of each stream:
lanes [g : 8][j : 4]. Of K, g is a token and j a quarter of the channels. Of V, g is a channel and j one of four tokens.
A *run* of positions stays with eight tokens of K (D/4 positions) or eight channels of V (16 positions), so products
are sums of whole registers, and only a run's total is summed over j.

Factors are integers of 16 bits (``factors``), so one instruction multiplies and adds two positions of a lane, and sums
are exact. Addresses are int64, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvcomp.codec.block import STREAMS
from kvcomp.kernels.cpu.bits import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    OF_VECTOR,
    alone,
    at,
    compiled,
    emitted,
    integers,
    products_of_pairs,
    splat,
    vector,
)
from kvcomp.kernels.cpu.decode import PAIR_STEP, V

HALF = STREAMS // 2  # streams of a half, which a row of codes is of
GROUPS, PARTS = 8, 4  # values of g and j
PIECE = 16  # positions that are unpacked together: those of a run of V
WORD_ROW = 4 * STREAMS  # bytes from one row of words of a half to the next
ROW = 4 * HALF  # bytes of a row of pairs: codes of two positions, 16 bits each
OF_PAIR = 4 * PARTS  # bytes of a pair's factors
TOGETHER = 4 // OF_VECTOR  # queries whose sums are in registers
FLOATS, WORDS, SHORTS = vector(F32), vector(I32), vector(I16, 2 * LANES)
i64 = np.int64


def pairs_of(builder: ir.IRBuilder, rows: Sequence[ir.Value], first: int, bits: int) -> Iterator[ir.Value]:
    """The codes of 16 positions in pairs, from rows of words that have them from bit ``first`` of the first row on."""
    for pair in range(PIECE // 2):
        index, begin = divmod(first + 2 * pair * bits, 32)
        both = builder.lshr(rows[index], _repeated(begin)) if begin else rows[index]
        if begin + 2 * bits > 32:
            both = builder.or_(both, builder.shl(rows[index + 1], _repeated(32 - begin)))
        mask = (1 << bits) - 1
        second = builder.and_(builder.shl(both, _repeated(16 - bits)), _repeated(mask << 16))
        yield builder.or_(builder.and_(both, _repeated(mask)), second)


def _repeated(value: int) -> ir.Constant:
    return integers(I32, [value] * LANES)


def rows_of(builder: ir.IRBuilder, words: ir.Value, first: int, bits: int) -> list[ir.Value]:
    """The rows of words that have 16 codes of one width from a bit of the first row on."""
    count = (first + PIECE * bits + 31) // 32
    return [builder.load(at(builder, words, WORD_ROW * i), align=4, typ=WORDS) for i in range(count)]


def each_case(builder: ir.IRBuilder, value: ir.Value, cases: Iterable[int], emit: Callable[[int], None]) -> None:
    """What ``emit(case)`` writes for the case that is there; nothing for any other."""
    done = builder.append_basic_block("done")
    chosen = builder.switch(value, done)
    for case in cases:
        block = builder.append_basic_block(f"case_{case}")
        chosen.add_case(I64(case), block)
        builder.position_at_end(block)
        emit(case)
        builder.branch(done)
    builder.position_at_end(done)


def each_piece(
    builder: ir.IRBuilder, words: ir.Value, bit: ir.Value, positions: ir.Value, bits: int, emit: Callable[..., None]
) -> None:
    """``emit(words, first bit, position)`` for each 16 positions of one width from a bit of the stream on.

    Of an odd width, every second piece begins in the middle of its words.
    """
    with cgutils.for_range_slice(builder, I64(0), positions, I64(PIECE), I64) as (position, _):
        begin = builder.add(bit, builder.mul(position, I64(bits)))
        row = builder.add(words, builder.mul(builder.lshr(begin, I64(5)), I64(WORD_ROW)))
        if bits % 2:
            late = builder.trunc(builder.lshr(begin, I64(4)), ir.IntType(1))
            with builder.if_else(late) as (if_late, if_not):
                with if_late:
                    emit(row, PIECE, position)
                with if_not:
                    emit(row, 0, position)
        else:
            emit(row, 0, position)


def _unpack(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    words, width, positions, out = args

    def of_piece(bits: int, row: ir.Value, first: int, position: ir.Value) -> None:
        to = builder.add(out, builder.mul(position, I64(ROW // 2)))
        for half in range(2):
            rows = rows_of(builder, builder.add(row, I64(4 * LANES * half)), first, bits)
            for pair, codes in enumerate(pairs_of(builder, rows, first, bits)):
                builder.store(codes, at(builder, to, ROW * pair + 4 * LANES * half), align=4)

    def of_width(bits: int) -> None:
        each_piece(builder, words, I64(0), positions, bits, partial(of_piece, bits))

    each_case(builder, width, range(1, 9), of_width)


# unpack(words, width, positions, out): codes of the streams of one half to int16 [pair of positions][lane][2].
unpack = emitted(types.void, [types.int64] * 4, _unpack)

Sums = list[list[ir.Value]]


def _sums(builder: ir.IRBuilder, queries: int) -> Sums:
    """Places for a run's sums of both halves of a row."""
    return [[cgutils.alloca_once(builder, WORDS) for _ in range(2)] for _ in range(queries)]


def _clear(builder: ir.IRBuilder, sums: Sums) -> None:
    for place in chain(*sums):
        builder.store(_repeated(0), place)


def _take(builder: ir.IRBuilder, sums: Sums, halves: Sequence[ir.Value], factors: Sequence[ir.Value]) -> None:
    """Add the products of a pair of positions, whose factors lie at an address for each query."""
    for of_query, address in zip(sums, factors, strict=True):
        parts = builder.load(at(builder, address), align=4, typ=vector(I32, PARTS))
        repeated = builder.shuffle_vector(parts, parts, integers(I32, [*range(PARTS)] * (LANES // PARTS)))
        for place, codes in zip(of_query, halves, strict=True):
            both = products_of_pairs(builder, codes, repeated)
            builder.store(builder.add(builder.load(place, typ=WORDS), both), place)


def _give(builder: ir.IRBuilder, sums: Sums, steps: ir.Value, out: ir.Value, out_bytes: ir.Value) -> None:
    """out[query, g] += step[query] * sum over j of the sums [g : 8][j : 4], of two queries at once."""
    halves = [[builder.sitofp(builder.load(place, typ=WORDS), FLOATS) for place in of_query] for of_query in sums]
    of_halves = [_neighbours(builder, *of_query) for of_query in halves]
    for first in range(0, len(sums), 2):
        two = of_halves[first : first + 2]
        totals = _neighbours(builder, two[0], two[-1])
        for number in range(len(two)):
            order = integers(I32, [4 * (g % 4) + 2 * number + g // 4 for g in range(GROUPS)])
            total = builder.shuffle_vector(totals, totals, order)
            step = splat(builder, builder.load(at(builder, steps, 4 * (first + number)), typ=F32), GROUPS)
            place = at(builder, builder.add(out, builder.mul(out_bytes, I64(first + number))))
            product = builder.fmul(total, step, flags=("contract",))
            so_far = builder.load(place, align=4, typ=vector(F32, GROUPS))
            builder.store(builder.fadd(so_far, product, flags=("contract",)), place, align=4)


def _neighbours(builder: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """In each four lanes two sums of neighbours of x, then two of y: registers need not be crossed for it."""
    of = [[base + odd + side for base in range(0, LANES, 4) for side in (0, 2, LANES, LANES + 2)] for odd in (0, 1)]
    return builder.fadd(*(builder.shuffle_vector(x, y, integers(I32, chosen)) for chosen in of))


def by_queries(
    name: str,
    arguments: int,
    emit: Callable[[int, Any, ir.IRBuilder, Sequence[ir.Value]], None],
    most: int = TOGETHER,
) -> Any:
    """A function of so many integers and the number of queries; a body for each number up to ``most``."""

    def call(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        *of_all, queries = args

        def of_count(count: int) -> None:
            alone(f"{name}_{count}", partial(emit, count))(context, builder, of_all)

        each_case(builder, queries, range(1, most + 1), of_count)

    return emitted(types.void, [types.int64] * (arguments + 1), call)


def _words(queries: int, context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    codes, width, run, runs, factors, factor_bytes, steps, out, out_bytes = args
    sums = _sums(builder, queries)
    of_query = [builder.add(factors, builder.mul(factor_bytes, I64(query))) for query in range(queries)]

    def of_piece(bits: int, row: ir.Value, first: int, position: ir.Value) -> None:
        rows = [rows_of(builder, builder.add(row, I64(4 * LANES * half)), first, bits) for half in range(2)]
        halves = zip(*(pairs_of(builder, of_half, first, bits) for of_half in rows), strict=True)
        offset = builder.mul(position, I64(OF_PAIR // 2))
        places = [builder.add(of, offset) for of in of_query]
        for pair, both in enumerate(halves):
            _take(builder, sums, both, [builder.add(place, I64(OF_PAIR * pair)) for place in places])

    def of_width(bits: int) -> None:
        with cgutils.for_range(builder, I64(2), intp=I64) as s, cgutils.for_range(builder, runs, intp=I64) as each:
            words = builder.add(codes, builder.mul(s.index, I64(4 * HALF)))
            bit = builder.mul(builder.mul(each.index, run), I64(bits))
            _clear(builder, sums)
            each_piece(builder, words, bit, run, bits, partial(of_piece, bits))
            place = builder.add(builder.mul(s.index, runs), each.index)
            _give(builder, sums, steps, builder.add(out, builder.mul(place, I64(4 * GROUPS))), out_bytes)

    each_case(builder, width, range(1, 9), of_width)


def _pairs(queries: int, context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    pairs, fours, four_bytes, runs, run_bytes, factors, factor_bytes, steps, out, out_bytes = args
    sums = _sums(builder, queries)
    with cgutils.for_range(builder, runs, intp=I64) as run:
        _clear(builder, sums)
        begin = builder.add(pairs, builder.mul(run.index, run_bytes))
        with cgutils.for_range(builder, fours, intp=I64) as four:
            rows = builder.add(begin, builder.mul(four.index, four_bytes))
            of = builder.add(factors, builder.mul(four.index, I64(2 * OF_PAIR)))
            of_query = [builder.add(of, builder.mul(factor_bytes, I64(query))) for query in range(queries)]
            for pair in range(2):
                places = [at(builder, rows, ROW * pair + 4 * LANES * half) for half in range(2)]
                halves = [builder.load(place, align=4, typ=WORDS) for place in places]
                _take(builder, sums, halves, [builder.add(place, I64(OF_PAIR * pair)) for place in of_query])
        _give(builder, sums, steps, builder.add(out, builder.mul(run.index, I64(4 * GROUPS))), out_bytes)


# some_words(codes, width, run, runs, factors, factor_bytes, steps, out, out_bytes, queries): ``some_pairs`` of both
# halves of a block, whose codes stay in registers. A run is of so many positions, whole pieces.
some_words = by_queries("some_words", 9, _words)
# some_pairs(pairs, fours, four_bytes, runs, run_bytes, factors, factor_bytes, steps, out, out_bytes, queries):
# out[query, n, g] += steps[query] * sum over positions r and parts j of factors[query, r, j] * codes[n, r, g, j]
# factors: int16 [query][pair][j][2]. Codes are int16 [pair][g, j][2] of four positions after one another; fours and
# runs n are so many bytes apart.
some_pairs = by_queries("some_pairs", 10, _pairs)


@compiled
def multiply_pairs(pairs, fours, four_bytes, runs, run_bytes, factors, factor_bytes, steps, queries, out, out_bytes):
    """``some_pairs`` for any number of queries."""
    first = 0
    while first < queries:
        of, step, to = factors + first * factor_bytes, steps + 4 * first, out + first * out_bytes
        some = min(TOGETHER, queries - first)
        some_pairs(pairs, fours, four_bytes, runs, run_bytes, of, factor_bytes, step, to, out_bytes, some)
        first += TOGETHER


@compiled
def multiply(codes, kind, channels, width, factors, factor_bytes, steps, queries, unpacked, out, out_bytes):
    """Add products of a block's codes to ``out``: float32 [query, token] for K, [query, channel] for V.

    factors, steps: int16 [query, pair of positions of a run, j, 2] and float32 [query], see ``round_factors``.
    unpacked: scratch, int16 [channels, 32].
    """
    run = i64(PIECE) if kind == V else channels // PARTS
    runs = i64(channels // PIECE) if kind == V else i64(PARTS)
    if run % PIECE == 0 and queries <= TOGETHER:
        some_words(codes, width, run, runs, factors, factor_bytes, steps, out, out_bytes, queries)
        return
    for s in range(2):
        unpack(codes + 4 * HALF * s, width, channels, unpacked)
        to = out + 4 * GROUPS * runs * s
        four, of_run = i64(2 * ROW), ROW // 2 * run
        multiply_pairs(unpacked, run // 4, four, runs, of_run, factors, factor_bytes, steps, queries, to, out_bytes)


def _pair(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    pairs, out, step = args
    halves = [builder.load(at(builder, pairs, 4 * LANES * half), align=4, typ=WORDS) for half in range(2)]
    bytes_ = [builder.trunc(builder.or_(x, builder.lshr(x, _repeated(8))), vector(I16)) for x in halves]
    for j in range(PARTS):
        run = builder.shuffle_vector(*bytes_, integers(I32, [PARTS * g + j for g in range(GROUPS)]))
        builder.store(run, at(builder, builder.add(out, builder.mul(step, I64(j)))), align=2)


pair_up = emitted(types.void, [types.int64] * 3, _pair)  # a row of pairs of codes up to 255 to wide pairs


@compiled
def decode_fixed(codes, channels, width, unpacked, out):
    """Decode codes of a fixed width to wide pairs, address to address; ``unpacked`` is scratch as in ``multiply``."""
    step = PAIR_STEP * (channels // 2)
    for s in range(2):
        unpack(codes + 4 * HALF * s, width, channels, unpacked)
        for pair in range(channels // 2):
            pair_up(unpacked + ROW * pair, out + PARTS * step * s + PAIR_STEP * pair, step)
