# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""The pairs of a block's codes, and how often each occurs: what codebooks are made from."""

from __future__ import annotations

import numpy as np

from kvcomp.codec.quantise import MAX_CODES
from kvcomp.kernels.cpu.bits import compiled
from kvcomp.kernels.cpu.decode import K, class_of
from kvcomp.kernels.cpu.page import TOKENS

i64, u64 = np.int64, np.uint64


@compiled
def pair_words(kind, codes, words):
    """codes [64, D] -> pairs ``a | b << 8``: K [token, channel pair], V [token pair, channel]."""
    if kind == K:
        for t in range(TOKENS):
            for i in range(words.shape[1]):
                words[t, i] = np.uint16(codes[t, 2 * i]) | np.uint16(codes[t, 2 * i + 1]) << np.uint16(8)
    else:
        for t in range(TOKENS // 2):
            for c in range(words.shape[1]):
                words[t, c] = np.uint16(codes[2 * t, c]) | np.uint16(codes[2 * t + 1, c]) << np.uint16(8)


@compiled
def code_range(codes, low, high):
    """Least and greatest code of each channel of [64, D]."""
    low[:], high[:] = codes[0], codes[0]
    for t in range(1, TOKENS):
        row = codes[t]
        for c in range(row.size):
            low[c] = min(low[c], row[c])
            high[c] = max(high[c], row[c])


@compiled(entry=True)
def count_blocks(codes, raw, kind, counts):
    """Add how often the pair (a, b) occurs in the blocks that are not raw to counts[class, a, b].

    codes is (pages, heads, 64, channels), raw (pages, heads).
    """
    pages, heads, _, channels = codes.shape
    classes = counts.shape[0]
    shape = (TOKENS, channels // 2) if kind == K else (TOKENS // 2, channels)
    words = np.empty(shape, np.uint16)
    # Two tables in turn: equal pairs often follow each other, and adding to the same place twice waits for memory.
    partial = np.zeros((classes, 2, MAX_CODES * MAX_CODES), np.uint32)  # [.., b << 8 | a]
    of_column = np.empty(shape[1], i64)
    for column in range(shape[1]):
        of_column[column] = class_of(kind, channels, classes, 2 * column if kind == K else column)
    low, high = np.empty(channels, np.uint8), np.empty(channels, np.uint8)
    least, most = MAX_CODES, -1  # of all codes: memory outside their range is never touched
    for page in range(pages):
        for head in range(heads):
            if raw[page, head]:
                continue
            pair_words(kind, codes[page, head], words)
            code_range(codes[page, head], low, high)
            for c in range(channels):
                least, most = min(least, i64(low[c])), max(most, i64(high[c]))
            for row in range(shape[0]):
                for column in range(0, shape[1], 2):  # a class begins at an even column
                    table = partial[of_column[column]]
                    table[0, words[row, column]] += np.uint32(1)
                    table[1, words[row, column + 1]] += np.uint32(1)
    for index in range(classes):
        for b in range(least, most + 1):
            for a in range(least, most + 1):
                pair = b << 8 | a
                counts[index, a, b] += u64(partial[index, 0, pair]) + u64(partial[index, 1, pair])
