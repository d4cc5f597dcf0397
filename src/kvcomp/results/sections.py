"""What a report shows of each kind of results: numbers first, then pictures. Numbers come from the results alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvcomp.results import plots


@dataclass
class Table:
    """header: of the columns. rows: of cells, the first names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """A part of the page. pictures: (caption, SVG). points: sentences below."""

    title: str
    lead: str
    tables: list[Table] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    points: list[str] = field(default_factory=list)


def evaluation(content: dict[str, Any]) -> Iterator[Section]:
    methods = [one for one in content["methods"] if "teacher_forced" in one["fidelity"]]
    compressed = [one for one in methods if one["name"] != "uncompressed"]
    yield _quality(content, methods, compressed)
    asked = {one["name"]: one["retrieval"] for one in methods if one.get("retrieval")}
    if asked:
        yield Section(
            "Look-ups",
            "Facts given once in the context and asked for later, by length and by depth: 0 % is its beginning.",
            [_lookups(asked)],
            [("Look-ups right", plots.svg(plots.lookup_accuracy(asked)))],
        )
    tasks = [(one["name"], one["tasks"]) for one in methods if one.get("tasks")]
    if tasks:
        rows = [
            [f"{name}, {task}, {metric}", _figure(value)]
            for name, of in tasks
            for task, metrics in of.items()
            for metric, value in metrics.items()
        ]
        yield Section(
            "Tasks", "Scores of lm-evaluation-harness with the cache under the model.", [Table(["task", "score"], rows)]
        )
    yield _sizes(compressed)
    for one in compressed:
        if one.get("error") and "spec" in one["settings"]:
            yield _errors(one)


def _quality(content: dict[str, Any], methods: list[dict[str, Any]], compressed: list[dict[str, Any]]) -> Section:
    rows = []
    for one in methods:
        memory, fidelity = one["memory"]["teacher_forced"], one["fidelity"]["teacher_forced"]
        streaming = one["fidelity"].get("streaming")
        rows.append(
            [
                one["name"],
                f"{memory['coded_bits']:.2f}" if memory["sealed_values"] else "",
                f"{memory['total_bits']:.2f}",
                _figure(fidelity["kl"]),
                f"{100 * fidelity['top1']['mean']:.1f} %",
                f"{fidelity['perplexity'] - fidelity['perplexity_uncompressed']:+.3f}",
                _figure(streaming["kl"]) if streaming else "",
            ]
        )
    header = ["method", "coded bits", "total bits", "KL, nats", "top-1", "perplexity", "KL streaming"]
    curves = {name: _curve(points) for name, points in content.get("curves", {}).items()}
    families: dict[str, list[dict[str, Any]]] = {}
    for one in compressed:
        families.setdefault(_family(one["name"]), []).append(_point(one))
    curves |= {name: _curve(points) for name, points in families.items()}
    failed = [
        f"{one['name']} could not be measured on {piece}: {why}"
        for one in content["methods"]
        for piece, why in list(one.get("failed", {}).items())[:1]
    ]
    shape = methods[0]["fidelity"]["teacher_forced"]
    return Section(
        "Quality and size",
        f"Each method beside the uncompressed cache: {shape['samples']} prompts of {shape['prompt_tokens']:,} tokens "
        f"and the {shape['scored_tokens']:,} tokens after each. KL is how far the predicted distribution moves "
        "(0: not at all), top-1 how often the likeliest token stays.",
        [Table(header, rows)],
        [
            (
                "KL over coded bits: further left is smaller, further down is better",
                plots.svg(plots.rate_distortion(curves)),
            )
        ],
        failed,
    )


def _lookups(asked: dict[str, list[dict[str, Any]]]) -> Table:
    kinds = sorted({(cell["task"], cell["tokens"]) for cells in asked.values() for cell in cells})
    rows = []
    for name, cells in asked.items():
        row = [name]
        for kind in kinds:
            of = [cell for cell in cells if (cell["task"], cell["tokens"]) == kind]
            count = sum(cell["asked"] for cell in of)
            row.append(f"{100 * sum(cell['right'] for cell in of) / count:.1f} % of {count}" if count else "")
        rows.append(row)
    return Table(["method", *(f"{task}, {tokens:,}" for task, tokens in kinds)], rows)


def _sizes(compressed: list[dict[str, Any]]) -> Section:
    """Bits of every part, and the bytes that are allocated."""
    held = {one["name"]: one["memory"]["teacher_forced"] for one in compressed}
    parts = list(dict.fromkeys(part for memory in held.values() for part in memory["parts"]))
    rows = [
        [
            name,
            *(f"{memory['parts'][part]:.3f}" if part in memory["parts"] else "" for part in parts),
            f"{memory['total_bits']:.2f}",
            f"{memory['allocated_bytes']:,}",
        ]
        for name, memory in held.items()
    ]
    header = ["bits a value", *(part.replace("_", " ") for part in parts), "total", "bytes allocated"]
    return Section(
        "Where the bytes are", "Bits for each value held, by part, at the end of the prompts.", [Table(header, rows)]
    )


def _errors(one: dict[str, Any]) -> Section:
    error = one["error"]
    points = [f"{error['missed']} of {error['values']:,} values lie outside of their bound."]
    if error["largest_over_bound"] is not None:
        points.append(f"The largest error is {100 * error['largest_over_bound']:.1f} % of its bound.")
    worst = [row for row in one.get("suffering", [])[:3] if row["kl"] > 0]
    if worst:
        points += [
            f"{row['kind']} of layer {row['layer']}, head {row['head']}, has a KL of {row['kl']:.1e} if it alone is "
            f"compressed: {row['why']}."
            for row in worst
        ]
    pictures = [("How large the errors are", plots.svg(plots.error_histogram(error["histogram"])))]
    if any(row["bits"] is not None for row in error["heads"]):
        pictures.insert(0, ("Bits a value of each layer and head", plots.svg(plots.bits_by_head(error["heads"]))))
    return Section(
        f"Layers, heads and errors: {one['name']}",
        "What each head costs, and how its values come back.",
        [],
        pictures,
        points,
    )


def tuning(content: dict[str, Any]) -> Iterator[Section]:
    advice = content["advice"]
    rows = [
        [name, f"{row['coded_bits']:.2f}", f"{row['total_bits']:.2f}", f"{row['kl']:.2e}", f"{100 * row['top1']:.1f} %"]
        for name, row in [("tuned", content), *content["before"].items()]
    ]
    sizes = [[f"{row['context']:,}", f"{row['total_bits']:.2f}"] for row in advice["size"]]
    speeds = [[f"{row['context']:,}", _spread(row["ratio"]), row["fastest"]] for row in advice["speed"]]
    yield Section(
        "Tuned for this model, and when not to compress",
        "The spec that was found, beside what it started from; then what it means for short contexts.",
        [
            Table(["spec", "coded bits", "total bits", "KL, nats", "top-1"], rows),
            Table(["context", "total bits"], sizes),
            Table(["context", "time over the fastest dense", "which"], speeds),
        ],
        points=list(advice["sentences"]),
    )


def bench(content: dict[str, Any]) -> Iterator[Section]:
    backend = f"Backend {content['setting']['backend']}. "
    if rows := content.get("attention"):
        names = list(dict.fromkeys(name for row in rows for name in row["time_over"]))
        cells = [
            [
                f"{row['context']:,} x {row['batch']}",
                str(row["group"]),
                str(row["head_dim"]),
                f"{row['threads']}{', from rest' if row['from_rest'] and row['threads'] > 1 else ''}",
                f"{row['milliseconds']['kvcomp']['median']:.2f}",
                f"{row['bits_per_value']:.2f}",
                *(f"{row['time_over'][name]['median']:.2f}x" if name in row["time_over"] else "" for name in names),
                _spread(row["time_over"][row["fastest_dense"]]),
                f"{row['error']:.0e}",
            ]
            for row in rows
        ]
        header = [
            "context x batch",
            "G",
            "D",
            "threads",
            "ms",
            "bits",
            *(f"over {name.replace('_', ' ')}" for name in names),
            "over the fastest (quartiles)",
            "error",
        ]
        yield Section(
            "Decode attention",
            f"{backend}kvcomp's time over that of each dense bfloat16 method, in the same round; below 1 kvcomp is "
            "faster. G: queries a KV head; D: head size. Error: the largest against float64, relative to the largest "
            "output, checked before anything was timed.",
            [Table(header, cells)],
            [("Speed over context: above 1 kvcomp is faster", plots.svg(plots.speed_up(rows)))],
            [f"{name} was not compared: {why}." for name, why in content["setting"]["not_compared"].items()],
        )
    if rows := content.get("codec"):
        cells = [
            [
                f"{row['tokens']:,} x {row['head_dim']}",
                f"{row['bits_per_value']:.2f}",
                _spread(row["encode_ns_per_value"]),
                f"{row['seal_page_microseconds']['median']:.0f}",
                _spread(row["decompress_ns_per_value"]),
                f"{row['decompress_over_copy']['median']:.1f}x",
            ]
            for row in rows
        ]
        header = [
            "tokens x head size",
            "bits",
            "encode, ns a value",
            "seal a page, µs",
            "decompress, ns a value",
            "over a copy",
        ]
        yield Section("Encoding and decompressing", f"{backend}One thread.", [Table(header, cells)])
    if rows := content.get("generate"):
        cells = [
            [
                f"{row['prompt_tokens']:,} + {row['new_tokens']}",
                str(row["batch"]),
                f"{row['total_bits']:.2f}",
                *(
                    f"{row[figure][name]['median']:.{digits}f}"
                    for figure, digits in (("first_token_seconds", 3), ("milliseconds_per_token", 2))
                    for name in ("kvcomp", "uncompressed")
                ),
                _spread(row["time_over"]),
            ]
            for row in rows
        ]
        header = [
            "tokens",
            "batch",
            "total bits",
            "first token, s",
            "uncompressed",
            "ms a token",
            "uncompressed",
            "time over (quartiles)",
        ]
        yield Section(
            "Generation",
            f"{backend}The whole of generate, beside transformers' own cache and SDPA.",
            [Table(header, cells)],
        )
    for row in content.get("growth", []):
        yield _growth(row["memory"])


def _growth(memory: dict[str, list[int]]) -> Section:
    chosen = range(0, len(memory["tokens"]), max(1, len(memory["tokens"]) // 6))
    rows = [
        [
            f"{memory['tokens'][i]:,}",
            f"{memory['kvcomp'][i]:,}",
            f"{memory['uncompressed'][i]:,}",
            f"{memory['uncompressed'][i] / memory['kvcomp'][i]:.2f}x",
        ]
        for i in chosen
    ]
    series = plots.growth_series(memory)
    return Section(
        "Memory while generating",
        "Bytes that the cache allocates as tokens are added, beside those of an uncompressed cache of the same tokens.",
        [Table(["tokens", "kvcomp, bytes", "uncompressed, bytes", "smaller by"], rows)],
        [("Memory over tokens", plots.svg(plots.memory_growth(series)))],
    )


def _point(one: dict[str, Any]) -> dict[str, float]:
    memory, fidelity = one["memory"]["teacher_forced"], one["fidelity"]["teacher_forced"]
    return {"coded_bits": memory["coded_bits"], "kl": fidelity["kl"]["mean"]}


def _curve(points: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [point["coded_bits"] for point in points], [point["kl"] for point in points]


def _family(name: str) -> str:
    """Methods that differ in a number or level at the end of their name are one curve."""
    return name.partition(":")[0] if ":" in name else name.rstrip("0123456789").rstrip("-")


def _figure(figure: dict[str, Any]) -> str:
    error = figure["standard_error"]
    if not figure["mean"] and not error:
        return "0"
    return f"{figure['mean']:.2e}" + ("" if error is None else f" ± {error:.0e}")


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['quartile_1']:.2f} to {spread['quartile_3']:.2f})"
