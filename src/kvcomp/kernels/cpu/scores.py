# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""What attention takes from one coded block: scores from K, sums from V.

Scales are folded into q (K) and into the weights (V), zeros into one number for each query, so the products run on bare
codes. ``s`` is the scratch; its ``score`` is filled, or holds the weights.
"""

from __future__ import annotations

import numpy as np

from kvcomp.codec.block import MAX_CHANNELS
from kvcomp.codec.dtypes import CHANNEL, PATCHED
from kvcomp.kernels.cpu.bits import compiled, fill, floats_at, integers_at
from kvcomp.kernels.cpu.decode import K, V
from kvcomp.kernels.cpu.factors import round_factors, round_factors_of_pieces, turn_factors
from kvcomp.kernels.cpu.fixed import multiply
from kvcomp.kernels.cpu.huffman import multiply_huffman, turn_pairs
from kvcomp.kernels.cpu.page import TOKENS, fixed_width
from kvcomp.kernels.cpu.patched import multiply_patched
from kvcomp.kernels.cpu.products import add_multiple, rescale
from kvcomp.kernels.cpu.scratch import SLOTS, take_pairs

f32, i64 = np.float32, np.int64


@compiled
def take_first(codes, kind, unit, mode, books, s):
    """Decode a Huffman block to pairs in scratch.

    Returns the slot of its book, and the address of the first codes of the channels: 0 where all are 0, or where each
    channel has a zero and takes its first code in.
    """
    if mode >= PATCHED:
        return i64(0), i64(0)
    slot = take_pairs(codes, mode, kind, unit, books, s)
    if integers_at(s.form, SLOTS)[slot] == 1:
        return slot, i64(0)
    first = s.first + 4 * MAX_CHANNELS * slot
    if unit == CHANNEL:
        add_multiple(s.zero, first, f32(1), s.key_channels if kind == K else s.value_channels)
        first = i64(0)
    return slot, first


@compiled(inline=True)
def multiply_codes(codes, kind, mode, slot, books, channels, s, out, step):
    """Products of a block of this mode at an address with ``factors``; ``slot`` is that of a Huffman block's book."""
    pitch = 2 * s.padded
    if mode < PATCHED:
        multiply_huffman(kind, slot, books, channels, s.pairs, s.factors, pitch, s.steps, s.queries, out, step)
    elif mode == PATCHED:
        multiply_patched(codes, kind, channels, s.factors, pitch, s.steps, s.queries, s.values, out, step)
    else:
        width = fixed_width(mode)
        multiply(codes, kind, channels, width, s.factors, pitch, s.steps, s.queries, s.values, out, step)


@compiled(inline=True)
def score_coded_keys(codes, unit, mode, words, books, s):
    """score[g, t] = sum over channels of q * (code + zero) * scale, from the codes of a block at an address.

    words: integers that a factor takes, one or two. Zeros are multiplied by the rounded factors too: so an error counts
    from the middle of the codes and not from the first.
    """
    channels, steps = s.key_channels, floats_at(s.steps, s.queries)
    of_zero, of_first = floats_at(s.of_zero, s.queries), floats_at(s.of_first, s.queries)
    slot, first = take_first(codes, K, unit, mode, books, s)
    scales, zeros = (s.scale, s.zero) if unit == CHANNEL else (s.ones, s.ones)
    other = first if first else s.ones
    of_zero[:], of_first[:] = f32(0), f32(0)
    for g in range(s.queries):
        fill(s.score + 4 * TOKENS * g, f32(0), TOKENS)
    for word in range(words):
        for g in range(s.queries):
            left, factors = s.part + 4 * g * s.padded, s.factors + 2 * g * s.padded
            source, scale = (left, s.ones) if word else (s.q + 4 * g * s.padded, scales)
            sums, others = s.of_zero + 4 * g, s.of_first + 4 * g
            if mode < PATCHED:
                steps[g] = round_factors(source, scale, zeros, other, channels, left, factors, sums, others)
            elif mode == PATCHED:
                steps[g] = round_factors_of_pieces(source, scale, zeros, other, channels, left, factors, sums, others)
            else:
                steps[g] = round_factors(source, scale, zeros, other, channels, left, s.low, sums, others)
                turn_factors(s.low, channels // 8, factors)
        multiply_codes(codes, K, mode, slot, books, channels, s, s.score, 4 * TOKENS)
    for g in range(s.queries):
        score = s.score + 4 * TOKENS * g
        if unit == CHANNEL:
            add_multiple(score, s.ones, of_zero[g], TOKENS)
        else:
            if first:
                add_multiple(score, s.ones, of_first[g], TOKENS)
            rescale(score, s.scale, s.zero, of_zero[g], TOKENS)


@compiled(inline=True)
def add_coded_values(codes, unit, mode, words, books, s, out):
    """Add sum over tokens of weight * (code + zero) * scale to out[g, c], from the codes of a block at an address.

    What every channel gets goes to ``rest``. words: as for ``score_coded_keys``. Weights are lost.
    """
    channels, step = s.value_channels, 4 * s.value_channels
    steps, rest = floats_at(s.steps, s.queries), floats_at(s.rest, s.queries)
    of_zero, of_first = floats_at(s.of_zero, s.queries), floats_at(s.of_first, s.queries)
    part, zero = floats_at(s.part, (s.queries, channels)), floats_at(s.zero, channels)
    slot, first = take_first(codes, V, unit, mode, books, s)
    to = s.part if unit == CHANNEL else out
    scales, zeros = (s.ones, s.ones) if unit == CHANNEL else (s.scale, s.zero)
    of_zero[:], of_first[:] = f32(0), f32(0)
    if unit == CHANNEL:
        for g in range(s.queries):
            for c in range(channels):
                part[g, c] = f32(0)
    for word in range(words):
        for g in range(s.queries):
            weights, factors, scale = s.score + 4 * g * TOKENS, s.factors + 2 * g * s.padded, s.ones if word else scales
            sums, others = s.of_zero + 4 * g, s.of_first + 4 * g
            steps[g] = round_factors(weights, scale, zeros, s.ones, TOKENS, weights, factors, sums, others)
            if mode < PATCHED:
                turn_pairs(factors)
        multiply_codes(codes, V, mode, slot, books, channels, s, to, step)
    for g in range(s.queries):
        if first:
            add_multiple(out + g * step, first, of_first[g], channels)
        if unit == CHANNEL:
            for c in range(channels):
                part[g, c] += of_zero[g] * zero[c]
        else:
            rest[g] += of_zero[g]
    if unit == CHANNEL:
        add_part(s, out)


@compiled
def add_part(s, out):
    """Add sums of bare codes, times the scales of the channels."""
    part, sums = floats_at(s.part, (s.queries, s.value_channels)), floats_at(out, (s.queries, s.value_channels))
    scale = floats_at(s.scale, s.value_channels)
    for g in range(s.queries):
        for c in range(s.value_channels):
            sums[g, c] += part[g, c] * scale[c]
