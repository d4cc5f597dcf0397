"""KVStore: one layer's cache in main memory. Sealed pages are only ever added; recent tokens and sinks are raw.

Tokens have positions from 0 to ``tokens``, the same for all rows of the batch. Left padding is never sealed. A row's
pages depend on its own tokens alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.calibration.transform import Transform
from kvcomp.codec.page import Layout
from kvcomp.errors import BackendUnavailable, InvalidInput
from kvcomp.kernels import Books, CacheView, Steps, load_backend
from kvcomp.spec import CodecSpec
from kvcomp.store import read
from kvcomp.store.checks import check_crop, check_kv, check_more, check_shape, check_starts, check_window, row_index
from kvcomp.store.join import join
from kvcomp.store.memory import Memory, memory_of
from kvcomp.store.padding import Padding, padding
from kvcomp.store.places import place_tail, places
from kvcomp.store.protocol import Store
from kvcomp.store.rows import Rows
from kvcomp.store.seal import seal_row, until_seal
from kvcomp.store.tail import grown_room, steady_room
from kvcomp.store.training import check_books, default_book

# torch's threads do not survive a fork, and the child would wait for them: it computes on one, as DataLoader's do.
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


class KVStore:
    """The K and V of one layer, compressed as they grow.

    Parameters
    ----------
    spec
        A spec of one layer (``CodecSpec.layer``).
    backend
        ``cpu``, or ``reference`` to check against it.
    books
        For K and for V the default book and the one every row has for its own, as a calibration has them for the unit
        ``head``; rows then train none. Without, default books follow from relative scales. The unit ``head`` has none:
        its blocks have a fixed width until a row has trained its own book.
    transform
        What K and V pass before they are held: pages, sinks and tail hold K' and V'.
    sliding_window
        A token sees so many of the last tokens, itself included; None for all. Pages, and sinks, that no later token
        sees are dropped. Not with a transform.
    """

    rows: Rows
    """What there is of each sequence; read by all, written by the store alone."""
    layout: Layout
    """Of the pages, known after the first append."""
    held_channels: tuple[int, int]
    """Channels of K and V as they are held, with padding."""
    tail_base: int
    """Position of the tail's first token."""
    tail_k: Tensor
    """(rows, KV heads, room, channels of K as they are held)."""
    tail_v: Tensor
    """As ``tail_k``, of V."""
    sinks_k: Tensor
    """(rows, KV heads, sinks, channels of K as they are held)."""
    sinks_v: Tensor
    """As ``sinks_k``, of V."""

    def __init__(
        self,
        spec: CodecSpec,
        backend: str = "cpu",
        books: tuple[Books, Books] | None = None,
        transform: Transform | None = None,
        sliding_window: int | None = None,
    ) -> None:
        self.spec = spec
        self.sliding_window = sliding_window
        self.given_transform = transform
        self.transform: Transform | Padding | None = transform
        self.kernels = load_backend(backend)
        self.units = spec.key.unit, spec.value.unit
        self.steps: Steps = spec.key.heads, spec.value.heads
        self.given_books = books
        if books is None:
            self.default_books = default_book(spec.key), default_book(spec.value)
        else:
            check_books(spec, books)
            self.default_books = books[0][0], books[1][0]
        self.tokens = self.batch = self.heads = self.channels = self.value_channels = self.tail_base = 0
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.rows = Rows.empty(0)
        self._view: CacheView | None = None  # forgotten by whatever changes rows or buffers

    def of(
        self,
        rows: Rows,
        tokens: int,
        tail: tuple[Tensor, Tensor],
        sinks: tuple[Tensor, Tensor] | None = None,
        channels: tuple[int, int] | None = None,
    ) -> Self:
        """A store like this one that holds other rows, whose arrays become its own.

        tail: K and V of the last positions, which are raw. sinks: none if None. channels: of K and V without padding;
        None for those of this store. Raises InvalidInput if the calibration is of another shape.
        """
        (batch, heads, recent, _), channels = tail[0].shape, channels or (self.channels, self.value_channels)
        check_shape(self.steps, self.given_transform, heads, channels)
        store = object.__new__(type(self))
        vars(store).update(vars(self))
        store._take_shape(batch, heads, channels, tail[0].dtype)
        store.rows, store.tokens = rows, tokens
        store.tail_k, store.tail_v = tail
        store.tail_base = tokens - recent
        if sinks is not None:
            store.sinks_k, store.sinks_v = sinks
        return store

    def on(self, backend: str) -> Self:
        """An independent store with the same cache, read by another backend; pages are shared."""
        twin = deepcopy(self)
        twin.kernels = load_backend(backend)
        return twin

    # What one append or seal changes

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens at the end, raw until ``seal``.

        k, v: (batch, KV heads, new tokens, head_dim), float32, float16 or bfloat16, on the CPU.
        Raises InvalidInput or BackendUnavailable and leaves the store as it was.
        """
        self._check(k, v)
        if not self.batch:
            self._allocate(k, v)
        new = k.shape[2]
        if self.transform is not None:
            k, v = self.transform.key.apply(k, places(self, self.tokens, new)), self.transform.value.apply(v)
        if self.tokens - self.tail_base + new > self.tail_k.shape[2]:
            self._make_room(k, v)
        else:
            at = self.tokens - self.tail_base
            self.tail_k[:, :, at : at + new] = k.detach()
            self.tail_v[:, :, at : at + new] = v.detach()
        self.tokens += new

    def set_starts(self, starts: Sequence[int]) -> None:
        """Say where each row's real tokens begin. Raises InvalidInput for a row sealed from elsewhere."""
        check_starts(starts, self.batch, self.tokens)
        new, rows = np.asarray(starts, np.int64), self.rows
        moved = new != rows.starts
        if (moved & ((rows.tail_begin > rows.starts) | (new < self.tail_base))).any():
            raise InvalidInput("the padding of a row cannot change once its tokens are compressed")
        place_tail(self, self.tail_k, self.tail_base, new)
        rows.starts[moved] = rows.tail_begin[moved] = new[moved]
        self._view = None

    def seal(self, drops: bool = True) -> None:
        """Compress every whole page of tokens beyond the window. What is sealed never changes.

        drops: whether to drop what a sliding window has left.
        """
        view, self._view = self._view, None  # no view is of rows of which some are sealed, should this be interrupted
        sealed = [seal_row(self, row, self._needed() if drops else 0) for row in range(self.batch)]
        if any(sealed):
            self._trim_tail()
        else:
            self._view = view

    def slide(self, window: int) -> None:
        """Say how many of the last tokens a token sees, of a store that was read from a file."""
        self.sliding_window = window

    def drop(self) -> None:
        """Drop what a sliding window has left."""
        for row in range(self.batch):
            self.rows.drop(row, self._needed())
        self._view = None

    def step(self) -> None:
        """Nothing: what ``seal`` begins, it ends."""

    def drain(self) -> None:
        """Nothing: what ``seal`` begins, it ends."""

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` positions. Raises InvalidInput as ``check_crop``."""
        self.check_crop(tokens)
        self.rows.crop(tokens)
        self.tokens = tokens
        self.tail_base, self._view = min(self.tail_base, tokens), None

    def check_crop(self, tokens: int) -> None:
        """Raise InvalidInput unless ``crop`` can keep so many tokens."""
        check_crop(tokens, self.tokens)
        check_window(self, tokens)

    @torch.inference_mode(False)
    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Make the batch of these rows, which may repeat; sealed pages are shared. Raises InvalidInput for rows that do
        not exist.
        """
        index = row_index(rows, self.batch)
        chosen = torch.from_numpy(index)
        self.tail_k, self.tail_v, self.sinks_k, self.sinks_v = (
            x.index_select(0, chosen) for x in (self.tail_k, self.tail_v, self.sinks_k, self.sinks_v)
        )
        self.rows, self.batch, self._view = self.rows.select(index), index.size, None

    def join(self, others: Sequence[Self], tokens: int | None = None) -> Self:
        """One batch of these rows and those of others (``kvcomp.store.join``)."""
        return join((self, *others), tokens)

    def slice(self, first: int, last: int, sinks: int) -> Self:
        """The pages ``first`` to ``last`` of each row behind so many sinks, as a store of their own;
        nothing is copied.
        """
        rows = self.rows.slice(first, last, sinks)
        tail = self.tail_k[:, :, :0], self.tail_v[:, :, :0]
        return self.of(rows, int(rows.tail_begin.max()), tail, (self.sinks_k, self.sinks_v))

    def behind(self, pages: int) -> Self:
        """What each row holds behind its first pages, the tail included, at the positions it has; nothing is copied."""
        return self.of(self.rows.behind(pages), self.tokens, self._tail(), (self.sinks_k, self.sinks_v))

    def chain(self, others: Sequence[Self]) -> Self:
        """The pages of this slice and of those that follow it, with this one's codebooks and the last one's tail."""
        rows, last = Rows.chained([self.rows, *(store.rows for store in others)]), (self, *others)[-1]
        recent = last.tokens - int(last.rows.tail_begin.max())
        k, v = (x[:, :, x.shape[2] - recent :] for x in last._tail())
        return self.of(rows, int(rows.tail_begin.max()) + recent, (k, v), (self.sinks_k, self.sinks_v))

    def to_gpu(self, device: torch.device) -> Store:
        """A copy in the memory of a GPU. Raises BackendUnavailable or LimitExceeded."""
        from kvcomp.store.gpu.copies import to_device  # not before there is a GPU

        return to_device(self, device)

    def to_main_memory(self) -> KVStore:
        """This store."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """An independent store; sealed pages, which never change, are shared."""
        if not self.batch:
            twin = object.__new__(type(self))
            vars(twin).update(vars(self))
            return twin
        twin = self.of(self.rows.select(np.arange(self.batch)), self.tokens, self._tail())
        twin.tail_k, twin.tail_v = self.tail_k.clone(), self.tail_v.clone()
        twin.sinks_k, twin.sinks_v = self.sinks_k.clone(), self.sinks_v.clone()
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled: pages are known by their addresses in this process."""
        raise InvalidInput("a KVStore cannot be pickled: save the cache in a .kvc file")

    # What readers need

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """(rows,) position of each row's first real token."""
        return self.rows.starts

    @property
    def compressed(self) -> bool:
        """Whether any row has a sealed page."""
        return bool(self.rows.count.any())

    def books(self, row: int) -> tuple[Books, Books]:
        """The default and own codebooks of K and of V of a row."""
        (key, value), (own_key, own_value) = self.default_books, self.rows.books[row]
        return (key, own_key), (value, own_value)

    def can_attend(self, queries: int) -> bool:
        """Whether all of the last tokens are in the tail: a crop may have left some in pages."""
        return queries <= self.tokens - int(self.rows.tail_begin.max()) + 1

    def attend(self, q: Tensor, scaling: float, softcap: float = 0.0, sink_logits: Tensor | None = None) -> Tensor:
        """Fused attention of the last tokens, decoding the sealed pages on the fly; q: (batch, heads, queries,
        head_dim).
        """
        return read.attend(self, q, scaling, softcap, sink_logits)

    def until_seal(self) -> int:
        """Tokens until a row compresses a page."""
        return until_seal(self)

    def view(self) -> CacheView:
        """What attention kernels read; the same view until rows or buffers change."""
        if self._view is None:
            self._view = read.view(self)
        return self._view

    def tiles(self, row: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """A row's tokens in order: position of the first, and K and V as held, (KV heads, tokens, head_dim) each."""
        return read.tiles(self, row)

    def tile(self, row: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """What the pages ``first`` to ``last`` of a row hold, (KV heads, tokens, head_dim) each."""
        return read.tile(self, row, first, last)

    def dense(self, first: int = 0) -> tuple[Tensor, Tensor]:
        """K and V from a position on as attention sees them, (batch, KV heads, tokens, head_dim) in the dtype; what was
        dropped, and padding once a row is sealed, is 0.
        """
        padding = np.where(self.rows.tail_begin > self.starts, np.maximum(0, self.rows.begins - first), 0).tolist()
        return read.undone(self.transform, *self.held(first), padding, places(self, first, self.tokens - first))

    def held(self, first: int = 0) -> tuple[Tensor, Tensor]:
        """The same as it is held: K' and V' where there is a calibration, with padding where there is any."""
        return read.held(self, first)

    def memory(self) -> Memory:
        """Bytes by part; a test holds them against what is allocated."""
        return memory_of(self) if self.batch else Memory()

    def _needed(self) -> int:
        """The first position that the next token sees."""
        return 0 if self.sliding_window is None else max(0, self.tokens + 1 - self.sliding_window)

    def _tail(self) -> tuple[Tensor, Tensor]:
        held = self.tokens - self.tail_base
        return self.tail_k[:, :, :held], self.tail_v[:, :, :held]

    def _check(self, k: Tensor, v: Tensor) -> None:
        check_kv(k, v)
        if k.device.type != "cpu" or v.device.type != "cpu":
            raise BackendUnavailable(f"K on {k.device}, V on {v.device}: move them to the CPU, or use backend='gpu'")
        if self.batch:
            check_more(k, v, (self.batch, self.heads, self.channels, self.value_channels), self.dtype)
        else:
            check_shape(self.steps, self.given_transform, k.shape[1], (k.shape[3], v.shape[3]))

    @torch.inference_mode(False)  # the buffers outlive the mode they were filled in
    def _take_shape(self, batch: int, heads: int, channels: tuple[int, int], dtype: torch.dtype) -> None:
        """Take the shape and dtype of K and V, as ``check_shape`` has found it, and make room for sinks."""
        self.batch, self.heads, self.dtype = batch, heads, dtype
        self.channels, self.value_channels = channels
        padded = padding(channels)
        if padded is not None:
            self.transform = padded
        self.held_channels = channels if padded is None else (padded.key.held, padded.value.held)
        self.layout = Layout(heads, self.held_channels, self.units, dtype.itemsize)
        self.sinks_k, self.sinks_v = self._empty(self.spec.sinks)
        self._view = None

    def _empty(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Room for K and V of so many tokens."""
        shapes = ((self.batch, self.heads, tokens, held) for held in self.held_channels)
        k, v = (torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes)
        return k, v

    @torch.inference_mode(False)
    def _allocate(self, k: Tensor, v: Tensor) -> None:
        """Begin with the first tokens' shape and dtype."""
        self._take_shape(k.shape[0], k.shape[1], (k.shape[3], v.shape[3]), k.dtype)
        self.tail_k, self.tail_v = self._empty(0)
        own = (None, None) if self.given_books is None else [of_kind[1] for of_kind in self.given_books]
        self.rows, self.tail_base = Rows.empty(self.batch, own), 0

    def _steady_room(self) -> int:
        return steady_room(self.spec, self.batch, self.compressed)

    @torch.inference_mode(False)
    def _make_room(self, k: Tensor, v: Tensor) -> None:
        """Move the tail to a buffer with room for the new tokens, and put them there."""
        base = min(int(self.rows.tail_begin.min()), self.tokens) if self.compressed else self.tail_base
        kept, new = self.tokens - base, k.shape[2]
        self._move_tail(base, kept, grown_room(kept, new, self._steady_room()))
        self.tail_k[:, :, kept : kept + new], self.tail_v[:, :, kept : kept + new] = k.detach(), v.detach()

    @torch.inference_mode(False)
    def _trim_tail(self) -> None:
        """Give back what a prefill took for tokens that are now sealed: all of it, as nothing here holds the tail's
        address.
        """
        base = int(self.rows.tail_begin.min())
        kept = self.tokens - base
        if self.tail_k.shape[2] > self._steady_room() >= kept and self.compressed:
            self._move_tail(base, kept, kept)

    def _move_tail(self, base: int, kept: int, room: int) -> None:
        """Let the tail begin at a later position, in a buffer of its own with this much room."""
        first, last = base - self.tail_base, self.tokens - self.tail_base
        k, v = self._empty(room)
        k[:, :, :kept], v[:, :, :kept] = self.tail_k[:, :, first:last], self.tail_v[:, :, first:last]
        self.tail_k, self.tail_v, self.tail_base, self._view = k, v, base, None  # at the end: Ctrl-C may come before
