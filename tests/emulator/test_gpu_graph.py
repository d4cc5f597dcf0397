"""Recorded decoding steps, repeated with the arguments they were recorded with, against ordinary ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from emulator import COMPILER
from kvcomp.calibration.rotary import Rotation
from kvcomp.calibration.transform import Affine, Transform
from kvcomp.errors import InvalidInput, LimitExceeded
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store.attention import attend, attend_tiled
from kvcomp.store.gpu import store as gpu_store
from kvcomp.store.gpu.store import GPUStore
from recorder import Recorder, RecordingEmulator

transformers = pytest.importorskip("transformers")
KVCompCache = pytest.importorskip("kvcomp.integrations.transformers").KVCompCache
transformers_graph = pytest.importorskip("kvcomp.integrations.transformers.graph")

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++"), pytest.mark.emulated]

SPEC = CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=16, sinks=4)


@pytest.mark.parametrize("coordinates", ["as they are", "transformed", "with means that turn"])
def test_a_store_repeats_a_step_while_pages_are_sealed(coordinates: str) -> None:
    on = RecordingEmulator(processors=8)
    random = torch.Generator().manual_seed(3)
    key, value = (Affine.of(torch.randn((2, 64, 64), generator=random) / 8, torch.zeros(2, 64)) for _ in "KV")
    if coordinates == "with means that turn":
        rotation = Rotation.of(np.array([[0, 32], [3, 7]]), np.array([0.5, 1e-3]), 64)
        key = Affine.of(key.matrix, torch.randn((2, 64), generator=random), rotation)
    transform = None if coordinates == "as they are" else Transform(key, value)
    one = GPUStore(SPEC, transform=transform, launcher=lambda device: on)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(torch.bfloat16)

    one.append(*(values(2, 2, 340, 64) for _ in "KV"))
    one.seal()
    one.prepare(1)
    other = deepcopy(one)
    k, v, q = values(2, 2, 1, 64), values(2, 2, 1, 64), values(2, 4, 1, 64).float()
    one.attend(q, 0.125)  # as the first step is an ordinary one
    recorder = Recorder(on)
    places = one.places
    with recorder:
        one.append(k, v)
        out = one.attend(q, 0.125)
    if transform is None:
        assert recorder.names == ["index_copy_", "index_copy_", "add_", "attend", "merge"]
    sealed = sum(len(row.valid) for row in one.rows)
    for step in range(200):
        for x, new in ((k, values(2, 2, 1, 64)), (v, values(2, 2, 1, 64)), (q, values(2, 4, 1, 64).float())):
            x.copy_(new)
        if step:
            one.prepare(1)
            one.advance(1)
        assert one.places == places
        recorder.repeat()
        one.seal()
        other.append(k, v)
        assert torch.equal(out, other.attend(q, 0.125))
        other.seal()
    assert sum(len(row.valid) for row in one.rows) == sealed + 6
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.dense(), other.dense(), strict=True))
    again = deepcopy(one)
    again.crop(again.tokens - 1)  # the last token, added by the host
    again.append(k, v)
    assert torch.equal(out, again.attend(q, 0.125))


def test_a_soft_cap_asks_the_device_once() -> None:
    on = RecordingEmulator()
    same = Affine.of(torch.eye(64)[None], torch.zeros(1, 64))
    one = GPUStore(SPEC, transform=Transform(same, same), launcher=lambda device: on)
    one.append(*torch.randn(2, 1, 1, 3, 64).to(torch.bfloat16))
    q = torch.randn(1, 2, 1, 64)
    attend_tiled(one, q, 0.125, 30.0)  # the first step is an ordinary one
    recorder = Recorder(on)
    with recorder:
        attend(one, q, 0.125, 30.0)
    assert "attend" in recorder.names


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> RecordingEmulator:
    made = RecordingEmulator()
    monkeypatch.setattr(gpu_store, "gpu_of", lambda device: made)
    return made


def model(tokens: int = 512, layers: int = 2) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config).eval()
    made.set_attn_implementation("kvcomp")
    return made


def test_a_model_repeats_a_step_across_seals(on: RecordingEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    recorders: list[Recorder] = []

    def recorded(step: Callable[[], torch.Tensor], _: torch.device) -> tuple[torch.Tensor, Callable[[], None]]:
        recorders.append(Recorder(on))
        with recorders[-1], monkeypatch.context() as capturing:
            # as in transformers 5.17 while a stream is captured
            capturing.setattr(transformers.masking_utils, "_ignore_causal_mask_sdpa", lambda *_: False)
            result = step()
        return result, recorders[-1].repeat

    monkeypatch.setattr(transformers_graph, "recorded", recorded)
    made = model()
    prompt = torch.randint(1, 96, (2, 330), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompt)
    mask[1, :45] = 0
    cache = KVCompCache(made.config, SPEC, backend="gpu")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = made(prompt, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
    other = deepcopy(cache)
    graph = transformers_graph.DecodeGraph(made, cache)
    for step in range(80):
        ids = logits.argmax(-1)
        logits = graph.step(ids)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        with torch.no_grad():
            positions = mask.sum(1, keepdim=True) - 1
            expected = made(ids[:, None], attention_mask=mask, position_ids=positions, past_key_values=other)
        assert torch.equal(logits, expected.logits[:, -1]), step
    assert len(recorders) == 1
    ours = [name for name in recorders[0].names if name in ("index_copy_", "attend", "merge")]
    assert len(ours) <= 4 * len(cache.layers)
    assert cache.memory() == other.memory()
    cache.batch_select_indices(torch.tensor([1]))
    other.batch_select_indices(torch.tensor([1]))
    for _ in range(3):
        logits = graph.step(torch.tensor([5]))
        with torch.no_grad():
            position = torch.tensor([[other.get_seq_length() - 45]])
            expected = made(torch.tensor([[5]]), position_ids=position, past_key_values=other).logits[:, -1]
        assert torch.equal(logits, expected)
    assert len(recorders) == 2


def test_launches_of_a_layer(on: RecordingEmulator) -> None:
    """What a step launches for one layer more: of ours two writes, a counter, attention and its merge; DynamicCache has
    two writes and sdpa.
    """

    def launches(layers: int, compressed: bool) -> Counter[str]:
        made = model(layers=layers)
        made.set_attn_implementation("kvcomp" if compressed else "sdpa")
        config = made.config
        cache = KVCompCache(config, backend="gpu") if compressed else transformers.DynamicCache(config=config)
        recorder = Recorder(on)
        with torch.inference_mode():
            made(torch.full((1, 300), 5), past_key_values=cache)
            if compressed:
                for layer in cache.layers:
                    layer.store.prepare(1)
                cache.session.recording = True
            token, position = torch.tensor([[1]]), torch.tensor([[300]])
            with recorder:
                made(token, position_ids=position, past_key_values=cache)
        return Counter(recorder.names)

    ours, stock = (launches(3, compressed) - launches(2, compressed) for compressed in (True, False))
    assert ours - stock == Counter({"index_copy_": 2, "add_": 1, "attend": 1, "merge": 1})
    assert stock - ours == Counter({"cat": 2, "scaled_dot_product_attention": 1})


def test_what_cannot_be_recorded_is_refused(on: RecordingEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(tokens=160)
    cache = KVCompCache(made.config, SPEC, backend="gpu")
    with pytest.raises(InvalidInput, match="holds a prompt"):
        transformers_graph.DecodeGraph(made, cache)
    prompt = torch.randint(1, 96, (1, 158), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made(prompt, past_key_values=cache)
    graph = transformers_graph.DecodeGraph(made, cache)
    with pytest.raises(InvalidInput, match="one token"):
        graph.step(torch.tensor([1, 2]))
    graph.step(torch.tensor([1]))

    def failing(step: Callable[[], torch.Tensor], _: torch.device) -> None:
        with Recorder(on):
            step()
        raise RuntimeError("capture fails")

    monkeypatch.setattr(transformers_graph, "recorded", failing)
    with pytest.raises(RuntimeError, match="capture fails"):
        graph.step(torch.tensor([1]))
    assert cache.get_seq_length() == 159
    with torch.no_grad():
        made(torch.tensor([[1]]), past_key_values=cache)
    with pytest.raises(LimitExceeded):
        graph.step(torch.tensor([1]))
    made.set_attn_implementation("sdpa")
    with pytest.raises(InvalidInput, match="set_attn_implementation"):
        transformers_graph.DecodeGraph(made, cache)
