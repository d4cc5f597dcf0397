"""The cache on a GPU as a system: rows that join and leave, copies to and from main memory, prompts, graphs. ``make
gpu-check`` runs them.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from batching import Batch
from kvcomp.calibration.rotary import Rotation
from kvcomp.calibration.transform import Affine, Transform
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store.gpu.copies import to_device, to_main_memory
from kvcomp.store.gpu.join import join
from kvcomp.store.gpu.store import GPUStore
from stores import page_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

TOLERANCE = 1e-4  # of float32 outputs, relative to the largest
DEVICE = torch.device("cuda", 0)
SPEC = CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=16, sinks=4)


@pytest.mark.parametrize("seed", range(4))
def test_rows_join_and_leave_without_touching_the_others(seed: int) -> None:
    batch = Batch(
        make=lambda: GPUStore(SPEC),
        join=join,
        attend=lambda store, q, by: store.attend(q, by),
        pages=lambda store: page_bytes(to_main_memory(store)),
        seed=seed,
        device=DEVICE,
    )
    batch.live(TOLERANCE)


def test_to_main_memory_and_back() -> None:
    store = GPUStore(SPEC)
    store.append(*torch.randn(2, 3, 2, 500, 64, device=DEVICE, dtype=torch.bfloat16))
    store.seal()
    store.select(torch.tensor([2, 0, 0]))
    host = to_main_memory(store)
    back = to_device(host, DEVICE)
    assert page_bytes(to_main_memory(back)) == page_bytes(host)
    q = torch.randn((3, 4, 1, 64), device=DEVICE)
    assert torch.equal(back.attend(q, 0.125), store.attend(q, 0.125))


def test_means_that_turn_and_pieces_are_those_of_main_memory() -> None:
    random = torch.Generator().manual_seed(4)
    matrix = torch.linalg.qr(torch.randn((2, 128, 128), generator=random))[0]
    rotation = Rotation.of(np.array([[0, 64], [3, 7]]), np.array([0.5, 1e-3]), 128)
    mean = torch.randn((2, 128), generator=random)
    transform = Transform(Affine.of(matrix, mean, rotation), Affine.of(matrix, mean))
    of_heads = TensorSpec("head", None, "patched", steps=((0.2, 0.3),))
    store = GPUStore(CodecSpec(of_heads, of_heads, window=16).layer(0, 1), transform=transform)
    for tokens in (300, 70, 1):
        store.append(*torch.randn(2, 2, 2, tokens, 128, generator=random).to(DEVICE, torch.bfloat16))
        if tokens == 300:
            store.set_starts([0, 9])
        store.seal()
    q = torch.randn((2, 8, 1, 128), generator=random)
    out, expected = store.attend(q.to(DEVICE), 0.1).cpu(), to_main_memory(store).attend(q, 0.1)
    assert (out - expected).abs().max() < TOLERANCE * store.dense()[1].abs().mean()


def small_model(layers: int) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1 << 15,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().to(DEVICE)
    model.set_attn_implementation("kvcomp")
    return model


def test_a_prompt_is_held_raw_in_few_layers_at_a_time() -> None:
    cache_class = pytest.importorskip("kvcomp.integrations.transformers").KVCompCache
    model = small_model(layers=8)
    cache = cache_class(model.config, backend="gpu")
    stores = [layer.store for layer in cache.layers]
    raw: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(
            lambda *_: raw.append(sum(store.batch > 0 and store.tail.room >= 4096 for store in stores))
        )
    with torch.inference_mode():
        model(torch.randint(1, 96, (2, 4096), device=DEVICE), past_key_values=cache, logits_to_keep=1)
    assert max(raw) <= 2


def test_recorded_steps_give_what_ordinary_ones_do() -> None:
    cache_class = pytest.importorskip("kvcomp.integrations.transformers").KVCompCache
    graph_class = pytest.importorskip("kvcomp.integrations.transformers.graph").DecodeGraph
    model = small_model(layers=2)
    prompt = torch.randint(1, 96, (2, 400), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    cache = cache_class(model.config, backend="gpu")
    with torch.inference_mode():
        logits = model(prompt, past_key_values=cache).logits[:, -1]
        other = copy.deepcopy(cache)
        graph = graph_class(model, cache)
        for _ in range(200):  # three pages of each row are sealed on the way
            ids = logits.argmax(-1)
            logits = graph.step(ids)
            expected = model(ids[:, None], past_key_values=other).logits[:, -1]
            assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert cache.memory() == other.memory()
