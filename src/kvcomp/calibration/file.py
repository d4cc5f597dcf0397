"""Calibrations: what ``kvcomp-klt`` and ``packed-klt`` must know of a model, and the .kvcal file that holds it.

A calibration has a transform of K and of V for each full-attention layer of a model. For each quality level it has the
steps of the heads, and two codebooks each for K and V: a narrow one for almost every block, a wide one for the rest.
``kvcomp calibrate`` makes one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from xxhash import xxh3_128

from kvcomp import disk
from kvcomp.calibration.content import CLASSES, About, LevelOfLayer, content_of, parse
from kvcomp.calibration.transform import Transform
from kvcomp.calibration.windows import window_spec
from kvcomp.errors import CorruptData, InvalidInput, LimitExceeded, UnsupportedVersion
from kvcomp.kernels import Books
from kvcomp.spec import CodecSpec, Coding, TensorSpec

DEFAULT_LEVEL = "balanced"
MAX_BYTES = 1 << 30


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
    _coarsened: dict[tuple[int, str], Transform] = field(default_factory=dict, init=False, repr=False)
    """Transforms by layer and level, which all caches of the model share."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: it never changes."""
        return self

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
        if level.shifts is not None:
            at = index, chosen[index]
            transform = self._coarsened.get(at) or self._coarsened.setdefault(at, transform.coarsened(level.shifts))
        return LayerCalibration(books, transform)

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
        """Write the .kvcal file; it takes the place of what was there.

        Raises InvalidInput for a folder, a pipe or an empty path, and OSError.
        """
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
        try:
            return cls.from_bytes(content)
        except (CorruptData, UnsupportedVersion, LimitExceeded) as error:
            raise type(error)(f"{path}: {error}") from None

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Read and check the bytes of a .kvcal file; raises as ``read`` does."""
        return cls(*parse(content), content)

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
        return cls.from_bytes(content_of(about, transforms, levels))
