"""The kernels on a GPU: against the float64 oracle, the CPU's bytes, and themselves. ``make gpu-check`` runs them."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from attention_cases import Expected, oracle
from kvcomp.spec import CodecSpec, Coding, TensorSpec, Unit
from kvcomp.store import KVStore
from kvcomp.store.gpu.store import GPUStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

TOLERANCE = 2e-4  # of float32 outputs, relative to the largest sum of w |v|; see the emulator's test
DEVICE = torch.device("cuda", 0)


def tensor(unit: Unit, scale: float, coding: Coding, classes: int, limit: int, heads: int) -> TensorSpec:
    if unit == "head":
        return TensorSpec("head", None, coding, limit, classes, steps=((scale * 2,) * heads,))
    return TensorSpec(unit, scale, coding, limit, classes)


class Pair:
    """A store on the GPU and one on the CPU, given the same tokens."""

    def __init__(self, spec: CodecSpec, batch: int, heads: int, channels: int, dtype: torch.dtype, seed: int) -> None:
        self.gpu, self.cpu = GPUStore(spec), KVStore(spec, "reference")
        self.shape, self.dtype = (batch, heads, channels), dtype
        self.random = torch.Generator().manual_seed(seed)

    def append(self, tokens: int, seal: bool = True) -> None:
        batch, heads, channels = self.shape
        spread = torch.exp(torch.randn((1, heads, 1, channels), generator=self.random) / 2)
        k, v = (
            (torch.randn((batch, heads, tokens, channels), generator=self.random) * spread).to(self.dtype) for _ in "KV"
        )
        self.cpu.append(k, v)
        self.gpu.append(k.to(DEVICE), v.to(DEVICE))
        if seal:
            self.cpu.seal()
            self.gpu.seal()

    def check(self, group: int, queries: int = 1, softcap: float = 0.0) -> None:
        for mine, theirs in zip(self.gpu.dense(), self.cpu.dense(), strict=True):
            assert torch.equal(mine.cpu(), theirs)
        batch, heads, channels = self.shape
        q = torch.randn((batch, heads * group, queries, channels), generator=self.random)
        out = self.gpu.attend(q.to(DEVICE), channels**-0.5, softcap).cpu()
        expected = self._oracle(q, group, queries, softcap)
        assert expected.error_of(out.reshape(expected.out.shape).numpy()) < TOLERANCE

    def check_pages(self) -> None:
        self.gpu.sync()
        torch.cuda.synchronize()
        for row in range(self.shape[0]):
            ours = self.gpu.table.pages[row].tolist()
            for mine, theirs in zip(ours, self.cpu.rows.pages[row, : self.cpu.rows.count[row]].tolist(), strict=False):
                size = int(np.frombuffer(ctypes.string_at(theirs + 8 * self.shape[1], 4), "<u4")[0])
                assert self._page(mine, size) == ctypes.string_at(theirs, size)

    def _page(self, address: int, size: int) -> bytes:
        for row in self.gpu.rows:
            for chunk in row.chunks:
                at = address - chunk.memory.data_ptr()
                if 0 <= at <= chunk.memory.shape[0] - size:
                    return chunk.memory[at : at + size].cpu().numpy().tobytes()
        raise AssertionError("a page lies in none of its row's chunks")

    def _oracle(self, q: torch.Tensor, group: int, queries: int, softcap: float) -> Expected:
        store, (batch, heads, channels) = self.cpu, self.shape
        at = store.tokens - store.tail_base
        return oracle(
            q.reshape(batch, heads, group * queries, channels).numpy(),
            store.view(),
            np.tile(np.arange(at - queries + 1, at + 1), group),
            channels**-0.5,
            softcap,
        )


GRID: list[tuple[int, int, tuple[Unit, Unit], Coding, int, int, torch.dtype, float]] = [
    # channels, group, units, coding, classes, limit, dtype, soft cap
    (128, 4, ("block", "token"), "huffman", 1, 12, torch.bfloat16, 0.0),
    (128, 8, ("block", "token"), "huffman", 1, 10, torch.bfloat16, 0.0),
    (64, 1, ("channel", "vector"), "huffman", 4, 12, torch.float16, 0.0),
    (80, 5, ("vector", "channel"), "huffman", 4, 11, torch.bfloat16, 0.0),
    (96, 16, ("head", "head"), "huffman", 4, 10, torch.bfloat16, 0.0),
    (192, 3, ("token", "block"), "huffman", 1, 12, torch.float32, 30.0),
    (256, 2, ("block", "token"), "huffman", 1, 10, torch.bfloat16, 0.0),
    (128, 4, ("block", "token"), "fixed", 1, 12, torch.bfloat16, 0.0),
    (64, 7, ("head", "head"), "fixed", 1, 12, torch.float16, 0.0),
    (128, 4, ("head", "head"), "patched", 4, 12, torch.bfloat16, 0.0),
    (80, 5, ("channel", "token"), "patched", 1, 12, torch.float16, 0.0),
]


@pytest.mark.parametrize(("channels", "group", "units", "coding", "classes", "limit", "dtype", "softcap"), GRID)
def test_the_same_bytes_and_attention(
    channels: int,
    group: int,
    units: tuple[Unit, Unit],
    coding: Coding,
    classes: int,
    limit: int,
    dtype: torch.dtype,
    softcap: float,
) -> None:
    heads = 2
    key, value = (
        tensor(unit, scale, coding, classes, limit, heads) for unit, scale in zip(units, (0.05, 0.1), strict=True)
    )
    pair = Pair(CodecSpec(key, value, window=32, sinks=4).layer(0, 1), 2, heads, channels, dtype, seed=channels)
    pair.append(64 * 9 + 5)
    pair.check(group, softcap=softcap)
    for tokens in (40, 60, 64):
        pair.append(tokens)
    pair.append(3, seal=False)
    pair.check(group, queries=3, softcap=softcap)
    pair.check_pages()


def test_rows_of_different_lengths_leave_and_join() -> None:
    spec = CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=16, sinks=4)
    pair = Pair(spec, 3, 2, 128, torch.bfloat16, seed=5)
    pair.append(30, seal=False)
    for store in (pair.gpu, pair.cpu):
        store.set_starts([0, 7, 20])
    pair.append(300)
    pair.check(4)
    for store in (pair.gpu, pair.cpu):
        store.select(torch.tensor([2, 0, 0]))
    pair.append(70)
    pair.check(4)
    for store in (pair.gpu, pair.cpu):
        store.crop(200)
    pair.append(90)
    pair.check(4)
    pair.check_pages()


def test_a_long_context_in_one_launch_and_its_merge() -> None:
    spec = CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1))
    pair = Pair(spec, 1, 1, 64, torch.bfloat16, seed=6)
    pair.append(64 * 300)
    pair.check(4)


def test_the_result_does_not_change_from_run_to_run() -> None:
    spec = CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1))
    pair = Pair(spec, 2, 2, 128, torch.bfloat16, seed=7)
    pair.append(64 * 40)
    q = torch.randn((2, 8, 1, 128), generator=pair.random).to(DEVICE)
    first = pair.gpu.attend(q, 0.1)
    for _ in range(20):
        assert torch.equal(pair.gpu.attend(q, 0.1), first)


def test_decoding_never_waits_for_the_gpu() -> None:
    spec = CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1))
    pair = Pair(spec, 1, 2, 128, torch.bfloat16, seed=8)
    pair.append(1000)
    k, v = (torch.randn((1, 2, 1, 128), generator=pair.random).to(DEVICE, torch.bfloat16) for _ in "KV")
    q = torch.randn((1, 8, 1, 128), generator=pair.random).to(DEVICE, torch.bfloat16)
    pair.gpu.attend(q, 0.1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(200):  # three pages are sealed on the way
            pair.gpu.append(k, v)
            pair.gpu.attend(q, 0.1)
            pair.gpu.seal()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_model_generates_what_it_does_on_the_cpu() -> None:
    transformers = pytest.importorskip("transformers")
    cache_class = pytest.importorskip("kvcomp.integrations.transformers").KVCompCache
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().float()
    model.set_attn_implementation("kvcomp")
    prompt = torch.randint(1, 96, (2, 400), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, past_key_values=cache_class(config, backend="reference"), **options)
    model.to(DEVICE)
    tokens = model.generate(prompt.to(DEVICE), past_key_values=cache_class(config, backend="gpu"), **options)
    assert torch.equal(tokens.cpu(), expected)
