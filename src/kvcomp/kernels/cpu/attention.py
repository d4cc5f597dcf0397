# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Fused decode attention on compressed pages (KVComp, arXiv 2509.00579, "Fetch").

One task is one KV head of one part of a sequence: sixteen pages, or the raw sinks and tail. A block is decoded into a
few kilobytes of scratch, used at once and forgotten. The parts do not depend on the number of threads, so neither does
the result.
"""

from __future__ import annotations

import numpy as np

from kvcomp.codec.dtypes import FLOAT32, RAW
from kvcomp.kernels.cpu.bits import address_of, compiled, floats_at, integers_at, prefetch, row_address, take_next
from kvcomp.kernels.cpu.decode import MOST_CLASSES, K, V
from kvcomp.kernels.cpu.page import TOKENS, block_at, prefetch_block, prefetch_token_scales, table_places
from kvcomp.kernels.cpu.products import add_raw_values, score_raw_keys
from kvcomp.kernels.cpu.scores import add_coded_values, score_coded_keys
from kvcomp.kernels.cpu.scratch import lay_out, prepare, take_books, take_scales
from kvcomp.kernels.cpu.softmax import LOG2_E, LOWEST, soften, weigh

PART_PAGES = 16
PART_TAIL = 512  # tail tokens of a part

f32, i64 = np.float32, np.int64


@compiled
def soften_and_weigh(tokens, softcap, s, peak, total, out):
    """Turn scores into weights."""
    if softcap:
        soften(floats_at(s.score, (s.queries, TOKENS)), tokens, f32(softcap))
    weigh(s.score, s.queries, s.hidden, s.seen, peak, total, s.rest, out, s.value_channels)


@compiled
def add_bias(bias, step, tokens, s):
    """Add a bias to the scores; that of a query is ``step`` bytes behind that of the one before."""
    score = floats_at(s.score, (s.queries, TOKENS))
    for g in range(s.queries):
        of_query = floats_at(bias + g * step, tokens)
        for t in range(tokens):
            score[g, t] += of_query[t]


@compiled
def score_raw(keys, step, tokens, dtype, s):
    q, score = floats_at(s.q, (s.queries, s.padded)), floats_at(s.score, (s.queries, TOKENS))
    score_raw_keys(q, keys, step, tokens, dtype, floats_at(s.values, (TOKENS, s.key_channels)), score)


@compiled
def add_raw(values, step, tokens, dtype, s, out):
    weights = floats_at(s.score, (s.queries, TOKENS))
    hidden, seen = integers_at(s.hidden, s.queries), integers_at(s.seen, s.queries)
    sums, scratch = floats_at(out, (s.queries, s.value_channels)), floats_at(s.values, (TOKENS, s.value_channels))
    add_raw_values(weights, hidden, seen, values, step, tokens, dtype, scratch, sums)


@compiled
def hide(first, place, tokens, s):
    """Hide what query g does not see: its row's first ``first[g]`` tokens, of which ``place`` lie before these."""
    hidden = integers_at(s.hidden, s.queries)
    for g in range(s.queries):
        hidden[g] = max(0, min(tokens, first[g] - place))


@compiled(inline=True)
def attend_page(
    page,
    following,
    tokens,
    head,
    heads,
    k_unit,
    v_unit,
    books,
    steps,
    dtype,
    softcap,
    bias,
    bias_step,
    s,
    peak,
    total,
    out,
):
    """Take one step of the online softmax over the first tokens of a page; ``following`` is the next page, or 0.

    bias: address of what is added to the scores of the first query; no more is if 0.
    """
    value_bytes, words = (4, 2) if dtype == FLOAT32 else (2, 1)
    integers_at(s.seen, s.queries)[:] = tokens

    prefetch_block(page, heads + head)
    if following:
        prefetch(following + 4 * head)
    block, mode = block_at(page, head)
    if mode == RAW:
        score_raw(block, s.key_channels * value_bytes, tokens, dtype, s)
    else:
        codes = take_scales(page, block, mode, K, head, heads, k_unit, v_unit, steps, s)
        score_coded_keys(codes, k_unit, mode, words, books, s)
    if bias:
        add_bias(bias, bias_step, tokens, s)

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
        add_coded_values(codes, v_unit, mode, words, books, s, out)


@compiled
def attend_raw(
    keys, key_step, values, value_step, begin, end, ends, first, place, dtype, softcap, bias, bias_step, s, peak, total,
    out,
):  # fmt: skip
    """Take the raw tokens ``begin`` to ``end``, ``step`` bytes apart, into the online softmax.

    Query g sees those before ends[g]. first: as for ``hide``, where ``place`` tokens lie before ``begin``. bias: as for
    ``attend_page``, from the token ``begin`` on.
    """
    seen = integers_at(s.seen, s.queries)
    for token in range(begin, end, TOKENS):
        tokens = min(TOKENS, end - token)
        for g in range(s.queries):
            seen[g] = max(0, min(tokens, ends[g] - token))
        hide(first, place + token - begin, tokens, s)
        score_raw(keys + token * key_step, key_step, tokens, dtype, s)
        if bias:
            add_bias(bias + 4 * (token - begin), bias_step, tokens, s)
        soften_and_weigh(tokens, softcap, s, peak, total, out)
        add_raw(values + token * value_step, value_step, tokens, dtype, s, out)


@compiled(entry=True)
def plan_parts(count, tail_begin, tail_end, first_part):
    """Fill ``first_part``, see ``attend_tasks``. Returns how many parts there are."""
    last = i64(0)
    for end in tail_end:
        last = max(last, end)
    first_part[0] = 0
    for row in range(count.size):
        of_pages = (count[row] + PART_PAGES - 1) // PART_PAGES
        of_tail = (last - tail_begin[row] + PART_TAIL - 1) // PART_TAIL
        first_part[row + 1] = first_part[row] + of_pages + max(i64(1), of_tail)
    return first_part[count.size]


@compiled(entry=True)
def attend_tasks(
    counter, first_part, q, bias, hidden, pages, valid, count, units, books, steps, dtype,
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
    bias
        float32 (rows, heads, queries, tokens): what the part of the mean that turns adds to scores (``folding``), times
        the factor on q; nothing if there are no tokens.
    hidden
        int64 (rows, queries), as for ``Backend.attend``.
    pages, valid, count, sink_count, tail_begin
        As in ``CacheView``.
    units, steps, dtype
        As for ``decompress_pages``.
    books
        int64 (rows, 4), as ``book_addresses`` gives them.
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
    scaled, rest = floats_at(s.q, (queries, s.padded)), floats_at(s.rest, queries)
    factor = f32(scaling) if softcap else f32(scaling) * LOG2_E
    bias_step = i64(4) * bias.shape[3]
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
        sums = partial_out[number, head]
        sums[:], rest[:] = f32(0), f32(0)
        partial_peak[number, head], partial_total[number, head] = LOWEST, f32(0)
        out = address_of(sums)
        peak, total = address_of(partial_peak[number, head]), address_of(partial_total[number, head])

        part = number - first_part[row]
        page_parts = (count[row] + PART_PAGES - 1) // PART_PAGES
        place = i64(sink_count[row])  # of the part's first token among the row's
        for index in range(min(part * PART_PAGES, count[row])):
            place += valid[row, index]
        first_seen = hidden[row]
        of_head = address_of(bias) + bias_step * queries * (row * heads + head)
        if part < page_parts:
            last = min((part + 1) * PART_PAGES, count[row])
            for index in range(part * PART_PAGES, last):
                tokens = i64(valid[row, index])
                following = pages[row, index + 1] if index + 1 < last else i64(0)
                if tokens > 0 and place + tokens > first_seen.min():
                    page = pages[row, index]
                    hide(first_seen, place, tokens, s)
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
                        of_head + 4 * place if bias_step else i64(0),
                        bias_step,
                        s,
                        peak,
                        total,
                        out,
                    )
                place += tokens
        else:
            for source, strides, is_tail in ((sinks, sink_strides, False), (tail, tail_strides, True)):
                keys = source[0] + row * strides[0, 0] + head * strides[0, 1]
                values = source[1] + row * strides[1, 0] + head * strides[1, 1]
                if is_tail:
                    first = tail_begin[row] + (part - page_parts) * PART_TAIL
                    end, ends = min(first + PART_TAIL, tail_end.max()), tail_end
                    before = place + first - tail_begin[row]
                else:
                    first, end = i64(0), sink_count[row] if part == page_parts else i64(0)
                    ends, before = np.full(queries, end), i64(0)
                attend_raw(
                    keys,
                    strides[0, 2],
                    values,
                    strides[1, 2],
                    first,
                    end,
                    ends,
                    first_seen,
                    before,
                    dtype,
                    softcap,
                    of_head + 4 * before if bias_step else i64(0),
                    bias_step,
                    s,
                    peak,
                    total,
                    out,
                )
        for g in range(queries):
            for c in range(value_channels):
                sums[g, c] += rest[g]
    return memory.size + steps.size  # mentioned here, so that Numba keeps it until here
