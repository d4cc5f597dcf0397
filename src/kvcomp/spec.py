"""CodecSpec: everything, besides the bytes and the codebooks, that a decoder needs. Plain frozen data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from kvcomp.errors import InvalidInput, UnsupportedVersion

Unit = Literal["block", "channel", "token", "vector", "head"]
Coding = Literal["huffman", "fixed", "patched"]
Kind = Literal["K", "V"]
KINDS: tuple[Kind, Kind] = ("K", "V")

UNITS: tuple[Unit, ...] = ("block", "channel", "token", "vector", "head")
CODINGS: tuple[Coding, ...] = ("huffman", "fixed", "patched")
PAGE_TOKENS = 64
SPEC_VERSION = 1
WINDOWS_VERSION = 2  # of a spec with the field "windows", which older readers do not know
MOST_LAYERS = 1 << 12
CALIBRATED = "kvcomp-klt"
# The presets whose specs a calibration makes, alone or as NAME:LEVEL, and how these code the same values.
CALIBRATED_CODINGS: Mapping[str, Coding] = {CALIBRATED: "huffman", "packed-klt": "patched"}
LEVELS = ("near-lossless", "balanced", "aggressive")
SCALE_RANGE = (2.0**-100, 2.0**100)
STEP_BITS = 16


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """How one of K and V is coded.

    unit: the values that share a scale: ``block`` (64 tokens of a head), ``channel``, ``token`` (all heads) or
        ``vector`` (one head's token); KVComp's BlockQuant, ChannelQuant, TokenQuant (arXiv 2509.00579, section 3). Or
        ``head``: all values of a head, with a step that is known beforehand.
    relative_scale: quantisation step over the unit's range (max - min), in (0, 1); one number, or one for each layer.
        None for the unit ``head``.
    coding: ``huffman`` (pairs of codes, variable length), ``fixed`` (fixed width, chosen for each block) or ``patched``
        (a width for each 512 codes of a block, and exceptions).
    limit: longest Huffman code in bits, 10 to 12.
    classes: codebooks for each quarter of the channels (4) or one for all (1).
    steps: for the unit ``head`` the step of each KV head, layer after layer, from 2^-100 to 2^100; rounded to 16
        significant bits, so that every multiple up to 256 is a float32. None for the others.
    """

    unit: Unit
    relative_scale: float | tuple[float, ...] | None = None
    coding: Coding = "huffman"
    limit: int = 12
    classes: int = 1
    steps: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise InvalidInput(f"unit must be one of {', '.join(UNITS)}, not {self.unit!r}")
        if self.coding not in CODINGS:
            raise InvalidInput(f"coding must be one of {', '.join(CODINGS)}, not {self.coding!r}")
        if self.unit == "head":
            if self.relative_scale is not None or self.steps is None:
                raise InvalidInput(
                    'the unit "head" needs steps, one for each KV head of each layer, and no relative_scale'
                )
            object.__setattr__(self, "steps", _rounded_steps(self.steps))
        else:
            if self.steps is not None or self.relative_scale is None:
                raise InvalidInput(f"the unit {self.unit!r} needs a relative_scale, and no steps")
            self._check_relative_scale()
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or not 10 <= self.limit <= 12:
            raise InvalidInput(f"limit must be 10 to 12 bits, not {self.limit!r}")
        if isinstance(self.classes, bool) or not isinstance(self.classes, int) or self.classes not in (1, 4):
            raise InvalidInput(f"classes must be 1 or 4, not {self.classes!r}")

    def _check_relative_scale(self) -> None:
        if isinstance(self.relative_scale, list):
            object.__setattr__(self, "relative_scale", tuple(self.relative_scale))
        for scale in self.scales:
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1:
                raise InvalidInput(f"relative_scale must lie strictly between 0 and 1, not {scale!r}")
        if not self.scales:
            raise InvalidInput("relative_scale needs one number, or one for each layer")

    @property
    def scales(self) -> tuple[float, ...]:
        """The relative scales, one for each layer, or a single one for all; none for the unit ``head``."""
        if self.relative_scale is None:
            return ()
        return self.relative_scale if isinstance(self.relative_scale, tuple) else (self.relative_scale,)

    @property
    def layers(self) -> int | None:
        """How many layers the spec lists relative scales or steps for; None if one relative scale is for all."""
        if self.steps is not None:
            return len(self.steps)
        return len(self.scales) if len(self.scales) > 1 else None

    @property
    def scale(self) -> float | tuple[float, ...]:
        """What ``quantise`` takes: the relative scale, or the heads' steps, of a spec for one layer, as every
        ``CodecSpec.layer()`` is.
        """
        if self.layers not in (None, 1):
            raise InvalidInput(
                "this spec has scales or steps for each layer: take CodecSpec.layer(index, layers) first"
            )
        return float(self.scales[0]) if self.steps is None else self.steps[0]

    @property
    def heads(self) -> tuple[float, ...] | None:
        """The heads' steps of a spec for one layer; None unless the unit is ``head``."""
        return self.scale if isinstance(self.scale, tuple) else None

    def layer(self, index: int, layers: int) -> TensorSpec:
        """The same for layer ``index`` of ``layers``. Raises InvalidInput if the spec lists another number
        of layers.
        """
        if self.layers not in (None, layers):
            raise InvalidInput(
                f"the spec has scales or steps for {self.layers} layers, the model has {layers}: "
                "use a spec tuned for this model, or one number for all layers"
            )
        if self.steps is not None:
            return replace(self, steps=self.steps[index : index + 1])
        return replace(self, relative_scale=self.scales[index if self.layers else 0])


def _rounded_steps(steps: Any) -> tuple[tuple[float, ...], ...]:
    """Steps with 16 significant bits. Raises InvalidInput for what are no steps."""
    layers = steps if isinstance(steps, list | tuple) else ()
    if not layers or not all(isinstance(layer, list | tuple) and layer for layer in layers):
        raise InvalidInput("steps must be a list of layers, each a list of one step for each KV head")
    for step in chain.from_iterable(layers):
        number = isinstance(step, int | float) and not isinstance(step, bool)
        if not number or not SCALE_RANGE[0] <= step <= SCALE_RANGE[1]:
            raise InvalidInput(f"a step must be a number from 2^-100 to 2^100, not {step!r}")
    return tuple(tuple(_rounded(float(step)) for step in layer) for layer in layers)


def _rounded(step: float) -> float:
    mantissa, exponent = math.frexp(step)
    return math.ldexp(round(math.ldexp(mantissa, STEP_BITS)), exponent - STEP_BITS)


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """How the layers are coded that a calibration lacks, those with sliding windows: with relative scales, as a preset.

    layers: their indices in the model, ascending.
    key, value: coding of K and V, with one relative scale each for all of these layers.
    """

    layers: tuple[int, ...]
    key: TensorSpec
    value: TensorSpec

    def __post_init__(self) -> None:
        for name, tensor in (("key", self.key), ("value", self.value)):
            if not isinstance(tensor, TensorSpec) or tensor.unit == "head" or tensor.layers is not None:
                raise InvalidInput(f"{name} of windows must be a TensorSpec with one relative_scale for all layers")
        if not isinstance(self.layers, list | tuple) or not 0 < len(self.layers) <= MOST_LAYERS:
            raise InvalidInput("the layers of windows must be a list of at least one index of a layer")
        object.__setattr__(self, "layers", tuple(self.layers))
        for index in self.layers:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < MOST_LAYERS:
                raise InvalidInput(f"a layer of windows must be a number from 0 to {MOST_LAYERS - 1}, not {index!r}")
        if list(self.layers) != sorted({*self.layers}):
            raise InvalidInput("the layers of windows must ascend")


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """How a KV cache is coded: two equal specs produce and read identical bytes.

    key, value: coding of K and V.
    window: most recent tokens that are never compressed; a page is sealed when 64 more have gathered.
    sinks: first tokens that are never compressed (attention sinks).
    calibration: fingerprint, in hexadecimal digits, of the calibration that the steps belong to and without which the
        pages cannot be read; None if there is none.
    windows: coding of the layers that the calibration lacks, by the same ``coding`` as the others. None leaves those
        raw, and is for specs without a calibration, which code sliding windows as all layers.
    """

    key: TensorSpec
    value: TensorSpec
    window: int = 64
    sinks: int = 4
    calibration: str | None = None
    windows: WindowSpec | None = None

    def __post_init__(self) -> None:
        for name, tensor in (("key", self.key), ("value", self.value)):
            if not isinstance(tensor, TensorSpec):
                raise InvalidInput(f"{name} must be a TensorSpec, not {type(tensor).__name__}")
        for name, count in (("window", self.window), ("sinks", self.sinks)):
            if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 65536:
                raise InvalidInput(f"{name} must be a number of tokens from 0 to 65536, not {count!r}")
        if self.calibration is not None and not (
            isinstance(self.calibration, str) and re.fullmatch("[0-9a-f]{16,64}", self.calibration)
        ):
            raise InvalidInput(f"calibration must be 16 to 64 hexadecimal digits, not {self.calibration!r}")
        if self.windows is not None:
            self._check_windows(self.windows)

    def _check_windows(self, windows: Any) -> None:
        if not isinstance(windows, WindowSpec) or self.calibration is None:
            raise InvalidInput("windows must be a WindowSpec, and only a spec with a calibration has one")
        for mine, theirs in ((self.key, windows.key), (self.value, windows.value)):
            if theirs.coding != mine.coding:
                raise InvalidInput(f"windows have the coding {theirs.coding!r}, and the other layers {mine.coding!r}")
            if mine.layers is not None and windows.layers[-1] >= mine.layers:
                raise InvalidInput(f"windows name the layer {windows.layers[-1]}, and the spec is of {mine.layers}")

    def layer(self, index: int, layers: int) -> CodecSpec:
        """The spec of layer ``index`` of ``layers``: the same, with one relative scale each for K and V, or the steps
        of its heads. A layer of ``windows`` needs no calibration, and its spec names none.

        Raises InvalidInput if the spec lists another number of layers, or there is no such layer.
        """
        if not 0 <= index < layers:
            raise InvalidInput(f"there is no layer {index} among {layers}")
        tensors = self.key.layer(index, layers), self.value.layer(index, layers)
        if self.windows is None or index not in self.windows.layers:
            return replace(self, key=tensors[0], value=tensors[1], windows=None)
        return CodecSpec(self.windows.key, self.windows.value, self.window, self.sinks)

    def bare(self) -> CodecSpec:
        """The same without window and sinks, for tensors that are compressed whole."""
        return replace(self, window=0, sinks=0)

    def to_json(self) -> str:
        """The spec as JSON text; ``CodecSpec.from_json`` gives an equal spec back."""
        content = asdict(self, dict_factory=lambda items: {name: value for name, value in items if value is not None})
        version = SPEC_VERSION if self.windows is None else WINDOWS_VERSION
        return json.dumps({"kvcomp_spec": version, **content}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote. Raises InvalidInput for anything else, UnsupportedVersion for a
        newer version.
        """
        try:
            content = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(f"a spec must be JSON: {error}") from None
        if not isinstance(content, Mapping) or "kvcomp_spec" not in content:
            raise InvalidInput('this JSON is no kvcomp spec: the field "kvcomp_spec" is missing')
        version, windows = content["kvcomp_spec"], content.get("windows")
        if version is True or version not in (SPEC_VERSION, WINDOWS_VERSION if "windows" in content else SPEC_VERSION):
            raise UnsupportedVersion(
                f"spec version {version!r}: kvcomp reads version {SPEC_VERSION}, and {WINDOWS_VERSION} with windows"
            )
        if "windows" in content and version != WINDOWS_VERSION:
            raise InvalidInput(f"a spec with windows is of version {WINDOWS_VERSION}, and this is of {version}")
        parts = _with_tensors({name: part for name, part in content.items() if name != "kvcomp_spec"})
        if "windows" in content:
            windows = _with_tensors(windows) if isinstance(windows, Mapping) else windows
            parts["windows"] = _build(WindowSpec, windows, "windows")
        return _build(cls, parts, "spec")

    @classmethod
    def resolve(cls, spec: str | Path | CodecSpec) -> CodecSpec:
        """A spec from a spec, a preset's name or the path of a JSON file. Raises InvalidInput if it is none of them."""
        if isinstance(spec, CodecSpec):
            return spec
        if isinstance(spec, str) and spec in PRESETS:
            return PRESETS[spec]
        if not str(spec).endswith(".json"):
            raise InvalidInput(f"no preset {str(spec)!r}: use {', '.join(PRESETS)} or the path of a spec.json file")
        from kvcomp.disk import place  # NumPy is not loaded for a name

        path = place(spec)
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"cannot read the spec file {path}: {error}") from None


def is_calibrated(name: object) -> bool:
    """Whether a name is that of a preset that needs a calibration."""
    return isinstance(name, str) and name.partition(":")[0] in CALIBRATED_CODINGS


T = TypeVar("T")


def _with_tensors(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a spec with K and V read."""
    return {**content, **{name: _build(TensorSpec, content.get(name), name) for name in ("key", "value")}}


def _build(kind: type[T], content: Any, name: str) -> T:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(content, Mapping) or not set(content) <= known:
        raise InvalidInput(f"{name} in a spec must be an object with the fields {', '.join(sorted(known))}")
    try:
        return kind(**content)
    except TypeError as error:
        raise InvalidInput(f"{name} in a spec is incomplete: {error}") from None


PRESETS: Mapping[str, CodecSpec] = {
    # KVComp with a scale for each K channel, so that a large one does not make the others coarse.
    "kvcomp": CodecSpec(TensorSpec("channel", 0.08), TensorSpec("token", 0.15)),
    # The same with finer steps, about as good as KIVI with 4 bits, look-ups in long lists included.
    "kvcomp:fine": CodecSpec(TensorSpec("channel", 0.04), TensorSpec("token", 0.1)),
    # Fixed-width codes: K of four bits, with levels to spare for the rounding of bfloat16, V of three.
    "packed": CodecSpec(TensorSpec("channel", 0.08, "fixed"), TensorSpec("token", 1 / 6, "fixed")),
    # KVComp as published: one scale for each K block, one for each V token.
    "kvcomp:paper": CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1)),
    "packed:paper": CodecSpec(TensorSpec("block", 1 / 14, "fixed"), TensorSpec("token", 1 / 14, "fixed")),
}

LATENTS = replace(PRESETS["kvcomp"], key=TensorSpec("channel", 0.09))
"""What ``kvcomp`` is for latent attention, whose K and V come from one latent: it loses as little at 0.09 as K and V do
at the preset's scales (benchmarks/latents.py).
"""
