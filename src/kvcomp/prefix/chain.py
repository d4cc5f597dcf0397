"""A sequence as a chain of chunks: whole pages of all layers, each chunk a .kvc file of its own under a key that says
what it is.

The first chunk holds the sinks and ``CHUNK_PAGES`` pages, every later one as many pages. The key of a chunk is a hash
of the model, the spec, and all tokens up to its end, so prompts that begin alike share the chunks of what they share.

A page can only be read with the codebooks it was written with. Each chunk has them with it, and the keys after the
first chunk are also a hash of its codebooks, so that a chain never mixes pages of two.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcomp import files
from kvcomp.calibration import Calibration
from kvcomp.errors import CorruptData, InvalidInput
from kvcomp.files.container import Container
from kvcomp.files.header import VERSION, Header
from kvcomp.serve.blobs import Buffer
from kvcomp.spec import PAGE_TOKENS, CodecSpec
from kvcomp.store import KVStore
from kvcomp.store.checks import check_shape
from kvcomp.store.tensors import NAMES

CHUNK_PAGES = 4
CHUNK_TOKENS = CHUNK_PAGES * PAGE_TOKENS


@dataclass(frozen=True)
class Origin:
    """Whose K and V: of which model under which spec; all of it goes into every key and every value.

    model: its fingerprint, plain JSON. layers: how many it has. compressed: those that keep all tokens, by index.
    dtype: the name of its type. calibration: the one that the spec names.
    """

    model: Mapping[str, Any]
    layers: int
    compressed: Sequence[int]
    dtype: str
    spec: CodecSpec
    calibration: Calibration | None = None

    def spec_of(self, chunk: int) -> CodecSpec:
        """The spec in the file of a chunk: the first one has the sinks."""
        return replace(self.spec, sinks=0) if chunk else self.spec

    def end(self, chunk: int) -> int:
        """Tokens up to the end of a chunk."""
        return self.spec.sinks + (chunk + 1) * CHUNK_TOKENS

    def chunks(self, tokens: int) -> int:
        """How many whole chunks so many tokens are."""
        return max(0, tokens - self.spec.sinks) // CHUNK_TOKENS

    def hashes(self, tokens: Sequence[int], chunks: int) -> list[bytes]:
        """For each chunk the hash of all that comes before its end; a hash of the one before and of its own tokens."""
        about = {
            "version": VERSION,
            "chunk": CHUNK_PAGES,
            "model": self.model,
            "layers": self.layers,
            "dtype": self.dtype,
            "spec": json.loads(self.spec.to_json()),
        }
        last, begin, found = _hash(json.dumps(about, sort_keys=True).encode()), 0, []
        for chunk in range(chunks):
            own = np.asarray(tokens[begin : self.end(chunk)], "<i8")
            last, begin = _hash(last + own.tobytes()), self.end(chunk)
            found.append(last)
        return found

    def state_hashes(self, tokens: Sequence[int], lengths: Iterable[int], hashes: Sequence[bytes]) -> Iterator[bytes]:
        """For each length, not less than a chunk, the hash of so many tokens at whose end a state stands.

        hashes: what ``hashes`` says of the same tokens.
        """
        every = np.asarray(tokens, "<i8")
        for length in lengths:
            chunks = self.chunks(length)
            yield _hash(b"state 2" + hashes[chunks - 1] + every[self.end(chunks - 1) : length].tobytes())


def key_of(of_tokens: bytes, books: bytes = b"") -> str:
    """books: what ``books_of`` says of the chain's first chunk; nothing for the first chunk itself, which anyone must
    find.
    """
    return f"kvcomp:prefix:{_hash(of_tokens + books).hex()}"


def header_of(value: Sequence[Buffer]) -> Header:
    """The header of a value given in pieces."""
    return Container(np.frombuffer(b"".join(value), np.uint8)).header


def books_of(header: Header) -> bytes:
    """What tells the codebooks of a chunk from others: the checksums of the sections that hold them."""
    return _hash(json.dumps([layer.sections["books"].digest for layer in header.layers]).encode())


def storable(stores: Mapping[int, KVStore]) -> int:
    """Whole chunks of a sequence that never change any more: those whose codebooks are fixed and whose
    pages are whole.
    """
    pages = []
    for store in stores.values():
        waiting = any(counts is not None and counts.any() for counts in store.rows.pair_counts[0])
        whole = whole_pages(store)
        pages.append(0 if waiting else int(whole.cumprod().sum()))
    return min(pages) // CHUNK_PAGES


def pack(origin: Origin, stores: Mapping[int, KVStore], chunk: int, key: str) -> list[memoryview]:
    """The value of a chunk of a sequence."""
    first, sinks = chunk * CHUNK_PAGES, 0 if chunk else origin.spec.sinks
    parts = {layer: store.slice(first, first + CHUNK_PAGES, sinks) for layer, store in stores.items()}
    return files.pack_stores(parts, origin.spec_of(chunk), origin.layers, binding(origin, key, origin.end(chunk)))


def unpack(origin: Origin, value: Buffer, chunk: int, key: str, backend: str) -> tuple[Header, dict[int, KVStore]]:
    """The layers of a chunk, after every check that there is. Raises CorruptData, UnsupportedVersion or
    LimitExceeded.
    """
    container = Container(np.frombuffer(value, np.uint8))
    header = container.header
    expected = (origin.end(0) if chunk == 0 else CHUNK_TOKENS), 1, list(origin.compressed), origin.spec_of(chunk), ()
    found = header.tokens, header.rows, [layer.layer for layer in header.layers], header.spec, header.states
    if found != expected:
        raise CorruptData("the value is another chunk's, or of another model")
    if header.model != binding(origin, key, origin.end(chunk)):
        raise CorruptData("the value was stored under another key")
    given = {} if origin.calibration is None else origin.calibration.layers
    for layer in header.layers:
        if layer.layer in given:
            try:
                shape = layer.heads, (layer.channels, layer.value_channels)
                check_shape((None, None), given[layer.layer][0], *shape)
            except InvalidInput as error:
                raise CorruptData(f"the value has layers of another shape than the calibration: {error}") from None
    stores = files.load(container, backend, calibration=origin.calibration)
    for store in stores.values():
        if whole_pages(store).tolist() != [True] * CHUNK_PAGES or NAMES[store.dtype] != origin.dtype:
            raise CorruptData("the value holds other pages than a chunk has")
    return header, stores


def join_chunks(chunks: Sequence[KVStore]) -> KVStore:
    """One sequence of a layer's chunks, all with the codebooks of the first. Raises CorruptData if they do not fit each
    other.
    """
    whole = chunks[0]
    for chunk in chunks[1:]:
        for name in ("heads", "channels", "value_channels"):
            if getattr(chunk, name) != getattr(whole, name):
                raise CorruptData(f"the chunks of a sequence have different {name}")
        if [book is None for book in chunk.rows.books[0]] != [book is None for book in whole.rows.books[0]]:
            raise CorruptData("the chunks of a sequence have different codebooks")
    return whole.chain(chunks[1:])


def whole_pages(store: KVStore) -> npt.NDArray[np.bool_]:
    """Which pages of a sequence hold 64 tokens that count."""
    whole: npt.NDArray[np.bool_] = store.rows.valid[0, : store.rows.count[0]] == PAGE_TOKENS
    return whole


def binding(origin: Origin, key: str, end: int) -> dict[str, Any]:
    """What the header of a value says of whose it is. end: tokens up to its own end."""
    return {**origin.model, "prefix": {"key": key, "end": end}}


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=20).digest()
