"""The cache of a model on a GPU where mixing devices is an error, its kernels on the emulator: what the CPU gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, Lfm2Config, LlamaConfig, PreTrainedModel
from typer.testing import CliRunner

from emulator import COMPILER, Emulator
from fake_gpu import DEVICE, OnGpu, fake_gpu
from kvcomp.cli import app
from kvcomp.integrations.transformers import KVCompCache, identity
from kvcomp.prefix import PrefixStore
from kvcomp.store.gpu import store as gpu_store
from kvcomp.store.gpu.store import GPUStore
from tiny_models import random_model

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++"), pytest.mark.emulated]

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "pad_token_id": 0,
}
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_store, "gpu_of", lambda device: Emulator())
    monkeypatch.setattr(identity, "Tensor", OnGpu)  # whose weights are hashed


@pytest.fixture
def llama() -> PreTrainedModel:
    model = random_model(LlamaConfig(**SHAPE))
    model.set_attn_implementation("kvcomp")
    return model


@pytest.fixture
def gpu() -> Iterator[None]:
    with fake_gpu():
        yield


def prompt(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generates_what_the_cpu_does(llama: Any, options: dict[str, Any]) -> None:
    ids = prompt(2, 180)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    expected = llama.generate(ids, attention_mask=mask, past_key_values=KVCompCache(llama.config), **OPTIONS, **options)
    with fake_gpu():
        cache = KVCompCache(llama.config, backend="gpu")
        found = llama.to(DEVICE).generate(
            ids.to(DEVICE), attention_mask=mask.to(DEVICE), past_key_values=cache, **OPTIONS, **options
        )
        assert cache.memory().total > 0
    assert torch.equal(found.cpu(), expected)


def test_rows_leave_join_and_go_to_files_and_back(llama: Any, gpu: None, tmp_path: Path) -> None:
    llama, ids = llama.to(DEVICE), prompt(2, 300).to(DEVICE)
    caches = [KVCompCache(llama.config, backend="gpu") for _ in range(2)]
    with torch.no_grad():
        for cache, own in zip(caches, (ids, ids[:1, :200]), strict=True):
            llama(own, past_key_values=cache)
    caches[0].batch_select_indices(torch.tensor([1], device=DEVICE))
    for cache, name in zip(caches, "ab", strict=True):
        cache.save(tmp_path / name, llama)
    loaded = [KVCompCache.load(tmp_path / name, llama.config, llama, backend="gpu") for name in "ab"]
    logits = []
    for one, other in (caches, loaded):
        one.join(other)  # what was loaded lies in main memory still
        mask = one.attention_mask().to(DEVICE)
        with torch.no_grad():
            told = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
            logits.append(llama(torch.tensor([[5], [6]], device=DEVICE), past_key_values=one, **told).logits)
        assert isinstance(one.compressed_layers[0].store, GPUStore)
    assert torch.equal(logits[0].cpu(), logits[1].cpu())


@pytest.mark.parametrize("config", [Gemma3TextConfig, Lfm2Config], ids=["windows", "states"])
def test_windows_and_states_lie_where_the_model_does(config: Any, gpu: None, tmp_path: Path) -> None:
    kinds = {Gemma3TextConfig: "sliding_attention", Lfm2Config: "conv"}
    layers = {"layer_types": [kinds[config], "full_attention"], "sliding_window": 32}
    model: Any = random_model(config(**SHAPE, **layers)).to(DEVICE)
    model.set_attn_implementation("kvcomp")
    ids, store, logits = prompt(1, 401).to(DEVICE), PrefixStore(tmp_path / "store"), []
    cache = KVCompCache(model.config, backend="gpu")
    with torch.no_grad():
        model(ids[:, :400], past_key_values=cache)
        assert store.save(ids, cache, model) == 400
        for one in (cache, store.load(ids, model, backend="gpu")):
            assert one.get_seq_length() == 400
            logits.append(model(ids[:, 400:], past_key_values=one).logits.cpu())
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_commands_take_a_device(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"prompts": 1, "prompt-tokens": 512, "scored-tokens": 16, "streams": 1, "streamed-tokens": 16}
    sizes |= {"lists": 1, "passkeys": 1, "lengths": 512}
    small = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    for command in (
        ["generate", "--compare", "-n", "4", "--prefix-store", "store", "--json", "generated.json"],
        ["evaluate", "--spec", "kvcomp", "--baseline", "kivi-4", *small, "--json", "evaluated.json"],
    ):
        done = CliRunner().invoke(app, [*command, "--device", str(DEVICE)])
        assert done.exit_code == 0, done.output
    assert json.loads(Path("generated.json").read_text())["prefix_store"]["stored_tokens"] > 0
    evaluated = json.loads(Path("evaluated.json").read_text())
    assert evaluated["setting"]["multiprocessors"]
    for method in evaluated["methods"]:
        assert method["retrieval"]
        assert not [key for key in method if "failed" in key]
