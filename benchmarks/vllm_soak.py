"""Requests of random lengths in a real vLLM engine whose cache is compressed, for so many minutes.

Some clients share an engine that has so few blocks that requests are preempted; a third of the prompts begin like the
one before. Then each request runs alone on the same engine and must get the same answer: log probabilities of the
likeliest tokens within ``CODED_CLOSE``, up to where two tokens tie. The spec is so fine that a wrong page is far
outside of that. At the end the cache must be empty.

    python benchmarks/vllm_soak.py --minutes 30
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
from vllm_client import CODED, CODED_CLOSE, ROOT, Engine, same

BATCH, LONGEST, TOKENS, BLOCKS, CONTEXT = 24, 700, 70, 26, 1024


def main(
    model: Annotated[Path, typer.Option(help="A folder.")] = ROOT / "examples" / "tiny-lm",
    minutes: Annotated[float, typer.Option()] = 30,
    clients: Annotated[int, typer.Option()] = 8,
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("benchmarks/results/vllm_soak.json"),
) -> None:
    """Run, write what came of it, and fail if an answer was wrong or something was left."""
    random, end = np.random.default_rng(seed), time.monotonic() + 60 * minutes
    asked, wrong = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "fine.json"
        spec.write_text(json.dumps(CODED))
        arguments: dict[str, Any] = {
            "model": str(model),
            "dtype": "float32",
            "max_model_len": CONTEXT,
            "max_num_seqs": clients,
        }
        arguments |= {"max_num_batched_tokens": 256, "num_gpu_blocks_override": BLOCKS, "enable_prefix_caching": False}
        arguments |= {"kv_cache_memory_bytes": 1 << 30}
        with Engine({"spec": str(spec), "saving": 1.5}, **arguments) as engine:
            while time.monotonic() < end:
                prompts = drawn(random)
                together = engine("run", prompts=prompts)["answers"]
                for prompt, [ours] in zip(prompts, together, strict=True):
                    [[alone]] = engine("run", prompts=[prompt])["answers"]
                    asked, wrong = asked + 1, wrong + (not same(ours, alone, CODED_CLOSE))
            state = engine.state()
    left = {name: state["memory"][name] for name in ("used", "outside", "tokens")}
    found: dict[str, Any] = {"requests": asked, "wrong": wrong, "left": left}
    found["preempted"] = state["metrics"]["vllm:num_preemptions"]
    about = environment(model=model.name, vllm="0.32.0", minutes=minutes, clients=clients, seed=seed, close=CODED_CLOSE)
    content = {"kvcomp_results": 1, "kind": "vllm_soak", "partial": False, "setting": about, **found}
    output.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(found))
    raise typer.Exit(int(wrong > 0 or any(left.values()) or not found["preempted"]))


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
