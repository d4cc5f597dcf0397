"""A model of the shape of Llama 3.1 8B with random weights, generating after a long prompt on a GPU: benchmarks/results/gpu_generate.json.

Run by ``make gpu-check``. For each cache the time to the first token, tokens a second after it, and the most memory torch held.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from gpu_attention import setting
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from kvcomp.integrations.transformers import KVCompCache

RESULTS = Path(__file__).parent / "results" / "gpu_generate.json"
CONFIG = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=1 << 18,
)  # fmt: skip
SHAPES = ((4, 32768), (1, 131072))


def model_on_gpu() -> Any:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"), torch.no_grad():
        made: Any = LlamaForCausalLM._from_config(CONFIG, dtype=torch.bfloat16)
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.02)
    torch.set_default_dtype(torch.float32)
    return made.eval()


@torch.inference_mode()
def run(model: Any, name: str, batch: int, tokens: int, new: int) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    model.set_attn_implementation("kvcomp" if name.startswith("kvcomp") else "sdpa")
    caches: dict[str, Any] = {
        "dynamic": lambda: DynamicCache(config=CONFIG),
        "static": lambda: StaticCache(config=CONFIG, max_cache_len=tokens + new),
        "kvcomp": lambda: KVCompCache(CONFIG, backend="gpu"),
        "kvcomp packed": lambda: KVCompCache(CONFIG, spec="packed", backend="gpu"),
    }
    cache = caches[name]()
    ids = torch.randint(0, CONFIG.vocab_size, (batch, tokens), device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    following = out.logits[:, -1:].argmax(-1)
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    steps = []
    for _ in range(new):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        out = model(following, past_key_values=cache, use_cache=True)
        following = out.logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        steps.append(time.perf_counter() - begin)
    result = {
        "cache": name,
        "batch": batch,
        "tokens": tokens,
        "seconds_to_first_token": first,
        "tokens_a_second": batch * new / sum(steps),
        "median_step_ms": 1e3 * sorted(steps)[new // 2],
        "peak_gigabytes_beside_weights": (torch.cuda.max_memory_allocated() - base) / 1e9,
        "held_gigabytes": (torch.cuda.memory_allocated() - base) / 1e9,
    }
    if name.startswith("kvcomp"):
        memory = cache.memory()
        result |= {"coded_bits": memory.coded_bits, "total_bits": memory.total_bits}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new", type=int, default=130)
    parser.add_argument("--small", action="store_true", help="only the first shape")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = model_on_gpu()
    rows: list[dict[str, Any]] = []
    run(model, "kvcomp", 1, 1024, 4)  # compiles
    for batch, tokens in SHAPES[:1] if arguments.small else SHAPES:
        for name in ("dynamic", "static", "kvcomp", "kvcomp packed"):
            try:
                rows.append(run(model, name, batch, tokens, arguments.new))
            except (RuntimeError, torch.OutOfMemoryError) as error:
                rows.append({"cache": name, "batch": batch, "tokens": tokens, "error": str(error).splitlines()[0]})
            print(rows[-1], flush=True)
            RESULTS.write_text(json.dumps({"setting": setting(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
