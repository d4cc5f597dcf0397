# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Fused decode attention on compressed pages (KVComp, arXiv 2509.00579, "Fetch").

One task is one KV head of one part of a sequence: sixteen pages, or the raw sinks and tail. A block is decoded into a
few kilobytes of scratch, used at once and forgotten. Scales are folded into q (K) and into the weights (V), zeros into
one number for each query, so the products run on bare codes. The parts do not depend on the number of threads, so
neither does the result.
"""

from __future__ import annotations

import numpy as np

from kvcomp.codec.block import MAX_CHANNELS
from kvcomp.codec.dtypes import CHANNEL, FIXED, FLOAT32, HEAD, RAW
from kvcomp.kernels.cpu.bits import (
    FAST,
    address_of,
    compiled,
    floats_at,
    integers_at,
    prefetch,
    row_address,
    take_next,
)
from kvcomp.kernels.cpu.decode import (
    EMPTY,
    MOST_CLASSES,
    NARROW,
    K,
    V,
)
from kvcomp.kernels.cpu.fixed import multiply, scale_keys, turn, turn_weights
from kvcomp.kernels.cpu.page import (
    TOKENS,
    block_at,
    code_masks,
    fixed_width,
    prefetch_block,
    prefetch_token_scales,
    table_places,
)
from kvcomp.kernels.cpu.products import accumulate, add_multiple, add_raw_values, fold, rescale, score_raw_keys
from kvcomp.kernels.cpu.scratch import (
    FACTORS,
    KEY_SLOTS,
    SLOTS,
    lay_out,
    prepare,
    run_of_form,
    take_books,
    take_pairs,
    take_scales,
)
from kvcomp.kernels.cpu.softmax import LOG2_E, LOWEST, soften, weigh

PART_PAGES = 16
PART_TAIL = 512  # tail tokens of a part

f32, i64 = np.float32, np.int64


@compiled
def add_first(slot, channels, s):
    """Add the first codes to the zeros of the channels."""
    if integers_at(s.form, SLOTS)[slot] == 2:
        add_multiple(s.zero, s.first + 4 * MAX_CHANNELS * slot, f32(1), channels)


@compiled
def score_coded_keys(unit, slot, books, s):
    """score[g, t] = sum over channels of q * (code + zero) * scale, from pairs [channel pair][token]."""
    score = floats_at(s.score, (s.queries, TOKENS))
    pitch = i64(4 * FACTORS)
    units = s.unit + 4 * MAX_CHANNELS * slot
    if unit == CHANNEL:
        add_first(slot, s.key_channels, s)
        key_a, key_b = s.of_a, s.of_b
        for g in range(s.queries):
            q, of_a, of_b = s.q + 4 * g * s.padded, key_a + g * pitch, key_b + g * pitch
            score[g] = fold(q, s.scale, s.zero, units, s.key_channels, of_a, of_b)
    else:
        key_a, key_b = s.key_a + slot * s.queries * pitch, s.key_b + slot * s.queries * pitch
        ready = integers_at(s.key_ready, KEY_SLOTS)
        bias = floats_at(s.key_bias, (KEY_SLOTS, s.queries))[slot]
        if not ready[slot]:
            ready[slot] = 1
            for g in range(s.queries):
                q, of_a, of_b = s.q + 4 * g * s.padded, key_a + g * pitch, key_b + g * pitch
                bias[g] = fold(q, s.ones, s.first + 4 * MAX_CHANNELS * slot, units, s.key_channels, of_a, of_b)
        for g in range(s.queries):
            score[g] = bias[g]
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
        scale_scores(s)


@compiled
def scale_scores(s):
    """Apply scales and zeros of tokens to the scores of bare codes."""
    sums = floats_at(s.q_sum, s.queries)
    for g in range(s.queries):
        rescale(s.score + 4 * g * TOKENS, s.scale, s.zero, sums[g], TOKENS)


@compiled
def score_fixed_keys(codes, unit, width, s):
    """Score as ``score_coded_keys`` does, from codes of a fixed width at an address."""
    score, pitch, turned = floats_at(s.score, (s.queries, TOKENS)), 4 * s.padded, s.q_turned
    score[:] = f32(0)
    if unit == CHANNEL:
        turned = s.turned
        turn(s.scale, s.key_channels // 4, s.turned_scale)
        turn(s.zero, s.key_channels // 4, s.turned_zero)
        for g in range(s.queries):
            q = s.q_turned + g * pitch
            score[g] = scale_keys(q, s.turned_scale, s.turned_zero, s.key_channels, turned + g * pitch)
    multiply(codes, K, s.key_channels, width, turned, pitch, s.queries, s.values, s.score, 4 * TOKENS)
    if unit != CHANNEL:
        scale_scores(s)


@compiled
def add_fixed_values(codes, unit, width, s, out):
    """Add what ``add_coded_values`` adds, from codes of a fixed width at an address."""
    step, pitch, to = 4 * s.value_channels, 4 * s.padded, s.part if unit == CHANNEL else out
    rest, zero = floats_at(s.rest, s.queries), floats_at(s.zero, s.value_channels)
    part = floats_at(s.part, (s.queries, s.value_channels))
    for g in range(s.queries):
        weights, turned = s.score + 4 * g * TOKENS, s.turned + g * pitch
        if unit == CHANNEL:
            total = turn_weights(weights, s.ones, s.ones, turned)
            for c in range(s.value_channels):
                part[g, c] = total * zero[c]
        else:
            rest[g] += turn_weights(weights, s.scale, s.zero, turned)
    multiply(codes, V, s.value_channels, width, s.turned, pitch, s.queries, s.values, to, step)
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


@compiled
def soften_and_weigh(tokens, softcap, s, peak, total, out):
    """Turn scores into weights."""
    if softcap:
        soften(floats_at(s.score, (s.queries, TOKENS)), tokens, f32(softcap))
    weigh(s.score, s.queries, s.seen, peak, total, s.rest, out, s.value_channels)


@compiled
def score_raw(keys, step, tokens, dtype, s):
    q, score = floats_at(s.q, (s.queries, s.padded)), floats_at(s.score, (s.queries, TOKENS))
    score_raw_keys(q, keys, step, tokens, dtype, floats_at(s.values, (TOKENS, s.key_channels)), score)


@compiled
def add_raw(values, step, tokens, dtype, s, out):
    weights, seen = floats_at(s.score, (s.queries, TOKENS)), integers_at(s.seen, s.queries)
    sums, scratch = floats_at(out, (s.queries, s.value_channels)), floats_at(s.values, (TOKENS, s.value_channels))
    add_raw_values(weights, seen, values, step, tokens, dtype, scratch, sums)


@compiled
def attend_page(
    page, following, tokens, head, heads, k_unit, v_unit, books, steps, dtype, softcap, s, peak, total, out
):
    """Take one step of the online softmax over the first tokens of a page; ``following`` is the next page, or 0."""
    value_bytes = 4 if dtype == FLOAT32 else 2
    integers_at(s.seen, s.queries)[:] = tokens

    prefetch_block(page, heads + head)
    if following:
        prefetch(following + 4 * head)
    block, mode = block_at(page, head)
    if mode == RAW:
        score_raw(block, s.key_channels * value_bytes, tokens, dtype, s)
    else:
        codes = take_scales(page, block, mode, K, head, heads, k_unit, v_unit, steps, s)
        if mode >= FIXED:
            score_fixed_keys(codes, k_unit, fixed_width(mode), s)
        else:
            score_coded_keys(k_unit, take_pairs(codes, mode, K, k_unit, books, s), books, s)

    soften_and_weigh(tokens, softcap, s, peak, total, out)

    if following:
        prefetch_block(following, head)
        prefetch(following + 4 * (heads + head))
        prefetch_token_scales(following, heads, k_unit, v_unit)
    block, mode = block_at(page, heads + head)
    if mode == RAW:
        add_raw(block, s.value_channels * value_bytes, tokens, dtype, s, out)
    else:
        codes = take_scales(page, block, mode, V, head, heads, k_unit, v_unit, steps, s)
        if mode >= FIXED:
            add_fixed_values(codes, v_unit, fixed_width(mode), s, out)
        else:
            add_coded_values(v_unit, take_pairs(codes, mode, V, v_unit, books, s), books, s, out)


@compiled
def attend_raw(keys, key_step, values, value_step, begin, end, ends, dtype, softcap, s, peak, total, out):
    """Take the raw tokens ``begin`` to ``end``, ``step`` bytes apart, into the online softmax.

    Query g sees those before ends[g].
    """
    seen = integers_at(s.seen, s.queries)
    for token in range(begin, end, TOKENS):
        tokens = min(TOKENS, end - token)
        for g in range(s.queries):
            seen[g] = max(0, min(tokens, ends[g] - token))
        score_raw(keys + token * key_step, key_step, tokens, dtype, s)
        soften_and_weigh(tokens, softcap, s, peak, total, out)
        add_raw(values + token * value_step, value_step, tokens, dtype, s, out)


@compiled(entry=True)
def attend_tasks(
    counter, first_part, q, pages, valid, count, units, books, steps, dtype,
    sinks, sink_strides, sink_count, tail, tail_strides, tail_begin, tail_end,
    scaling, softcap, partial_out, partial_peak, partial_total,
):  # fmt: skip
    """Take tasks (row, part, KV head) until none is left.

    Parameters
    ----------
    counter
        int64 (1,): the next task, for all threads.
    first_part
        int64 (rows + 1,): number of the first part of each row. A row's parts are its pages by sixteen, then its tail
        by 512 tokens; the sinks come with the first of these.
    q
        float32 (rows, heads, queries, channels of K).
    pages, valid, count, sink_count, tail_begin
        As in ``CacheView``.
    units, steps, dtype
        As for ``decompress_pages``.
    books
        int64 (rows, 4, columns), as ``describe_books`` gives them.
    sinks, tail
        int64 (2,): addresses of K and V.
    sink_strides, tail_strides
        Bytes between rows, heads and tokens of K and of V.
    tail_end, scaling, softcap
        As for ``Backend.attend``.
    partial_out
        float32 (parts, heads, queries, channels of V): filled with unnormalised sums.
    partial_peak, partial_total
        float32 (parts, heads, queries): filled with the largest score and the sum of the weights.
    """
    rows, heads, queries, channels = q.shape
    value_channels = partial_out.shape[3]
    table_bytes, begin = i64(0), np.empty((4, MOST_CLASSES), i64)
    for row in range(rows):
        table_bytes = max(table_bytes, table_places(row_address(books, row), begin))
    memory = np.empty(lay_out(i64(0), queries, channels, value_channels, table_bytes).end + 64, np.uint8)
    s = lay_out(address_of(memory), queries, channels, value_channels, table_bytes)
    prepare(s)
    scaled, q_sum, rest = floats_at(s.q, (queries, s.padded)), floats_at(s.q_sum, queries), floats_at(s.rest, queries)
    factor = f32(scaling) if softcap else f32(scaling) * LOG2_E
    k_unit, v_unit, steps_at = units[0], units[1], row_address(steps, 0)
    row, tables_of = 0, -1
    while True:
        task = take_next(address_of(counter))
        if task >= first_part[rows] * heads:
            break
        number, head = task // heads, task % heads
        while first_part[row + 1] <= number:
            row += 1
        books_of_row = row_address(books, row)
        if tables_of != row:
            tables_of = row
            take_books(books_of_row, s)
        for g in range(queries):
            for c in range(channels):
                scaled[g, c] = q[row, head, g, c] * factor
            q_sum[g] = scaled[g].sum()
            turn(s.q + 4 * g * s.padded, channels // 4, s.q_turned + 4 * g * s.padded)
        integers_at(s.key_ready, KEY_SLOTS)[:] = 0
        sums = partial_out[number, head]
        sums[:], rest[:] = f32(0), f32(0)
        partial_peak[number, head], partial_total[number, head] = LOWEST, f32(0)
        out = address_of(sums)
        peak, total = address_of(partial_peak[number, head]), address_of(partial_total[number, head])

        part = number - first_part[row]
        page_parts = (count[row] + PART_PAGES - 1) // PART_PAGES
        if part < page_parts:
            last = min((part + 1) * PART_PAGES, count[row])
            for index in range(part * PART_PAGES, last):
                tokens = i64(valid[row, index])
                following = pages[row, index + 1] if index + 1 < last else i64(0)
                if tokens > 0:
                    page = pages[row, index]
                    attend_page(
                        page,
                        following,
                        tokens,
                        head,
                        heads,
                        k_unit,
                        v_unit,
                        books_of_row,
                        steps_at,
                        dtype,
                        softcap,
                        s,
                        peak,
                        total,
                        out,
                    )
        else:
            for source, strides, is_tail in ((sinks, sink_strides, False), (tail, tail_strides, True)):
                keys = source[0] + row * strides[0, 0] + head * strides[0, 1]
                values = source[1] + row * strides[1, 0] + head * strides[1, 1]
                if is_tail:
                    first = tail_begin[row] + (part - page_parts) * PART_TAIL
                    end, ends = min(first + PART_TAIL, tail_end.max()), tail_end
                else:
                    first, end = i64(0), sink_count[row] if part == page_parts else i64(0)
                    ends = np.full(queries, end)
                attend_raw(
                    keys, strides[0, 2], values, strides[1, 2], first, end, ends, dtype, softcap, s, peak, total, out
                )
        for g in range(queries):
            for c in range(value_channels):
                sums[g, c] += rest[g]
    return memory.size + steps.size  # mentioned here, so that Numba keeps it until here
