# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""What attention takes from one block: scores from K, sums from V, of coded pairs or of codes of a fixed width.

Scales are folded into q (K) and into the weights (V), zeros into one number for each query, so the products run on bare
codes. ``s`` is the scratch; its ``score`` is filled, or holds the weights.
"""

from __future__ import annotations

import numpy as np

from kvcomp.codec.block import MAX_CHANNELS
from kvcomp.codec.dtypes import CHANNEL, HEAD, PATCHED
from kvcomp.kernels.cpu.bits import FAST, compiled, fill, floats_at, integers_at
from kvcomp.kernels.cpu.decode import EMPTY, MOST_CLASSES, NARROW, K, V
from kvcomp.kernels.cpu.factors import round_factors, round_factors_of_pieces, scale_factors, turn_factors
from kvcomp.kernels.cpu.fixed import multiply
from kvcomp.kernels.cpu.page import TOKENS, code_masks, fixed_width
from kvcomp.kernels.cpu.patched import multiply_patched
from kvcomp.kernels.cpu.products import accumulate, add_multiple, fold, rescale
from kvcomp.kernels.cpu.scratch import FACTORS, KEY_SLOTS, SLOTS, run_of_form

f32, i64 = np.float32, np.int64


@compiled
def add_first(slot, channels, s):
    """Add the first codes to the zeros of the channels."""
    if integers_at(s.form, SLOTS)[slot] == 2:
        add_multiple(s.zero, s.first + 4 * MAX_CHANNELS * slot, f32(1), channels)


@compiled
def score_coded_keys(unit, slot, books, s):
    """score[g, t] = sum over channels of q * (code + zero) * scale, from pairs [channel pair][token]."""
    pitch, bias = i64(4 * FACTORS), floats_at(s.key_bias, (KEY_SLOTS, s.queries))[slot]
    units = s.unit + 4 * MAX_CHANNELS * slot
    if unit == CHANNEL:
        add_first(slot, s.key_channels, s)
        key_a, key_b = s.of_a, s.of_b
        for g in range(s.queries):
            q, of_a, of_b = s.q + 4 * g * s.padded, key_a + g * pitch, key_b + g * pitch
            bias[g] = fold(q, s.scale, s.zero, units, s.key_channels, of_a, of_b)
    else:
        key_a, key_b = s.key_a + slot * s.queries * pitch, s.key_b + slot * s.queries * pitch
        ready = integers_at(s.key_ready, KEY_SLOTS)
        if not ready[slot]:
            ready[slot] = 1
            for g in range(s.queries):
                q, of_a, of_b = s.q + 4 * g * s.padded, key_a + g * pitch, key_b + g * pitch
                bias[g] = fold(q, s.ones, s.first + 4 * MAX_CHANNELS * slot, units, s.key_channels, of_a, of_b)
    for g in range(s.queries):
        fill(s.score + 4 * TOKENS * g, bias[g], TOKENS)
    step = i64(4 * TOKENS)
    for index in range(MOST_CLASSES):
        begin, end, form = run_of_form(index, slot, books, s.key_channels // 2)
        if end > begin and form != EMPTY:
            mask_a, mask_b, _, _ = code_masks(form)
            pairs, key = s.pairs + 2 * TOKENS * begin, 4 * begin
            accumulate(
                pairs,
                2 * TOKENS,
                TOKENS,
                end - begin,
                mask_a,
                mask_b,
                key_a + key,
                key_b + key,
                pitch,
                s.queries,
                s.score,
                step,
            )
    if unit != CHANNEL:
        sums = floats_at(s.q_sum, s.queries)
        for g in range(s.queries):
            rescale(s.score + 4 * g * TOKENS, s.scale, s.zero, sums[g], TOKENS)


@compiled
def multiply_fixed(codes, kind, mode, channels, s, out, step):
    """Products of a block of a fixed width, or of pieces, with ``factors``."""
    pitch = 2 * s.padded
    if mode == PATCHED:
        multiply_patched(codes, kind, channels, s.factors, pitch, s.steps, s.queries, s.values, out, step)
    else:
        width = fixed_width(mode)
        multiply(codes, kind, channels, width, s.factors, pitch, s.steps, s.queries, s.values, out, step)


@compiled
def score_fixed_keys(codes, unit, mode, words, s):
    """Score as ``score_coded_keys`` does, from the codes of a block of this mode at an address: fixed or patched.

    words: integers that a factor takes, one or two. What rounding leaves of the factors is in ``part``, and the zeros
    do without it too: so an error counts from the middle of the codes and not from the first.
    """
    channels, steps, sums = s.key_channels, floats_at(s.steps, s.queries), floats_at(s.sums, s.queries)
    scales, zeros = (s.scale, s.zero) if unit == CHANNEL else (s.ones, s.ones)
    for g in range(s.queries):
        sums[g] = scale_factors(s.q + 4 * g * s.padded, scales, zeros, channels, s.part + 4 * g * s.padded)
        fill(s.score + 4 * TOKENS * g, f32(0), TOKENS)
    for _ in range(words):
        for g in range(s.queries):
            left, factors = s.part + 4 * g * s.padded, s.factors + 2 * g * s.padded
            if mode == PATCHED:
                steps[g] = round_factors_of_pieces(left, channels, factors)
            else:
                steps[g] = round_factors(left, channels, s.low)
                turn_factors(s.low, channels // 8, factors)
        multiply_fixed(codes, K, mode, channels, s, s.score, 4 * TOKENS)
    for g in range(s.queries):
        left, score = s.part + 4 * g * s.padded, s.score + 4 * TOKENS * g
        total = sums[g] - scale_factors(left, s.ones, zeros, channels, left)
        if unit == CHANNEL:
            add_multiple(score, s.ones, total, TOKENS)
        else:
            rescale(score, s.scale, s.zero, total, TOKENS)


@compiled
def add_fixed_values(codes, unit, mode, words, s, out):
    """Add what ``add_coded_values`` adds, from the codes of a block of this mode at an address: fixed or patched.

    words: as for ``score_fixed_keys``; weights are lost.
    """
    sums, steps, rest = floats_at(s.sums, s.queries), floats_at(s.steps, s.queries), floats_at(s.rest, s.queries)
    part, zero = floats_at(s.part, (s.queries, s.value_channels)), floats_at(s.zero, s.value_channels)
    to = s.part if unit == CHANNEL else out
    scales, zeros = (s.ones, s.ones) if unit == CHANNEL else (s.scale, s.zero)
    for g in range(s.queries):
        weights = s.score + 4 * g * TOKENS
        sums[g] = scale_factors(weights, scales, zeros, TOKENS, weights)
        if unit == CHANNEL:
            for c in range(s.value_channels):
                part[g, c] = f32(0)
    for _ in range(words):
        for g in range(s.queries):
            steps[g] = round_factors(s.score + 4 * g * TOKENS, TOKENS, s.factors + 2 * g * s.padded)
        multiply_fixed(codes, V, mode, s.value_channels, s, to, 4 * s.value_channels)
    for g in range(s.queries):
        left = s.score + 4 * g * TOKENS
        total = sums[g] - scale_factors(left, s.ones, zeros, TOKENS, left)
        if unit == CHANNEL:
            for c in range(s.value_channels):
                part[g, c] += total * zero[c]
        else:
            rest[g] += total
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


@compiled(fastmath=FAST)
def add_coded_values(unit, slot, books, s, out):
    """Add sum over tokens of weight * (code + zero) * scale to out[g, c], from pairs [token pair][channel].

    What every channel gets goes to ``rest``.
    """
    pitch, rows, step = i64(4 * FACTORS), TOKENS // 2, 4 * s.value_channels
    rest, zero = floats_at(s.rest, s.queries), floats_at(s.zero, s.value_channels)
    part = floats_at(s.part, (s.queries, s.value_channels))
    first = s.first + 4 * MAX_CHANNELS * slot
    from_zero = integers_at(s.form, SLOTS)[slot] == 1
    to, scales, zeros = out, s.scale, s.zero
    if unit == CHANNEL:
        add_first(slot, s.value_channels, s)
        to, scales, zeros = s.part, s.ones, s.ones
    elif unit == HEAD:
        zeros = s.ones
    for index in range(MOST_CLASSES):
        begin, end, form = run_of_form(index, slot, books, s.value_channels)
        if end == begin or (begin and form == EMPTY):
            continue
        mask_a, mask_b, _, _ = code_masks(form)
        units = s.narrow_unit if form == NARROW else s.wide_unit
        for g in range(s.queries):
            weights, of_a, of_b = s.score + 4 * g * TOKENS, s.of_a + g * pitch, s.of_b + g * pitch
            total = fold(weights, scales, zeros, units, TOKENS, of_a, of_b)
            if begin:  # the sum is that of the run before
                continue
            if unit == CHANNEL:
                for c in range(s.value_channels):
                    part[g, c] = total * zero[c]
            elif unit == HEAD:
                rest[g] += total * zero[0]
                add_multiple(out + g * step, first, total, s.value_channels)
            else:
                rest[g] += total
                if not from_zero:
                    total = fold(weights, scales, s.ones, units, TOKENS, of_a, of_b)
                    add_multiple(out + g * step, first, total, s.value_channels)
        if form == EMPTY:
            continue
        pairs = s.pairs + 2 * begin
        accumulate(
            pairs,
            2 * s.value_channels,
            end - begin,
            rows,
            mask_a,
            mask_b,
            s.of_a,
            s.of_b,
            pitch,
            s.queries,
            to + 4 * begin,
            step,
        )
    if unit == CHANNEL:
        add_part(s, out)
