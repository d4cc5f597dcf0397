"""CodecSpec: everything, besides the bytes and the codebooks, that a decoder needs. Plain frozen data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from kvcomp.errors import InvalidInput, UnsupportedVersion

Unit = Literal["block", "channel", "token", "vector"]
Coding = Literal["huffman", "fixed"]
Kind = Literal["K", "V"]

UNITS: tuple[Unit, ...] = ("block", "channel", "token", "vector")
CODINGS: tuple[Coding, ...] = ("huffman", "fixed")
PAGE_TOKENS = 64
SPEC_VERSION = 1


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """How one of K and V is coded.

    unit: the values that share a scale: ``block`` (64 tokens of a head), ``channel``, ``token`` (all heads) or
        ``vector`` (one head's token); KVComp's BlockQuant, ChannelQuant, TokenQuant (arXiv 2509.00579, section 3).
    relative_scale: quantisation step over the unit's range (max - min), in (0, 1); one number, or one for each layer.
    coding: ``huffman`` (pairs of codes, variable length) or ``fixed`` (fixed width, chosen for each block).
    limit: longest Huffman code in bits, 10 to 12.
    classes: codebooks for each quarter of the channels (4) or one for all (1).
    """

    unit: Unit
    relative_scale: float | tuple[float, ...]
    coding: Coding = "huffman"
    limit: int = 12
    classes: int = 1

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise InvalidInput(f"unit must be one of {', '.join(UNITS)}, not {self.unit!r}")
        if self.coding not in CODINGS:
            raise InvalidInput(f"coding must be one of {', '.join(CODINGS)}, not {self.coding!r}")
        if isinstance(self.relative_scale, list):
            object.__setattr__(self, "relative_scale", tuple(self.relative_scale))
        for scale in self.scales:
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1:
                raise InvalidInput(f"relative_scale must lie strictly between 0 and 1, not {scale!r}")
        if not self.scales:
            raise InvalidInput("relative_scale needs one number, or one for each layer")
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or not 10 <= self.limit <= 12:
            raise InvalidInput(f"limit must be 10 to 12 bits, not {self.limit!r}")
        if isinstance(self.classes, bool) or not isinstance(self.classes, int) or self.classes not in (1, 4):
            raise InvalidInput(f"classes must be 1 or 4, not {self.classes!r}")

    @property
    def scales(self) -> tuple[float, ...]:
        """The relative scales, one for each layer, or a single one for all."""
        return self.relative_scale if isinstance(self.relative_scale, tuple) else (self.relative_scale,)

    @property
    def scale(self) -> float:
        """The relative scale of a spec that has a single one, as every ``CodecSpec.layer()`` does."""
        if len(self.scales) != 1:
            raise InvalidInput("this spec has one relative_scale for each layer: take CodecSpec.layer(i) first")
        return float(self.scales[0])


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """How a KV cache is coded: two equal specs produce and read identical bytes.

    key, value: coding of K and V.
    window: most recent tokens that are never compressed; a page is sealed when 64 more have gathered.
    sinks: first tokens that are never compressed (attention sinks).
    """

    key: TensorSpec
    value: TensorSpec
    window: int = 64
    sinks: int = 4

    def __post_init__(self) -> None:
        for name, tensor in (("key", self.key), ("value", self.value)):
            if not isinstance(tensor, TensorSpec):
                raise InvalidInput(f"{name} must be a TensorSpec, not {type(tensor).__name__}")
        for name, count in (("window", self.window), ("sinks", self.sinks)):
            if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 65536:
                raise InvalidInput(f"{name} must be a number of tokens from 0 to 65536, not {count!r}")

    def layer(self, index: int, layers: int) -> CodecSpec:
        """The spec of layer ``index`` of ``layers``: the same, with one relative scale each for K and V.

        Raises InvalidInput if the spec lists scales for another number of layers, or there is no such layer.
        """

        if not 0 <= index < layers:
            raise InvalidInput(f"there is no layer {index} among {layers}")

        def of_layer(tensor: TensorSpec) -> TensorSpec:
            if len(tensor.scales) not in (1, layers):
                raise InvalidInput(
                    f"the spec has scales for {len(tensor.scales)} layers, the model has {layers}: "
                    "use a spec tuned for this model, or one number for all layers"
                )
            return replace(tensor, relative_scale=tensor.scales[index if len(tensor.scales) > 1 else 0])

        return replace(self, key=of_layer(self.key), value=of_layer(self.value))

    def to_json(self) -> str:
        """The spec as JSON text; ``CodecSpec.from_json`` gives an equal spec back."""
        return json.dumps({"kvcomp_spec": SPEC_VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote. Raises InvalidInput for anything else, UnsupportedVersion for a newer version."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"a spec must be JSON: {error}") from None
        if not isinstance(content, Mapping) or "kvcomp_spec" not in content:
            raise InvalidInput('this JSON is no kvcomp spec: the field "kvcomp_spec" is missing')
        if content["kvcomp_spec"] is True or content["kvcomp_spec"] != SPEC_VERSION:
            raise UnsupportedVersion(
                f"spec version {content['kvcomp_spec']!r}: this kvcomp reads version {SPEC_VERSION}"
            )
        parts = {name: part for name, part in content.items() if name != "kvcomp_spec"}
        for name in ("key", "value"):
            parts[name] = _build(TensorSpec, parts.get(name), name)
        return _build(cls, parts, "spec")

    @classmethod
    def resolve(cls, spec: str | Path | CodecSpec) -> CodecSpec:
        """A spec from a spec, a preset's name or the path of a JSON file. Raises InvalidInput if it is none of them."""
        if isinstance(spec, CodecSpec):
            return spec
        if isinstance(spec, str) and spec in PRESETS:
            return PRESETS[spec]
        path = Path(spec)
        if path.suffix != ".json":
            raise InvalidInput(f"no preset {str(spec)!r}: use {', '.join(PRESETS)} or the path of a spec.json file")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"cannot read the spec file {path}: {error}") from None


T = TypeVar("T")


def _build(kind: type[T], content: Any, name: str) -> T:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(content, Mapping) or not set(content) <= known:
        raise InvalidInput(f"{name} in a spec must be an object with the fields {', '.join(sorted(known))}")
    try:
        return kind(**content)
    except TypeError as error:
        raise InvalidInput(f"{name} in a spec is incomplete: {error}") from None


PRESETS: Mapping[str, CodecSpec] = {
    # KVComp as published: one scale for each K block, one for each V token, Huffman codes.
    "kvcomp": CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1)),
    # The same pages with fixed-width codes (four bits where the range allows): the speed floor.
    "packed": CodecSpec(TensorSpec("block", 1 / 14, "fixed"), TensorSpec("token", 1 / 14, "fixed")),
}
