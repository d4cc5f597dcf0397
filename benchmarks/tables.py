"""Write the tables of README.md from benchmarks/results, between their markers: no figure there is typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table, the first column left-aligned and the others right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def quality(found: Any) -> str:
    """Method x (bits in full, KL, top-1, look-ups)."""
    paper = {(row["key"], row["value"]): row for row in found["paper"]}
    lookups = found["lookups"]
    rows = [
        ("kvcomp, tuned for the model", found["tuned"], lookups["tuned"]),
        ("kvcomp, preset (K .05, V .1)", paper[0.05, 0.1], lookups["kvcomp"]),
        *((f"KIVI-style {bits} bit, group 32", found["kivi"][bits], lookups.get(f"kivi-{bits}")) for bits in "432"),
    ]
    return markdown(
        ["method", "coded bits", "total bits", "KL, nats", "top-1", "look-ups right"],
        [
            [
                name,
                f"{row['coded_bits']:.2f}",
                f"{row['total_bits']:.2f}",
                f"{row['kl']:.1e}",
                f"{100 * row['top1']:.1f} %",
                "" if right is None else f"{100 * right:.2f} %",
            ]
            for name, row, right in rows
        ],
    )


def equal_quality(found: Any) -> str:
    """Bits of the paper's scheme at KIVI's KL."""
    rows = []
    for bits, row in found["paper_at_the_kl_of_kivi"].items():
        kivi = found["kivi"][bits]
        rows.append(
            [
                f"KIVI-{bits} style",
                f"{kivi['kl']:.1e}",
                f"{kivi['coded_bits']:.2f} / {kivi['total_bits']:.2f}",
                f"{row['coded_bits']:.2f} / {row['total_bits']:.2f}",
                f"{row['coded_ratio']:.2f}x / {row['total_ratio']:.2f}x",
            ]
        )
    return markdown(["at the KL of", "KL", "its bits, coded / total", "kvcomp's", "ratio"], rows)


def memory(found: Any) -> str:
    """What a cache occupies."""
    mib = 1024 * 1024
    return markdown(
        ["cache", "occupied, MiB", "counted by the cache, MiB", "smaller by (occupied)", "peak of the process, MiB"],
        [
            [
                name,
                f"{row['occupied'] / mib:.1f}",
                f"{row['counted'] / mib:.1f}",
                f"{row['occupied_ratio']:.2f}x",
                f"{row['peak'] / mib:.0f}",
            ]
            for name, row in found["caches"].items()
        ],
    )


def attention(found: Any) -> str:
    """Time of the fused kernel over that of each dense method; with two threads back to back with them."""
    rows = []
    for row in found["attention"]:
        if row["threads"] > 1 and row["from_rest"]:
            continue
        ratios = {name: ratio["median"] for name, ratio in row["time_over"].items()}
        fastest = row["time_over"][row["fastest_dense"]]
        rows.append(
            [
                f"{row['tokens']:,}",
                str(row["group"]),
                str(row["threads"]),
                f"{row['ns_per_value']['kvcomp']['median']:.3f}",
                f"{ratios['sdpa_enable_gqa']:.2f}x",
                f"{ratios['sdpa_group_folded']:.2f}x",
                f"{ratios['grouped_matmul']:.2f}x",
                f"{fastest['quartile_1']:.2f} to {fastest['quartile_3']:.2f}",
            ]
        )
    header = ["context", "queries a KV head", "threads", "ns a value", "SDPA enable_gqa", "SDPA, group in q_len"]
    return markdown([*header, "grouped matmul", "quartiles, fastest"], rows)


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "quality": ("quality.json", quality),
    "equal-quality": ("quality.json", equal_quality),
    "memory": ("memory.json", memory),
    "attention": ("attention_cpu.json", attention),
    "attention-short-spin": ("attention_cpu_short_spin.json", attention),
}


def filled(text: str) -> str:
    """The text with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        source, make = TABLES[match[1]]
        content = json.loads((RESULTS / source).read_text(encoding="utf-8"))
        return f"<!-- table: {match[1]} -->\n{make(content)}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main(check: Annotated[bool, typer.Option("--check", help="Fail if a table is not up to date")] = False) -> None:
    """Fill the tables of README.md."""
    old = README.read_text(encoding="utf-8")
    new = filled(old)
    if check and new != old:
        raise SystemExit("README.md has tables that differ from benchmarks/results: run make tables")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
