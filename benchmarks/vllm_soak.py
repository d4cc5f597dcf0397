"""Requests of random lengths in a real vLLM engine whose cache is compressed, for so many minutes.

Some clients share an engine that has so few blocks that requests are preempted; a third of the prompts begin like the
one before. Then each request runs alone on the same engine and must get the same answer: log probabilities of the
likeliest tokens within a bound, up to where two tokens tie. At the end the cache must be empty.

Half of the time the spec is so fine that blocks are raw: no answer may be off. Then blocks are coded. How a prompt is
cut into pieces follows from the other requests, and what a later piece sees is compressed: in transformers 4 of 120
such prompts are off by more than the same bound when pieces of 256 tokens become pieces of 100. At most ``MOST_OFF``
may be off here.

    python benchmarks/vllm_soak.py
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kvcomp.results.schema import environment
from vllm_client import CODED, CODED_CLOSE, EXACT, EXACT_CLOSE, ROOT, Engine, same

BATCH, LONGEST, TOKENS, BLOCKS, CONTEXT = 24, 700, 70, 26, 1024
MOST_OFF = 0.05


def main(
    model: Annotated[Path, typer.Option(help="A folder.")] = ROOT / "examples" / "tiny-lm",
    minutes: Annotated[float, typer.Option()] = 30,
    clients: Annotated[int, typer.Option()] = 8,
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("benchmarks/results/vllm_soak.json"),
) -> None:
    """Run, write what came of it, and fail if an answer was wrong or something was left."""
    random = np.random.default_rng(seed)
    found = {
        "raw": soak(str(model), EXACT, EXACT_CLOSE, clients, minutes / 2, random),
        "coded": soak(str(model), CODED, CODED_CLOSE, clients, minutes / 2, random),
    }
    about = environment(model=model.name, vllm="0.32.0", minutes=minutes, clients=clients, seed=seed)
    content = {"kvcomp_results": 1, "kind": "vllm_soak", "partial": False, "setting": about, **found}
    output.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(found))
    off = found["raw"]["off"] or found["coded"]["off"] > MOST_OFF * found["coded"]["requests"]
    raise typer.Exit(int(bool(off) or any(any(one["left"].values()) or not one["preempted"] for one in found.values())))


def soak(
    model: str, spec: dict[str, Any], close: float, clients: int, minutes: float, random: np.random.Generator
) -> dict[str, Any]:
    """Requests, how many answers were off, what was left in the cache, and how often requests were preempted."""
    end = time.monotonic() + 60 * minutes
    asked, off = 0, 0
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": "float32",
        "max_model_len": CONTEXT,
        "max_num_seqs": clients,
        "max_num_batched_tokens": 256,
        "num_gpu_blocks_override": BLOCKS,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 30,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec))
        with Engine({"spec": str(path), "saving": 1.5}, **arguments) as engine:
            while time.monotonic() < end:
                prompts = drawn(random)
                together = engine("run", prompts=prompts)["answers"]
                for prompt, [ours] in zip(prompts, together, strict=True):
                    [[alone]] = engine("run", prompts=[prompt])["answers"]
                    asked, off = asked + 1, off + (not same(ours, alone, close))
            state = engine.state()
    return {
        "requests": asked,
        "off": off,
        "close": close,
        "left": {name: state["memory"][name] for name in ("used", "outside", "tokens")},
        "preempted": state["metrics"]["vllm:num_preemptions"],
    }


def drawn(random: np.random.Generator) -> list[dict[str, Any]]:
    """Prompts of random lengths, each a third likely to begin like the one before."""
    prompts: list[dict[str, Any]] = []
    for _ in range(BATCH):
        ids = random.integers(4, 4000, random.integers(1, LONGEST)).tolist()
        if prompts and random.random() < 1 / 3:
            ids = [*prompts[-1]["ids"][: LONGEST // 2], *ids[: LONGEST // 2]]
        prompts.append({"ids": ids, "max_tokens": int(random.integers(1, TOKENS)), "likeliest": True})
    return prompts


if __name__ == "__main__":
    typer.run(main)
