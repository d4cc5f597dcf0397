# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Fused decode attention on compressed pages (KVComp, arXiv 2509.00579, "Fetch").

One task is one KV head of one part of a sequence: sixteen pages, or the raw sinks and tail. A block is decoded into a few
kilobytes of scratch, used at once and forgotten. Scales are folded into q (K) and into the weights (V), zeros into one
number for each query, so the products run on bare codes. The parts do not depend on the number of threads, so neither does
the result.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcomp.kernels.cpu_bits import (
    FAST,
    FLOAT32,
    address_of,
    compiled,
    floats_at,
    integers_at,
    prefetch,
    row_address,
    take_next,
)
from kvcomp.kernels.cpu_decode import RAW, STREAMS, K, V, pair_offsets
from kvcomp.kernels.cpu_page import (
    CHANNEL,
    MAX_CHANNELS,
    TOKEN,
    TOKENS,
    block_at,
    code_masks,
    decode_block,
    load_scales,
    prefetch_block,
    prefetch_token_scales,
    table_places,
    token_scales_at,
)
from kvcomp.kernels.cpu_products import accumulate, add_raw_values, fold, rescale, score_raw_keys
from kvcomp.kernels.cpu_softmax import LOG2_E, LOWEST, soften, weigh

PART_PAGES = 16
PART_TAIL = 512  # tail tokens of a part
FACTORS = MAX_CHANNELS // 2  # room for the factors of a query's pairs

f32, i64 = np.float32, np.int64


class Scratch(NamedTuple):
    """What a task runner works in, by address; float32 where nothing is said. Addresses, as passing arrays on counts references."""

    queries: int
    channels: int
    padded: int  # channels of a row of q, a multiple of 32
    q: int  # [queries, padded], scaled
    q_sum: int  # [queries]
    key_a: (
        int  # [wide or narrow, queries, FACTORS]: q for the first code of each pair, where no channel has its own scale
    )
    key_b: int  # and for the second
    key_ready: int  # int64 [wide or narrow]
    of_a: int  # [queries, FACTORS]: the factors for a block
    of_b: int
    score: int  # [queries, tokens], then weights
    part: int  # [queries, channels]
    rest: int  # [queries]: what every channel of the output gets
    seen: int  # int64 [queries]: tokens of the block that a query sees
    scale: int  # [units of a block]
    zero: int
    ones: int
    values: int  # [tokens, channels]: raw values
    pairs: int  # uint16 [tokens * channels / 2]: decoded codes
    streams: int  # int64 [streams]
    offsets: int  # int64 [K or V, pairs of a stream]
    begin: int  # int64 [books]: where the tables begin
    built: int  # int64 [books]
    tables: int
    end: int


@compiled
def lay_out(base, queries, channels, table_bytes):
    """Scratch from an address on."""
    padded = (channels + 31) & ~31
    line = 64
    q = (base + line - 1) & ~i64(line - 1)
    q_sum = q + 4 * queries * padded
    key_a = q_sum + 4 * ((queries + 15) & ~15)
    key_b = key_a + 8 * queries * FACTORS
    key_ready = key_b + 8 * queries * FACTORS
    of_a = key_ready + line
    of_b = of_a + 4 * queries * FACTORS
    score = of_b + 4 * queries * FACTORS
    part = score + 4 * queries * TOKENS
    rest = part + 4 * queries * padded
    seen = rest + 4 * ((queries + 15) & ~15)
    scale = seen + 8 * ((queries + 7) & ~7)
    zero = scale + 4 * MAX_CHANNELS
    ones = zero + 4 * MAX_CHANNELS
    values = ones + 4 * MAX_CHANNELS
    pairs = values + 4 * TOKENS * channels
    streams = pairs + TOKENS * channels
    offsets = streams + 8 * STREAMS
    begin = offsets + 8 * channels
    built = begin + line
    tables = built + line
    end = tables + table_bytes
    return Scratch(
        queries, channels, padded, q, q_sum, key_a, key_b, key_ready, of_a, of_b, score, part, rest, seen,
        scale, zero, ones, values, pairs, streams, offsets, begin, built, tables, end,
    )  # fmt: skip


@compiled
def prepare(s):
    """Fill what does not change."""
    floats_at(s.q, (s.queries, s.padded))[:] = f32(0)
    floats_at(s.ones, MAX_CHANNELS)[:] = f32(1)
    floats_at(s.scale, MAX_CHANNELS)[:] = f32(1)
    floats_at(s.zero, MAX_CHANNELS)[:] = f32(0)
    offsets = integers_at(s.offsets, (2, s.channels // 2))
    pair_offsets(K, s.channels, offsets[K])
    pair_offsets(V, s.channels, offsets[V])


@compiled
def score_coded_keys(unit, narrow, s):
    """score[g, t] = sum over channels of q * (code + zero) * scale, from pairs [channel pair][token]."""
    mask_a, mask_b, unit_a, unit_b = code_masks(narrow)
    score = floats_at(s.score, (s.queries, TOKENS))
    pitch = i64(4 * FACTORS)
    if unit == CHANNEL:
        key_a, key_b = s.of_a, s.of_b
        for g in range(s.queries):
            q, of_a, of_b = s.q + 4 * g * s.padded, key_a + g * pitch, key_b + g * pitch
            score[g] = fold(q, s.scale, s.zero, s.channels, unit_a, unit_b, of_a, of_b)
    else:
        form = i64(1 if narrow else 0)
        key_a, key_b = s.key_a + form * s.queries * pitch, s.key_b + form * s.queries * pitch
        ready, q_sum = integers_at(s.key_ready, 2), floats_at(s.q_sum, s.queries)
        if not ready[form]:
            ready[form] = 1
            for g in range(s.queries):
                q, of_a, of_b = s.q + 4 * g * s.padded, key_a + g * pitch, key_b + g * pitch
                q_sum[g] = fold(q, s.ones, s.ones, s.channels, unit_a, unit_b, of_a, of_b)
        score[:] = f32(0)
    rows, step = s.channels // 2, i64(4 * TOKENS)
    accumulate(s.pairs, TOKENS, rows, mask_a, mask_b, key_a, key_b, pitch, s.queries, s.score, step)
    if unit != CHANNEL:
        sums = floats_at(s.q_sum, s.queries)
        for g in range(s.queries):
            rescale(s.score + g * step, s.scale, s.zero, sums[g], TOKENS)


@compiled(fastmath=FAST)
def add_coded_values(unit, narrow, s, out):
    """out[g, c] += sum over tokens of weight * (code + zero) * scale, from pairs [token pair][channel]; in part through ``rest``."""
    mask_a, mask_b, unit_a, unit_b = code_masks(narrow)
    pitch, rows, step = i64(4 * FACTORS), TOKENS // 2, 4 * s.channels
    rest, zero, scale = floats_at(s.rest, s.queries), floats_at(s.zero, s.channels), floats_at(s.scale, s.channels)
    part, sums = floats_at(s.part, (s.queries, s.channels)), floats_at(out, (s.queries, s.channels))
    for g in range(s.queries):
        weights, of_a, of_b = s.score + 4 * g * TOKENS, s.of_a + g * pitch, s.of_b + g * pitch
        if unit == CHANNEL:
            total = fold(weights, s.ones, s.ones, TOKENS, unit_a, unit_b, of_a, of_b)
            for c in range(s.channels):
                part[g, c] = total * zero[c]
        else:
            rest[g] += fold(weights, s.scale, s.zero, TOKENS, unit_a, unit_b, of_a, of_b)
    to = s.part if unit == CHANNEL else out
    accumulate(s.pairs, s.channels, rows, mask_a, mask_b, s.of_a, s.of_b, pitch, s.queries, to, step)
    if unit == CHANNEL:
        for g in range(s.queries):
            for c in range(s.channels):
                sums[g, c] += part[g, c] * scale[c]


@compiled
def decode_coded(page, block, mode, kind, heads, k_unit, v_unit, books, s):
    """Scales, zeros and pairs of a coded block to scratch. Returns whether the pairs are narrow."""
    unit = k_unit if kind == K else v_unit
    if unit == TOKEN:
        load_scales(token_scales_at(page, heads, k_unit, kind), TOKEN, s.channels, s.scale, s.zero)
    else:
        block += load_scales(block, unit, s.channels, s.scale, s.zero)
    offsets = s.offsets + kind * 4 * s.channels
    return decode_block(block, mode, kind, s.channels, books, s.tables, s.begin, s.built, offsets, s.streams, s.pairs)


@compiled
def soften_and_weigh(tokens, softcap, s, peak, total, out):
    """Scores to weights."""
    if softcap:
        soften(floats_at(s.score, (s.queries, TOKENS)), tokens, f32(softcap))
    weigh(s.score, s.queries, s.seen, peak, total, s.rest, out, s.channels)


@compiled
def score_raw(keys, step, tokens, dtype, s):
    q, score = floats_at(s.q, (s.queries, s.padded)), floats_at(s.score, (s.queries, TOKENS))
    score_raw_keys(q, keys, step, tokens, dtype, floats_at(s.values, (TOKENS, s.channels)), score)


@compiled
def add_raw(values, step, tokens, dtype, s, out):
    weights, seen = floats_at(s.score, (s.queries, TOKENS)), integers_at(s.seen, s.queries)
    sums, scratch = floats_at(out, (s.queries, s.channels)), floats_at(s.values, (TOKENS, s.channels))
    add_raw_values(weights, seen, values, step, tokens, dtype, scratch, sums)


@compiled
def attend_page(page, following, tokens, head, heads, k_unit, v_unit, books, dtype, softcap, s, peak, total, out):
    """One step of the online softmax over the first tokens of a page; ``following`` is the next page, or 0."""
    row_bytes = s.channels * (4 if dtype == FLOAT32 else 2)
    integers_at(s.seen, s.queries)[:] = tokens

    prefetch_block(page, heads + head)
    if following:
        prefetch(following + 4 * head)
    block, mode = block_at(page, head)
    if mode == RAW:
        score_raw(block, row_bytes, tokens, dtype, s)
    else:
        score_coded_keys(k_unit, decode_coded(page, block, mode, K, heads, k_unit, v_unit, books, s), s)

    soften_and_weigh(tokens, softcap, s, peak, total, out)

    if following:
        prefetch_block(following, head)
        prefetch(following + 4 * (heads + head))
        prefetch_token_scales(following, heads, k_unit, v_unit)
    block, mode = block_at(page, heads + head)
    if mode == RAW:
        add_raw(block, row_bytes, tokens, dtype, s, out)
    else:
        add_coded_values(v_unit, decode_coded(page, block, mode, V, heads, k_unit, v_unit, books, s), s, out)


@compiled
def attend_raw(keys, key_step, values, value_step, begin, end, ends, dtype, softcap, s, peak, total, out):
    """Online softmax over the raw tokens ``begin`` to ``end``, ``step`` bytes apart; query g sees those before ends[g]."""
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
    counter, first_part, q, pages, valid, count, units, books, dtype,
    sinks, sink_strides, sink_count, tail, tail_strides, tail_begin, tail_end,
    scaling, softcap, partial_out, partial_peak, partial_total,
):  # fmt: skip
    """Take tasks (row, part, KV head) until none is left.

    first_part: (rows + 1,), number of the first part of each row; a row's parts are its pages by sixteen, then its tail by 512 tokens,
    the sinks with the first of these. sinks, tail: addresses of K and of V; their strides: bytes between rows, heads, tokens.
    partial_out (parts, heads, queries, channels), partial_peak, partial_total (parts, heads, queries): unnormalised sums.
    """
    rows, heads, queries, channels = q.shape
    table_bytes, begin = i64(0), np.empty(4, i64)
    for row in range(rows):
        table_bytes = max(table_bytes, table_places(row_address(books, row), begin))
    memory = np.empty(lay_out(i64(0), queries, channels, table_bytes).end + 64, np.uint8)
    s = lay_out(address_of(memory), queries, channels, table_bytes)
    prepare(s)
    scaled, rest = floats_at(s.q, (queries, s.padded)), floats_at(s.rest, queries)
    factor = f32(scaling) if softcap else f32(scaling) * LOG2_E
    k_unit, v_unit = units[0], units[1]
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
            table_places(books_of_row, integers_at(s.begin, 4))
            integers_at(s.built, 4)[:] = 0
        for g in range(queries):
            for c in range(channels):
                scaled[g, c] = q[row, head, g, c] * factor
        integers_at(s.key_ready, 2)[:] = 0
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
            for c in range(channels):
                sums[g, c] += rest[g]
    return memory.size  # mentioned here, so that Numba keeps it until here
