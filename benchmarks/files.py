"""Saving and loading a cache of 32,768 tokens and four layers, against writing and reading the same bytes.

Loading includes every check; nothing is decoded. It is held against `cat` of the same file, which is in the page cache,
to /dev/null; saving against writing the same bytes with fsync, both over what the last run left. The runs take turns,
and the medians count.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvcomp import files
from kvcomp.results.schema import environment
from kvcomp.spec import PRESETS, CodecSpec
from kvcomp.store import KVStore

OUTPUT = Path(__file__).parent / "results" / "files.json"
app = typer.Typer(pretty_exceptions_enable=False)
screen = Console()


def filled(spec: CodecSpec, layers: int, heads: int, channels: int, tokens: int) -> dict[int, KVStore]:
    """Stores of random normal values in bfloat16."""
    stores = {}
    for layer in range(layers):
        torch.manual_seed(layer)
        stores[layer] = KVStore(spec.layer(layer, layers))
        stores[layer].append(*torch.randn(2, 1, heads, tokens, channels, dtype=torch.bfloat16))
        stores[layer].seal()
    return stores


def write_plainly(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
    os.fsync(descriptor)
    os.close(descriptor)


def in_turns(runs: int, actions: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Median and least seconds of each action, after one run that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(runs + 1):
        for name, action in actions.items():
            begin = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - begin)
    return {name: {"median": median(times[1:]), "least": min(times[1:])} for name, times in seconds.items()}


def measure(name: str, runs: int, shape: tuple[int, int, int, int], folder: Path) -> dict[str, Any]:
    layers = shape[0]
    spec = PRESETS[name]
    stores = filled(spec, *shape)
    path, plain = folder / "cache.kvc", folder / "plain"
    files.save(path, stores, spec, layers)
    data = path.read_bytes()

    def write() -> None:
        write_plainly(plain, data)

    def save() -> None:
        files.save(path, stores, spec, layers)

    def load() -> None:
        files.load(files.open_container(path))

    def cat() -> None:
        subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True)

    found: dict[str, Any] = in_turns(runs, {"save": save, "write": write}) | in_turns(
        3 * runs, {"load": load, "cat": cat}
    )
    memory = sum(store.memory().total for store in stores.values())
    ratios = {"file_bytes": len(data), "cache_bytes": memory, "file_over_cache": len(data) / memory}
    for ours, theirs in (("save", "write"), ("load", "cat")):
        ratios[f"{ours}_over_{theirs}"] = found[ours]["median"] / found[theirs]["median"]
    return found | ratios


@app.command()
def main(
    runs: Annotated[int, typer.Option(help="Runs of each kind that count")] = 9,
    tokens: Annotated[int, typer.Option(help="Tokens of the cache")] = 32768,
    output: Annotated[Path, typer.Option(help="Where the results go")] = OUTPUT,
) -> None:
    """Measure and write the results."""
    shape = 4, 4, 128, tokens
    with tempfile.TemporaryDirectory() as folder:
        found = {name: measure(name, runs, shape, Path(folder)) for name in ("kvcomp:paper", "packed:paper")}
    content = {"setting": environment(layers=4, heads=4, head_dim=128, tokens=tokens, runs=runs), "presets": found}
    output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    table = Table(
        "preset", "file, MB", "of the cache", "load, ms", "cat, ms", "ratio", "save, ms", "write, ms", "ratio"
    )
    for name, r in found.items():
        times = [f"{1e3 * r[kind]['median']:.1f}" for kind in ("load", "cat", "save", "write")]
        size = f"{r['file_bytes'] / 1e6:.1f}", f"{100 * r['file_over_cache']:.2f} %"
        table.add_row(name, *size, *times[:2], f"{r['load_over_cat']:.2f}", *times[2:], f"{r['save_over_write']:.2f}")
    screen.print(table)


if __name__ == "__main__":
    app()
