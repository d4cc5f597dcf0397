"""A model of the shape of Llama 3.1 8B with random weights, generating after a long prompt on a GPU:
benchmarks/results/gpu_generate.json.

    python benchmarks/gpu_generate.py                          # 4 x 32K and 1 x 128K
    python benchmarks/gpu_generate.py --shapes 1x131072 --limit 300
    python benchmarks/gpu_generate.py --longest                # the longest context that fits, by arithmetic, and one
    step there

Run by ``make gpu-check``. For each cache the time to the first token, tokens a second after it, launches of a step, and
the most memory torch held. The longest contexts are filled with random K and V, as the model would take minutes to read
them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
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
    SPECS,
    STOCK,
    allocated,
    cache_for,
    compiled,
    decoder,
    described,
    fill,
    launches,
    model_with_random_weights,
    release,
    seconds_of,
    synchronise,
)
from kvcomp.errors import LimitExceeded
from kvcomp.results.schema import environment

RESULTS = Path(__file__).parent / "results" / "gpu_generate.json"
SHAPES = ("4x32768", "1x131072") if GPU else ("2x300",)
PROBE = 8192 if GPU else 2048  # tokens from which bytes a token are found
WORK = 4 << 30  # bytes left for what a step of the model needs


@torch.inference_mode()
def run(model: Any, name: str, batch: int, tokens: int, new: int) -> dict[str, Any]:
    release()
    base = allocated()
    cache = cache_for(model, name, tokens + new + 8)
    ids = torch.randint(0, CONFIG.vocab_size, (batch, tokens), device=DEVICE)
    synchronise()
    begin = time.perf_counter()
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    following = logits.argmax(-1, keepdim=True)
    synchronise()
    first = time.perf_counter() - begin
    step = decoder(model, cache, name)
    seconds = seconds_of(step, following, new)
    found = {
        "cache": name,
        "batch": batch,
        "tokens": tokens,
        "seconds_to_first_token": first,
        "tokens_a_second": batch * new / seconds,
        "step_ms": 1e3 * seconds / new,
        "peak_gigabytes_beside_weights": (allocated(peak=True) - base) / 1e9,
        "held_gigabytes": (allocated() - base) / 1e9,
        "peak_reserved_gigabytes": torch.cuda.max_memory_reserved() / 1e9 if GPU else 0.0,  # pools of streams included
        "launches_a_step": launches(lambda: step(following)),
    }
    if name.startswith("kvcomp"):
        memory = cache.memory()
        found |= {"coded_bits": memory.coded_bits, "total_bits": memory.total_bits}
    return found


@torch.inference_mode()
def longest(model: Any, name: str, room: int) -> dict[str, Any]:
    """The context of one sequence that fits so many bytes by the bytes a token of a shorter one; less where a step
    there fails.
    """
    release()
    if name in STOCK:
        a_token: float = DENSE_LAYER * (CONFIG.num_hidden_layers + (name == "dynamic"))  # which copies a layer
    else:
        totals = []
        for tokens in (PROBE, 2 * PROBE):
            cache = cache_for(model, name, tokens)
            fill(cache, 1, tokens)
            totals.append(cache.memory().total)
            del cache
        a_token = (totals[1] - totals[0]) / PROBE
    tokens = int(room / a_token) // 1024 * 1024
    found = {"cache": name, "expected_tokens": tokens, "bytes_a_token": a_token, "room_bytes": room}
    while True:
        release()
        try:
            cache = cache_for(model, name, tokens + 1)
            fill(cache, 1, tokens)
            decoder(model, cache, name)(torch.zeros((1, 1), dtype=torch.int64, device=DEVICE))
            synchronise()
            return found | {"tokens": tokens, "held_bytes": allocated(), "peak_bytes": allocated(peak=True)}
        except (torch.OutOfMemoryError, LimitExceeded):
            cache, tokens = None, tokens * 9 // 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BATCHxTOKENS")
    parser.add_argument("--small", action="store_true", help="only the first shape")
    parser.add_argument("--new", type=int, default=128 if GPU else 4)
    parser.add_argument("--limit", type=float, default=540.0, metavar="SECONDS", help="nothing is begun after it")
    parser.add_argument("--longest", action="store_true", help="only the longest contexts that fit")
    parser.add_argument(
        "--room", type=int, help="bytes for the cache with --longest; what the device has left by default"
    )
    parser.add_argument("--output", type=Path, default=RESULTS if GPU else None)
    arguments = parser.parse_args()
    begun = time.monotonic()
    model = model_with_random_weights()
    rows: list[dict[str, Any]] = []
    jobs: list[tuple[Callable[..., dict[str, Any]], tuple[Any, ...], dict[str, Any]]]
    if arguments.longest:
        if arguments.room is None and not GPU:
            parser.error("--longest needs --room where there is no GPU")
        room = arguments.room or torch.cuda.mem_get_info()[0] - WORK
        jobs = [(longest, (name, room), {"cache": name}) for name in (*STOCK, *SPECS)]
    else:
        names = compiled(lambda name: run(model, name, 1, 1024, 4), rows) if GPU else NAMES
        shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes[: 1 if arguments.small else None]]
        jobs = [
            (run, (name, batch, tokens, arguments.new), {"cache": name, "batch": batch, "tokens": tokens})
            for batch, tokens in shapes
            for name in names
        ]
    for measure, how, what in jobs:
        try:
            if time.monotonic() - begun > arguments.limit:
                raise TimeoutError(f"not begun: the limit of {arguments.limit:.0f} s has passed")
            rows.append(measure(model, *how))
        except FAILURES as error:
            rows.append({**what, "error": described(error)})
        print(rows[-1], flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps({"setting": environment(gpu=True), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
