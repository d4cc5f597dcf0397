"""The CPU backend: the functions of ``Backend``, compiled with Numba.

The first call of each function compiles it, once for a machine (the cache is on disk); the logger "kvcomp" says so.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba.core import event

from kvcomp.codec.block import check_channels
from kvcomp.codec.dtypes import UNIT_NUMBERS, dtype_of
from kvcomp.codec.page import Layout
from kvcomp.codec.quantise import HEAD_ZERO, MAX_CODES, SCALE_BITS, Quantised, check_scale, check_values
from kvcomp.errors import InvalidInput
from kvcomp.kernels import NO_STEPS, Array, Books, CacheView, Folding, Steps
from kvcomp.kernels.cpu.attention import attend_tasks, plan_parts
from kvcomp.kernels.cpu.count import count_blocks
from kvcomp.kernels.cpu.decompress import decompress_pages
from kvcomp.kernels.cpu.encode import encode_blocks
from kvcomp.kernels.cpu.folding import fold, turning_tables, unfold
from kvcomp.kernels.cpu.quantise import quantise_blocks, quantise_heads
from kvcomp.kernels.cpu.raw import write_rows
from kvcomp.kernels.cpu.softmax import LOG2_E, merge
from kvcomp.kernels.cpu.tables import book_addresses, describe_books
from kvcomp.spec import CODINGS, PAGE_TOKENS, Coding, Kind, Unit

__all__ = ["attend", "count_pairs", "decompress", "encode_pages", "quantise", "write_raw"]

THREAD_VALUES = 300_000  # values in pages that make a thread worth waking: about 80 microseconds of work


_pool: ThreadPoolExecutor | None = None
_pool_threads = 0


class _CompileNotice(event.Listener):
    """Says once that kernels are being compiled; Numba fires the event only if its disk cache has nothing."""

    def __init__(self) -> None:
        self.said = False

    def on_start(self, event: Any) -> None:
        dispatcher = event.data.get("dispatcher")
        if not self.said and getattr(dispatcher, "__module__", "").startswith("kvcomp.kernels.cpu"):
            self.said = True
            logging.getLogger("kvcomp").warning(
                "compiling the CPU kernels, once on this machine (about half a minute) ..."
            )

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _CompileNotice())  # type: ignore[no-untyped-call]


class _Prepared(NamedTuple):
    """A view as ``attend_tasks`` takes it, which says more of most; all layers of a model and step need theirs."""

    all_pages: int
    before_tail: Array
    """int64 (rows,): most tokens in sinks and pages, less where the tail begins."""
    pages: Array
    valid: Array
    page_count: Array
    units: Array
    books: Array
    steps: Array
    dtype: int
    sinks: Array
    sink_strides: Array
    sink_count: Array
    tail: Array
    tail_strides: Array
    tail_begin: Array

    @classmethod
    def of(cls, view: CacheView) -> _Prepared:
        rows, heads = view.tail_k.shape[:2]
        sinks, tail = (view.sinks_k, view.sinks_v), (view.tail_k, view.tail_v)
        if any(x.size and x.strides[-1] != x.itemsize for x in (*sinks, *tail)):
            raise InvalidInput("the channels of a token in sinks and tail must lie side by side")
        return cls(
            int(view.count.sum()),
            view.sink_count + PAGE_TOKENS * view.count - view.tail_begin,
            np.ascontiguousarray(view.pages, np.int64),
            np.ascontiguousarray(view.valid, np.int32),
            np.ascontiguousarray(view.count, np.int64),
            _unit_numbers(view.units),
            book_addresses([of_kind for of_row in view.books for of_kind in of_row], view.channels[1]).reshape(rows, 4),
            _steps(view.steps, heads),
            dtype_of(view.tail_k.dtype).number,
            _addresses(*sinks),
            _strides(*sinks),
            np.ascontiguousarray(view.sink_count, np.int64),
            _addresses(*tail),
            _strides(*tail),
            np.ascontiguousarray(view.tail_begin, np.int64),
        )


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
    """Compute ``Backend.attend`` in tasks of some pages of a row and KV head, whose partial results are merged."""
    rows, heads, queries, _ = q.shape
    if "cpu" not in view.derived:
        view.derived["cpu"] = _Prepared.of(view)
    prepared: _Prepared = view.derived["cpu"]
    channels, value_channels = view.channels
    tail_end = np.ascontiguousarray(tail_end, np.int64)
    inner, bias = np.ascontiguousarray(q), np.empty((*q.shape[:3], 0), np.float32)
    if folding is not None:
        factor = float(scaling if softcap else scaling * LOG2_E)
        inner, bias = _folded(inner, folding, prepared.before_tail + tail_end.max(), factor, channels)
    first_part = np.empty(rows + 1, np.int64)
    parts = plan_parts(prepared.page_count, prepared.tail_begin, tail_end, first_part)
    partial = np.empty((parts, heads, queries, value_channels), np.float32)
    peak, total = np.empty((parts, heads, queries), np.float32), np.empty((parts, heads, queries), np.float32)
    out, lse = np.empty((*q.shape[:3], value_channels), np.float32), np.empty(q.shape[:3], np.float32)
    arguments: tuple[Any, ...] = (
        np.zeros(1, np.int64),
        first_part,
        inner,
        bias,
        np.zeros((rows, queries), np.int64) if hidden is None else np.ascontiguousarray(hidden, np.int64),
        *prepared[2:],
        tail_end,
        float(scaling),
        float(softcap),
        partial,
        peak,
        total,
    )
    work = prepared.all_pages * PAGE_TOKENS * heads * (channels + value_channels)
    others = min(threads, parts * heads, work // THREAD_VALUES) - 1
    running = [_workers(others).submit(attend_tasks, *arguments) for _ in range(others)] if others > 0 else []
    try:
        attend_tasks(*arguments)
    finally:
        for future in running:
            if not future.cancel():  # one that has not started is not waited for: no task is left
                future.result()
    merge(first_part, partial, peak, total, out, lse)
    if folding is None:
        return out, lse
    result = np.empty((*q.shape[:3], folding.mean.shape[1]), np.float32)
    unfold(out, folding.outputs, folding.mean, result)
    return result, lse


def decompress(
    pages: npt.NDArray[np.int64],
    units: tuple[Unit, Unit],
    k_books: Books,
    v_books: Books,
    out_k: Array,
    out_v: Array,
    steps: Steps = NO_STEPS,
) -> None:
    """``Backend.decompress``, whatever strides the arrays to fill have."""
    heads, _, channels = out_k.shape
    value_channels = out_v.shape[2]
    results = [x if x.strides[-1] == x.itemsize else np.empty(x.shape, x.dtype) for x in (out_k, out_v)]
    decompress_pages(
        np.ascontiguousarray(pages, np.int64),
        _unit_numbers(units),
        book_addresses([k_books, v_books], value_channels),
        _steps(steps, heads),
        heads,
        np.array([channels, value_channels]),
        dtype_of(out_k.dtype).number,
        _addresses(*results),
        _strides(*results),
    )
    for out, result in zip((out_k, out_v), results, strict=True):
        if out is not result:
            out[...] = result


def write_raw(
    pages: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], k: Array, v: Array, units: tuple[Unit, Unit]
) -> None:
    """``Backend.write_raw``."""
    k, v = _rows_of_values(k), _rows_of_values(v)
    _, heads, channels = k.shape
    write_rows(
        np.ascontiguousarray(pages, np.int64),
        np.ascontiguousarray(offsets, np.int64),
        _addresses(k, v),
        _strides(k, v),
        Layout(heads, (channels, channels), units, k.itemsize).first_block,
        heads,
        channels * k.itemsize,
    )


def quantise(x: Array, unit: Unit, scale: float | tuple[float, ...]) -> Quantised:
    """``Backend.quantise``."""
    check_values(x)
    check_channels(x.shape[2])
    check_scale(x, unit, scale)
    x = _rows_of_values(x)
    heads, tokens, channels = x.shape
    pages = tokens // PAGE_TOKENS
    codes = np.empty((pages, heads, PAGE_TOKENS, channels), np.uint8)
    raw = np.empty((pages, heads), np.bool_)
    address, strides = x.__array_interface__["data"][0], np.array(x.strides)
    if isinstance(scale, tuple):
        steps = np.array(scale, np.float32)
        quantise_heads(address, strides, dtype_of(x.dtype).number, steps, codes, raw)
        shape = 1, heads, 1, 1
        return Quantised(codes, steps.reshape(shape), np.full(shape, HEAD_ZERO, np.int32), raw)
    shapes = {
        "block": (heads, 1, 1),
        "channel": (heads, 1, channels),
        "vector": (heads, PAGE_TOKENS, 1),
        "token": (1, PAGE_TOKENS, 1),
    }
    scales, zeros = np.empty((pages, *shapes[unit]), np.float32), np.empty((pages, *shapes[unit]), np.int32)
    quantise_blocks(
        address,
        strides,
        dtype_of(x.dtype).number,
        UNIT_NUMBERS[unit],
        float(scale),
        SCALE_BITS[unit],
        codes,
        _by_block(scales),  # the same memory
        _by_block(zeros),
        raw,
    )
    return Quantised(codes, scales, zeros, raw)


def count_pairs(q: Quantised, kind: Kind, classes: int) -> npt.NDArray[np.uint64]:
    """``Backend.count_pairs``."""
    counts = np.zeros((classes, MAX_CODES, MAX_CODES), np.uint64)
    count_blocks(np.ascontiguousarray(q.codes), np.ascontiguousarray(q.raw), 0 if kind == "K" else 1, counts)
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
    """``Backend.encode_pages``; K and V are read where they lie."""
    k, v = _rows_of_values(k), _rows_of_values(v)
    heads, tokens, channels = k.shape
    widest = max(channels, v.shape[2])
    pages = tokens // PAGE_TOKENS
    offsets = np.zeros(pages + 1, np.int64)
    # No block is larger than raw values, or 9 bits a code with scales and lengths.
    block_bytes = PAGE_TOKENS * widest * max(k.itemsize, 2) + 4 * widest + 6 * PAGE_TOKENS
    buffer = np.empty(pages * heads * 2 * (block_bytes + 8) + pages * 1024 + widest + 64, np.uint8)
    encode_blocks(
        _addresses(k, v),
        _strides(k, v),
        k.itemsize,
        (np.ascontiguousarray(kq.codes), np.ascontiguousarray(vq.codes)),
        (np.ascontiguousarray(kq.raw), np.ascontiguousarray(vq.raw)),
        (_by_block(kq.scale).view(np.uint32), _by_block(vq.scale).view(np.uint32)),
        (_by_block(kq.zero), _by_block(vq.zero)),
        _unit_numbers(units),
        np.array([CODINGS.index(code) for code in coding]),
        np.array(describe_books([k_books, v_books], v.shape[2])),
        buffer,
        offsets,
    )
    total = int(offsets[-1])
    return np.append(buffer[:total], np.zeros(widest, np.uint8)), offsets


def _folded(
    q: npt.NDArray[np.float32], folding: Folding, tokens: npt.NDArray[np.int64], factor: float, channels: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Queries in the coordinates of K', and what is added to their scores, times the factor that scores have."""
    starts, run = turning_tables(folding.speed, int(tokens.max()))
    inner = np.empty((*q.shape[:3], channels), np.float32)
    bias = np.empty((*q.shape[:3], PAGE_TOKENS * len(starts) if folding.speed else 0), np.float32)
    fold(q, np.float32(factor), folding.queries, folding.turning, starts, run, tokens, inner, bias)
    return inner, bias


def _steps(steps: Steps, heads: int) -> npt.NDArray[np.float32]:
    """Steps of K and V, (2, heads); 1 where the unit is not ``head``."""
    return np.array([(1.0,) * heads if of_kind is None else of_kind for of_kind in steps], np.float32)


def _by_block(x: Array) -> Array:
    """Scales or zeros as (pages, heads or 1, units of a block)."""
    return np.ascontiguousarray(x).reshape(*x.shape[:2], x.shape[2] * x.shape[3])


def _unit_numbers(units: tuple[Unit, Unit]) -> npt.NDArray[np.int64]:
    return np.array([UNIT_NUMBERS[unit] for unit in units])


def _addresses(first: Array, second: Array) -> npt.NDArray[np.int64]:
    return np.array([first.__array_interface__["data"][0], second.__array_interface__["data"][0]], np.int64)


def _strides(first: Array, second: Array) -> npt.NDArray[np.int64]:
    return np.array([first.strides, second.strides], np.int64)


def _rows_of_values(x: Array) -> Array:
    """An array whose last axis is contiguous; the others may have any stride."""
    return x if x.strides[-1] == x.itemsize else np.ascontiguousarray(x)


def _workers(threads: int) -> ThreadPoolExecutor:
    """A pool of at least so many threads, made when first needed."""
    global _pool, _pool_threads
    if _pool is None or _pool_threads < threads:
        _pool, _pool_threads = ThreadPoolExecutor(threads, thread_name_prefix="kvcomp"), threads
    return _pool


def _forget_workers() -> None:
    global _pool
    _pool = None  # threads do not survive a fork


os.register_at_fork(after_in_child=_forget_workers)
