"""The container: compressed layers <-> the bytes of a .kvc file (docs/format.md, section 7).

Pages are in a file what they are in memory, so reading one is checking it. Everything that a header claims is checked
against the size of the file before memory is allocated for it, and every page before a kernel sees it. What
``Container.layer`` gives back can be decoded without another check.

Checksums are XXH3: zlib's CRC-32 alone takes longer than ``cat`` needs for the whole file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64

from kvcomp.codec import codebook
from kvcomp.codec.codebook import Codebook
from kvcomp.codec.dtypes import DTYPES
from kvcomp.codec.page import Layout
from kvcomp.codec.quantise import MAX_CODES
from kvcomp.errors import CorruptData, LimitExceeded
from kvcomp.files.check import check_pages
from kvcomp.files.header import (
    ALIGNMENT,
    DROPPED,
    MAX_HEADER,
    PREFIX,
    STATES,
    Header,
    LayerHeader,
    Section,
    header_text,
    padded,
    read_header,
    seal,
)
from kvcomp.spec import PAGE_TOKENS, CodecSpec, TensorSpec

FREE_PLACES = 1 << 22  # places in a page table that need no pages to fill them

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Longs = npt.NDArray[np.int64]
Counts = npt.NDArray[np.uint32] | None  # of pairs, (classes, n, n)


@dataclass(frozen=True)
class LayerParts:
    """One compressed layer as arrays."""

    layer: int
    """Its index in the model."""
    heads: int
    channels: tuple[int, int]
    """head_dim of K and of V, without padding."""
    dtype: str
    """A name in ``DTYPES``."""
    start: Longs
    """(rows,): position of each row's first real token."""
    dropped: Longs
    """(rows,): how many of its first tokens a sliding window has left."""
    sink_count: Longs
    """(rows,)"""
    page_count: Longs
    """(rows,)"""
    offsets: Longs
    """(entries,): where the pages of each row in turn begin in the arena."""
    valid: npt.NDArray[np.int32]
    """(entries,): how many of a page's tokens count."""
    arena: Sequence[Bytes]
    """Pieces that follow each other: the pages without gaps, then D spare bytes. Nothing at all without pages."""
    books: Sequence[Codebook]
    """The codebooks that rows have for their own."""
    row_books: Longs
    """(rows, 2): which of ``books`` K and V of a row have, -1 for none."""
    counts: Sequence[Sequence[Counts]]
    """For each row the pair counts of K and V, (classes, n, n), where no book is trained yet."""
    sinks: tuple[Array, Array]
    """K and V, (rows, heads, tokens, D) each."""
    tail: tuple[Array, Array]
    """The last tokens of all rows, in the shapes of ``sinks``."""


@dataclass(frozen=True)
class State:
    """One tensor of a layer's state, as linear attention has it in place of K and V."""

    layer: int
    """The layer's index in the model."""
    name: str
    dtype: str
    """A name in ``DTYPES``."""
    values: Array
    """(rows, ...)"""


# Writing


def pack(
    spec: CodecSpec,
    model: Mapping[str, Any] | None,
    model_layers: int,
    rows: int,
    tokens: int,
    layers: Sequence[LayerParts],
    states: Sequence[State] = (),
) -> list[memoryview]:
    """The bytes of a file, in pieces that follow each other; those of the pages are not copied.

    Parameters
    ----------
    spec, model_layers
        Of the whole model.
    model
        Its fingerprint, plain JSON; None for tensors without a model.
    rows, tokens
        Of every layer.
    layers
        In the order of their indices.
    states
        In the order of their layers and names.

    Raises
    ------
    LimitExceeded, CorruptData
        For what could not be read.
    """
    described, body, at = [], list[memoryview](), 0

    def section(pieces: Sequence[memoryview]) -> list[int | str]:
        """Put a section behind those before it; where it lies, its size and its checksum."""
        nonlocal body, at
        begin, size, digest = at, sum(piece.nbytes for piece in pieces), xxh3_64()
        for piece in pieces:
            digest.update(piece)
        body += [*pieces, memoryview(bytes(-size % ALIGNMENT))]
        at += size + -size % ALIGNMENT
        return [begin, size, digest.hexdigest()]

    dropped = any(parts.dropped.any() for parts in layers)
    for parts in layers:
        sections = {name: section(pieces) for name, pieces in _sections(parts, dropped).items()}
        described.append({**_described(parts), "sections": sections})
    found = [
        {
            "layer": state.layer,
            "name": state.name,
            "dtype": state.dtype,
            "shape": list(state.values.shape),
            "section": section(_pieces([state.values])),
        }
        for state in states
    ]
    if body:
        body.pop()  # nothing follows that would need the padding
    content = {
        "spec": json.loads(spec.to_json()),
        "model": model,
        "model_layers": model_layers,
        "rows": rows,
        "tokens": tokens,
        "layers": described,
        **({"states": found} if found else {}),
    }
    flags = (STATES if found else 0) | (DROPPED if dropped else 0)
    text = json.dumps(content, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER:
        raise LimitExceeded(f"the header of {len(layers)} layers takes {len(text)} bytes, at most {MAX_HEADER} can be")
    size = sum(piece.nbytes for piece in body)
    header = read_header(text, flags, size)  # what would be refused when read is not written
    for head, parts in zip(header.layers, layers, strict=True):
        _check_rows(header, head, parts.start, parts.dropped, parts.sink_count, parts.page_count, parts.valid)
    return [memoryview(seal(text, flags)), *body]


def _described(parts: LayerParts) -> dict[str, Any]:
    """What the header says of a layer, but for where its sections lie."""
    return {
        "layer": parts.layer,
        "heads": parts.heads,
        "channels": parts.channels[0] if parts.channels[0] == parts.channels[1] else list(parts.channels),
        "dtype": parts.dtype,
        "sinks": parts.sinks[0].shape[2],
        "recent": parts.tail[0].shape[2],
        "entries": parts.offsets.size,
        "books": len(parts.books),
    }


def _sections(parts: LayerParts, dropped: bool) -> dict[str, list[memoryview]]:
    rows = [parts.start, parts.sink_count, parts.page_count, *parts.row_books.T]
    for of_kind in zip(*parts.counts, strict=True):
        rows.append(np.array([0 if counts is None else counts.shape[1] for counts in of_kind]))
    if dropped:
        rows.append(parts.dropped)
    books = [np.frombuffer(book.to_bytes(), np.uint8) for book in parts.books]
    pieces: dict[str, Sequence[Array]] = {
        "pages": parts.arena,
        "table": [parts.offsets.astype("<i8"), parts.valid.astype("<i4")],
        "rows": [np.stack(rows, axis=1).astype("<i8")],
        "books": books,
        "counts": [counts.astype("<u4") for pair in parts.counts for counts in pair if counts is not None],
        "sinks": parts.sinks,
        "tail": parts.tail,
    }
    return {name: _pieces(of) for name, of in pieces.items()}


def _pieces(arrays: Sequence[Array]) -> list[memoryview]:
    return [np.ascontiguousarray(x).data.cast("B") for x in arrays if x.size]


# Reading


class Container:
    """The bytes of a file with its header read. A layer's sections are checked when the layer is asked for.

    Parameters
    ----------
    data
        uint8; it must not change as long as pages of it are in use.

    Raises
    ------
    UnsupportedVersion
        For a newer file.
    CorruptData, LimitExceeded
        For bytes that are wrong.
    """

    def __init__(self, data: Bytes) -> None:
        self.data = data
        text, flags = header_text(data)
        self.begin = padded(PREFIX.size + len(text))
        _check_padding(data, PREFIX.size + len(text), self.begin)
        self.header = read_header(text, flags, data.size - self.begin)

    def layers(self) -> Iterator[LayerParts]:
        """Read all layers, each checked when its turn comes. Raises CorruptData or LimitExceeded."""
        return (self.layer(index) for index in range(len(self.header.layers)))

    def layer(self, index: int) -> LayerParts:
        """Read the layer at this place in the file, after all checks; its pages stay where they are.

        Raises CorruptData or LimitExceeded.
        """
        header, head = self.header, self.header.layers[index]
        spec = header.spec.layer(head.layer, header.model_layers)
        start, sink_count, page_count, k_book, v_book, k_side, v_side, *rest = (
            self._section(index, "rows").view("<i8").reshape(header.rows, header.row_fields).T
        )
        dropped = rest[0] if rest else np.zeros_like(start)
        row_books, sides = np.stack([k_book, v_book], axis=1), np.stack([k_side, v_side], axis=1)
        table = self._section(index, "table")
        offsets, valid = table[: 8 * head.entries].view("<i8"), table[8 * head.entries :].view("<i4")
        _check_rows(header, head, start, dropped, sink_count, page_count, valid)
        tensors, classes = (spec.key, spec.value), (spec.key.classes, spec.value.classes)
        books = _read_books(self._section(index, "books").tobytes(), head.books)
        _check_books(books, row_books, tensors)
        counts = _read_counts(self._section(index, "counts"), sides, classes)
        dtype = DTYPES[head.dtype].array
        units = spec.key.unit, spec.value.unit
        given = np.array([spec.calibration is not None and tensor.coding == "huffman" for tensor in tensors])
        if (given & (row_books >= 0)).any():
            raise CorruptData("a row names a codebook of the file, and a calibration has those of all rows")
        defaults = units[0] != "head" or bool(given[0]), units[1] != "head" or bool(given[1])
        layout = Layout(head.heads, head.held_channels, units, dtype.itemsize, defaults)
        arena, digest = self._bytes(head.sections["pages"]), xxh3_64()
        begin, which = np.unique(offsets, return_inverse=True)
        try:
            own = check_pages(arena, begin, layout, digest.update)[which]
        finally:  # if the checksum is wrong, that is what there is to say
            self._verify(head.sections["pages"], f"'pages' of layer {head.layer}", digest.hexdigest())
        missing = own & (row_books < 0)[np.repeat(np.arange(header.rows), page_count)]
        if (missing & ~given).any():  # a calibration has the books of all rows
            raise CorruptData("a block needs the sequence's own codebook, and there is none")
        return LayerParts(
            head.layer,
            head.heads,
            (head.channels, head.value_channels),
            head.dtype,
            start,
            dropped,
            sink_count,
            page_count,
            offsets,
            valid,
            [arena],
            books,
            row_books,
            counts,
            self._raw(index, "sinks", head.sinks),
            self._raw(index, "tail", head.recent),
        )

    def states(self) -> Iterator[State]:
        """Read all states, each checked when its turn comes. Raises CorruptData."""
        for head in self.header.states:
            values = self._copy(head.section, f"{head.name!r} of layer {head.layer}").view(DTYPES[head.dtype].array)
            yield State(head.layer, head.name, head.dtype, values.reshape(head.shape))

    def _raw(self, index: int, name: str, tokens: int) -> tuple[Array, Array]:
        """K and V of a section of raw tokens, (rows, heads, tokens, D) each."""
        head, rows = self.header.layers[index], self.header.rows
        values = self._section(index, name).view(DTYPES[head.dtype].array)
        shapes = [(rows, head.heads, tokens, channels) for channels in head.held_channels]
        of_keys = rows * head.heads * tokens * head.held_channels[0]
        return values[:of_keys].reshape(shapes[0]), values[of_keys:].reshape(shapes[1])

    def _section(self, index: int, name: str) -> Bytes:
        layer = self.header.layers[index]
        return self._copy(layer.sections[name], f"{name!r} of layer {layer.layer}")

    def _copy(self, section: Section, name: str) -> Bytes:
        """A copy of the checked bytes of a section: nobody can change it after it was checked."""
        data = self._bytes(section).copy()
        self._verify(section, name, xxh3_64(data.data).hexdigest())
        return data

    def _bytes(self, section: Section) -> Bytes:
        begin = self.begin + section.offset
        return self.data[begin : begin + section.size]

    def _verify(self, section: Section, name: str, digest: str) -> None:
        """Raise CorruptData if this is not the checksum of a section, or what follows it is not zero."""
        if digest != section.digest:
            raise CorruptData(f"the checksum of the section {name} is wrong: the file is damaged")
        end = self.begin + section.offset + section.size
        _check_padding(self.data, end, min(padded(end), self.data.size))


def _check_padding(data: Bytes, begin: int, end: int) -> None:
    if data[begin:end].any():
        raise CorruptData("bytes between sections are not zero: the file is damaged")


def _check_rows(
    header: Header, head: LayerHeader, start: Longs, dropped: Longs, sink_count: Longs, page_count: Longs, valid: Array
) -> None:
    """Check that each row's tokens are its sinks, pages and part of the tail, so that readers stay in range."""
    wrong = (start < 0) | (start > header.tokens) | (sink_count < 0) | (sink_count > head.sinks)
    wrong |= (dropped < 0) | (dropped > header.tokens - start)
    wrong |= (page_count < 0) | (page_count > head.entries)
    sinks = np.where(dropped > 0, 0, header.spec.sinks)
    wrong |= ((page_count > 0) | (dropped > 0)) & (sink_count != sinks)
    if wrong.any() or page_count.sum() != head.entries:
        raise CorruptData(f"a row of layer {head.layer} has a start, sinks or pages that cannot be")
    if ((valid < 1) | (valid > PAGE_TOKENS)).any():
        raise CorruptData(f"a page of layer {head.layer} counts other than 1 to {PAGE_TOKENS} tokens")
    before = np.concatenate([[0], np.cumsum(valid, dtype=np.int64)])
    last = np.cumsum(page_count)
    tail_begin = start + dropped + sink_count + before[last] - before[last - page_count]
    if ((tail_begin > header.tokens) | (tail_begin < header.tokens - head.recent)).any():
        raise CorruptData(f"the sinks, pages and recent tokens of a row of layer {head.layer} are not its tokens")
    if header.rows * int(page_count.max()) > 4 * head.entries + FREE_PLACES:
        raise LimitExceeded(f"a page table of {header.rows} rows and {page_count.max()} pages is mostly empty")


def _read_books(data: bytes, count: int) -> list[Codebook]:
    """Books one after the other."""
    books, at = [], 0
    for _ in range(count):
        book, at = codebook.read(data, at)
        books.append(book)
    if at != len(data):
        raise CorruptData("the section of codebooks is longer than the codebooks")
    return books


def _check_books(books: Sequence[Codebook], row_books: Longs, tensors: Sequence[TensorSpec]) -> None:
    if ((row_books < -1) | (row_books >= len(books))).any():
        raise CorruptData("a row names a codebook that does not exist")
    for kind, tensor in enumerate(tensors):
        for index in np.unique(row_books[:, kind]):
            if index >= 0 and (books[index].classes, books[index].limit) != (tensor.classes, tensor.limit):
                raise CorruptData("a codebook has another number of classes, or longer codes, than the spec")


def _read_counts(data: Bytes, sides: Longs, classes: tuple[int, int]) -> list[list[Counts]]:
    """Pair counts (classes, n, n) of the rows and kinds whose n is not 0, one after the other."""
    if ((sides < 0) | (sides > MAX_CODES)).any() or int((sides**2 * np.array(classes)).sum()) * 4 != data.size:
        raise CorruptData("the section of pair counts has another size than the rows say")
    values, at = data.view("<u4"), 0
    counts: list[list[Counts]] = []
    for row in sides.tolist():
        counts.append([])
        for n, of_kind in zip(row, classes, strict=True):
            size = of_kind * n * n
            counts[-1].append(values[at : at + size].reshape(of_kind, n, n) if n else None)
            at += size
    return counts
