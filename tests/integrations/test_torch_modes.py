"""torch's autocast, gradients and forked processes with a KVCompCache."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

from kvcomp.errors import InvalidInput
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.spec import CodecSpec, TensorSpec
from tiny_models import HYBRIDS, TINY, random_model

NEARLY_EXACT = CodecSpec(TensorSpec("block", 1e-3, "huffman"), TensorSpec("token", 1e-3, "huffman"))
LLAMA = LlamaConfig(**TINY)
ATTENTION = ["kvcomp", "sdpa", "eager"]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return random_model(LLAMA)


def ids_of(tokens: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (rows, tokens), generator=torch.Generator().manual_seed(0))


def passes(model: Any, cache: Any, attention: str) -> torch.Tensor:
    """Logits of a prompt of 300 tokens, of 5 more and of one more."""
    model.set_attn_implementation(attention)
    ids = ids_of(306)
    parts = [model(some, past_key_values=cache).logits for some in (ids[:, :300], ids[:, 300:305], ids[:, 305:])]
    return torch.cat(parts, dim=1).float()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_it_gives_with_transformers_own_cache(
    llama: PreTrainedModel, attention: str, dtype: torch.dtype
) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype):
        expected = passes(llama, DynamicCache(config=LLAMA), "sdpa")
        cache = KVCompCache(LLAMA, NEARLY_EXACT)
        found = passes(llama, cache, attention)
    assert cache.compressed_layers[0].store.dtype == dtype
    with torch.no_grad():
        exact = passes(llama, DynamicCache(config=LLAMA), "sdpa")
    assert (found - expected).norm() < 1.5 * (expected - exact).norm()  # autocast's own error is the measure


def test_tensors_of_two_dtypes_are_refused_without_autocast(llama: PreTrainedModel) -> None:
    k = torch.randn(1, 2, 5, 16)
    with pytest.raises(InvalidInput, match=r"torch\.float32 and torch\.bfloat16"):
        KVCompCache(LLAMA).update(k, k.to(torch.bfloat16), 0)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("held", [0, 20, 300])
def test_gradients_are_right_or_refused(attention: str, held: int) -> None:
    model: Any = random_model(LLAMA)
    model.set_attn_implementation(attention)
    cache, ids = KVCompCache(LLAMA), ids_of(320)
    if held:
        with torch.no_grad():
            model(ids[:, :held], past_key_values=cache)
    weight = model.model.layers[0].self_attn.k_proj.weight
    loss = model(ids[:, held:], past_key_values=cache).logits.logsumexp(-1).sum()
    if held == 0 and attention == "kvcomp":
        loss.backward()
        found = weight.grad.clone()
        weight.grad = None
        model(ids, past_key_values=DynamicCache(config=LLAMA)).logits.logsumexp(-1).sum().backward()
        torch.testing.assert_close(found, weight.grad)
        return
    with pytest.raises(InvalidInput, match="no gradient passes through a KVCompCache"):
        loss.backward()


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_forward_pass_with_gradients_on_gives_the_same_logits(llama: PreTrainedModel, tokens: int) -> None:
    """Whoever forgets ``torch.no_grad`` gets an answer as long as nobody asks for gradients."""
    llama.set_attn_implementation("kvcomp")
    found = []
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        cache = KVCompCache(LLAMA)
        with mode():
            llama(ids_of(300), past_key_values=cache)
            found.append(llama(ids_of(tokens), past_key_values=cache).logits.detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


FORKED = """
import os, signal, torch, kvcomp
torch.set_num_threads(2)
k, v, q = torch.randn(1, 4, 20000, 64), torch.randn(1, 4, 20000, 64), torch.randn(1, 4, 1, 64)
(k @ k.mT[..., :64]).sum()
cache = kvcomp.compress(k, v)
expected = cache.attend(q)
child = os.fork()
if not child:
    signal.alarm(60)
    same = torch.equal(cache.attend(q), expected)
    kvcomp.compress(k, v).decompress()
    (k @ k.mT[..., :64]).sum()
    os._exit(0 if same else 1)
status = os.waitpid(child, 0)[1]
print("status", status, "threads", torch.get_num_threads())
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two threads")
def test_a_forked_process_goes_on_after_kernels_ran_on_threads() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", FORKED], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "status 0 threads 2"


@pytest.mark.parametrize("model", [LLAMA, *HYBRIDS.values()], ids=lambda config: config.model_type)
@pytest.mark.parametrize("loaded", [False, True])
def test_beams_over_a_cache_of_one_row_say_what_to_call(model: Any, loaded: bool, tmp_path: Any) -> None:
    net: Any = random_model(model)
    net.set_attn_implementation("kvcomp")
    ids, cache = ids_of(100), KVCompCache(model)
    with torch.no_grad():
        net(ids[:, :99], past_key_values=cache)
    if loaded:
        cache.save(tmp_path / "a.kvc")
        cache = KVCompCache.load(tmp_path / "a.kvc", model)
    with pytest.raises(InvalidInput, match=r"holds 1 rows, and 3 come: call batch_repeat_interleave\(3\)"):
        net.generate(ids, past_key_values=cache, num_beams=3, max_new_tokens=3)
    cache.batch_repeat_interleave(3)
    assert net.generate(ids, past_key_values=cache, num_beams=3, max_new_tokens=3, do_sample=False).shape == (1, 103)
