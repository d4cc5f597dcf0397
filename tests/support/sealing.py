"""A .kvc file taken apart and put together again with right checksums: written from docs/format.md, section
7, alone.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from xxhash import xxh3_64

NAMES = ("pages", "table", "rows", "books", "counts", "sinks", "tail")
Sections = list[dict[str, bytes]]


def unseal(data: bytes) -> tuple[dict[str, Any], Sections]:
    """The header, and for each layer its sections; then for each state its only one, ``state``."""
    length = int.from_bytes(data[12:16], "little")
    header: dict[str, Any] = json.loads(data[24 : 24 + length])
    base = -(-(24 + length) // 64) * 64
    sections = []
    for layer in header["layers"]:
        places = {name: layer["sections"][name] for name in NAMES}
        sections.append({name: data[base + at : base + at + size] for name, (at, size, _) in places.items()})
    for state in header.get("states", []):
        at, size, _ = state["section"]
        sections.append({"state": data[base + at : base + at + size]})
    return header, sections


def seal(
    header: dict[str, Any], sections: Sections, lay_out: bool = True, version: int = 1, flags: int | None = None
) -> bytes:
    """A file with right checksums. lay_out: also give the sections their right places and sizes, else only right
    checksums.
    """
    body = b""
    of_layers = [parts for parts in sections if "state" not in parts]
    for layer, of_layer in zip(header["layers"], of_layers, strict=False):
        for name in NAMES:
            body += bytes(-len(body) % 64)
            place = [len(body), len(of_layer[name])] if lay_out else layer["sections"][name][:2]
            layer["sections"][name] = [*place, xxh3_64(of_layer[name]).hexdigest()]
            body += of_layer[name]
    for state, parts in zip(header.get("states", []), sections[len(of_layers) :], strict=False):
        body += bytes(-len(body) % 64)
        place = [len(body), len(parts["state"])] if lay_out else state["section"][:2]
        state["section"] = [*place, xxh3_64(parts["state"]).hexdigest()]
        body += parts["state"]
    if flags is None:
        dropped = any(len(parts["rows"]) == 64 * header["rows"] for parts in of_layers)
        flags = int("states" in header) | 2 * dropped
    return seal_text(json.dumps(header).encode(), version, flags) + body


def seal_text(text: bytes, version: int = 1, flags: int = 0, length: int | None = None) -> bytes:
    prefix = b"\x89KVC\r\n\x1a\n" + struct.pack("<HHI", version, flags, len(text) if length is None else length)
    head = prefix + struct.pack("<Q", xxh3_64(prefix + text).intdigest()) + text
    return head + bytes(-len(head) % 64)
