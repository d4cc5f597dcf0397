"""Where K and V of each layer lie in the memory objects of LMCache (0.5.6).

LMCache hands over a chunk of tokens as one buffer with a shape and a type for each *group* of layers, laid out as

- ``(2, layers, tokens, heads * head_dim)``: first all K, then all V; or
- ``(layers, tokens, heads * 2 * head_dim)``, also with a leading 1: what vLLM keeps in one tensor, in which each head
  has its K channels, then its V channels. A model with latent attention looks the same but for the width.

Neither says how many heads there are, so the adapter is told. Everything else is refused: with the wrong heads or
order, units would run across the wrong values, and nobody would notice but for worse answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.serve.chunks import ChunkShape
from kvcomp.store.tensors import TYPES

FORMAT = "KV_2LTD"  # the name LMCache gives all of these, and all it allocates for caches


class MemoryObject(Protocol):
    """The part of LMCache's ``MemoryObj`` that is used here."""

    @property
    def raw_data(self) -> Any: ...

    @property
    def metadata(self) -> Any: ...

    def get_size(self) -> int: ...


@dataclass(frozen=True)
class Heads:
    """What a memory object does not say."""

    heads: int
    """KV heads of one rank."""
    head_dim: int
    """Their width."""
    layers: int | None = None
    """Of a chunk, where LMCache gives plain bytes (its ``bench l2`` does)."""
    dtype: torch.dtype | None = None
    """As ``layers``."""


def kv_views(memory: MemoryObject, about: Heads) -> tuple[ChunkShape, list[tuple[Tensor, Tensor]]]:
    """The shape of a chunk, and views of K and V of each layer, (KV heads, tokens, head_dim), into its buffer.

    Raises
    ------
    UnsupportedModel
        For a layout that is none of the above.
    """
    meta = memory.metadata
    if meta.fmt.name != FORMAT:
        raise UnsupportedModel(f"LMCache hands over memory of the format {meta.fmt.name}: kvcomp reads {FORMAT}")
    shapes = [tuple(shape) for shape in meta.shapes or [meta.shape]]
    dtypes = list(meta.dtypes or [meta.dtype])
    if dtypes == [torch.uint8] and len(shapes[0]) == 1:
        shapes, dtypes = [_shape_of_bytes(memory.get_size(), about)], [about.dtype or torch.uint8]
    if not dtypes or set(dtypes) - set(TYPES.values()) or len(set(dtypes)) != 1:
        raise UnsupportedModel(
            f"LMCache's cache holds {', '.join(map(str, dtypes))}: kvcomp compresses one of {', '.join(TYPES)}; "
            "with a quantised cache (kv_cache_dtype fp8) use LMCache without kvcomp"
        )
    data = memory.raw_data.view(torch.uint8).flatten()
    if data.device.type != "cpu":
        raise UnsupportedModel(f"LMCache's buffer is on {data.device}: kvcomp needs a first tier in the CPU's memory")
    kv: list[tuple[Tensor, Tensor]] = []
    tokens, at = set(), 0
    for shape in shapes:
        size = torch.Size(shape).numel() * dtypes[0].itemsize
        if at + size > data.numel():
            raise UnsupportedModel(f"LMCache's buffer of {data.numel()} bytes is smaller than its shape {shape}")
        kv += _layers(data[at : at + size].view(dtypes[0]).view(shape), about)
        tokens.add(kv[-1][0].shape[1])
        at += size
    if len(tokens) != 1:
        raise UnsupportedModel(f"the groups of layers hold {sorted(tokens)} tokens: kvcomp needs one number for all")
    return ChunkShape(len(kv), about.heads, tokens.pop(), about.head_dim, dtypes[0]), kv


def _layers(group: Tensor, about: Heads) -> list[tuple[Tensor, Tensor]]:
    shape, width = tuple(group.shape), about.heads * about.head_dim
    if 0 in shape or group.ndim not in (3, 4):
        raise UnsupportedModel(f"LMCache hands over a cache of the shape {shape}, which kvcomp does not know")
    if group.ndim == 4 and shape[0] == 2 and shape[3] == width:
        k, v = group.view(*shape[:3], about.heads, about.head_dim)
    elif (group.ndim == 3 or shape[0] == 1) and shape[-1] == 2 * width:
        both = group.view(*shape[-3:-1], about.heads, 2, about.head_dim)
        k, v = both[:, :, :, 0], both[:, :, :, 1]
    else:
        raise UnsupportedModel(
            f"LMCache hands over a cache of the shape {shape}: with {about.heads} KV heads of {about.head_dim} "
            "channels kvcomp knows "
            f"(2, layers, tokens, {width}) and (layers, tokens, {2 * width}); check heads and head_dim, which are "
            "those of one rank. "
            "Models with latent attention (MLA) keep no K and V"
        )
    return list(zip(k.transpose(1, 2), v.transpose(1, 2), strict=True))


def _shape_of_bytes(size: int, about: Heads) -> tuple[int, ...]:
    if about.layers is None or about.dtype is None:
        raise UnsupportedModel("LMCache hands over plain bytes: say with layers and dtype what they are")
    token = 2 * about.layers * about.heads * about.head_dim * about.dtype.itemsize
    if size < token or size % token:
        raise UnsupportedModel(f"{size} bytes are no whole number of tokens of {token} bytes: check layers and dtype")
    return 2, about.layers, size // token, about.heads * about.head_dim


def heads_of(params: dict[str, Any]) -> Heads:
    """Read what ``adapter_params`` say of the heads. Raises InvalidInput."""
    numbers = {name: params.get(name) for name in ("heads", "head_dim", "layers")}
    for name, value in numbers.items():
        if value is None and name == "layers":
            continue
        if type(value) is not int or value < 1:
            raise InvalidInput(f"adapter_params needs {name}, a whole number from 1, not {value!r}")
    dtype = params.get("dtype")
    if dtype is not None and dtype not in TYPES:
        raise InvalidInput(f"dtype in adapter_params must be one of {', '.join(TYPES)}, not {dtype!r}")
    return Heads(numbers["heads"] or 0, numbers["head_dim"] or 0, numbers["layers"], TYPES[dtype] if dtype else None)
