"""Calibrations: what ``kvcomp-klt`` and ``packed-klt`` must know of a model, and the .kvcal file that holds it.

A calibration has a transform of K and of V for each full-attention layer of a model. For each quality level it has the
steps of the heads, and two codebooks each for K and V: a narrow one for almost every block, a wide one for the rest.
``kvcomp calibrate`` makes one.

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from xxhash import xxh3_128

from kvcomp import disk
from kvcomp.calibration.rotary import Rotation
from kvcomp.calibration.transform import Affine, Transform, eight_bits
from kvcomp.calibration.windows import window_spec
from kvcomp.codec import codebook
from kvcomp.codec.block import check_channels
from kvcomp.codec.codebook import Codebook
from kvcomp.errors import CorruptData, InvalidInput, LimitExceeded, UnsupportedVersion
from kvcomp.kernels import Books
from kvcomp.spec import CodecSpec, Coding, TensorSpec

VERSION = 1
METADATA = "kvcomp_calibration"
DEFAULT_LEVEL = "balanced"
MAX_BYTES = 1 << 30
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


class LayerCalibration(NamedTuple):
    """What a store needs of a calibration, in the order in which it takes it."""

    books: tuple[Books, Books]
    """(wide, narrow) of K and of V."""
    transform: Transform


@dataclass(frozen=True, eq=False)
class Calibration:
    """What ``kvcomp-klt`` and ``packed-klt`` must know of one model: transforms, steps and codebooks.

    ``Calibration.read`` gives one from a .kvcal file, which ``kvcomp calibrate`` makes.
    """

    about: About
    layers: Mapping[int, tuple[Transform, Mapping[str, LevelOfLayer]]]
    """Transform and levels of each calibrated layer, by its index in the model."""
    content: bytes
    """The .kvcal file."""
    _last: list[tuple[CodecSpec | None, dict[int, str]]] = field(
        default_factory=lambda: [(None, {})], init=False, repr=False
    )
    """The last spec that was asked for, and its levels: layer after layer asks for the same."""

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that tell this calibration from every other."""
        return str(xxh3_128(self.content).hexdigest())

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the quality levels, from fine to coarse."""
        return tuple(self.about.levels)

    @property
    def tokens(self) -> int | None:
        """That it was measured on; its levels do not hold beyond. None if it does not say."""
        prompt, scored, context = (self.about.made.get(name) for name in ("prompt", "scored", "context"))
        window = prompt + scored if isinstance(prompt, int) and isinstance(scored, int) else None
        return context if isinstance(context, int) else window

    def nbytes(self, level: str, layers: Sequence[int] | None = None) -> int:
        """Bytes that decoding at a level takes from the file: transforms, means, steps, codebooks, shifts.

        layers: which to count; all if None.
        """
        size = 0
        for transform, levels in (self.layers[index] for index in (self.layers if layers is None else layers)):
            affines = (transform.key, transform.value)
            size += sum(x.matrix.numel() + 8 * x.mean.numel() for x in affines)
            size += 0 if (turn := transform.key.rotation) is None else 12 * len(turn.speed)
            size += sum(4 * len(steps) for steps in levels[level].steps)
            size += sum(len(book.to_bytes()) for pair in levels[level].books for book in pair if book)
            size += 0 if (shifts := levels[level].shifts) is None else shifts.nbytes
        return size

    @property
    def lacking(self) -> list[int]:
        """Layers that are not calibrated, by index, of a model with sliding windows: those slide. Of another: none."""
        slides = self.about.model.get("sliding_window", 0) is not None
        return [index for index in range(self.about.layers) if slides and index not in self.layers]

    def spec(self, level: str = DEFAULT_LEVEL, coding: Coding = "huffman") -> CodecSpec:
        """The spec of a quality level. Only ``huffman`` uses the codebooks. Raises InvalidInput for no such level."""
        return self.mixed(dict.fromkeys(self.layers, level), coding, level)

    def mixed(self, chosen: Mapping[int, str], coding: Coding = "huffman", windows: str | None = None) -> CodecSpec:
        """The spec that has a level for each layer, and one for all sliding windows: the finest if None, as none has a
        price. Raises InvalidInput if there is no such level.
        """
        windows = self.levels[0] if windows is None else windows
        for level in (*chosen.values(), windows):
            if level not in self.about.levels:
                raise InvalidInput(f"this calibration has no level {level!r}: use {', '.join(self.levels)}")
        tensors: list[TensorSpec] = []
        for kind in (0, 1):
            heads = next(iter(self.layers.values()))[0].heads
            steps = [(1.0,) * heads] * self.about.layers  # of layers that it lacks: nobody reads them
            for index, (_, levels) in self.layers.items():
                steps[index] = levels[chosen[index]].steps[kind]
            tensors.append(TensorSpec("head", coding=coding, steps=tuple(steps), classes=CLASSES))
        others = window_spec(self.lacking, windows, coding)
        return CodecSpec(tensors[0], tensors[1], calibration=self.fingerprint, windows=others)

    def layer(self, index: int, spec: CodecSpec) -> LayerCalibration | None:
        """Transform of a layer of the model, and codebooks if the spec's coding has any.

        Parameters
        ----------
        index
            Of the layer in the model.
        spec
            The model's, one of this calibration's levels with any window, sinks and coding of sliding windows.

        Returns
        -------
        LayerCalibration or None
            None for a layer that the calibration lacks.

        Raises
        ------
        InvalidInput
            If the spec is of no level of this calibration.
        """
        chosen = self.levels_of(spec)
        if index not in self.layers:
            return None
        transform, levels = self.layers[index]
        level = levels[chosen[index]]
        books = level.books if spec.key.coding == "huffman" else ((None, None), (None, None))
        return LayerCalibration(books, transform if level.shifts is None else transform.coarsened(level.shifts))

    def levels_of(self, spec: CodecSpec) -> dict[int, str]:
        """The level that a spec has in each layer. Raises InvalidInput if it is of no level of this calibration."""
        last, levels_of_last = self._last[0]
        if spec is last:
            return levels_of_last
        if spec.calibration != self.fingerprint:
            raise InvalidInput(
                f"this spec belongs to the calibration {spec.calibration}, and the one given is {self.fingerprint}: "
                "give the file that the cache was compressed with"
            )
        steps = list(zip(spec.key.steps or (), spec.value.steps or (), strict=False))
        found = {
            index: level
            for index, (_, levels) in self.layers.items()
            for level in reversed(self.levels)
            if index < len(steps) and levels[level].steps == steps[index]
        }
        mine = self.mixed(found, spec.key.coding) if len(found) == len(self.layers) else None
        if mine is None or (mine.key, mine.value) != (spec.key, spec.value):
            raise InvalidInput("the steps of this spec are those of no level of the calibration")
        if spec.windows is not None and not {*spec.windows.layers} <= {*self.lacking}:
            raise InvalidInput(f"windows are in {spec.windows.layers}, and this calibration lacks {self.lacking}")
        self._last[0] = spec, found
        return found

    def check_model(self, fingerprint: Mapping[str, Any]) -> None:
        """Raise InvalidInput if this is the fingerprint of another model."""
        for name in sorted({*self.about.model, *fingerprint}):
            if self.about.model.get(name) != fingerprint.get(name):
                raise InvalidInput(
                    f"this calibration is of a model with {name} {self.about.model.get(name)!r}, "
                    f"not {fingerprint.get(name)!r}: run kvcomp calibrate on this model"
                )

    def write(self, path: str | Path) -> None:
        """Write the .kvcal file; it takes the place of what was there. Raises OSError."""
        disk.write(path, [self.content])

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read and check a .kvcal file.

        Raises
        ------
        InvalidInput
            If the file cannot be read.
        CorruptData
            If it is no calibration.
        UnsupportedVersion, LimitExceeded
            If it is of another version, or larger than a calibration can be.
        """
        file = disk.place(path)
        try:
            size = file.stat().st_size
            if size > MAX_BYTES:
                raise LimitExceeded(f"{path} has {size} bytes, a calibration has at most {MAX_BYTES}")
            content = disk.read(file).tobytes()
        except (OSError, InvalidInput) as error:
            raise InvalidInput(f"cannot read the calibration {path}: {error}") from None
        return cls.from_bytes(content)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Read and check the bytes of a .kvcal file; raises as ``read`` does."""
        return cls(*_parse(content), content)

    @classmethod
    def build(
        cls,
        about: About,
        transforms: Mapping[int, Transform],
        levels: Mapping[int, Mapping[str, LevelOfLayer]],
    ) -> Self:
        """Build a calibration from its parts.

        Parameters
        ----------
        about
            What it says of itself.
        transforms
            Of each layer. An A that does not come from ``quantise_matrix`` is rounded once more.
        levels
            Of each layer its levels, by name.
        """
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
        return cls.from_bytes(save(tensors, {METADATA: text}))


# Reading foreign bytes


def _parse(content: bytes) -> tuple[About, dict[int, tuple[Transform, dict[str, LevelOfLayer]]]]:
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
        key, value = (TensorSpec("head", steps=(tuple(map(float, row)),)).steps for row in steps)
    except InvalidInput as error:
        raise CorruptData(f"{name} in the calibration: {error}") from None
    if key is None or value is None:
        raise CorruptData(f"{name} in the calibration has no steps")
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
    return LevelOfLayer((key[0], value[0]), ((books[0], books[1]), (books[2], books[3])), shifts)
