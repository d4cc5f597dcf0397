"""``kvcomp bench`` and ``kvcomp report``: times beside those of an uncompressed cache, and one page of all results."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvcomp.cli.common import errors, named_spec, partial, plain_errors, quiet_loading, screen
from kvcomp.spec import PRESETS, is_calibrated

PARTS = "attention", "codec", "generate", "growth"


Numbers = list[int] | None


def bench(
    model: Annotated[str | None, typer.Argument(help="Model to generate with [default: the shipped one]")] = None,
    spec: Annotated[
        str, typer.Option(help=f"{', '.join(PRESETS)}, a spec.json, or kvcomp-klt:LEVEL for generate and growth")
    ] = "kvcomp",
    calibration: Annotated[
        Path | None, typer.Option(help="Of the model, for kvcomp-klt [default: model.kvcal beside it]", exists=True)
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PARTS)} [default: all]; may be repeated")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="The full grid: longer contexts, more rounds, calls from rest")
    ] = False,
    context: Annotated[Numbers, typer.Option(help="Tokens in the cache; may be repeated, as the next four")] = None,
    batch: Annotated[Numbers, typer.Option(help="Sequences")] = None,
    group: Annotated[Numbers, typer.Option(help="Queries a KV head (G)")] = None,
    head_dim: Annotated[Numbers, typer.Option(help="Channels of a head (D)")] = None,
    threads: Annotated[Numbers, typer.Option(help="Threads [default: 1, and as many as torch uses]")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads", min=1)] = None,
    prompt_tokens: Annotated[Numbers, typer.Option(help="Prompt tokens of generate; may be repeated")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate", min=2)] = None,
    rounds: Annotated[int | None, typer.Option(help="Most rounds of a measurement", min=5)] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the results go; the plots beside it")] = Path(
        "kvcomp-bench.json"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run with the same options was stopped")
    ] = False,
) -> None:
    """Time decode attention, encoding, decompression and generation, with and without compression.

    Every kernel is held against the float64 reference on the data it is timed with; no time is given of one that is wrong.
    The defaults take under two minutes on two cores.
    """
    parts = [name for name in PARTS if part is None or name in part]
    if part and set(part) - set(PARTS):
        raise typer.BadParameter(f"the parts are {', '.join(PARTS)}", param_hint="--part")
    if not is_calibrated(spec):
        named_spec(spec)
    given: dict[str, Any] = {
        "contexts": context,
        "batches": batch,
        "groups": group,
        "head_dims": head_dim,
        "threads": threads,
        "prompts": prompt_tokens,
    }
    given = {name: tuple(numbers) for name, numbers in given.items() if numbers}
    given |= {
        name: n for name, n in (("kv_heads", kv_heads), ("new_tokens", new_tokens), ("rounds", rounds)) if n is not None
    }
    with plain_errors():
        _bench(model, (spec, calibration), parts, full, given, output, resume)


def _bench(
    name: str | None,
    named: tuple[str, Path | None],
    parts: list[str],
    full: bool,
    given: dict[str, Any],
    output: Path,
    resume: bool,
) -> None:
    with quiet_loading():
        from dataclasses import asdict, replace

        from kvcomp.bench import cases as bench
        from kvcomp.evaluate.models import load_model, shipped_model, spec_for
        from kvcomp.results import schema as results
        from kvcomp.results.journal import Journal

        place = name if name is not None else shipped_model()
        model = load_model(place)[0] if {"generate", "growth"} & set(parts) else None
        coding = spec_for(place, *named)
    grid = replace(bench.FULL if full else bench.QUICK, **given)
    todo = bench.cases(grid, coding, parts, model, full)
    about = results.environment(
        **bench.parameters(grid, coding[0]), named_spec=named[0], model=Path(place).name, parts=parts
    )
    fixed = {
        name: about[name]
        for name in ("device", "kvcomp", "torch", "commit", "backend", "spec", "model", "parts", "threads")
    }
    journal = Journal(partial(output), {**fixed, **asdict(grid), "full": full}, resume)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()

    def content() -> dict[str, Any]:
        return {part: journal.some(bench.key(case) for case in todo if case.part == part) for part in parts}

    # Without auto_refresh: a thread that draws would count in the times.
    with Progress(*columns, console=screen, auto_refresh=False, speed_estimate_period=600) as progress:
        task = progress.add_task("", total=sum(case.cost for case in todo))
        try:
            for case in todo:
                progress.update(task, description=case.part, refresh=True)
                journal.piece(bench.key(case), functools.partial(case.measure, grid))
                progress.update(task, advance=case.cost, refresh=True)
        except KeyboardInterrupt:
            progress.stop()
            results.write(output, "bench", about, partial=True, **content())
            show(content())
            errors.print(f"stopped: {output} holds what is measured; the same command with --resume goes on")
            raise typer.Exit(130) from None
    results.write(output, "bench", about, partial=False, **content())
    journal.close()
    show(content())
    if about["load_average"] > 1:
        screen.print(
            f"[yellow]the load average was {about['load_average']:.1f}: on a machine at rest the times are other ones[/yellow]"
        )
    device = f"{about['device']}, {about['llvm_cpu']}, torch {about['torch']} with {about['torch_capability']}"
    screen.print(f"kvcomp's backend: {about['backend']}; {device}", highlight=False)
    for method, why in about["not_compared"].items():
        screen.print(f"{method}: {why}", style="dim")
    _draw(output, content())


def show(found: dict[str, Any]) -> None:
    """Tables of the parts that were measured."""
    if rows := found.get("attention"):
        screen.print(_attention_table(rows))
    if rows := found.get("codec"):
        screen.print(_codec_table(rows))
    if rows := found.get("generate"):
        screen.print(_generation_table(rows))
    for row in found.get("growth", []):
        ours, dense = (row["memory"][name][-1] for name in ("kvcomp", "uncompressed"))
        screen.print(f"memory after {row['tokens']:,} tokens: {ours:,} bytes, uncompressed {dense:,}", highlight=False)


def _spread(spread: dict[str, float], digits: int = 2) -> str:
    """Median and quartiles."""
    return f"{spread['median']:.{digits}f} ({spread['quartile_1']:.{digits}f}, {spread['quartile_3']:.{digits}f})"


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _attention_table(rows: list[dict[str, Any]]) -> Table:
    headers = "context", "batch", "G", "D", "threads", "ms", "fastest dense", "time over it"
    table = _table("decode attention beside dense bfloat16 (below 1: kvcomp is faster)", *headers)
    for row in rows:
        rested = "*" if row["from_rest"] and row["threads"] > 1 else ""
        table.add_row(
            f"{row['context']:,}",
            *(str(row[name]) for name in ("batch", "group", "head_dim")),
            f"{row['threads']}{rested}",
            f"{row['milliseconds']['kvcomp']['median']:.2f}",
            row["fastest_dense"].replace("_", " "),
            _spread(row["time_over"][row["fastest_dense"]]),
        )
    if any(row["from_rest"] and row["threads"] > 1 for row in rows):
        table.caption = "* each call from rest; the others back to back with the dense methods, as in a model"
    return table


def _codec_table(rows: list[dict[str, Any]]) -> Table:
    headers = "tokens", "D", "bits", "encode, ns/value", "page, us", "decompress", "over a copy"
    table = _table("the codec on one thread; a copy is torch's, of the same bfloat16", *headers)
    for row in rows:
        table.add_row(
            f"{row['tokens']:,}",
            str(row["head_dim"]),
            f"{row['bits_per_value']:.2f}",
            f"{row['encode_ns_per_value']['median']:.2f}",
            f"{row['seal_page_microseconds']['median']:.0f}",
            f"{row['decompress_ns_per_value']['median']:.2f}",
            f"{row['decompress_over_copy']['median']:.1f}x",
        )
    return table


def _generation_table(rows: list[dict[str, Any]]) -> Table:
    headers = "prompt", "new", "batch", "bits", "first, s", "dense", "ms/token", "dense", "time over"
    table = _table("generate as a whole, beside transformers' own cache and SDPA (dense)", *headers)
    for row in rows:
        first, step = row["first_token_seconds"], row["milliseconds_per_token"]
        table.add_row(
            f"{row['prompt_tokens']:,}",
            *(str(row[name]) for name in ("new_tokens", "batch")),
            f"{row['total_bits']:.2f}",
            *(f"{first[name]['median']:.3f}" for name in ("kvcomp", "uncompressed")),
            *(f"{step[name]['median']:.2f}" for name in ("kvcomp", "uncompressed")),
            _spread(row["time_over"]),
        )
    return table


def _draw(output: Path, found: dict[str, Any]) -> None:
    """The picture beside the results, where matplotlib is there to draw it."""
    if not (found.get("attention") or found.get("growth")):
        return
    try:
        from kvcomp.results import plots
    except ImportError:
        screen.print(f"the results are in {output}; for pictures: pip install 'kvcomp[plots]'", markup=False)
        return
    pictures = []
    if found.get("attention"):
        pictures += plots.save(plots.speed_up(found["attention"]), output.with_suffix(""))
    for row in found.get("growth", []):
        stem = output.with_name(f"{output.stem}-memory")
        pictures += plots.save(plots.memory_growth(plots.growth_series(row["memory"])), stem)
    screen.print(f"results: {output}; {', '.join(map(str, pictures))}", markup=False, highlight=False)
