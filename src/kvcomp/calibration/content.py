"""The bytes of a .kvcal file, and what is read from them after all checks.

The file is a safetensors file. Its metadata hold ``kvcomp_calibration``, a JSON object with the field ``version`` and
those of ``About``. Layer i has these tensors, and for each level the last three::

    i.key.matrix    i8  (heads, D, D)     and i.value.matrix
    i.key.scale     f32 (heads, D)        and i.value.scale
    i.key.mean      f32 (heads, D)        and i.value.mean
    i.key.pairs     i16 (pairs, 2)        channels of K whose mean turns; absent if none does
    i.key.speed     f64 (pairs,)          and by how many radians a token
    i.LEVEL.steps   f32 (2, heads)        of K, of V
    i.LEVEL.books   u8                    the wide and the narrow book of K, then of V
    i.LEVEL.shifts  u8  (2, heads, D)     absent if all are 0

At a level the step of a coordinate is 2^shift times the head's: its row of A is divided by that. Codes have 8 bits, and
a coordinate whose values reach beyond them would leave whole blocks raw. Row r of A is ``matrix[r] * scale[r]``: eight
bits are enough, as whatever A is, its exact inverse undoes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from kvcomp.calibration.rotary import Rotation
from kvcomp.calibration.transform import Affine, Transform, eight_bits
from kvcomp.codec import codebook
from kvcomp.codec.block import check_channels
from kvcomp.codec.codebook import Codebook
from kvcomp.errors import CorruptData, InvalidInput, LimitExceeded, UnsupportedVersion
from kvcomp.kernels import Books
from kvcomp.spec import TensorSpec

VERSION = 1
METADATA = "kvcomp_calibration"
MAX_LAYERS, MAX_HEADS, MAX_LEVELS = 1 << 12, 1 << 10, 64
CLASSES, MAX_SHIFT = 4, 16
LEVEL_NAME = r"[a-z0-9][a-z0-9.-]{0,31}"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class About:
    """What a calibration says of itself."""

    model: Mapping[str, Any]
    """Fingerprint of the model's configuration; whoever uses the calibration compares it."""
    layers: int
    """Layers of the model."""
    levels: Mapping[str, Mapping[str, Any]]
    """For each level what was measured on the calibration text, and what it was to be as good as."""
    made: Mapping[str, Any]
    """The text and the settings it was made with."""


@dataclass(frozen=True)
class LevelOfLayer:
    """What one layer has at one level, of K and of V."""

    steps: tuple[tuple[float, ...], tuple[float, ...]]
    """Of the heads."""
    books: tuple[Books, Books]
    """(wide, narrow) codebooks."""
    shifts: npt.NDArray[np.uint8] | None = field(default=None, compare=False)
    """Of the coordinates, (2, heads, D)."""


def content_of(
    about: About, transforms: Mapping[int, Transform], levels: Mapping[int, Mapping[str, LevelOfLayer]]
) -> bytes:
    """The bytes of a file. transforms, levels: of each layer, and of these each level by its name."""
    tensors: dict[str, Array] = {}
    for index, transform in transforms.items():
        for kind, affine in (("key", transform.key), ("value", transform.value)):
            rounded, scale = eight_bits(affine.matrix)
            tensors[f"{index}.{kind}.matrix"], tensors[f"{index}.{kind}.scale"] = rounded, scale
            tensors[f"{index}.{kind}.mean"] = affine.mean.numpy()
        if (turn := transform.key.rotation) is not None:
            tensors[f"{index}.key.pairs"] = np.array([turn.first, turn.second], np.int16).T.copy()
            tensors[f"{index}.key.speed"] = np.array(turn.speed)
        for level, of_layer in levels[index].items():
            tensors[f"{index}.{level}.steps"] = np.array(of_layer.steps, np.float32)
            books = b"".join(book.to_bytes() for pair in of_layer.books for book in pair if book)
            tensors[f"{index}.{level}.books"] = np.frombuffer(books, np.uint8)
            if of_layer.shifts is not None and of_layer.shifts.any():
                tensors[f"{index}.{level}.shifts"] = of_layer.shifts
    text = json.dumps({"version": VERSION, **asdict(about)})
    return save(tensors, {METADATA: text})


# Reading foreign bytes


def parse(content: bytes) -> tuple[About, dict[int, tuple[Transform, dict[str, LevelOfLayer]]]]:
    """What a file says of itself, and each layer's transform and levels. Raises as ``Calibration.read`` does."""
    try:
        tensors = load(content)
        about = _about(_metadata(content))
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError) as error:
        raise CorruptData(f"this is no calibration: {error}") from None
    layers: dict[int, tuple[Transform, dict[str, LevelOfLayer]]] = {}
    for index in sorted({_layer_of(name, about.layers) for name in tensors}):
        parts = [_affine(tensors, f"{index}.{kind}") for kind in ("key", "value")]
        if parts[0].matrix.shape != parts[1].matrix.shape:
            raise CorruptData(f"K and V of layer {index} have different shapes in the calibration")
        heads = parts[0].matrix.shape[0]
        channels = parts[0].matrix.shape[2]
        levels = {level: _level(tensors, f"{index}.{level}", heads, channels) for level in about.levels}
        layers[index] = Transform(*parts), levels
    if not layers or tensors:
        raise CorruptData(f"the calibration has no layers, or more than it needs: {sorted(tensors)[:3]}")
    return about, layers


def _metadata(content: bytes) -> dict[str, Any]:
    """What the file says of itself, from the metadata that ``load`` has checked but does not return."""
    size = int.from_bytes(content[:8], "little")
    found: dict[str, Any] = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][METADATA])
    return found


def _about(fields: dict[str, Any]) -> About:
    version = fields.pop("version")
    if version is True or version != VERSION:
        raise UnsupportedVersion(f"this calibration has version {version!r}, this kvcomp reads {VERSION}")
    about = About(**fields)
    whole = isinstance(about.layers, int) and not isinstance(about.layers, bool)
    if not whole or not all(isinstance(x, dict) for x in (about.model, about.levels, about.made)):
        raise CorruptData("the calibration's description has a field of the wrong type")
    if not 1 <= about.layers <= MAX_LAYERS or not 1 <= len(about.levels) <= MAX_LEVELS:
        raise LimitExceeded(f"a calibration of {about.layers} layers and {len(about.levels)} levels is out of range")
    for name, level in about.levels.items():
        if not re.fullmatch(LEVEL_NAME, name) or name in ("key", "value") or not isinstance(level, dict):
            raise CorruptData(f"the calibration has a level with the name {name!r}")
        _check_prices(name, level.get("layers", {}))
    return about


def _check_prices(name: str, layers: Any) -> None:
    """Raise CorruptData unless these are bits and KL of layers."""
    prices = layers.values() if isinstance(layers, dict) else [None]
    for price in prices:
        both = [price.get(what) for what in ("bits", "kl")] if isinstance(price, dict) else [None]
        if not all(isinstance(x, float) and 0 <= x < np.inf for x in both):
            raise CorruptData(f"the calibration has prices of the level {name!r} that are no bits and KL of layers")


def _layer_of(name: str, layers: int) -> int:
    match = re.fullmatch(r"(0|[1-9][0-9]{0,4})\..+", name)
    if match is None or int(match[1]) >= layers:
        raise CorruptData(f"the calibration has a tensor {name[:64]!r}, which belongs to no layer")
    return int(match[1])


def _take(tensors: dict[str, Array], name: str, dtype: str) -> Array:
    array = tensors.pop(name, None)
    if array is None or array.dtype != np.dtype(dtype):
        raise CorruptData(f"the calibration needs a tensor {name} of {dtype}")
    return array


def _affine(tensors: dict[str, Array], name: str) -> Affine:
    matrix = _take(tensors, f"{name}.matrix", "int8")
    scale, mean = _take(tensors, f"{name}.scale", "float32"), _take(tensors, f"{name}.mean", "float32")
    if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2] or not scale.shape == mean.shape == matrix.shape[:2]:
        raise CorruptData(f"{name} in the calibration has shapes {matrix.shape}, {scale.shape} and {mean.shape}")
    if not 1 <= matrix.shape[0] <= MAX_HEADS:
        raise LimitExceeded(f"{name} in the calibration has {matrix.shape[0]} heads")
    try:
        check_channels(matrix.shape[1])
        rotation = None
        if name.endswith(".key") and f"{name}.pairs" in tensors:
            pairs, speed = _take(tensors, f"{name}.pairs", "int16"), _take(tensors, f"{name}.speed", "float64")
            rotation = Rotation.of(pairs, speed, matrix.shape[1])
        with np.errstate(all="ignore"):
            return Affine.of(torch.from_numpy(matrix * scale[..., None]), torch.from_numpy(mean), rotation)
    except InvalidInput as error:
        raise CorruptData(f"{name} in the calibration: {error}") from None


def _level(tensors: dict[str, Array], name: str, heads: int, channels: int) -> LevelOfLayer:
    steps, data = _take(tensors, f"{name}.steps", "float32"), _take(tensors, f"{name}.books", "uint8")
    if steps.shape != (2, heads) or data.ndim != 1:
        raise CorruptData(f"{name} in the calibration has shapes {steps.shape} and {data.shape}")
    try:
        key, value = (TensorSpec("head", steps=(tuple(map(float, row)),)).heads or () for row in steps)
    except InvalidInput as error:
        raise CorruptData(f"{name} in the calibration: {error}") from None
    books: list[Codebook] = []
    at, raw = 0, data.tobytes()
    for _ in range(4):
        book, at = codebook.read(raw, at)
        if book.classes != CLASSES:
            raise CorruptData(f"{name} in the calibration has a codebook of {book.classes} classes")
        books.append(book)
    if at != len(raw):
        raise CorruptData(f"{name} in the calibration has more than four codebooks")
    shifts = tensors.pop(f"{name}.shifts", None)
    if shifts is not None and (
        shifts.dtype != np.uint8 or shifts.shape != (2, heads, channels) or shifts.max() > MAX_SHIFT
    ):
        raise CorruptData(f"{name}.shifts in the calibration are no (2, {heads}, {channels}) up to {MAX_SHIFT}")
    return LevelOfLayer((key, value), ((books[0], books[1]), (books[2], books[3])), shifts)
