"""Memory of `generate` at a long context: resident memory that goes back to the system with the cache, kvcomp against
DynamicCache.

A model of random weights reads 16,384 tokens in chunks and generates 32. Each cache runs in a process of its own; what
it occupies is the resident memory before it is deleted less that after, and the peak is the process's largest resident
memory.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from kvcomp.integrations.transformers import KVCompCache
from kvcomp.results.schema import environment

OUTPUT = Path(__file__).parent / "results" / "memory.json"
MIB = 1024 * 1024
CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=32768,
    eos_token_id=None,
)

app = typer.Typer(pretty_exceptions_enable=False)
screen = Console()


def resident() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def dense_bytes(cache: DynamicCache) -> int:
    layers: list[Any] = list(cache.layers)
    return sum(x.untyped_storage().nbytes() for layer in layers for x in (layer.keys, layer.values))


@app.command()
def one(kind: str, tokens: int, new: int, chunk: int) -> None:
    """Generate with one kind of cache and print what it occupied."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(CONFIG).bfloat16().eval()
    compressed = kind != "DynamicCache"
    model.set_attn_implementation("kvcomp" if compressed else "sdpa")
    ids = torch.randint(0, CONFIG.vocab_size, (1, tokens))

    def cache_for() -> KVCompCache | DynamicCache:
        return KVCompCache(CONFIG, kind) if compressed else DynamicCache(config=CONFIG)

    def run(cache: Cache, ids: torch.Tensor) -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            prefill_chunk_size=chunk,
            pad_token_id=0,
        )

    run(cache_for(), ids[:, : 2 * chunk])  # compile, and load what is loaded once
    before = resident()
    cache = cache_for()
    run(cache, ids)
    held = resident()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if isinstance(cache, KVCompCache):
        counted, dense = cache.memory().total, cache.memory().dense
    else:
        counted = dense = dense_bytes(cache)
    del cache
    freed = held - resident()
    print(json.dumps({"before": before, "peak": peak, "occupied": freed, "counted": counted, "dense": dense}))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    tokens: Annotated[int, typer.Option(help="Prompt tokens")] = 16384,
    new: Annotated[int, typer.Option(help="Generated tokens")] = 32,
    chunk: Annotated[int, typer.Option(help="Prompt tokens read at a time")] = 1024,
    output: Annotated[Path, typer.Option(help="Where the results go")] = OUTPUT,
) -> None:
    """Compare the caches and write the results."""
    if context.invoked_subcommand:
        return
    found: dict[str, dict[str, float]] = {}
    for kind in ("DynamicCache", "kvcomp", "packed"):
        with screen.status(f"{kind}: {tokens} tokens"):
            command = [sys.executable, __file__, "one", kind, str(tokens), str(new), str(chunk)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    dense = found["DynamicCache"]
    for result in found.values():
        result["occupied_ratio"] = dense["occupied"] / result["occupied"]
        result["counted_ratio"] = dense["counted"] / result["counted"]
    content = {"setting": environment(tokens=tokens, new_tokens=new, chunk=chunk), "caches": found}
    output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    table = Table("cache", "occupied, MiB", "counted, MiB", "peak, MiB", "occupied ratio", "counted ratio")
    for kind, r in found.items():
        sizes = (f"{r[name] / MIB:.1f}" for name in ("occupied", "counted", "peak"))
        table.add_row(kind, *sizes, f"{r['occupied_ratio']:.2f}x", f"{r['counted_ratio']:.2f}x")
    screen.print(table)


if __name__ == "__main__":
    app()
