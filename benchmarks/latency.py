"""What each generated token costs as the context grows: appending, sealing, attending; and whether a sealing token stands out.

One layer, KVStore alone: 8 KV heads of 128 channels, bfloat16, 4 queries a KV head, preset kvcomp, Gaussian K and V with channels of
different size. Appending must not grow with the context, attending must grow linearly.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvcomp.results import plots
from kvcomp.spec import PAGE_TOKENS, CodecSpec
from kvcomp.store import KVStore
from kvcomp.store.attention import attend
from setting import RESULTS, setting

HEADS, CHANNELS, GROUP = 8, 128, 4
BIN = 1024

screen = Console()


@dataclass(frozen=True)
class Span:
    """Milliseconds a token over a stretch of contexts. p50, p99: append + seal + attend; sealing: tokens at which a page is sealed."""

    context: int
    append: float
    seal: float
    attend: float
    p50: float
    p99: float
    sealing_p50: float


def measure(tokens: int) -> np.ndarray[Any, Any]:
    """Seconds of (append, seal, attend) of every token."""
    torch.manual_seed(0)
    size = torch.randn(HEADS, 1, CHANNELS).mul(0.5).exp()
    store = KVStore(CodecSpec.resolve("kvcomp"))
    seconds = np.empty((tokens, 3))
    for i in track(range(tokens), "generating", console=screen):
        k, v = (torch.randn(2, 1, HEADS, 1, CHANNELS) * size).to(torch.bfloat16)
        q = torch.randn(1, HEADS * GROUP, 1, CHANNELS, dtype=torch.bfloat16)
        ticks = [time.perf_counter()]
        store.append(k, v)
        ticks.append(time.perf_counter())
        store.seal()
        ticks.append(time.perf_counter())
        attend(store, q, CHANNELS**-0.5)
        ticks.append(time.perf_counter())
        seconds[i] = np.diff(ticks)
    return seconds


def summarise(seconds: np.ndarray[Any, Any]) -> list[Span]:
    sealing = np.zeros(len(seconds), bool)
    spec = CodecSpec.resolve("kvcomp")
    sealing[spec.window + spec.sinks + PAGE_TOKENS - 1 :: PAGE_TOKENS] = True
    spans = []
    for begin in range(0, len(seconds), BIN):
        part, seals = 1e3 * seconds[begin : begin + BIN], sealing[begin : begin + BIN]
        total = part.sum(axis=1)
        append, seal, attending = (float(x) for x in np.median(part[~seals], axis=0))
        p50, p99 = (float(x) for x in np.percentile(total, (50, 99)))
        spans.append(Span(begin + BIN // 2, append, seal, attending, p50, p99, float(np.median(total[seals]))))
    return spans


def plot(spans: list[Span], path: Path) -> None:
    contexts = [float(span.context) for span in spans]
    curves = {
        "attend": [span.attend for span in spans],
        "append": [span.append for span in spans],
        "token, median": [span.p50 for span in spans],
        "token, 99th percentile": [span.p99 for span in spans],
        "token that seals a page, median": [span.sealing_p50 for span in spans],
    }
    series = {name: (contexts, values) for name, values in curves.items()}
    plots.save(plots.lines(series, ("context, tokens", "milliseconds a token and layer")), path.with_suffix(""))


def main(
    tokens: Annotated[int, typer.Option(help="Tokens to generate")] = 16384,
    output: Annotated[Path, typer.Option(help="Where the results go")] = RESULTS / "latency.json",
) -> None:
    measure(PAGE_TOKENS * 8)  # compile and warm up
    spans = summarise(measure(tokens))
    contexts, attends = [s.context for s in spans], [s.attend for s in spans]
    slope, offset = np.polyfit(contexts, attends, 1)
    fit = float(1 - np.var(np.asarray(attends) - slope * np.asarray(contexts) - offset) / np.var(attends))
    found = {
        "setting": setting(kv_heads=HEADS, head_dim=CHANNELS, group=GROUP, threads=torch.get_num_threads()),
        "attend_linear_fit_r2": fit,
        "append_last_over_first": spans[-1].append / spans[0].append,
        "spans": [asdict(span) for span in spans],
    }
    output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    plot(spans, output.with_suffix(".svg"))
    table = Table(
        "context", "append", "attend", "median", "p99", "sealing token", title="milliseconds a token and layer"
    )
    for span in spans:
        figures = (span.append, span.attend, span.p50, span.p99, span.sealing_p50)
        table.add_row(str(span.context), *(f"{figure:.3f}" for figure in figures))
    screen.print(table)
    screen.print(
        f"attend against a straight line: R2 {fit:.4f}; append, last over first: {found['append_last_over_first']:.2f}"
    )


if __name__ == "__main__":
    typer.run(main)
