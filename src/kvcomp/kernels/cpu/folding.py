# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Queries and outputs in other coordinates (``kvcomp.kernels.folding``), a few at a time.

A product of matrices so small takes less time than the calls to a library around it. The part that turns is made for
runs of 64 tokens: z is turned once to the middle of a run, and a table that all runs share does the rest. As far before
the middle as behind it, cosines are the same and sines the opposite, so the table has half of the places.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvcomp.kernels.cpu.bits import (
    F32,
    FAST,
    I32,
    I64,
    LANES,
    address_of,
    at,
    compiled,
    emitted,
    integers,
    splat,
    vector,
)
from kvcomp.kernels.cpu.page import TOKENS

LEAST_RUNS = 16  # that tables are made for

f32 = np.float32
FLOATS = vector(F32)


def turning_tables(speed: tuple[float, ...], tokens: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """exp(i w t) in the middle of runs, (runs, 2, pairs), and the factors of the places behind it on real and imaginary
    parts, (pairs, 2, 32); for as many tokens or more.
    """
    runs = -(-tokens // TOKENS)
    return _tables(speed, max(LEAST_RUNS, 1 << (runs - 1).bit_length()))


@lru_cache(maxsize=128)
def _tables(speed: tuple[float, ...], runs: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    middles = np.multiply.outer(np.arange(runs) * TOKENS + (TOKENS - 1) / 2, np.array(speed))
    behind = np.multiply.outer(np.array(speed), np.arange(TOKENS // 2) + 0.5)
    middle = np.stack([np.cos(middles), np.sin(middles)], 1)
    run = np.stack([np.cos(behind), -np.sin(behind)], 1)
    return middle.astype(np.float32), run.astype(np.float32)


@compiled(fastmath=FAST)
def add_product(x, matrix, out):
    """Add x times a matrix to a row, four of its rows at a time."""
    rows, columns = matrix.shape
    whole = rows - rows % 4
    for r in range(0, whole, 4):
        a, b, c, d = x[r], x[r + 1], x[r + 2], x[r + 3]
        for m in range(columns):
            out[m] += a * matrix[r, m] + b * matrix[r + 1, m] + c * matrix[r + 2, m] + d * matrix[r + 3, m]
    for r in range(whole, rows):
        for m in range(columns):
            out[m] += x[r] * matrix[r, m]


def _turn_run(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    """All 64 sums stay in registers."""
    x, run, pairs, out = args
    vectors = TOKENS // 2 // LANES
    sums = [
        [cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [0.0] * LANES)) for _ in range(vectors)]
        for _ in range(2)
    ]
    with cgutils.for_range(builder, pairs, intp=I64) as loop:
        pair = builder.add(run, builder.mul(loop.index, I64(4 * TOKENS)))
        for part, of_part in enumerate(sums):  # real, then imaginary
            place = builder.shl(builder.add(loop.index, builder.mul(pairs, I64(part))), I64(2))
            factor = splat(builder, builder.load(at(builder, builder.add(x, place)), typ=F32))
            for m, so_far in enumerate(of_part):
                waves = builder.load(at(builder, pair, 4 * LANES * (vectors * part + m)), align=4, typ=FLOATS)
                product = builder.fmul(waves, factor, flags=("contract",))
                builder.store(builder.fadd(builder.load(so_far, typ=FLOATS), product, flags=("contract",)), so_far)
    for m, (even, odd) in enumerate(zip(*sums, strict=True)):
        both = builder.load(even, typ=FLOATS), builder.load(odd, typ=FLOATS)
        before, behind = builder.fsub(*both), builder.fadd(*both)
        backwards = builder.shuffle_vector(before, before, integers(I32, range(LANES - 1, -1, -1)))
        builder.store(backwards, at(builder, out, 4 * LANES * (vectors - 1 - m)), align=4)
        builder.store(behind, at(builder, out, 4 * LANES * (vectors + m)), align=4)


# turn_run(x, run, pairs, out): the real part of x e^(i w t) at the 64 places around the middle of a run, summed over
# pairs; x is [real and imaginary part][pair], ``run`` as in ``turning_tables``. All but the count are addresses.
turn_run = emitted(types.void, [types.int64] * 4, _turn_run)


@compiled(entry=True, fastmath=FAST)
def fold(q, factor, queries, turning, middles, run, tokens, inner, bias):
    """Fill ``inner`` with the queries as K' wants them, and ``bias`` with ``factor`` times what turns.

    Parameters
    ----------
    q
        float32 (rows, KV heads, queries, channels of K).
    queries, turning
        As in ``Folding``.
    middles, run
        ``turning_tables``.
    tokens
        int64 (rows,): of each row; what is behind them is left.
    inner
        float32 (rows, KV heads, queries, channels of K as held).
    bias
        float32 (rows, KV heads, queries, 64 runs).
    """
    rows, heads, count, _ = q.shape
    pairs = turning.shape[2] // 2
    z, turned = np.empty(2 * pairs, f32), np.empty(2 * pairs, f32)
    of_turned, of_run = address_of(turned), address_of(run)
    for row in range(rows):
        for head in range(heads):
            for g in range(count):
                of = q[row, head, g]
                inner[row, head, g, :] = f32(0)
                add_product(of, queries[head], inner[row, head, g])
                if not pairs:
                    continue
                z[:] = f32(0)
                add_product(of, turning[head], z)
                of_bias = address_of(bias[row, head, g])
                for r in range((tokens[row] + TOKENS - 1) // TOKENS):
                    for p in range(pairs):
                        real, imaginary = factor * z[p], factor * z[pairs + p]
                        turned[p] = real * middles[r, 0, p] - imaginary * middles[r, 1, p]
                        turned[pairs + p] = real * middles[r, 1, p] + imaginary * middles[r, 0, p]
                    turn_run(of_turned, of_run, pairs, of_bias + 4 * TOKENS * r)
    return turned.size + run.size  # mentioned here, so that Numba keeps them until here


@compiled(entry=True, fastmath=FAST)
def unfold(held, outputs, mean, out):
    """Fill ``out`` with outputs as the model wants them, both (rows, KV heads, queries, channels of V)."""
    rows, heads, count, _ = held.shape
    for row in range(rows):
        for head in range(heads):
            for g in range(count):
                out[row, head, g, :] = mean[head]
                add_product(held[row, head, g], outputs[head], out[row, head, g])
