"""A prompt on the GPU: when the host waits for the device, and what is held raw meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from emulator import COMPILER, Emulator
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store.gpu import arena as gpu_arena
from kvcomp.store.gpu import books as gpu_books
from kvcomp.store.gpu import rows as gpu_rows
from kvcomp.store.gpu import store as gpu_store
from kvcomp.store.tensors import to_pinned
from recorder import WAITING

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
    wait, proceed = gpu_arena.Readback.wait, gpu_store.GPUStore.step
    at_hand: list[Any] = []

    def waiting(sent: gpu_arena.Readback) -> Any:
        events.append(("waits for", stores.index(at_hand[-1])))
        return wait(sent)

    def proceeding(store: gpu_store.GPUStore) -> None:
        at_hand.append(store)
        proceed(store)

    monkeypatch.setattr(gpu_store.GPUStore, "step", proceeding)
    monkeypatch.setattr(gpu_arena.Readback, "wait", waiting)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    waits = [(at, index) for at, (what, index) in enumerate(events) if what == "waits for"]
    assert {index for _, index in waits} == set(range(LAYERS - 1))  # the last layer is finished when it is used
    for at, index in waits:
        assert ("queued", index) in events[:at]
    assert max(raw) <= 2  # the layer at hand and the one before it
    cache.memory()
    assert not any(store.tail.room >= TOKENS for store in stores)


def test_decoding_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=16, sinks=4)
    store = gpu_store.GPUStore(spec, launcher=lambda device: Emulator())
    store.append(*torch.randn(2, 2, 1, 340, 64))
    store.seal()
    store.sync()
    k, v, q = torch.randn(3, 2, 1, 1, 64)
    sealed = sum(len(row.valid) for row in store.rows)
    for module in (gpu_rows, gpu_books):
        monkeypatch.setattr(module, "to_pinned", pinned)
    with NoWaiting():
        for _ in range(140):
            store.append(k, v)
            store.attend(q, 0.125)
            store.seal()
    assert sum(len(row.valid) for row in store.rows) == sealed + 4


def pinned(content: Any, device: torch.device) -> torch.Tensor:
    with _disable_current_modes():
        return to_pinned(content, device)


class NoWaiting(TorchDispatchMode):
    """Refuses what on a GPU would let the host wait: reading a number, and sending one that is not pinned."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name.removeprefix("aten::") not in WAITING, func
        return func(*args, **(kwargs or {}))
