"""The header of a .kvc file: what lies where, as JSON behind a short prefix (docs/format.md, section 7).

Reading one allocates nothing but the parsed JSON: all that it claims is checked against the size of the file first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64

from kvcomp.codec.block import held_channels
from kvcomp.codec.dtypes import DTYPES
from kvcomp.errors import CorruptData, InvalidInput, LimitExceeded, UnsupportedVersion
from kvcomp.spec import CodecSpec

MAGIC = b"\x89KVC\r\n\x1a\n"
VERSION = 1
STATES = 1  # the flag of a file whose header has the field "states"
DROPPED = 2  # of one whose rows say how many tokens a sliding window has left
PREFIX = struct.Struct("<8sHHIQ")  # magic, version, flags, bytes of the header, checksum
ALIGNMENT = 64
SECTIONS = "pages", "table", "rows", "books", "counts", "sinks", "tail"
ROW_FIELDS = 7  # and one more with the flag ``DROPPED``
ENTRY_BYTES = 12

MAX_HEADER = 1 << 20  # parsed JSON takes some twenty times its bytes
MAX_DEPTH = 16
MAX_DIMENSIONS, MAX_NAME = 8, 64  # of a state
LIMITS = {"model_layers": 1 << 12, "rows": 1 << 16, "tokens": 1 << 27, "heads": 1 << 16}
# Memory of Python's objects, in bytes, upwards; of heads the commands have some.
ROW_OBJECTS, BOOK_OBJECTS, HEAD_OBJECTS, FREE_OBJECTS = 1 << 10, 1 << 11, 1 << 8, 1 << 26
FREE_SINKS = 1 << 28  # bytes of room for sinks that are not there yet

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Section:
    """Where a part of a layer lies."""

    offset: int
    """Bytes from the end of the padded header."""
    size: int
    digest: str
    """XXH3 of 64 bits, in hexadecimal digits."""


@dataclass(frozen=True)
class LayerHeader:
    """What the header says of a layer."""

    layer: int
    heads: int
    channels: int
    """head_dim of K."""
    value_channels: int
    """head_dim of V."""
    dtype: str
    sinks: int
    """Tokens in the section ``sinks``."""
    recent: int
    """Tokens in the section ``tail``."""
    entries: int
    """Entries of the page table."""
    books: int
    sections: Mapping[str, Section]

    @property
    def held_channels(self) -> tuple[int, int]:
        """Channels of K and V in pages and raw tokens."""
        return held_channels(self.channels), held_channels(self.value_channels)

    @property
    def token_bytes(self) -> int:
        """Bytes of a raw token of one row, K and V."""
        return self.heads * sum(self.held_channels) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StateHeader:
    """What the header says of one tensor of a layer's state, as linear attention has it in place of K and V."""

    layer: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    """(rows, ...)"""
    section: Section


@dataclass(frozen=True)
class Shapes:
    """What the layers of a model hold of one sequence, but for how many tokens."""

    attention: Mapping[int, tuple[int, int, int, str]]
    """Of each layer with K and V: KV heads, head_dim of K, head_dim of V, dtype."""
    linear: Mapping[int, Mapping[str, tuple[tuple[int, ...], str]]]
    """Of each layer with linear attention, by the name of the state: its shape and dtype."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    spec: CodecSpec
    model: Mapping[str, Any] | None
    """The model's fingerprint, which whoever made it compares; None for tensors without a model."""
    model_layers: int
    """Layers of the model, of which the file holds some."""
    rows: int
    tokens: int
    """Positions of every layer, left padding included."""
    layers: tuple[LayerHeader, ...]
    states: tuple[StateHeader, ...] = ()
    dropped: bool = False
    """Whether rows say how many tokens a sliding window has left."""

    @property
    def row_fields(self) -> int:
        """Numbers of a row."""
        return ROW_FIELDS + self.dropped

    @property
    def shapes(self) -> Shapes:
        """What to compare with those of a model before anything is read."""
        linear: dict[int, dict[str, tuple[tuple[int, ...], str]]] = {}
        for state in self.states:
            linear.setdefault(state.layer, {})[state.name] = state.shape[1:], state.dtype
        attention = {x.layer: (x.heads, x.channels, x.value_channels, x.dtype) for x in self.layers}
        return Shapes(attention, linear)


def seal(text: bytes, flags: int) -> bytes:
    """A header behind its prefix, padded."""
    plain = PREFIX.pack(MAGIC, VERSION, flags, len(text), 0)[:-8]
    head = plain + xxh3_64(plain + text).intdigest().to_bytes(8, "little") + text
    return head.ljust(padded(len(head)), b"\0")


def padded(size: int) -> int:
    """Bytes of a part of the file with the zeros behind it."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def header_text(data: Bytes) -> tuple[bytes, int]:
    """The header's JSON, with its checksum verified, and the flags.

    Raises UnsupportedVersion for a newer file, CorruptData or LimitExceeded for bytes that are wrong.
    """
    if data.size < PREFIX.size:
        raise CorruptData(f"{data.size} bytes are too few for a .kvc file: it is cut off, or something else")
    prefix = data[: PREFIX.size].tobytes()
    magic, version, flags, length, digest = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise CorruptData("this is no .kvc file: it does not begin with the bytes that one begins with")
    if version != VERSION:
        raise UnsupportedVersion(
            f"this .kvc file has version {version}, this kvcomp reads {VERSION}: use a newer kvcomp"
        )
    unknown = flags & ~(STATES | DROPPED)
    if unknown:
        raise UnsupportedVersion(f"this .kvc file has the unknown flags {unknown:#x}: use a newer kvcomp")
    if length > MAX_HEADER:
        raise LimitExceeded(f"the header claims {length} bytes, at most {MAX_HEADER} can be")
    if padded(PREFIX.size + length) > data.size:
        raise CorruptData("the file ends in its header: it is cut off")
    text = data[PREFIX.size : PREFIX.size + length].tobytes()
    if xxh3_64(prefix[:-8] + text).intdigest() != digest:
        raise CorruptData("the checksum of the header is wrong: the file is damaged")
    return text, flags


def read_header(text: bytes, flags: int, available: int) -> Header:
    """Read the header's JSON, with ``available`` bytes behind the header. Raises as ``header_text``."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise CorruptData(f"the header is no JSON: {error}") from None
    if not _is_flat(content, MAX_DEPTH):
        raise CorruptData(f"the header is nested more than {MAX_DEPTH} deep")
    with_states = ("states",) if flags & STATES else ()
    dropped = bool(flags & DROPPED)
    _check_fields(content, ("spec", "model", "model_layers", "rows", "tokens", "layers", *with_states), "the header")
    try:
        spec = CodecSpec.from_json(json.dumps(content["spec"]))
    except (InvalidInput, RecursionError, OverflowError) as error:
        raise CorruptData(f"the spec in the header is wrong: {error}") from None
    model, layers = content["model"], content["layers"]
    if not isinstance(model, dict | None) or not isinstance(layers, list) or not layers:
        raise CorruptData("the header needs a model, an object or null, and a list of layers")
    model_layers = _number(content, "model_layers", 1)
    rows, tokens = _number(content, "rows", 1), _number(content, "tokens", 0)
    found: list[LayerHeader] = []
    at = 0
    for entry in layers:
        layer, at = _read_layer(entry, spec, rows, tokens, ROW_FIELDS + dropped, at)
        if not (found[-1].layer if found else -1) < layer.layer < model_layers:
            raise CorruptData(f"layer {layer.layer} is not in order among {model_layers} layers")
        found.append(layer)
    try:
        for layer in found:
            of_layer = spec.layer(layer.layer, model_layers)
            for tensor in (of_layer.key, of_layer.value):
                if tensor.heads is not None and len(tensor.heads) != layer.heads:
                    raise CorruptData(f"the spec has steps for {len(tensor.heads)} heads, a layer has {layer.heads}")
    except InvalidInput as error:
        raise CorruptData(f"the spec in the header does not fit its layers: {error}") from None
    states = _read_states(content["states"], model_layers, rows, at) if with_states else ()
    at = states[-1].section.offset + states[-1].section.size if states else at
    objects = sum(rows * ROW_OBJECTS + x.books * BOOK_OBJECTS + x.heads * HEAD_OBJECTS for x in found)
    if at != available:
        raise CorruptData(
            f"the sections end at byte {at} behind the header, the file at {available}: it is cut off or damaged"
        )
    if objects > FREE_OBJECTS + available:
        raise LimitExceeded(
            f"{rows} rows in {len(found)} layers with their heads and codebooks are too many for a file of this size"
        )
    if sum(rows * spec.sinks * layer.token_bytes for layer in found) > FREE_SINKS + available:
        raise LimitExceeded(f"room for {spec.sinks} sinks of {rows} rows is too much for a file of this size")
    return Header(spec, model, model_layers, rows, tokens, tuple(found), states, dropped)


def _read_layer(
    entry: Any, spec: CodecSpec, rows: int, tokens: int, row_fields: int, at: int
) -> tuple[LayerHeader, int]:
    """The header of a layer whose first section must begin at ``at``, and where the next layer must begin."""
    names = "layer", "heads", "channels", "dtype", "sinks", "recent", "entries", "books", "sections"
    _check_fields(entry, names, "a layer in the header")
    heads = _number(entry, "heads", 1)
    channels, value_channels = _read_channels(entry)
    sinks, recent = _number(entry, "sinks", 0), _number(entry, "recent", 0)
    entries, books = _number(entry, "entries", 0), _number(entry, "books", 0)
    try:
        held = held_channels(channels) + held_channels(value_channels)
    except InvalidInput as error:
        raise CorruptData(f"a layer in the header is wrong: {error}") from None
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CorruptData(f"a layer in the header has the unknown dtype {entry['dtype']!r}")
    if sinks > spec.sinks or recent > tokens:
        raise CorruptData(
            f"a layer has {sinks} sinks and {recent} recent tokens, of {spec.sinks} and {tokens} possible"
        )
    token = rows * heads * held * DTYPES[entry["dtype"]].itemsize
    exact = {
        "table": entries * ENTRY_BYTES,
        "rows": 8 * row_fields * rows,
        "sinks": sinks * token,
        "tail": recent * token,
    }
    _check_fields(entry["sections"], SECTIONS, "the sections of a layer")
    sections: dict[str, Section] = {}
    for name in SECTIONS:
        sections[name] = _read_section(entry["sections"][name], name, padded(at), exact.get(name))
        at = padded(at) + sections[name].size
    layer = _number(entry, "layer", 0)
    return LayerHeader(
        layer, heads, channels, value_channels, entry["dtype"], sinks, recent, entries, books, sections
    ), at


def _read_section(place: Any, name: str, begin: int, exact: int | None) -> Section:
    """The place of a section that must begin there, and have this size if it is known."""
    if not isinstance(place, list) or len(place) != 3 or not isinstance(place[2], str):
        raise CorruptData(f"the section {name!r} needs an offset, a size and a checksum")
    offset, size = _whole(place[0], "offset", 0), _whole(place[1], "size", 0)
    if offset != begin or exact not in (None, size):
        raise CorruptData(f"the section {name!r} does not lie where it must, or has another size than its contents")
    return Section(offset, size, place[2])


def _read_states(entries: Any, model_layers: int, rows: int, at: int) -> tuple[StateHeader, ...]:
    """The headers of the states, the first of which begins behind ``at``."""
    if not isinstance(entries, list) or not entries:
        raise CorruptData("the header needs a list of states, at least one")
    found: list[StateHeader] = []
    for entry in entries:
        _check_fields(entry, ("layer", "name", "dtype", "shape", "section"), "a state in the header")
        layer, name, dtype, shape = _number(entry, "layer", 0), entry["name"], entry["dtype"], entry["shape"]
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not isinstance(shape, list):
            raise CorruptData(f"a state needs a name of 1 to {MAX_NAME} characters, and a shape")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CorruptData(f"a state in the header has the unknown dtype {dtype!r}")
        sides = tuple(_whole(side, "side", 1) for side in shape[: MAX_DIMENSIONS + 1])
        if not 1 <= len(sides) <= MAX_DIMENSIONS or sides[0] != rows:
            raise CorruptData(f"a state has 1 to {MAX_DIMENSIONS} dimensions, the first of {rows} rows")
        if layer >= model_layers or (found and (layer, name) <= (found[-1].layer, found[-1].name)):
            raise CorruptData(f"the state {name!r} of layer {layer} is not in order among {model_layers} layers")
        section = _read_section(entry["section"], name, padded(at), prod(sides) * DTYPES[dtype].itemsize)
        at = padded(at) + section.size
        found.append(StateHeader(layer, name, dtype, sides, section))
    return tuple(found)


def _read_channels(entry: Mapping[str, Any]) -> tuple[int, int]:
    """head_dim of K and of V: one number for both, or two that differ."""
    found = entry["channels"]
    if not isinstance(found, list):
        return (_whole(found, "channels", 1),) * 2
    if len(found) != 2 or found[0] == found[1]:
        raise CorruptData(f"channels in the header must be a number, or two that differ, not {str(found)[:40]}")
    key, value = (_whole(channels, "channels", 1) for channels in found)
    return key, value


def _is_flat(content: Any, depth: int) -> bool:
    """Whether lists and objects are in each other at most so deep: what is deeper, Python can read but not print."""
    inside = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return not inside or (depth > 0 and all(_is_flat(part, depth - 1) for part in inside))


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a field is there twice")
    return content


def _check_fields(content: Any, names: Sequence[str], what: str) -> None:
    if not isinstance(content, dict) or set(content) != set(names):
        raise CorruptData(f"{what} must be an object with the fields {', '.join(names)}")


def _number(content: Mapping[str, Any], name: str, least: int) -> int:
    return _whole(content[name], name, least)


def _whole(value: Any, name: str, least: int) -> int:
    """A whole number of the header, from ``least`` to what ``LIMITS`` says of its name."""
    most = LIMITS.get(name, (1 << 63) - 1)
    if type(value) is not int or value < least:
        raise CorruptData(f"{name} in the header must be a whole number from {least}, not {str(value)[:40]}")
    if value > most:
        raise LimitExceeded(f"the header claims {name} = {value}, at most {most} can be")
    return value
