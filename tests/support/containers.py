"""Containers in memory, and the golden ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvcomp import files
from kvcomp.errors import CorruptData, LimitExceeded, UnsupportedVersion
from kvcomp.files.container import Container, pack
from kvcomp.files.layers import parts_of
from kvcomp.spec import CodecSpec
from kvcomp.store import KVStore

GOLDEN = Path(__file__).parents[1] / "golden"


FILES = GOLDEN / "container-v1"


SMALL, BATCH, STATES = ((FILES / f"{name}.kvc").read_bytes() for name in ("small", "batch", "states"))


def open_bytes(data: bytes) -> Container:
    return Container(np.frombuffer(data, np.uint8))


def packed(stores: dict[int, KVStore], spec: CodecSpec, layers: int, model: Any = None) -> bytes:
    first = next(iter(stores.values()))
    parts = [parts_of(store, layer) for layer, store in stores.items()]
    return b"".join(pack(spec, model, layers, first.batch, first.tokens, parts))


def reopened(data: bytes) -> dict[int, KVStore]:
    return files.load(open_bytes(data))


def refused(data: bytes) -> bool:
    """Whether opening and checking all layers ends in a typed error."""
    try:
        container = open_bytes(data)
        for _ in (*container.layers(), *container.states()):
            pass
    except (CorruptData, LimitExceeded, UnsupportedVersion):
        return True
    return False
