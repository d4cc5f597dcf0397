"""A model whose cache is a GPUStore, its kernels on the emulator: the tokens that the CPU backend gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emulator import COMPILER, Emulator
from kvcomp.prefix import PrefixStore
from kvcomp.store.gpu import store as gpu_store

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


@pytest.mark.parametrize("backend", ["gpu", "cpu"])
def test_a_file_goes_on_where_the_cache_was(model: transformers.PreTrainedModel, tmp_path: Path, backend: str) -> None:
    prompt = torch.randint(1, 96, (2, 330), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    cache = KVCompCache(model.config, backend=backend)
    with torch.no_grad():
        model(prompt[:, :-1], past_key_values=cache)
    cache.save(tmp_path / "cache.kvc")
    here, there = (KVCompCache.load(tmp_path / "cache.kvc", model.config, backend=on) for on in ("gpu", "cpu"))
    tokens = [model.generate(prompt, past_key_values=one, **options) for one in (cache, here, there)]
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
    again = KVCompCache.load(tmp_path / "cache.kvc", model.config, backend="gpu")
    for layer in again.layers:
        layer.upload(torch.device("cpu"))
        assert isinstance(layer.store, gpu_store.GPUStore)
    again.save(tmp_path / "again.kvc")
    assert (tmp_path / "cache.kvc").read_bytes() == (tmp_path / "again.kvc").read_bytes()


def test_prefixes_go_to_the_gpu_and_back(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    prompt = torch.randint(1, 96, (1, 400), generator=torch.Generator().manual_seed(2))
    values = []
    for backend in ("gpu", "cpu"):
        store = PrefixStore(tmp_path / backend)
        cache = KVCompCache(model.config, backend=backend)
        with torch.no_grad():
            model(prompt[:, :-1], past_key_values=cache)
        stored = store.save(prompt, cache, model)
        assert stored > 0
        values.append({path.name: path.read_bytes() for path in (tmp_path / backend).glob("*/*.kvc")})
        loaded = [store.load(prompt, model, backend=on) for on in ("gpu", "cpu")]
        with torch.no_grad():
            first, second = (model(prompt[:, stored:], past_key_values=one).logits for one in loaded)
        assert isinstance(loaded[0].layers[0].store, gpu_store.GPUStore)
        torch.testing.assert_close(first, second)
    assert values[0] == values[1]


def test_rows_and_first_tokens_of_files_go_to_the_gpu(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    prompt = torch.randint(1, 96, (2, 400), generator=torch.Generator().manual_seed(3))
    token = torch.tensor([[5], [6], [7]])
    cache = KVCompCache(model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([0, 1, 1]))  # rows that share pages
        cache.save(tmp_path / "three.kvc")
        logits = []
        for backend in ("gpu", "cpu"):
            paths = [tmp_path / "three.kvc"] * 2
            loaded = KVCompCache.load(paths, model.config, tokens=210, rows=[2, 1], backend=backend)
            loaded.batch_select_indices(torch.tensor([0, 3, 1]))
            more = KVCompCache.load(tmp_path / "three.kvc", model.config, tokens=90, rows=[0], backend=backend)
            logits.append(model(token, past_key_values=loaded).logits)
            loaded.join(more)
            assert len(loaded.layers[0].store.dense()[0]) == 4
            mask = loaded.attention_mask()
            ids, positions = torch.tensor([[5], [6], [7], [8]]), mask.sum(1, keepdim=True) - 1
            logits.append(model(ids, attention_mask=mask, position_ids=positions, past_key_values=loaded).logits)
    for mine, theirs in zip(logits[:2], logits[2:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lfm2", "gemma3_text"])
def test_states_and_windows_beside_pages_on_a_gpu(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What both backends load of a prefix and of a file goes on alike."""
    monkeypatch.setattr(gpu_store, "gpu_of", lambda device: Emulator())
    of_kind = {"layer_types": [{"lfm2": "conv", "gemma3_text": "sliding_attention"}[kind], "full_attention"]}
    config = transformers.AutoConfig.for_model(
        kind, **of_kind, vocab_size=96, hidden_size=128, intermediate_size=128, num_hidden_layers=2, head_dim=64,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, sliding_window=32, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("kvcomp")
    prompt = torch.randint(1, 96, (1, 401), generator=torch.Generator().manual_seed(2))
    store, logits = PrefixStore(tmp_path / "store"), []
    cache = KVCompCache(config, backend="gpu")
    with torch.no_grad():
        model(prompt[:, :400], past_key_values=cache)
        assert store.save(prompt, cache, model) == 400
        cache.save(tmp_path / "a.kvc", model)
        for backend in ("gpu", "cpu"):
            for loaded in (
                store.load(prompt, model, backend=backend),
                KVCompCache.load(tmp_path / "a.kvc", config, model, backend=backend),
            ):
                assert loaded.get_seq_length() == 400
                logits.append(model(prompt[:, 400:], past_key_values=loaded).logits)
    for one in logits[1:]:
        torch.testing.assert_close(one, logits[0], rtol=1e-4, atol=1e-4)
