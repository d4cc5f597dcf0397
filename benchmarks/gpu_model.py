"""What gpu_generate.py and gpu_throughput.py measure: a model of the shape of Llama 3.1 8B with random weights, and
caches for it.

Without a GPU there is a tiny model on the CPU in its place, to see that the benchmarks run; its times mean nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from kvcomp.errors import KVCompError
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers.graph import DecodeGraph, recorded
from kvcomp.integrations.transformers.layer import CompressedLayer

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HEADS, CHANNELS = (8, 128) if GPU else (1, 64)  # of K and V
LLAMA = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=HEADS, head_dim=CHANNELS, max_position_embeddings=1 << 24,
)  # fmt: skip
TINY = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=HEADS, head_dim=CHANNELS, max_position_embeddings=1 << 24,
)  # fmt: skip
CONFIG = LLAMA if GPU else TINY
DENSE_LAYER = 2 * 2 * HEADS * CHANNELS  # bytes a token of an uncompressed layer
FILLED_AT_ONCE = 1 << 17  # tokens of all rows, where a cache is filled without the model

# Caches: the names of transformers' own, and specs of kvcomp's. Those with a graph are decoded by CUDA graphs.
SPECS = {"kvcomp": "kvcomp", "kvcomp packed": "packed"}
STOCK = ("dynamic", "static")
NAMES = ("dynamic", "static", "static, graph", "kvcomp", "kvcomp, graph", "kvcomp packed") if GPU else (*STOCK, *SPECS)

FAILURES = (KVCompError, RuntimeError, ValueError, TimeoutError)  # of one cache, which hinder no other


def model_with_random_weights() -> Any:
    torch.manual_seed(0)
    with DEVICE, torch.no_grad():
        made: Any = LlamaForCausalLM._from_config(CONFIG, dtype=torch.bfloat16)
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.02)
    return made.eval()


def cache_for(model: Any, name: str, tokens: int) -> Any:
    """An empty cache; the model gets the attention that suits it. name: with ``, graph`` or without. tokens: the most
    that it will hold.
    """
    kind = name.removesuffix(", graph")
    model.set_attn_implementation("kvcomp" if kind in SPECS else "sdpa")
    if kind in SPECS:
        return KVCompCache(CONFIG, SPECS[kind], backend="gpu" if GPU else "cpu")
    return DynamicCache(config=CONFIG) if kind == "dynamic" else StaticCache(config=CONFIG, max_cache_len=tokens)


def decoder(model: Any, cache: Any, name: str) -> Callable[[Tensor], Tensor]:
    """What turns ids (batch, 1) into logits (batch, vocabulary), one step further. Graphs need a GPU."""

    def step(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
        return logits

    if not name.endswith(", graph"):
        return step
    if isinstance(cache, KVCompCache):
        return DecodeGraph(model, cache).step
    ids = torch.zeros((cache.layers[0].keys.shape[0], 1), dtype=torch.int64, device=DEVICE)
    step(ids)  # warms up
    out, repeat = recorded(lambda: step(ids), DEVICE)

    def repeated(new: Tensor) -> Tensor:
        ids.copy_(new.view_as(ids))
        repeat()
        return out

    return repeated


def compiled(run: Callable[[str], object], rows: list[dict[str, Any]]) -> list[str]:
    """Names of the caches of which a short run succeeds, with kernels that were compiled for it; rows get the others'
    errors.
    """
    names = []
    for name in NAMES:
        try:
            run(name)
            names.append(name)
        except FAILURES as error:
            rows.append({"cache": name, "error": described(error)})
            print(rows[-1], flush=True)
    return names


def seconds_of(step: Callable[[Tensor], Tensor], ids: Tensor, new: int) -> float:
    """Of so many greedy steps from ids (batch, 1) on, after two: an ordinary one, then one that is recorded where there
    are graphs.
    """
    for _ in range(2):
        ids = step(ids).argmax(-1, keepdim=True)
    synchronise()
    begin = time.perf_counter()
    for _ in range(new):
        ids = step(ids).argmax(-1, keepdim=True)
    synchronise()
    return time.perf_counter() - begin


def fill(cache: Any, batch: int, tokens: int) -> None:
    """Give all layers random K and V, without the model: contexts that would take minutes to read."""
    at_once = tokens if isinstance(cache, DynamicCache) else max(64, FILLED_AT_ONCE // batch)
    for first in range(0, tokens, at_once):
        for index, layer in enumerate(cache.layers):
            shape = batch, HEADS, min(at_once, tokens - first), CHANNELS
            k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in "KV")
            cache.update(k, v, index)
            if isinstance(layer, CompressedLayer):
                layer.seal()
    synchronise()


def synchronise() -> None:
    if GPU:
        torch.cuda.synchronize()


def release() -> None:
    """Give freed memory back and start to note its peak anew."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated(peak: bool = False) -> int:
    """Bytes of torch on the device; 0 on the CPU."""
    if not GPU:
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def launches(step: Callable[[], object]) -> int:
    """Kernels and copies that the device does in a step, counted by torch's profiler; 0 on the CPU."""
    if not GPU:
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in seen.events())


def described(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
