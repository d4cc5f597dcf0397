"""Compressed layers <-> .kvc files.

A cache that was read from a file uses its pages where they are mapped, so nobody may write into the file as long as the
cache lives; kvcomp never does, it puts a new file in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.calibration import Calibration, LayerCalibration, resolve
from kvcomp.codec.codebook import Codebook
from kvcomp.codec.page import size_of
from kvcomp.disk import read, write
from kvcomp.errors import CorruptData, InvalidInput, LimitExceeded, UnsupportedVersion
from kvcomp.files.container import Container, LayerParts, State, pack
from kvcomp.spec import CodecSpec
from kvcomp.store import KVStore
from kvcomp.store.checks import row_index
from kvcomp.store.join import first_of_tail, last_tokens
from kvcomp.store.padding import padding
from kvcomp.store.rows import Rows
from kvcomp.store.tensors import NAMES, TYPES, as_array, as_tensor

Bytes = npt.NDArray[np.uint8]
States = Mapping[int, Mapping[str, Tensor]]


# Layers <-> files


def save(
    path: str | Path,
    stores: Mapping[int, KVStore],
    spec: CodecSpec,
    model_layers: int,
    model: Mapping[str, Any] | None = None,
    rows: Sequence[int] | None = None,
    states: States | None = None,
) -> None:
    """Write layers to a file that takes the place of what was there.

    Parameters
    ----------
    stores
        The layers by their index among ``model_layers``, all with the same rows and tokens.
    spec
        That of the whole model.
    model
        Its fingerprint, plain JSON.
    rows
        Those to write, all if None.
    states
        Of layers that have a state in place of K and V, the tensors by name, (rows, ...) each.

    Raises
    ------
    InvalidInput, LimitExceeded, OSError
        A file that was there before is then still there, whole.
    """
    write(path, pack_stores(stores, spec, model_layers, model, rows, states))


def pack_stores(
    stores: Mapping[int, KVStore],
    spec: CodecSpec,
    model_layers: int,
    model: Mapping[str, Any] | None = None,
    rows: Sequence[int] | None = None,
    states: States | None = None,
) -> list[memoryview]:
    """The bytes that ``save`` writes, in pieces that follow each other; those of the pages are not copied.

    Raises InvalidInput or LimitExceeded.
    """
    if rows is not None:
        stores = {layer: deepcopy(store) for layer, store in stores.items()}
        for store in stores.values():
            store.select(rows)
    shapes = {(store.batch, store.tokens) for store in stores.values()}
    if len(shapes) != 1 or (0, 0) in shapes:
        raise InvalidInput(
            f"only layers that hold the same rows and tokens, at least one, go into a file, not {sorted(shapes)}: "
            "fill the cache first"
        )
    ((batch, tokens),) = shapes
    parts = [parts_of(store, layer) for layer, store in sorted(stores.items())]
    return pack(spec, model, model_layers, batch, tokens, parts, _states(states or {}, rows))


def open_container(path: str | Path) -> Container:
    """Map a file and read its header.

    Raises CorruptData, UnsupportedVersion, LimitExceeded or OSError, and InvalidInput for a folder, a pipe or an empty
    path.
    """
    return _File(path)


class _File(Container):
    """A container whose errors begin with the path of its file."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        data = read(path)
        with self._named():
            super().__init__(data)

    def layer(self, index: int) -> LayerParts:
        with self._named():
            return super().layer(index)

    def states(self) -> Iterator[State]:
        with self._named():
            yield from super().states()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (CorruptData, LimitExceeded, UnsupportedVersion) as error:
            raise type(error)(f"{self.path}: {error}") from None


def load(
    container: Container,
    backend: str = "cpu",
    layers: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    tokens: int | None = None,
    calibration: Calibration | None = None,
) -> dict[int, KVStore]:
    """Load the layers of a file by their index in the model; only those asked for are read and checked.

    Parameters
    ----------
    layers, rows
        Which ones, all if None.
    tokens
        How many to keep of the first, all if None; they are not compressed anew.
    calibration
        The one that the file's spec names, if it names one.

    Raises
    ------
    CorruptData, LimitExceeded
        If the file is damaged or claims too much.
    InvalidInput
        If the file does not hold what is asked for, or the calibration is missing or another.
    """
    header = container.header
    _, calibration = resolve(header.spec, calibration)
    places = {layer.layer: place for place, layer in enumerate(header.layers)}
    wanted = list(places) if layers is None else list(layers)
    if not set(wanted) <= set(places):
        raise InvalidInput(f"the file holds the layers {', '.join(map(str, places))}, not all of {wanted}")
    stores = {}
    for layer in wanted:
        calibrated = calibration.layer(layer, header.spec) if calibration else None
        spec = header.spec.layer(layer, header.model_layers)
        store = store_of(container.layer(places[layer]), spec, header.tokens, backend, calibrated)
        if rows is not None:
            store.select(rows)
        if tokens is not None:
            store.crop(tokens)
        stores[layer] = store
    return stores


def load_states(container: Container, rows: Sequence[int] | None = None) -> dict[int, dict[str, Tensor]]:
    """The states in a file, by layer and name, (rows, ...) each. Raises CorruptData, or InvalidInput for rows that do
    not exist.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for state in container.states():
        values = as_tensor(state.values, TYPES[state.dtype])
        if rows is not None:
            values = values[row_index(rows, values.shape[0])]
        found.setdefault(state.layer, {})[state.name] = values
    return found


def recent_only(k: Tensor, v: Tensor, tokens: int, spec: CodecSpec) -> KVStore:
    """Make a store of which only the last tokens are known, raw; the positions before them count as padding.

    Parameters
    ----------
    k, v
        (batch, KV heads, last tokens, head_dim) each.
    tokens
        Positions in all.
    spec
        That of the layer.

    Raises
    ------
    InvalidInput
        If they do not fit the spec.
    """
    empty, channels = KVStore(spec), (k.shape[3], v.shape[3])
    padded = padding(channels)
    if padded is not None:
        k, v = padded.key.apply(k), padded.value.apply(v)
    return empty.of(Rows.empty(k.shape[0], start=tokens - k.shape[2]), tokens, (k, v), channels=channels)


# Stores <-> parts


def _states(states: States, rows: Sequence[int] | None) -> list[State]:
    """What a file holds of states. Raises InvalidInput for a dtype that none has."""
    found = []
    for layer, of_layer in sorted(states.items()):
        for name, x in sorted(of_layer.items()):
            if x.dtype not in NAMES:
                raise InvalidInput(f"the state {name!r} of layer {layer} has {x.dtype}: no file can hold it")
            values = as_array(x.cpu())
            values = values if rows is None else values[row_index(rows, len(values))]
            found.append(State(layer, name, NAMES[x.dtype], values))
    return found


def parts_of(store: KVStore, layer: int) -> LayerParts:
    """What a file holds of a layer: pages that rows share once, nothing that no token needs. Pages are not copied."""
    rows = store.rows
    arena, offsets = _arena(store)
    books: dict[int, Codebook] = {}
    row_books = np.full((store.batch, 2), -1, np.int64)
    places: dict[int, int] = {}
    for row, pair in enumerate(rows.books):
        for kind, book in enumerate(pair):
            if book is not None and store.given_books is None:
                books[id(book)] = book
                row_books[row, kind] = places.setdefault(id(book), len(places))
    return LayerParts(
        layer=layer,
        heads=store.heads,
        channels=(store.channels, store.value_channels),
        dtype=NAMES[store.dtype],
        start=rows.starts,
        dropped=rows.dropped,
        sink_count=rows.sink_count,
        page_count=rows.count,
        offsets=offsets,
        valid=np.concatenate([rows.valid[row, :count] for row, count in enumerate(rows.count.tolist())]),
        arena=arena,
        books=list(books.values()),
        row_books=row_books,
        counts=rows.pair_counts,
        sinks=(_sinks(store.sinks_k, rows.sink_count), _sinks(store.sinks_v, rows.sink_count)),
        tail=last_tokens(store, store.tokens - first_of_tail(store)),
    )


@torch.inference_mode(False)
def store_of(
    parts: LayerParts,
    spec: CodecSpec,
    tokens: int,
    backend: str,
    calibrated: LayerCalibration | None = None,
) -> KVStore:
    """Make a store of parts that ``Container.layer`` has checked, whose arrays become the store's.

    Parameters
    ----------
    spec
        That of the layer.
    tokens
        Positions that the layer holds.
    calibrated
        What the layer's calibration has, if the spec has one.

    Raises
    ------
    InvalidInput
        If the calibration is of layers of another shape.
    """
    empty = KVStore(spec, backend, *(calibrated or ()))
    count, capacity = parts.page_count.copy(), int(parts.page_count.max())
    used = np.arange(capacity) < count[:, None]
    arena = parts.arena[0] if parts.arena else np.zeros(0, np.uint8)
    pages, valid = np.zeros(used.shape, np.int64), np.zeros(used.shape, np.int32)
    pages[used] = arena.ctypes.data + parts.offsets
    valid[used] = parts.valid
    given = (None, None) if empty.given_books is None else [narrow for _, narrow in empty.given_books]
    rows = Rows(
        starts=parts.start.copy(),
        dropped=parts.dropped.copy(),
        tail_begin=parts.start + parts.dropped + parts.sink_count + valid.sum(axis=1, dtype=np.int64),
        sink_count=parts.sink_count.copy(),
        count=count,
        pages=pages,
        valid=valid,
        owners=[[arena] * of_row for of_row in count.tolist()],
        books=[
            [book if index < 0 else parts.books[index] for index, book in zip(row, given, strict=True)]
            for row in parts.row_books.tolist()
        ],
        pair_counts=[list(pair) for pair in parts.counts],
    )
    (tail_k, tail_v), sinks = ([as_tensor(x, TYPES[parts.dtype]) for x in both] for both in (parts.tail, parts.sinks))
    store = empty.of(rows, tokens, (tail_k, tail_v), channels=parts.channels)
    for room, held in zip((store.sinks_k, store.sinks_v), sinks, strict=True):
        room[:, :, : held.shape[2]] = held
    return store


def _sinks(held: Tensor, counts: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The sinks of all rows, (rows, heads, most sinks of a row, D); 0 where a row has fewer."""
    sinks = as_array(held)[:, :, : int(counts.max())].copy()
    for row, count in enumerate(counts.tolist()):
        sinks[row, :, count:] = 0
    return sinks


def _arena(store: KVStore) -> tuple[list[Bytes], npt.NDArray[np.int64]]:
    """The pages of all rows without repetition, in as few pieces as they lie in, and where each entry's page begins."""
    rows = store.rows
    places: dict[int, int] = {}
    bases: dict[int, tuple[int, memoryview]] = {}
    runs: list[tuple[Bytes, int, int]] = []
    offsets, at = [], 0
    for owners, addresses, count in zip(rows.owners, rows.pages.tolist(), rows.count.tolist(), strict=True):
        for buffer, address in zip(owners, addresses[:count], strict=True):
            if address not in places:
                if id(buffer) not in bases:
                    bases[id(buffer)] = buffer.ctypes.data, buffer.data
                base, content = bases[id(buffer)]
                begin = address - base
                size = size_of(content, begin, store.heads)
                if runs and runs[-1][0] is buffer and runs[-1][2] == begin:
                    runs[-1] = buffer, runs[-1][1], begin + size
                else:
                    runs.append((buffer, begin, begin + size))
                places[address] = at
                at += size
            offsets.append(places[address])
    pieces = [buffer[begin:end] for buffer, begin, end in runs]
    return [*pieces, np.zeros(store.layout.spare_bytes if pieces else 0, np.uint8)], np.array(offsets, np.int64)
