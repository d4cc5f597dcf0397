"""From raw tokens to pages on the device: the kernels of encode.cu in their order, and the memory between them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvcomp.codec.quantise import MAX_CODES
from kvcomp.kernels.cuda import launch
from kvcomp.kernels.cuda.layout import EncodeArguments, Encoder, PageBuild
from kvcomp.spec import PAGE_TOKENS, TensorSpec
from kvcomp.store.gpu.arena import Chunk


class Encoding:
    """Some pages of a row on their way: ``quantise``, ``count_pairs`` if books are to be trained, ``measure``,
    ``pack``.

    k and v are (KV heads, 64 x pages, head_dim); steps are float32 (KV heads,) where the unit is ``head``.
    """

    def __init__(
        self,
        on: launch.Launcher,
        build: PageBuild,
        tensors: tuple[TensorSpec, TensorSpec],
        steps: tuple[Tensor | None, Tensor | None],
        k: Tensor,
        v: Tensor,
    ) -> None:
        self._on, self._build = on, build
        heads, tokens, channels = k.shape
        pages = tokens // PAGE_TOKENS
        blocks = pages, heads
        self._held: list[Tensor | None] = [k, v, *steps]

        def room(*shape: int, dtype: torch.dtype) -> Tensor:
            made = torch.empty(shape, dtype=dtype, device=k.device)
            self._held.append(made)
            return made

        a = self._arguments = EncodeArguments(pages=pages, heads=heads)
        self.counts: list[Tensor] = []  # int32 (classes, 256, 256), of K and of V
        for kind, (x, tensor) in enumerate(zip((k, v), tensors, strict=True)):
            t = a.tensors[kind]
            t.values, (t.head, t.token) = x.data_ptr(), x.stride()[:2]
            of_heads = steps[kind]
            t.steps = 0 if of_heads is None else of_heads.data_ptr()
            t.relative_scale = 0.0 if isinstance(tensor.scale, tuple) else tensor.scale
            t.codes = room(*blocks, PAGE_TOKENS, channels, dtype=torch.uint8).data_ptr()
            t.scale = room(*blocks, build.most_units, dtype=torch.float32).data_ptr()
            t.zero = room(*blocks, build.most_units, dtype=torch.int32).data_ptr()
            t.raw = room(*blocks, dtype=torch.uint8).data_ptr()
            t.token_range = room(pages, PAGE_TOKENS, 2, dtype=torch.float32).data_ptr()
            self.counts.append(room(tensor.classes, MAX_CODES, MAX_CODES, dtype=torch.int32).zero_())
            t.counts = self.counts[-1].data_ptr()
        a.modes = room(*blocks, 2, dtype=torch.uint8).data_ptr()
        a.sizes = room(*blocks, 2, dtype=torch.int32).data_ptr()
        a.lengths = room(*blocks, 2, 64, dtype=torch.int16).data_ptr()
        self.offsets = room(pages + 1, dtype=torch.int64)  # of the pages in their chunk, and where the last one ends
        a.offsets = self.offsets.data_ptr()

    def quantise(self) -> None:
        launch.quantise(self._on, self._build, self._arguments)

    def count_pairs(self) -> None:
        """Fill ``counts``."""
        launch.count_pairs(self._on, self._build, self._arguments)

    def measure(self, books: Tensor, cursor: Tensor) -> None:
        """Find the sizes of the pages and their ``offsets`` from a chunk's cursor on, which moves to their end.

        books is the row of ``DeviceBooks.encoding``.
        """
        self._held += books, cursor
        self._arguments.cursor = cursor.data_ptr()
        for kind, tensor in enumerate(self._arguments.tensors):
            tensor.books = books.data_ptr() + 2 * kind * ctypes.sizeof(Encoder)
        launch.measure(self._on, self._build, self._arguments)

    def pack(self, chunk: Chunk) -> Tensor:
        """Write the pages. Returns their addresses, int64 (pages,)."""
        self._arguments.out = chunk.memory.data_ptr()
        launch.pack(self._on, self._build, self._arguments)
        addresses: Tensor = self.offsets[:-1] + chunk.memory.data_ptr()
        return addresses
