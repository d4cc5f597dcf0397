"""A prompt on the GPU: when the host waits for the device, and what is held raw meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator import COMPILER, Emulator

from kvcomp import gpu_arena, gpu_store

transformers = pytest.importorskip("transformers")
KVCompCache = pytest.importorskip("kvcomp.integrations.transformers").KVCompCache

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++"), pytest.mark.emulated]

LAYERS, TOKENS = 4, 330


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(gpu_store, "gpu_of", lambda device: Emulator())
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config).eval()
    made.set_attn_implementation("kvcomp")
    return made


def test_the_host_waits_only_when_the_device_has_the_next_layer_to_do(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    prompt = torch.randint(1, 96, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    cache = KVCompCache(model.config, backend="gpu")
    stores = [layer.store for layer in cache.layers]
    raw = []

    def layer_of(index: int) -> Any:
        def queued(*_: Any) -> None:
            events.append(("queued", index))
            raw.append(sum(store.batch and store.tail.room >= TOKENS for store in stores))

        return queued

    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(layer_of(index))
    wait, proceed = gpu_arena.Sent.wait, gpu_store.GPUStore.proceed
    at_hand: list[Any] = []

    def waiting(sent: gpu_arena.Sent) -> torch.Tensor:
        events.append(("waits for", stores.index(at_hand[-1])))
        return wait(sent)

    def proceeding(store: gpu_store.GPUStore) -> None:
        at_hand.append(store)
        proceed(store)

    monkeypatch.setattr(gpu_store.GPUStore, "proceed", proceeding)
    monkeypatch.setattr(gpu_arena.Sent, "wait", waiting)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    waits = [(at, index) for at, (what, index) in enumerate(events) if what == "waits for"]
    assert {index for _, index in waits} == set(range(LAYERS - 1))  # the last layer is finished when it is used
    for at, index in waits:
        assert ("queued", index) in events[:at]
    assert max(raw) <= 2  # the layer at hand and the one before it
    cache.memory()
    assert not any(store.tail.room >= TOKENS for store in stores)
