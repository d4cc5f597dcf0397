"""A model whose cache is a GPUStore, its kernels on the emulator: the tokens that the CPU backend gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulator import COMPILER, Emulator

from kvcomp import gpu_store

transformers = pytest.importorskip("transformers")
KVCompCache = pytest.importorskip(
    "kvcomp.integrations.transformers"
).KVCompCache  # which registers the attention function

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++"), pytest.mark.emulated]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(gpu_store, "gpu_of", lambda device: Emulator())
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config).eval()
    made.set_attn_implementation("kvcomp")
    return made


@pytest.mark.parametrize("padded", [False, True])
def test_generates_what_the_cpu_backend_does(model: transformers.PreTrainedModel, padded: bool) -> None:
    prompt = torch.randint(1, 96, (2, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompt)
    if padded:
        mask[1, :30] = 0
    tokens = []
    for backend in ("gpu", "cpu"):
        cache = KVCompCache(model.config, backend=backend)
        tokens.append(
            model.generate(
                prompt, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False, pad_token_id=0
            )
        )
    assert torch.equal(*tokens)


def test_a_file_goes_on_where_the_cache_was(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    prompt = torch.randint(1, 96, (2, 330), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    cache = KVCompCache(model.config, backend="gpu")
    with torch.no_grad():
        model(prompt[:, :-1], past_key_values=cache)
    cache.save(tmp_path / "cache.kvc")
    loaded = KVCompCache.load(tmp_path / "cache.kvc", model.config)
    tokens = [model.generate(prompt, past_key_values=one, **options) for one in (cache, loaded)]
    assert torch.equal(*tokens)
