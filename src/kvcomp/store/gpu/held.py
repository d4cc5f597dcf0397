"""What one layer's cache holds in the memory of a GPU, and how it is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.calibration.transform import Transform
from kvcomp.errors import InvalidInput
from kvcomp.kernels.cuda import launch
from kvcomp.kernels.cuda.layout import (
    BFLOAT16_128,
    AttendArguments,
    AttendBuild,
    DecompressArguments,
    PageBuild,
    attend_build,
)
from kvcomp.spec import PAGE_TOKENS, CodecSpec
from kvcomp.store.gpu.books import DeviceBooks
from kvcomp.store.gpu.rows import Row, Table
from kvcomp.store.gpu.tail import Tail
from kvcomp.store.memory import Memory
from kvcomp.store.tail import TILE_PAGES
from kvcomp.store.tensors import NAMES


class Held(ABC):
    """The rows of a batch on one device: sinks, pages and tail of each, and the books of the pages."""

    spec: CodecSpec
    transform: Transform | None
    tokens: int
    batch: int
    heads: int
    channels: int
    dtype: torch.dtype
    device: torch.device
    rows: list[Row]
    tail: Tail
    table: Table
    sinks_k: Tensor  # (rows, KV heads, sinks, head_dim), as sinks_v
    sinks_v: Tensor
    device_books: DeviceBooks
    _on: launch.Launcher
    _page_build: PageBuild
    _builds: dict[tuple[str, bool], AttendBuild]
    _steps: tuple[Tensor | None, Tensor | None]  # float32 (KV heads,) of K and of V where the unit is ``head``
    _under_way: list[Iterator[None]]  # for each row that is being compressed what is left to do
    _sealed: torch.cuda.Event | None  # after which the pages that were sealed last may be read

    @abstractmethod
    def proceed(self) -> None:
        """Do what the host has to do next about what is being compressed; it waits until the device has come so far."""

    def finish(self) -> None:
        """Do all that the host has to do about what is being compressed."""
        while self._under_way:
            self.proceed()

    def settle(self) -> None:
        """``finish``, and let the current stream wait until the pages are there."""
        self.finish()
        if self._sealed is not None:
            torch.cuda.current_stream(self.device).wait_event(self._sealed)
            self._sealed = None

    @property
    def compressed(self) -> bool:
        """Whether any row has a sealed page."""
        self.finish()
        return any(row.valid for row in self.rows)

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Position of each row's first real token."""
        self.finish()
        return np.array([row.start for row in self.rows], np.int64)

    @property
    def tail_base(self) -> int:
        """Position of the tail's first token."""
        self.finish()
        return self.tail.base

    @property
    def tail_k(self) -> Tensor:
        """(rows, KV heads, room, head_dim)"""
        self.finish()
        return self.tail.k

    @property
    def tail_v(self) -> Tensor:
        """(rows, KV heads, room, head_dim)"""
        self.finish()
        return self.tail.v

    def until_seal(self) -> int:
        """1: what a row has sealed is known after waiting for the device."""
        return 1

    def tiles(self, row: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """A row's tokens in order: position of the first, and K and V as held, (KV heads, tokens, head_dim) each."""
        self.finish()
        of, position = self.rows[row], self.rows[row].start
        if of.sinks:
            yield position, self.sinks_k[row, :, : of.sinks], self.sinks_v[row, :, : of.sinks]
            position += of.sinks
        for first in range(0, len(of.valid), TILE_PAGES):
            k, v = self.tile(row, first, min(first + TILE_PAGES, len(of.valid)))
            yield position, k, v
            position += k.shape[1]
        base, last = self.tail.base, self.tokens - self.tail.base
        for at in range(position - base, last, TILE_PAGES * PAGE_TOKENS):
            part = slice(at, min(at + TILE_PAGES * PAGE_TOKENS, last))
            yield base + at, self.tail.k[row, :, part], self.tail.v[row, :, part]

    def can_attend(self, queries: int) -> bool:
        """Whether all of the last ``queries`` tokens lie in the tail, as ``attend`` needs: a crop may have left some in pages."""
        self.finish()
        return queries <= self.tokens - max(row.tail_begin for row in self.rows) + 1

    def attend(self, q: Tensor, scaling: float, softcap: float = 0.0) -> Tensor:
        """Fused attention of the last tokens, decoding the sealed pages on the fly.

        q: (batch, heads, queries, head_dim), on the device; query i is at position ``tokens - queries + i`` and sees what is not after it.
        Returns (batch, heads, queries, head_dim) in q's type. Raises InvalidInput if q does not fit the store.
        """
        rows, heads, new, channels = q.shape
        if rows != self.batch or channels != self.channels or heads % self.heads or not self.can_attend(new):
            raise InvalidInput(
                f"queries {tuple(q.shape)} do not fit a cache of {self.batch} rows and {self.heads} KV heads"
            )
        self.settle()
        inner = (q.detach() if self.transform is None else self.transform.queries(q)).contiguous()
        if inner.dtype not in NAMES or inner.device != self.device:
            raise InvalidInput(
                f"queries must be float32, float16 or bfloat16 on {self.device}, not {q.dtype} on {q.device}"
            )
        build = self._attend_build(NAMES[inner.dtype], bool(softcap))
        queries = heads // self.heads * new
        most = PAGE_TOKENS * self.table.capacity + self.tail.room  # which changes only when the table or the tail moves
        splits = launch.splits_for(self._on, build, rows, self.heads, queries, most)
        out = torch.empty_like(inner)
        lse = torch.empty((rows, self.heads, queries), dtype=torch.float32, device=self.device)
        parts = splits if splits > 1 else 0
        partial = torch.empty((parts, *lse.shape, channels), dtype=torch.float32, device=self.device)
        peaks = torch.empty((2, parts, *lse.shape), dtype=torch.float32, device=self.device)
        a = AttendArguments(rows=rows, heads=self.heads, queries=queries, new_tokens=new, capacity=self.table.capacity)
        a.scaling, a.softcap, a.ones = scaling, softcap, BFLOAT16_128
        a.q, a.out, a.lse, a.partial_out = inner.data_ptr(), out.data_ptr(), lse.data_ptr(), partial.data_ptr()
        if parts:
            a.partial_peak, a.partial_total = peaks[0].data_ptr(), peaks[1].data_ptr()
        a.pages, a.books = self.table.pages.data_ptr(), self.device_books.decoding.data_ptr()
        a.valid, a.count, a.sink_count, a.tail_begin = self.table.addresses
        a.tail_tokens = self.tail.held.data_ptr()  # the low half of a number below 2^31
        a.k_steps, a.v_steps = (0 if steps is None else steps.data_ptr() for steps in self._steps)
        raw = (a.sinks_k, self.sinks_k), (a.sinks_v, self.sinks_v), (a.tail_k, self.tail.k), (a.tail_v, self.tail.v)
        for described, x in raw:
            described.values = x.data_ptr()
            described.row, described.head, described.token, _ = x.stride()
        launch.attend(self._on, build, a, splits)
        return (out if self.transform is None else self.transform.outputs(out)).to(q.dtype).view(q.shape)

    def tile(self, row: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """What the pages ``first`` to ``last`` of a row hold, K' and V' where there is a transform: (KV heads, tokens, head_dim)."""
        self.settle()
        k = torch.empty((self.heads, (last - first) * PAGE_TOKENS, self.channels), dtype=self.dtype, device=self.device)
        v = torch.empty_like(k)
        a = DecompressArguments(page_count=last - first, heads=self.heads, ones=BFLOAT16_128)
        a.pages = self.table.pages[row, first:last].data_ptr()
        a.books = self.device_books.decoding[row].data_ptr()
        a.k_steps, a.v_steps = (0 if steps is None else steps.data_ptr() for steps in self._steps)
        a.out_k, a.out_v = k.data_ptr(), v.data_ptr()
        a.k_head, a.k_token, a.v_head, a.v_token = (*k.stride()[:2], *v.stride()[:2])
        launch.decompress(self._on, self._page_build, a)
        valid = self.rows[row].valid[first:last]
        if all(tokens == PAGE_TOKENS for tokens in valid):
            return k, v
        used = torch.tensor([t < tokens for tokens in valid for t in range(PAGE_TOKENS)], device=self.device)
        return k[:, used], v[:, used]

    def dense(self) -> tuple[Tensor, Tensor]:
        """K and V as attention sees them, (batch, KV heads, tokens, head_dim) in the dtype; padding is 0 once a row is sealed."""
        self.settle()
        shape = self.batch, self.heads, self.tokens, self.channels
        k, v = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "KV")
        for index, row in enumerate(self.rows):
            begin = self.tail_base if row.tail_begin == row.start else row.tail_begin
            pages = self.tile(index, 0, len(row.valid)) if row.valid else None
            first = row.start + row.sinks
            for i, (out, sinks, tail) in enumerate(((k, self.sinks_k, self.tail_k), (v, self.sinks_v, self.tail_v))):
                out[index, :, row.start : first] = sinks[index, :, : row.sinks]
                if pages is not None:
                    out[index, :, first : row.tail_begin] = pages[i]
                out[index, :, begin:] = tail[index, :, begin - self.tail_base : self.tokens - self.tail_base]
        if self.transform is None:
            return k, v
        k, v = self.transform.key.undo(k), self.transform.value.undo(v)
        for index, row in enumerate(self.rows):
            if row.tail_begin > row.start:
                k[index, :, : row.start] = v[index, :, : row.start] = 0
        return k, v

    def memory(self) -> Memory:
        """Bytes by part, pages as one (``codes``); waits for the device."""
        if not self.batch:
            return Memory()
        self.settle()
        chunks = {id(chunk): chunk for row in self.rows for chunk in row.chunks}
        used = sum(int(chunk.cursor) for chunk in chunks.values())
        values = 2 * self.heads * self.channels
        held = sum(self.tokens - row.start for row in self.rows)
        pages = sum(len(row.valid) for row in self.rows)
        return Memory(
            codes=used,
            spare=sum(chunk.memory.nbytes for chunk in chunks.values()) - used,
            table=self.table.nbytes,
            table_entries=12 * pages,
            books=self.device_books.nbytes,
            window=self.tail.nbytes,
            sinks=self.sinks_k.nbytes + self.sinks_v.nbytes,
            sealed_values=sum(row.tail_begin - row.start - row.sinks for row in self.rows) * values,
            values=held * values,
            dense=held * values * self.dtype.itemsize,
        )

    @property
    def places(self) -> tuple[Any, ...]:
        """Where everything lies that attention and the next token need: while it is the same, what was recorded of a step can be repeated."""
        held = self.tail.k, self.tail.v, self.tail.held, self.sinks_k, self.sinks_v
        device = self.table.pages, self.table.numbers, self.device_books.decoding
        return (*(x.data_ptr() for x in (*held, *device)), self.tail.room, self.table.capacity, self.batch)

    def _attend_build(self, query: str, softcap: bool) -> AttendBuild:
        key = query, softcap
        if key not in self._builds:
            self._builds[key] = attend_build(
                self.spec, self.channels, NAMES[self.dtype], query, softcap, self._on.machine
            )
        return self._builds[key]
