"""The oracle: the same functions as the fast kernels, written to be read, in float64 where it matters. No speed.

Its decoder follows docs/format.md alone, so it is also the independent check of the fast encoders.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcomp.codec import block, patched
from kvcomp.codec.dtypes import DEFAULT_BOOK, FIXED, OWN_BOOK, PATCHED, RAW
from kvcomp.codec.page import (
    Layout,
    assemble,
    blocks_of,
    fixed_mode,
    fixed_zero,
    size_of,
    token_scales_of,
    width_of,
    words_bytes,
)
from kvcomp.codec.quantise import HEAD_ZERO, MAX_CODES, Array, Quantised, quantise, round_to, to_float32
from kvcomp.errors import CorruptData
from kvcomp.kernels import NO_STEPS, Books, CacheView, Folding, Steps
from kvcomp.spec import KINDS, PAGE_TOKENS, Coding, Kind, Unit

__all__ = ["attend", "count_pairs", "decompress", "encode_pages", "quantise", "write_raw"]


def count_pairs(q: Quantised, kind: Kind, classes: int) -> npt.NDArray[np.uint64]:
    """``Backend.count_pairs``, block by block."""
    counts = np.zeros((classes, MAX_CODES, MAX_CODES), np.uint64)
    for page, head in np.argwhere(~q.raw):
        counts += block.count_pairs(q.codes[page, head], kind, classes)
    return counts


def encode_pages(
    k: Array,
    v: Array,
    kq: Quantised,
    vq: Quantised,
    coding: tuple[Coding, Coding],
    units: tuple[Unit, Unit],
    k_books: Books,
    v_books: Books,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """``Backend.encode_pages``, block by block."""
    heads, tokens, _ = k.shape
    layout = Layout(heads, (k.shape[2], v.shape[2]), units, k.dtype.itemsize)
    pages = []
    for page in range(tokens // PAGE_TOKENS):
        rows = slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
        token_scales, blocks = [], []
        for kind, x, q, unit, code, books in zip(
            KINDS, (k, v), (kq, vq), units, coding, (k_books, v_books), strict=True
        ):
            if unit == "token":
                token_scales.append(block.scale_bytes(q.scale[page].ravel(), q.zero[page].ravel()))
            for head in range(heads):
                if q.raw[page, head]:
                    blocks.append((RAW, np.ascontiguousarray(x[head, rows]).tobytes()))
                else:
                    mode, body = _encode_codes(q.codes[page, head], kind, unit, code, books)
                    here = layout.block_scales(KINDS.index(kind))
                    scales = block.scale_bytes(q.scale[page, head], q.zero[page, head]) if here else b""
                    blocks.append((mode, scales + body))
        pages.append(assemble(layout, token_scales, blocks))
    offsets = np.cumsum([0, *map(len, pages)], dtype=np.int64)
    return np.frombuffer(b"".join(pages) + bytes(layout.spare_bytes), np.uint8).copy(), offsets


def _encode_codes(
    codes: npt.NDArray[np.uint8], kind: Kind, unit: Unit, coding: Coding, books: Books
) -> tuple[int, bytes]:
    if coding == "huffman":
        for mode, book in ((OWN_BOOK, books[1]), (DEFAULT_BOOK, books[0])):
            if book is not None and block.covers(book, codes, kind):
                return mode, block.encode_huffman(codes, kind, book)
    signed = codes.astype(np.int64)
    if unit == "head":
        width = block.signed_width(codes)
        codes = codes + np.uint8(fixed_zero(width) - HEAD_ZERO & 255)
        signed += HEAD_ZERO
    else:
        width = block.fixed_width(codes)
    body = block.encode_fixed(codes, kind, width)
    if coding == "patched":
        smaller = patched.encode_patched(signed, kind)
        if len(smaller) < len(body):
            return PATCHED, smaller
    return fixed_mode(width), body


def write_raw(
    pages: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], k: Array, v: Array, units: tuple[Unit, Unit]
) -> None:
    """``Backend.write_raw``, token by token."""
    _, heads, channels = k.shape
    first, row = Layout(heads, (channels, channels), units, k.itemsize).first_block, channels * k.itemsize
    for token, (address, offset) in enumerate(zip(pages.tolist(), offsets.tolist(), strict=True)):
        for index, values in enumerate([*k[token], *v[token]]):
            ctypes.memmove(address + first + (index * PAGE_TOKENS + offset) * row, values.tobytes(), row)


def page_bytes(address: int, heads: int) -> bytes:
    """Copy the page at an address of this process."""
    return ctypes.string_at(address, size_of(ctypes.string_at(address, words_bytes(heads)), 0, heads))


def decode_page(
    page: bytes, layout: Layout, books: tuple[Books, Books], dtype: np.dtype[Any], steps: Steps = NO_STEPS
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Decode a page to what attention sees: raw values, or (code + zero) * scale in float32.

    Parameters
    ----------
    page
        Its bytes.
    layout
        What the sizes in it depend on.
    books
        For K and V the default book and the sequence's own.
    dtype
        Of raw values.
    steps
        Of the heads, for K and V, where the unit is ``head``.

    Returns
    -------
    k, v
        (heads, 64, channels of K or V) each.

    Raises
    ------
    CorruptData
        If the page does not fit the layout, or needs a book that is missing.
    """
    k, v = (np.empty((layout.heads, PAGE_TOKENS, channels), np.float32) for channels in layout.channels)
    for index, (mode, data) in enumerate(blocks_of(page, layout)):
        kind, head = divmod(index, layout.heads)
        of_kind = steps[kind]
        step = None if of_kind is None else of_kind[head]
        (k, v)[kind][head] = _decode_block(page, mode, data, layout, kind, books[kind], dtype, step)
    return k, v


def _decode_block(
    page: bytes,
    mode: int,
    data: bytes,
    layout: Layout,
    kind: int,
    books: Books,
    dtype: np.dtype[Any],
    step: float | None,
) -> npt.NDArray[np.float32]:
    shape = PAGE_TOKENS, layout.channels[kind]
    if mode == RAW:
        return to_float32(np.frombuffer(data, dtype, shape[0] * shape[1]).reshape(shape))
    count = layout.block_scales(kind)
    shared = token_scales_of(page, layout, kind)
    if step is not None:
        zeros = 0 if mode == PATCHED else HEAD_ZERO if mode < FIXED else fixed_zero(width_of(mode))
        scale, zero = np.full(1, step, np.float32), np.full(1, zeros, np.int32)
    else:
        scale, zero = shared if shared is not None else block.scales_from(data, count)
    body = data[block.scales_size(count) if count else 0 :]
    codes: npt.NDArray[Any]
    if mode == PATCHED:
        codes = patched.decode_patched(body, shape[1], KINDS[kind])
    elif mode >= FIXED:
        codes = block.decode_fixed(body, shape[1], KINDS[kind], width_of(mode))
    else:
        book = books[0] if mode == DEFAULT_BOOK else books[1]
        if book is None:
            raise CorruptData(
                f"a block needs the {'default' if mode == DEFAULT_BOOK else 'own'} codebook, and there is none"
            )
        codes = block.decode_huffman(body, shape[1], KINDS[kind], book)
    across = (1, -1) if layout.units[kind] == "channel" else (-1, 1)
    return (codes + zero.reshape(across)).astype(np.float32) * scale.reshape(across)


def decompress(
    pages: npt.NDArray[np.int64],
    units: tuple[Unit, Unit],
    k_books: Books,
    v_books: Books,
    out_k: Array,
    out_v: Array,
    steps: Steps = NO_STEPS,
) -> None:
    """``Backend.decompress``, page by page."""
    layout = Layout(out_k.shape[0], (out_k.shape[2], out_v.shape[2]), units, out_k.dtype.itemsize)
    for index, address in enumerate(pages.tolist()):
        k, v = decode_page(page_bytes(address, layout.heads), layout, (k_books, v_books), out_k.dtype, steps)
        rows = slice(index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS)
        out_k[:, rows], out_v[:, rows] = round_to(k, out_k.dtype), round_to(v, out_v.dtype)


def attend(
    q: npt.NDArray[np.float32],
    view: CacheView,
    tail_end: npt.NDArray[np.int64],
    scaling: float,
    softcap: float = 0.0,
    threads: int = 1,
    folding: Folding | None = None,
    hidden: npt.NDArray[np.int64] | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Compute ``Backend.attend`` in float64, written as the formula."""
    rows, heads, queries, _ = q.shape
    layout = Layout(heads, view.channels, view.units, view.tail_k.dtype.itemsize)
    inner = q.astype(np.float64) if folding is None else np.einsum("rhqc,hcd->rhqd", q, folding.queries, dtype=float)
    out = np.zeros((*q.shape[:3], layout.channels[1]))
    lse = np.full(q.shape[:3], -np.inf, np.float32)
    for row in range(rows):
        k, v = (
            [to_float32(view.sinks_k[row, :, : view.sink_count[row]])],
            [to_float32(view.sinks_v[row, :, : view.sink_count[row]])],
        )
        for address, tokens in zip(view.pages[row, : view.count[row]].tolist(), view.valid[row].tolist(), strict=False):
            page_k, page_v = decode_page(
                page_bytes(address, heads), layout, view.books[row], view.tail_k.dtype, view.steps
            )
            k.append(page_k[:, :tokens])
            v.append(page_v[:, :tokens])
        for i in range(queries):
            seen = slice(0 if hidden is None else int(hidden[row, i]), None)
            tail = slice(int(view.tail_begin[row]), max(int(view.tail_begin[row]), int(tail_end[i])))
            keys = np.concatenate([*k, to_float32(view.tail_k[row, :, tail])], axis=1).astype(np.float64)
            values = np.concatenate([*v, to_float32(view.tail_v[row, :, tail])], axis=1).astype(np.float64)
            places = np.arange(keys.shape[1])[seen]
            if places.size:
                score = scaling * np.einsum("hd,htd->ht", inner[row, :, i], keys[:, seen])
                if folding is not None and folding.speed:
                    turned = folding.turned(q[row : row + 1, :, i : i + 1], keys.shape[1])[0, :, 0]
                    score += scaling * turned[:, seen]
                if softcap:
                    score = softcap * np.tanh(score / softcap)
                peak = score.max(axis=1, keepdims=True)
                weight = np.exp(score - peak)
                total = weight.sum(axis=1, keepdims=True)
                out[row, :, i] = np.einsum("ht,htd->hd", weight / total, values[:, seen])
                lse[row, :, i] = (peak + np.log(total))[:, 0]
    if folding is not None:
        out = np.einsum("rhqc,hcd->rhqd", out, folding.outputs, dtype=float) + folding.mean[:, None]
    return out.astype(np.float32), lse
