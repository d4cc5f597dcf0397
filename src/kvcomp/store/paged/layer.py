"""PagedLayer: the pages of one layer, in memory that an engine gave, and the calls of the kernels on them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.calibration import LayerCalibration
from kvcomp.calibration.transform import Affine
from kvcomp.codec.page import Layout, raw_header
from kvcomp.kernels import Array, Books, CacheView, load_backend
from kvcomp.spec import PAGE_TOKENS, CodecSpec
from kvcomp.store.attention import attend_tiles
from kvcomp.store.fused import attend_fused
from kvcomp.store.paged.arena import Room
from kvcomp.store.paged.blocks import Ints, Prefill, Seals, Step
from kvcomp.store.tail import TILE_PAGES
from kvcomp.store.tensors import as_array
from kvcomp.store.training import default_book

Bytes = npt.NDArray[np.uint8]


@dataclass
class Shape:
    """What the pages of a layer hold."""

    heads: int
    """KV heads."""
    channels: int
    """head_dim."""
    dtype: torch.dtype


class PagedLayer:
    """K and V of one layer in pages, by block number.

    Parameters
    ----------
    spec
        Of the layer.
    shape
        Of its K and V.
    blocks
        How many the engine has.
    room
        What the engine gave to all layers.
    memory
        uint8: what of it is the layer's own. Pages that find no room lie in memory of their own until there is some: no
        token is lost.
    calibrated
        Books and transform of the layer, where the spec needs a calibration. Without, the default books are used.
    backend
        ``cpu``, or ``reference`` to check against it.
    """

    def __init__(
        self,
        spec: CodecSpec,
        shape: Shape,
        blocks: int,
        room: Room,
        memory: Bytes,
        calibrated: LayerCalibration | None = None,
        backend: str = "cpu",
    ) -> None:
        self.spec, self.shape = spec, shape
        self.kernels = load_backend(backend)
        self.transform = None if calibrated is None else calibrated.transform
        defaults: tuple[Books, Books] = (default_book(spec.key), None), (default_book(spec.value), None)
        self.books = defaults if calibrated is None else calibrated.books
        self.units = spec.key.unit, spec.value.unit
        self.steps = spec.key.heads, spec.value.heads
        self.layout = Layout(shape.heads, (shape.channels, shape.channels), self.units, shape.dtype.itemsize)
        self.raw_header = raw_header(self.layout)
        self.address = np.zeros(blocks, np.int64)
        """(blocks,) where each block's page lies; 0 if it has none."""
        self._sinks: dict[int, Array] = {}
        """(2, KV heads, sinks, head_dim): K and V of blocks whose first tokens stayed raw, as they lie behind the page.
        The page has the other tokens first, and the last one again in the places that are left.
        """
        self._gathered: tuple[Ints, tuple[Array, Ints]] | None = None
        self._room, self._memory = room, memory
        self._outside: dict[int, Bytes] = {}  # pages by their block, with the bytes that kernels may read behind
        self.outside = 0
        """Bytes of pages that did not fit into the engine's memory."""

    def write(self, step: Step, k: Tensor, v: Tensor) -> None:
        """Put the tokens of a step into raw pages; k, v: (tokens, KV heads, head_dim)."""
        if self.transform is not None:
            places = torch.from_numpy(step.position)
            k, v = _applied(self.transform.key, k, places), _applied(self.transform.value, v, places)
        self.free(step.fresh)
        brief = set(step.seals.blocks.tolist())  # raw until the end of the step: they take no room from what stays
        for block in step.fresh.tolist():
            self._put(block, self.raw_header, self.layout.raw_bytes, block in brief)
        self.kernels.write_raw(self.address[step.block], step.offset, as_array(k), as_array(v), self.units)

    def attend(self, step: Step, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float, out: Tensor) -> None:
        """Fill ``out`` with the attention of a step's tokens, after ``write``.

        Parameters
        ----------
        step
            The step.
        q
            (tokens, heads, head_dim).
        k, v
            The step's own K and V, (tokens, KV heads, head_dim), as ``write`` got them.
        scaling, softcap
            As for ``kvcomp.store.attention.attend``.
        out
            Shaped as q.
        """
        if step.decoding.size:
            decoding = torch.from_numpy(step.decoding) if step.prefills else slice(None)
            out[decoding] = self._decode(step, q[decoding], scaling, softcap).to(out.dtype)
        for prefill in step.prefills:
            part = slice(prefill.begin, prefill.end)
            if prefill.tokens == prefill.end - prefill.begin and not softcap:
                out[part] = _dense(q[part], k[part], v[part], scaling)
            else:
                out[part] = self._prefill(prefill, q[part], scaling, softcap).to(out.dtype)

    def seal(self, seals: Seals) -> None:
        """Encode the raw pages of these blocks, whose 64 tokens are written, and give their room back.

        Pages outside the engine's memory come in as far as there is room now.
        """
        for first in range(0, seals.blocks.size, TILE_PAGES):
            self._seal(*(of[first : first + TILE_PAGES] for of in seals))
        self._bring_in()

    def free(self, blocks: Ints) -> None:
        """Give the room of these blocks' pages back."""
        for block in blocks[self.address[blocks] > 0].tolist():
            page = self._outside.pop(block, None)
            if page is None:
                self._room.give(int(self.address[block]))
            else:
                self.outside -= page.nbytes
            self.address[block] = 0
            if self._sinks.pop(block, None) is not None:
                self._gathered = None

    def values(self, blocks: Ints) -> tuple[Tensor, Tensor]:
        """K and V as held, (KV heads, 64 * blocks, head_dim) each."""
        size = self.shape.heads, blocks.size * PAGE_TOKENS, self.shape.channels
        k, v = torch.empty(size, dtype=self.shape.dtype), torch.empty(size, dtype=self.shape.dtype)
        pages = self.address[blocks]
        self.kernels.decompress(pages, self.units, *self.books, as_array(k), as_array(v), self.steps)
        for index, block in enumerate(blocks.tolist()):
            for x, sinks in zip((k, v), self._sinks.get(block, ()), strict=False):
                page, count = _page(as_array(x), index), sinks.shape[1]
                page[:, count:], page[:, :count] = page[:, : PAGE_TOKENS - count].copy(), sinks
        return k, v

    def _decode(self, step: Step, q: Tensor, scaling: float, softcap: float) -> Tensor:
        rows = len(q)
        (sinks_k, sinks_v), sink_count = self._sinks_of(step.table[:, 0])
        nothing, zero = sinks_k[:, :, :0], np.zeros(rows, np.int64)
        valid = step.valid.copy()
        valid[:, 0] -= sink_count
        view = CacheView(
            pages=self.address[step.table],
            valid=valid,
            count=step.count,
            units=self.units,
            books=[self.books] * rows,
            sinks_k=sinks_k,
            sinks_v=sinks_v,
            sink_count=sink_count,
            tail_k=nothing,
            tail_v=nothing,
            tail_begin=zero,
            steps=self.steps,
        )
        no_tail = np.zeros(1, np.int64)
        return attend_fused(self.kernels, view, self.transform, q[:, :, None], no_tail, scaling, softcap)[0][:, :, 0]

    def _sinks_of(self, leading: Ints) -> tuple[Array, Ints]:
        """K and V of the sinks that lie behind the first pages, (2, rows, KV heads, sinks, head_dim), and how many;
        the same ones as long as the rows are the same.
        """
        if self._gathered is None or not np.array_equal(self._gathered[0], leading):
            self._gathered = leading, self._gather_sinks(leading)
        return self._gathered[1]

    def _gather_sinks(self, leading: Ints) -> tuple[Array, Ints]:
        found = {row: self._sinks[block] for row, block in enumerate(leading.tolist()) if block in self._sinks}
        count = np.array([found[row].shape[2] if row in found else 0 for row in range(leading.size)], np.int64)
        size = 2, leading.size, self.shape.heads, int(count.max(initial=0)), self.shape.channels
        sinks = as_array(torch.zeros(size, dtype=self.shape.dtype))
        for row, of in found.items():
            sinks[:, row] = of
        return sinks, count

    def _prefill(self, prefill: Prefill, q: Tensor, scaling: float, softcap: float) -> Tensor:
        queries = q.transpose(0, 1)[None]
        inner = queries.to(torch.float32) if self.transform is None else self.transform.queries(queries)
        tiles = self._tiles(prefill)
        turning = None if self.transform is None else self.transform.turning(queries)
        if turning is not None:
            turning = turning[0][0], turning[1]
        heads = self.shape.heads
        out = attend_tiles(tiles, heads, prefill.tokens, inner[0], scaling, softcap, turning)[0][None]
        return (out if self.transform is None else self.transform.outputs(out))[0].transpose(0, 1)

    def _tiles(self, prefill: Prefill) -> Iterator[tuple[int, Tensor, Tensor]]:
        for first in range(0, prefill.blocks.size, TILE_PAGES):
            begin = first * PAGE_TOKENS
            k, v = self.values(prefill.blocks[first : first + TILE_PAGES])
            yield begin, k[:, : prefill.tokens - begin], v[:, : prefill.tokens - begin]

    def _seal(self, blocks: Ints, sinks: Ints) -> None:
        k, v = (as_array(x) for x in self.values(blocks))
        raw = {index: _taken(k, v, index, count) for index, count in enumerate(sinks.tolist()) if count}
        tensors = self.spec.key, self.spec.value
        kq, vq = (self.kernels.quantise(x, of.unit, of.scale) for x, of in zip((k, v), tensors, strict=True))
        coding = self.spec.key.coding, self.spec.value.coding
        pages, offsets = self.kernels.encode_pages(k, v, kq, vq, coding, self.units, *self.books)
        self.free(blocks)
        for index, block in enumerate(blocks.tolist()):
            page = pages[offsets[index] : offsets[index + 1]]
            if index not in raw:
                self._put(block, page, page.nbytes)
                continue
            both = np.append(page, raw[index].view(np.uint8))
            self._put(block, both, both.nbytes)
            self._sinks[block] = _array_at(int(self.address[block]) + page.nbytes, raw[index])
            self._gathered = None

    def _put(self, block: int, page: Bytes, size: int, brief: bool = False) -> None:
        """Give a block so many bytes, of which these are the first, outside the engine's memory if briefly."""
        address = None if brief else self._room.take(self._memory, size)
        if address is None:
            outside = np.empty(size + self.shape.channels, np.uint8)
            address, self._outside[block] = outside.ctypes.data, outside
            self.outside += outside.nbytes
        ctypes.memmove(address, page.ctypes.data, page.nbytes)
        self.address[block] = address

    def _bring_in(self) -> None:
        for block, page in list(self._outside.items()):
            size = page.nbytes - self.shape.channels
            address = self._room.take(self._memory, size)
            if address is not None:
                ctypes.memmove(address, page.ctypes.data, size)
                if (sinks := self._sinks.get(block)) is not None:
                    self._sinks[block] = _array_at(address + sinks.ctypes.data - page.ctypes.data, sinks)
                self.address[block] = address
                self.outside -= self._outside.pop(block).nbytes


def _array_at(address: int, like: Array) -> Array:
    """What lies at an address, in the type and shape of another array."""
    held = (ctypes.c_uint8 * like.nbytes).from_address(address)
    return np.frombuffer(memoryview(held), like.dtype).reshape(like.shape)


def _page(x: Array, index: int) -> Array:
    """The tokens of a page, of values (KV heads, 64 * pages, head_dim)."""
    return x[:, index * PAGE_TOKENS :][:, :PAGE_TOKENS]


def _taken(k: Array, v: Array, index: int, count: int) -> Array:
    """Take the first tokens out of a page's values, whose others move up: (2, KV heads, count, head_dim)."""
    first = []
    for x in (_page(k, index), _page(v, index)):
        first.append(x[:, :count].copy())
        x[:, :-count], x[:, -count:] = x[:, count:].copy(), x[:, -1:].copy()
    return np.stack(first)


def _applied(affine: Affine, x: Tensor, places: Tensor) -> Tensor:
    """``Affine.apply`` on (tokens, KV heads, head_dim)."""
    return affine.apply(x.transpose(0, 1), places).transpose(0, 1)


def _dense(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Causal attention of a whole prompt, (tokens, heads, head_dim), over its own K and V."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return out[0].transpose(0, 1)
