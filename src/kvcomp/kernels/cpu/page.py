# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""What a page holds, by address (docs/format.md, sections 2 and 3), and its blocks as pairs of codes."""

from __future__ import annotations

import numpy as np

from kvcomp.codec.dtypes import BFLOAT16, BLOCK, CHANNEL, FIXED, OWN_BOOK, TOKEN
from kvcomp.kernels.cpu.bits import (
    compiled,
    fill,
    halves_at,
    integers_at,
    load_f32,
    load_i32,
    load_u32,
    prefetch,
    widen,
    widen_integers,
)
from kvcomp.kernels.cpu.decode import (
    BITS,
    CLASSES,
    COLUMNS,
    EMPTY,
    FORM,
    LENGTHS,
    MOST_CLASSES,
    SYMBOLS,
    K,
    V,
    build_table,
    decode_huffman,
    of_class,
)
from kvcomp.spec import PAGE_TOKENS as TOKENS

f32, i64 = np.float32, np.int64


@compiled
def load_scales(address, unit, channels, scale, zero):
    """Load scales and zeros from an address, as float32 to two others. Returns the bytes they take.

    There is one for each token or, if the unit is that, channel.
    """
    if unit == BLOCK:
        fill(scale, load_f32(address), TOKENS)
        fill(zero, f32(load_i32(address + 4)), TOKENS)
        return 8
    count = channels if unit == CHANNEL else TOKENS
    widen(BFLOAT16, address, scale, count)
    widen_integers(address + 2 * count, zero, count)
    return 4 * count


@compiled
def block_at(page, index):
    """Address and mode of a block, by its place in the directory."""
    word = i64(load_u32(page + 4 * index))
    return page + (word & ~i64(15)), word & 15


@compiled
def prefetch_block(page, index):
    """Ask for the cache lines of a block while another is decoded.

    Streams are not read in order, so the hardware does not guess.
    """
    begin, end = i64(load_u32(page + 4 * index)), i64(load_u32(page + 4 * index + 4))
    for offset in range(begin & ~i64(15), end & ~i64(15), 64):
        prefetch(page + offset)


@compiled
def token_scales_at(page, heads, k_unit, kind):
    """Address of the token scales of K or V in a page."""
    directory = (4 * (2 * heads + 1) + 15) & ~15
    return page + directory + (4 * TOKENS if kind == V and k_unit == TOKEN else 0)


@compiled
def prefetch_token_scales(page, heads, k_unit, v_unit):
    """Ask for the token scales of K and V, which lie side by side."""
    begin = token_scales_at(page, heads, k_unit, K)
    size = 4 * TOKENS * ((1 if k_unit == TOKEN else 0) + (1 if v_unit == TOKEN else 0))
    for offset in range(0, size, 64):
        prefetch(begin + offset)


@compiled
def book_at(books, slot):
    """Description of one of a row's four books (K default, K own, V default, V own): ``books`` is the address of
    theirs.
    """
    return integers_at(integers_at(books, 4)[slot], COLUMNS)


@compiled
def table_places(books, begin):
    """Place the tables of four books in scratch: ``begin`` is [4 books, 4 classes]. Returns the bytes of all."""
    total = i64(0)
    for slot in range(4):
        book = book_at(books, slot)
        for index in range(book[CLASSES]):
            begin[slot, index] = total
            total += i64(2) << of_class(book, index, BITS)
    return total


@compiled
def build_tables(book, places):
    """Build the decode tables of a book's classes at their addresses."""
    for index in range(book[CLASSES]):
        if of_class(book, index, FORM) == EMPTY:
            continue
        bits, place = of_class(book, index, BITS), places[index]
        table = halves_at(place, i64(1) << bits)
        build_table(of_class(book, index, LENGTHS), of_class(book, index, SYMBOLS), bits, table)


@compiled
def decode_words(codes, mode, kind, channels, books, begin, built, streams, pairs, low):
    """Decode the words of a Huffman block to pairs; all but mode, kind and channels are addresses.

    begin: int64 [4, 4], where the tables of each book's classes lie.
    built: int64 [4], whether they are there; they are built when first needed.
    Returns the slot of the block's book.
    """
    slot = 2 * kind + (1 if mode == OWN_BOOK else 0)
    book, is_built = book_at(books, slot), integers_at(built, 4)
    tables = begin + 8 * MOST_CLASSES * slot
    if not is_built[slot]:
        is_built[slot] = 1
        build_tables(book, integers_at(tables, MOST_CLASSES))
    decode_huffman(codes, kind, channels, book, tables, streams, pairs, low)
    return slot


@compiled
def fixed_width(mode):
    """Bits of a code in a block of fixed width."""
    return mode - FIXED if mode > FIXED else 8
