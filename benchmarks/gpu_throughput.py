"""Total tokens a second at the largest batch that fits a memory budget: benchmarks/results/gpu_throughput.json and a
table.

    python benchmarks/gpu_throughput.py --budget-gigabytes 40 --context 8192 --limit 300

Each cache gets the batch that fits by arithmetic, less where memory ends all the same (the budget is enforced), filled
with random K and V, and the model decodes. Weights and what a step needs beside the cache are not in the budget.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpu_model import (
    CONFIG,
    DENSE_LAYER,
    DEVICE,
    FAILURES,
    GPU,
    NAMES,
    allocated,
    cache_for,
    compiled,
    decoder,
    described,
    fill,
    model_with_random_weights,
    release,
    seconds_of,
)
from kvcomp.errors import LimitExceeded
from kvcomp.results.schema import environment

RESULTS = Path(__file__).parent / "results" / "gpu_throughput.json"
WORK = 3 << 30  # bytes for what a step needs beside weights and cache


def bytes_a_row(model: Any, name: str, context: int) -> float:
    """Of a cache: what two rows hold, halved."""
    if not name.startswith("kvcomp"):
        layers: int = CONFIG.num_hidden_layers + (name == "dynamic")  # which copies a layer in every step
        return DENSE_LAYER * layers * context
    cache = cache_for(model, name, context)
    fill(cache, 2, context)
    total: int = cache.memory().total
    return total / 2


@torch.inference_mode()
def run(model: Any, name: str, batch: int, context: int, new: int) -> dict[str, Any]:
    release()
    base = allocated()
    cache = cache_for(model, name, context + new + 8)
    fill(cache, batch, context)
    ids = torch.zeros((batch, 1), dtype=torch.int64, device=DEVICE)
    seconds = seconds_of(decoder(model, cache, name), ids, new)
    return {
        "cache": name,
        "batch": batch,
        "context": context,
        "tokens_a_second": batch * new / seconds,
        "step_ms": 1e3 * seconds / new,
        "peak_gigabytes_beside_weights": (allocated(peak=True) - base) / 1e9,
    }


def largest(model: Any, name: str, budget: int, context: int, new: int) -> dict[str, Any]:
    """The run with the largest batch that fits."""
    with torch.inference_mode():
        release()
        batch = max(1, int(budget / bytes_a_row(model, name, context + new)))
    while True:
        try:
            return run(model, name, batch, context, new)
        except (torch.OutOfMemoryError, LimitExceeded):
            if batch == 1:
                raise
            batch = batch * 9 // 10


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| cache | batch | context | tokens a second, all rows | ms a step |", "|---|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['cache']} | - | - | {row['error']} | - |")
        else:
            lines.append(
                f"| {row['cache']} | {row['batch']} | {row['context']} | {row['tokens_a_second']:.0f} | "
                f"{row['step_ms']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-gigabytes", type=float, default=40.0 if GPU else 0.004)
    parser.add_argument("--context", type=int, default=8192 if GPU else 600)
    parser.add_argument("--new", type=int, default=128 if GPU else 4)
    parser.add_argument("--limit", type=float, default=480.0, metavar="SECONDS", help="nothing is begun after it")
    parser.add_argument("--output", type=Path, default=RESULTS if GPU else None)
    arguments = parser.parse_args()
    begun = time.monotonic()
    budget = int(arguments.budget_gigabytes * 1e9)
    model = model_with_random_weights()
    rows: list[dict[str, Any]] = []
    names: Sequence[str] = NAMES
    if GPU:
        names = compiled(lambda name: run(model, name, 1, 1024, 2), rows)
        release()
        most = allocated() + WORK + budget
        torch.cuda.set_per_process_memory_fraction(most / torch.cuda.get_device_properties(0).total_memory)
    for name in names:
        try:
            if time.monotonic() - begun > arguments.limit:
                raise TimeoutError(f"not begun: the limit of {arguments.limit:.0f} s has passed")
            rows.append(largest(model, name, budget, arguments.context, arguments.new))
        except FAILURES as error:
            rows.append({"cache": name, "error": described(error)})
        print(rows[-1], flush=True)
        if arguments.output:
            found = {"setting": environment(gpu=True, budget_bytes=budget), "rows": rows}
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
