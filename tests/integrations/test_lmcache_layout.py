"""K and V in LMCache's memory objects: known layouts are read right, all others refused. Needs no LMCache."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.integrations.lmcache_layout import Heads, heads_of, kv_views
from kvcomp.serve.chunks import ChunkShape

L, H, T, D = 3, 2, 8, 16
ABOUT = Heads(H, D)


@dataclass
class Memory:
    """What LMCache hands over, as far as it is used."""

    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    fmt: str = "KV_2LTD"
    padding: int = 64
    metadata: Any = field(init=False)
    raw_data: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        shapes = [torch.Size(shape) for shape in self.shapes]
        self.metadata = SimpleNamespace(
            shapes=shapes, dtypes=self.dtypes, shape=shapes[0], dtype=self.dtypes[0], fmt=SimpleNamespace(name=self.fmt)
        )
        self.raw_data = torch.zeros(self.get_size() + self.padding, dtype=torch.uint8)

    def get_size(self) -> int:
        return sum(torch.Size(s).numel() * d.itemsize for s, d in zip(self.shapes, self.dtypes, strict=True))

    def fill(self, values: torch.Tensor) -> None:
        self.raw_data[: self.get_size()] = values.contiguous().flatten().view(torch.uint8)


def expected() -> torch.Tensor:
    """(layers, K or V, heads, tokens, channels), each value another one."""
    return torch.arange(L * 2 * H * T * D).reshape(L, 2, H, T, D).to(torch.float32)


def check(memory: Memory, about: Heads = ABOUT, dtype: torch.dtype = torch.float32) -> None:
    shape, kv = kv_views(memory, about)
    assert shape == ChunkShape(L, H, T, D, dtype)
    for layer, (k, v) in enumerate(kv):
        assert torch.equal(k, expected()[layer, 0].to(dtype))
        assert torch.equal(v, expected()[layer, 1].to(dtype))


def test_all_keys_then_all_values() -> None:
    memory = Memory([(2, L, T, H * D)], [torch.float32])
    memory.fill(expected().permute(1, 0, 3, 2, 4))
    check(memory)


@pytest.mark.parametrize("shape", [(L, T, 2 * H * D), (1, L, T, 2 * H * D)])
def test_each_head_has_its_keys_then_its_values(shape: tuple[int, ...]) -> None:
    memory = Memory([shape], [torch.float32])
    memory.fill(expected().permute(0, 3, 2, 1, 4))
    check(memory)


def test_groups_of_layers_follow_each_other() -> None:
    memory = Memory([(2, 1, T, H * D), (2, L - 1, T, H * D)], [torch.float32] * 2)
    first, rest = expected()[:1].permute(1, 0, 3, 2, 4), expected()[1:].permute(1, 0, 3, 2, 4)
    memory.fill(torch.cat([first.flatten(), rest.flatten()]))
    check(memory)


def test_plain_bytes_are_what_they_are_said_to_be() -> None:
    memory = Memory([(4 * L * 2 * H * T * D,)], [torch.uint8])
    memory.fill(expected().permute(1, 0, 3, 2, 4))
    check(memory, Heads(H, D, L, torch.float32))
    with pytest.raises(UnsupportedModel, match="say with layers and dtype"):
        kv_views(memory, ABOUT)
    with pytest.raises(UnsupportedModel, match="no whole number of tokens"):
        kv_views(memory, Heads(H, D, L + 2, torch.float32))


def test_views_write_into_the_buffer() -> None:
    memory = Memory([(2, L, T, H * D)], [torch.float32])
    for layer, (k, v) in enumerate(kv_views(memory, ABOUT)[1]):
        k.copy_(expected()[layer, 0])
        v.copy_(expected()[layer, 1])
    check(memory)
    assert not memory.raw_data[memory.get_size() :].any()


@pytest.mark.parametrize(
    "shape",
    [
        (2, L, T, H * D * 2),  # twice the heads
        (2, L, T, H * D - 1),
        (L, T, H * D),  # latent attention, or K alone
        (1, L, T, H * D),
        (3, L, T, H * D),
        (2, L, H, T, D),
        (2, 0, T, H * D),
        (T, H * D),
        (T * H * D,),
    ],
)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedModel):
        kv_views(Memory([shape], [torch.bfloat16]), ABOUT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedModel, match="kvcomp compresses one of"):
        kv_views(Memory([(2, L, T, H * D)], [dtype]), ABOUT)


def test_mixed_groups_are_refused() -> None:
    one = (2, L, T, H * D)
    with pytest.raises(UnsupportedModel):
        kv_views(Memory([one, one], [torch.float32, torch.bfloat16]), ABOUT)
    with pytest.raises(UnsupportedModel, match="one number for all"):
        kv_views(Memory([one, (2, L, T - 1, H * D)], [torch.float32] * 2), ABOUT)


@pytest.mark.parametrize("fmt", ["KV_MLA_FMT", "KV_T2D", "KV_2TD", "BINARY_BUFFER", "UNDEFINED"])
def test_other_formats_are_refused(fmt: str) -> None:
    with pytest.raises(UnsupportedModel, match=fmt):
        kv_views(Memory([(2, L, T, H * D)], [torch.float32], fmt), ABOUT)


def test_a_buffer_that_is_smaller_than_its_shape_is_refused() -> None:
    memory = Memory([(2, L, T, H * D)], [torch.float32])
    memory.raw_data = memory.raw_data[:100]
    with pytest.raises(UnsupportedModel, match="smaller than its shape"):
        kv_views(memory, ABOUT)


@pytest.mark.parametrize(
    "params",
    [{}, {"heads": 2}, {"heads": 0, "head_dim": 64}, {"heads": 2, "head_dim": "64"}, {"heads": True, "head_dim": 64},
     {"heads": 2, "head_dim": 64, "layers": 0}, {"heads": 2, "head_dim": 64, "dtype": "int8"}],
)  # fmt: skip
def test_parameters_are_checked(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        heads_of(params)
