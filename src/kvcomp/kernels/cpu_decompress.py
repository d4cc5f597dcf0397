"""Pages -> values (docs/format.md, section 3)."""

from __future__ import annotations

import numpy as np

from kvcomp.kernels.cpu_attention import decode_coded, lay_out, prepare
from kvcomp.kernels.cpu_bits import FLOAT32, address_of, compiled, copy_bytes, floats_at, halves_at, integers_at, narrow
from kvcomp.kernels.cpu_decode import NARROW_A, NARROW_B, RAW, K
from kvcomp.kernels.cpu_page import CHANNEL, MAX_CHANNELS, TOKENS, block_at, prefetch_block, table_places

f32, i64 = np.float32, np.int64


@compiled
def restore_keys(pairs, small, by_channel, scale, zero, values):  # type: ignore[no-untyped-def]
    """pairs [channel pair][token] -> values [token][channel] = (code + zero) * scale."""
    shift_a, shift_b, mask = (NARROW_A, NARROW_B, 31) if small else (0, 8, 255)
    for i in range(pairs.shape[0]):
        for t in range(TOKENS):
            word = i64(pairs[i, t])
            a, b = (2 * i, 2 * i + 1) if by_channel else (t, t)
            values[t, 2 * i] = (f32(word >> shift_a & mask) + zero[a]) * scale[a]
            values[t, 2 * i + 1] = (f32(word >> shift_b & mask) + zero[b]) * scale[b]


@compiled
def restore_values(pairs, small, by_channel, scale, zero, values):  # type: ignore[no-untyped-def]
    """pairs [token pair][channel] -> values [token][channel] = (code + zero) * scale."""
    shift_a, shift_b, mask = (NARROW_A, NARROW_B, 31) if small else (0, 8, 255)
    for i in range(pairs.shape[0]):
        for c in range(pairs.shape[1]):
            word = i64(pairs[i, c])
            a, b = (c, c) if by_channel else (2 * i, 2 * i + 1)
            values[2 * i, c] = (f32(word >> shift_a & mask) + zero[a]) * scale[a]
            values[2 * i + 1, c] = (f32(word >> shift_b & mask) + zero[b]) * scale[b]


@compiled
def decompress_pages(pages, units, books, heads, channels, dtype, out, strides):  # type: ignore[no-untyped-def]
    """Fill the values at two addresses, K's and V's, (heads, 64*pages, channels), with the pages at these addresses."""
    size = 4 if dtype == FLOAT32 else 2
    table_bytes = table_places(address_of(books), np.empty(4, i64))
    memory = np.empty(lay_out(i64(0), 1, channels, table_bytes).end + 64, np.uint8)
    s = lay_out(address_of(memory), 1, channels, table_bytes)
    prepare(s)
    table_places(address_of(books), integers_at(s.begin, 4))
    integers_at(s.built, 4)[:] = 0
    half = channels // 2
    values, scale, zero = (
        floats_at(s.values, (TOKENS, channels)),
        floats_at(s.scale, MAX_CHANNELS),
        floats_at(s.zero, MAX_CHANNELS),
    )
    for index in range(pages.size):
        page = pages[index]
        for number in range(2 * heads):
            kind, head = number // heads, number % heads
            rows = out[kind] + head * strides[kind, 0] + index * TOKENS * strides[kind, 1]
            if number + 1 < 2 * heads:
                prefetch_block(page, number + 1)
            block, mode = block_at(page, number)
            if mode == RAW:
                for t in range(TOKENS):
                    copy_bytes(block + t * channels * size, rows + t * strides[kind, 1], channels * size)
                continue
            small = decode_coded(page, block, mode, kind, heads, units[0], units[1], address_of(books), s)
            by_channel = units[kind] == CHANNEL
            if kind == K:
                restore_keys(halves_at(s.pairs, (half, TOKENS)), small, by_channel, scale, zero, values)
            else:
                restore_values(halves_at(s.pairs, (TOKENS // 2, channels)), small, by_channel, scale, zero, values)
            for t in range(TOKENS):
                narrow(dtype, s.values + 4 * t * channels, rows + t * strides[kind, 1], channels)
    return memory.size  # mentioned here, so that Numba keeps it until here
