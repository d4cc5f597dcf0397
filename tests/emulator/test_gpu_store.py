"""The GPU's store, its kernels on the emulator, against the CPU's: the same pages, the same attention, through a
sequence's life.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emulator import COMPILER, Emulator
from kvcomp.calibration.rotary import Rotation
from kvcomp.calibration.transform import Affine, Transform
from kvcomp.errors import InvalidInput, LimitExceeded
from kvcomp.kernels.reference import page_bytes
from kvcomp.spec import CodecSpec, Coding, TensorSpec
from kvcomp.store import KVStore
from kvcomp.store.attention import attend
from kvcomp.store.gpu.copies import to_device, to_main_memory
from kvcomp.store.gpu.store import GPUStore
from stores import page_bytes as page_bytes_of

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++"), pytest.mark.emulated]

HEADS, CHANNELS, GROUP = 2, 64, 2
SPEC = CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=16, sinks=4)
TOLERANCE = 1e-4


class Pair:
    """Both stores, given the same tokens."""

    def __init__(self, spec: CodecSpec, batch: int, seed: int = 0) -> None:
        self.on = Emulator()
        self.gpu, self.cpu = GPUStore(spec, launcher=lambda device: self.on), KVStore(spec, "reference")
        self.batch = batch
        self.random = torch.Generator().manual_seed(seed)

    def values(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random).to(torch.bfloat16)

    def append(self, tokens: int, seal: bool = True) -> None:
        k, v = (self.values(self.batch, HEADS, tokens, CHANNELS) for _ in "KV")
        for store in (self.gpu, self.cpu):
            store.append(k, v)
            if seal:
                store.seal()

    def check(self, queries: int = 1, size: float = 0.0) -> None:
        """size: what the error of attention is relative to; the largest output if 0."""
        for mine, theirs in zip(self.gpu.dense(), self.cpu.dense(), strict=True):
            assert torch.equal(mine, theirs)
        q = torch.randn((self.batch, HEADS * GROUP, queries, CHANNELS), generator=self.random)
        out, expected = self.gpu.attend(q, 0.125), attend(self.cpu, q, 0.125)
        assert (out - expected).abs().max() < TOLERANCE * (size or expected.abs().max())

    def check_pages(self) -> None:
        self.gpu.sync()
        for row in range(self.batch):
            for mine, theirs in zip(
                self.gpu.table.pages[row].tolist(),
                self.cpu.rows.pages[row, : self.cpu.rows.count[row]].tolist(),
                strict=False,
            ):
                assert page_bytes(mine, HEADS) == page_bytes(theirs, HEADS)


def test_a_prompt_and_what_follows() -> None:
    pair = Pair(SPEC, 2)
    pair.append(150)
    pair.check_pages()
    for _ in range(3):
        pair.append(40)
    pair.append(2, seal=False)
    pair.check(2)
    pair.check_pages()
    assert pair.gpu.memory().codes > 0
    assert pair.gpu.memory().sealed_values == pair.cpu.memory().sealed_values


@pytest.mark.parametrize(("processors", "kernels"), [(8, ["attend", "merge"]), (1, ["attend"])])
def test_decoding_launches_a_kernel_a_layer_and_one_for_its_parts(processors: int, kernels: list[str]) -> None:
    pair = Pair(SPEC, 1)
    pair.append(340)
    pair.gpu.sync()
    pair.on.machine = type(pair.on.machine)(90, pair.on.machine.shared, processors)
    pair.on.launches.clear()
    pair.gpu.attend(pair.values(1, HEADS * GROUP, 1, CHANNELS).float(), 0.125)
    assert pair.on.launches == kernels


def test_rows_with_padding_leave_repeat_and_are_cropped() -> None:
    pair = Pair(SPEC, 3, seed=1)
    pair.append(30, seal=False)
    for store in (pair.gpu, pair.cpu):
        store.set_starts([0, 7, 20])
    pair.append(200)
    pair.check()
    for store in (pair.gpu, pair.cpu):
        store.select(torch.tensor([2, 0, 0]))
    pair.append(70)
    pair.check()
    for store in (pair.gpu, pair.cpu):
        store.crop(120)
    pair.append(1)
    pair.check()
    pair.append(90)
    pair.check()
    pair.check_pages()


def test_pages_from_main_memory_have_room_behind_them() -> None:
    """As pages of a file need it, whose streams may be read over their end (docs/format.md, section 2)."""
    pair = Pair(SPEC, 2)
    pair.append(300)
    host = to_main_memory(pair.gpu)
    back = to_device(host, torch.device("cpu"), lambda device: pair.on)
    assert page_bytes_of(to_main_memory(back)) == page_bytes_of(host)
    for row in back.rows:
        for chunk in row.chunks:
            assert chunk.memory.numel() - int(chunk.cursor) == CHANNELS * 9 // 8 + 8


def test_when_memory_ends_the_cache_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(SPEC, 2)
    pair.append(150)
    k, v = (pair.values(2, HEADS, 200, CHANNELS) for _ in "KV")
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", _no_memory)
        with pytest.raises(LimitExceeded, match="no memory left"):
            pair.gpu.append(k, v)
    pair.check()
    for store in (pair.gpu, pair.cpu):
        store.append(k, v)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", _no_memory)
        with pytest.raises(LimitExceeded, match="no memory left"):
            pair.gpu.seal()
    for store in (pair.gpu, pair.cpu):
        store.seal()
    pair.check()
    pair.check_pages()


def _no_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("coding", ["huffman", "patched"])
@pytest.mark.parametrize("units", [("head", "head"), ("channel", "vector")])
def test_other_units(units: tuple[str, str], coding: Coding) -> None:
    def tensor(unit: str) -> TensorSpec:
        if unit == "head":
            return TensorSpec("head", None, coding, classes=4, steps=((0.1, 0.15),))
        return TensorSpec(unit, 0.1, coding)  # type: ignore[arg-type]

    pair = Pair(CodecSpec(tensor(units[0]), tensor(units[1]), window=0, sinks=0).layer(0, 1), 1)
    pair.append(64 * 5)
    pair.append(1, seal=False)
    pair.check()
    pair.check_pages()


@pytest.mark.parametrize("queries", [1, 3])
def test_means_that_turn_are_those_of_the_cpu(queries: int) -> None:
    pair = Pair(SPEC, 2)
    rotation = Rotation.of(np.array([[0, 32], [3, 7]]), np.array([0.5, 1e-3]), CHANNELS)
    matrix = torch.linalg.qr(torch.randn((HEADS, CHANNELS, CHANNELS), generator=pair.random))[0]
    mean = torch.randn((HEADS, CHANNELS), generator=pair.random)
    transform = Transform(Affine.of(matrix, mean, rotation), Affine.of(matrix, mean))
    pair.gpu = GPUStore(SPEC, transform=transform, launcher=lambda device: pair.on)
    pair.cpu = KVStore(SPEC, "reference", transform=transform)
    pair.append(150, seal=False)
    for store in (pair.gpu, pair.cpu):
        store.set_starts([0, 9])
        store.seal()
    pair.append(70)
    pair.append(queries)
    pair.check_pages()
    of_values = float(pair.cpu.dense()[1].abs().mean())  # outputs are weighed means of many, and small
    pair.check(queries, of_values)
    for store in (pair.gpu, pair.cpu):
        store.crop(100)  # in the middle of a page
    pair.append(150)
    pair.append(queries, seal=False)
    assert pair.gpu.can_attend(queries)
    pair.check(queries, of_values)


def test_heads_and_channels_that_the_spec_or_the_calibration_lack_are_refused() -> None:
    matrix = torch.eye(CHANNELS).expand(HEADS, -1, -1)
    affine = Affine.of(matrix, torch.zeros(HEADS, CHANNELS))
    steps = TensorSpec("head", None, classes=4, steps=((0.1,) * HEADS,))
    of_steps = CodecSpec(steps, steps, window=0, sinks=0).layer(0, 1)
    stores = [
        GPUStore(of_steps, launcher=lambda device: Emulator()),
        GPUStore(SPEC, transform=Transform(affine, affine), launcher=lambda device: Emulator()),
    ]
    for store in stores:
        with pytest.raises(InvalidInput, match=f"for {HEADS} KV heads"):
            store.append(*torch.randn(2, 1, 8, 70, CHANNELS))
        assert (store.batch, store.tokens) == (0, 0)
        store.append(*torch.randn(2, 1, HEADS, 70, CHANNELS))
        assert store.tokens == 70
