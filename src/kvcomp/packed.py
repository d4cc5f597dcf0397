"""K and V tensors without a model: compress, decompress, attend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from kvcomp import files
from kvcomp.calibration import Calibration, resolve
from kvcomp.errors import InvalidInput
from kvcomp.spec import CodecSpec
from kvcomp.store import KVStore, Memory
from kvcomp.store.attention import attend


class Place(NamedTuple):
    """What a file says of a layer: the whole model's spec, the layer's index, and how many layers the model has."""

    spec: CodecSpec
    layer: int
    layers: int


class Packed:
    """Compressed K and V of one layer; made by ``compress`` or ``load``."""

    def __init__(self, store: KVStore, place: Place | None = None) -> None:
        self._store = store
        self._place = place or Place(store.spec, 0, 1)

    def decompress(self) -> tuple[Tensor, Tensor]:
        """K and V, (batch, KV heads, tokens, head_dim) in the type they came in, within the spec's bound."""
        return self._store.dense()

    def attend(self, q: Tensor, scaling: float | None = None, softcap: float = 0.0) -> Tensor:
        """softmax(scaling q.K) V on the compressed bits.

        q: (batch, heads, queries, head_dim), the queries of the last tokens, each of which sees what is not after it.
        scaling: head_dim^-0.5 if None. Returns (batch, heads, queries, head_dim) in q's type. Raises InvalidInput if q does not fit.
        """
        return attend(self._store, q, self._store.channels**-0.5 if scaling is None else scaling, softcap)

    def memory(self) -> Memory:
        """Bytes by part."""
        return self._store.memory()

    def save(self, path: str | Path) -> None:
        """Write a .kvc file that ``load`` reads; it takes the place of what was there. Raises OSError."""
        spec, layer, layers = self._place
        files.save(path, {layer: self._store}, spec, layers)


def compress(
    k: Tensor,
    v: Tensor,
    spec: str | Path | CodecSpec = "kvcomp",
    backend: str = "cpu",
    calibration: Calibration | str | Path | None = None,
    layer: int = 0,
) -> Packed:
    """Compress the K and V of one layer: every whole page of 64 tokens; what is left at the end stays raw.

    k, v: (batch, KV heads, tokens, head_dim), float32, float16 or bfloat16, on the CPU. spec: a preset's name, a JSON file or a
    CodecSpec with one relative scale each; its window and sinks are not used here.
    calibration: of the model, for the preset ``kvcomp-klt``; layer: which of its layers K and V are of.
    Raises InvalidInput or BackendUnavailable.
    """
    resolved, read = resolve(spec, calibration)
    bare = replace(resolved, window=0, sinks=0)
    if read is not None:
        place = Place(bare, layer, read.about.layers)
        calibrated = read.layer(layer, bare)
        if calibrated is None:
            raise InvalidInput(f"the calibration has no layer {layer}: give layer=, the one that K and V are of")
        return _packed(k, v, KVStore(bare.layer(layer, place.layers), backend, *calibrated), place)
    if not {resolved.key.layers, resolved.value.layers} <= {None, 1}:
        raise InvalidInput(
            "this spec has scales for each layer of a model: give CodecSpec.layer(i, layers) for one layer's tensors"
        )
    return _packed(k, v, KVStore(bare, backend))


def _packed(k: Tensor, v: Tensor, store: KVStore, place: Place | None = None) -> Packed:
    store.append(k, v)
    store.seal()
    return Packed(store, place)


def load(
    path: str | Path,
    layer: int | None = None,
    rows: Sequence[int] | None = None,
    tokens: int | None = None,
    backend: str = "cpu",
    calibration: Calibration | str | Path | None = None,
) -> Packed:
    """The compressed K and V of one layer of a .kvc file, without decoding anything; nobody may write into the file meanwhile.

    layer: which one, the only one if None. rows: which of the batch, all if None. tokens: how many of the first, all if None.
    calibration: the one that it was compressed with, if with any.
    Raises CorruptData, UnsupportedVersion, LimitExceeded or OSError, and InvalidInput if the file does not hold what is asked for.
    """
    container = files.open_container(path)
    if layer is None:
        if len(container.header.layers) != 1:
            raise InvalidInput(f"the file holds {len(container.header.layers)} layers: say which one with layer=")
        layer = container.header.layers[0].layer
    spec, read = resolve(container.header.spec, calibration)
    store = files.load(container, backend, [layer], rows, tokens, read)[layer]
    return Packed(store, Place(spec, layer, container.header.model_layers) if read else None)
