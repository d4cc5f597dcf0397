"""The CUDA kernels of one layer's store, as they are built for it and its device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kvcomp.codec.page import Layout, ceil16
from kvcomp.errors import BackendUnavailable
from kvcomp.kernels.cuda.device import Gpu
from kvcomp.kernels.cuda.launch import Launcher
from kvcomp.kernels.cuda.layout import AttendBuild, attend_build, page_build
from kvcomp.spec import PAGE_TOKENS, CodecSpec
from kvcomp.store.gpu.arena import Arena
from kvcomp.store.gpu.sealing import SideStream
from kvcomp.store.tensors import NAMES

ARENA_PAGES = 4  # pages of the largest size that fit a chunk of the arena


class LayerKernels:
    """Kernels for K like ``k``, (batch, KV heads, tokens, head_dim), and what is passed to them in every call."""

    def __init__(self, on: Launcher, spec: CodecSpec, k: Tensor) -> None:
        _, heads, _, channels = k.shape
        self.on, self.side, self._device = on, side_stream_of(k.device), k.device
        self.page_build = page_build(spec, channels, NAMES[k.dtype])
        key, value = (
            None if of_heads is None else torch.tensor(of_heads, dtype=torch.float32, device=k.device)
            for of_heads in (spec.key.heads, spec.value.heads)
        )
        self.steps = key, value  # float32 (KV heads,) where the unit is ``head``
        layout = Layout(heads, (channels, channels), (spec.key.unit, spec.value.unit), k.dtype.itemsize)
        block = PAGE_TOKENS * channels * k.dtype.itemsize + 4 * max(channels, PAGE_TOKENS)
        self.largest_page = layout.first_block + 2 * heads * ceil16(block)  # bytes
        self._layer = spec, channels, NAMES[k.dtype]
        self._builds: dict[tuple[str, bool, bool], AttendBuild] = {}

    @property
    def step_addresses(self) -> list[int]:
        """Of ``steps`` of K and of V; 0 where there are none."""
        return [0 if steps is None else steps.data_ptr() for steps in self.steps]

    def attend_build(self, query: torch.dtype, softcap: bool, turned: bool) -> AttendBuild:
        """The attention kernel for queries of this dtype. turned: whether scores lack what means that turn add."""
        key = NAMES[query], softcap, turned
        if key not in self._builds:
            self._builds[key] = attend_build(*self._layer, *key[:2], self.on.machine, turned)
        return self._builds[key]

    def arena(self) -> Arena:
        """A new arena for pages that are sealed while decoding."""
        return Arena(ARENA_PAGES * self.largest_page, self.page_build.channels, self._device)


@lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> Launcher:
    """The GPU behind a device of torch; kernels go to its current stream. Raises BackendUnavailable for
    another device.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        raise BackendUnavailable(
            f"backend='gpu' takes K and V on an NVIDIA GPU, not on {device}: "
            "move the model to one, or use backend='cpu'"
        )
    index = device.index or 0
    return Gpu(index, lambda: int(torch.cuda.current_stream(index).cuda_stream))


@lru_cache(maxsize=64)
def side_stream_of(device: torch.device) -> SideStream:
    """The side stream of a device, one for all layers: torch keeps what is freed for each stream, so that layers
    with streams of their own would each keep a prompt's scratch memory.
    """
    return SideStream(device)
