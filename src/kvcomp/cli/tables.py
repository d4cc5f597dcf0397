"""Results as tables on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from kvcomp.cli.common import screen

WORST = 3  # heads that are named


def show_evaluation(methods: list[dict[str, Any]]) -> None:
    """The results as tables."""
    table = Table(title="bits per value, and the distance from the uncompressed cache", title_justify="left")
    table.add_column("method", no_wrap=True)
    for header in ("coded\nbits", "total\nbits", "KL, nats", "top-1", "perplexity\nchange", "KL\nstreaming"):
        table.add_column(header, justify="right")
    for one in methods:
        forced, moving = one["fidelity"].get("teacher_forced"), one["fidelity"].get("streaming")
        if forced is None:
            continue
        held = one["memory"]["teacher_forced"]
        table.add_row(
            one["name"],
            f"{held['coded_bits']:.2f}" if held["sealed_values"] else "",
            f"{held['total_bits']:.2f}",
            _with_error(forced["kl"]),
            f"{100 * forced['top1']['mean']:.1f} %",
            f"{forced['perplexity'] - forced['perplexity_uncompressed']:+.3f}",
            f"{moving['kl']['mean']:.1e}" if moving else "",
        )
    screen.print(table)
    for one in methods:
        if "failed" in one:
            first, why = next(iter(one["failed"].items()))
            screen.print(
                f"{one['name']} failed {len(one['failed'])} times, first at {first}: {why}",
                highlight=False,
                markup=False,
            )
    asked = [one for one in methods if one.get("retrieval")]
    if asked:
        right = Table(title="look-ups right", title_justify="left")
        right.add_column("method", no_wrap=True)
        kinds = sorted({(cell["task"], cell["tokens"]) for cell in asked[0]["retrieval"]})
        for task, tokens in kinds:
            right.add_column(f"{task}\n{tokens:,}", justify="right")
        for one in asked:
            right.add_row(one["name"], *(_right(one["retrieval"], task, tokens) for task, tokens in kinds))
        screen.print(right)
    scored = [one for one in methods if one.get("tasks")]
    for name in scored[0]["tasks"] if scored else ():
        found = Table(title=name, title_justify="left")
        found.add_column("method", no_wrap=True)
        for metric in scored[0]["tasks"][name]:
            found.add_column(metric, justify="right")
        for one in scored:
            figures = one["tasks"].get(name, {}).values()
            found.add_row(one["name"], *(_score(figure) for figure in figures))
        screen.print(found)
    for one in methods:
        if one.get("suffering") and one["name"] != "uncompressed":
            screen.print(_worst(one), highlight=False, soft_wrap=True)


def _with_error(figure: dict[str, Any]) -> str:
    error = figure["standard_error"]
    return f"{figure['mean']:.1e}" + (f" ± {error:.0e}" if error else "")


def _score(figure: dict[str, Any]) -> str:
    error = figure["standard_error"]
    return f"{figure['mean']:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _right(cells: list[dict[str, Any]], task: str, tokens: int) -> str:
    of = [cell for cell in cells if (cell["task"], cell["tokens"]) == (task, tokens)]
    asked = sum(cell["asked"] for cell in of)
    return f"{100 * sum(cell['right'] for cell in of) / asked:.1f} %" if asked else ""


def _worst(one: dict[str, Any]) -> str:
    """The heads that cost most, and why, in words."""
    heads = [
        f"  {row['kind']} of layer {row['layer']}, head {row['head']}, KL {row['kl']:.1e} alone: {row['why']}"
        for row in one["suffering"][:WORST]
    ]
    return "\n".join([f"{one['name']} suffers most in", *heads])


def show_bench(found: dict[str, Any]) -> None:
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


def _spread(spread: dict[str, float]) -> str:
    """Median and quartiles."""
    return f"{spread['median']:.2f} ({spread['quartile_1']:.2f}, {spread['quartile_3']:.2f})"


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


def show_tuning(rows: dict[str, dict[str, Any]], source: str) -> None:
    """A tuned spec beside what it started from and what it should equal."""
    table = Table(title=f"on {source}", title_justify="left")
    for header in ("", "coded bits", "total bits", "KL, nats", "top-1"):
        table.add_column(header, justify="left" if not header else "right")
    for label, row in rows.items():
        bits = (f"{row[kind]:.2f}" for kind in ("coded_bits", "total_bits"))
        table.add_row(label, *bits, f"{row['kl']:.2e}", f"{100 * row['top1']:.1f} %")
    screen.print(table)
    for row in rows.values():
        if "kept" in row:
            screen.print(f"together they keep {100 * row['kept']:.1f} % of the score", highlight=False)


def show_calibration(levels: Mapping[str, Mapping[str, Any]]) -> None:
    """What each level of a calibration reached on each kind of text."""
    table = Table("level", "as good as", "KL", "of that", "reached")
    for level, about in levels.items():
        both = (", ".join(f"{kind} {kl:.2e}" for kind, kl in of.items() if kl) for of in (about["kl"], about["kl_of"]))
        table.add_row(level, about["as_good_as"], *both, "yes" if about["reached"] else "no: the best there is")
    screen.print(table)
