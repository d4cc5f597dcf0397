"""Pictures of results: figures in one style, written as SVG and PNG. The only module that imports matplotlib.

The colours are those of Okabe and Ito, which readers of every colour vision tell apart; each series has its own marker.
A picture has its own background, and an SVG turns dark where the reader's system is.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from kvcomp import disk

INK, PAPER, GRID = "#24292f", "#fefefe", "#c9ced6"  # each stands for one role, and is replaced by the dark one
DARK = {INK: "#e6edf3", PAPER: "#161b22", GRID: "#434b57"}
COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c7ae6", "#7f8790"
MARKERS = "osD^vPX*"
FONT = "DejaVu Sans"
PARAMETERS: Any = {
    "svg.hashsalt": "kvcomp",  # the same results give the same bytes
    "svg.fonttype": "none",
    "font.family": FONT,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "image.cmap": "cividis",
}
matplotlib.rcParams.update(PARAMETERS)

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def write(figure: Figure, path: Path) -> None:
    """Write a picture in the format of the path's suffix, whole or not at all. Raises OSError."""
    if path.suffix == ".svg":
        disk.put(path, svg(figure).encode())
    else:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=160)
        disk.put(path, buffer.getvalue())


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a picture beside a results file as ``stem``.svg and .png; returns both paths."""
    paths = [stem.with_name(stem.name + suffix) for suffix in (".svg", ".png")]
    for path in paths:
        write(figure, path)
    return paths


def svg(figure: Figure) -> str:
    """The picture as one SVG element with text that can be selected, for a file or to stand within a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(f"'{FONT}'", f"'{FONT}', Verdana, sans-serif")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    rules = "".join(
        f'[style*="{use}: {light}"]{{{use}:{dark} !important}}'
        for light, dark in DARK.items()
        for use in ("fill", "stroke")
    )
    return text.replace("<defs>", f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style><defs>", 1)


def heat_map(rows: Sequence[Sequence[float]], names: Sequence[str], labels: tuple[str, str, str]) -> Figure:
    """A coloured cell for each number, a named row for each row; labels of x, y and the colours. NaN stays empty."""
    figure = Figure(figsize=(3 + 0.35 * len(rows[0]), 1.5 + 0.25 * len(rows)), layout="constrained")
    axes: Any = figure.subplots()
    image = _cells(axes, np.asarray(rows))
    axes.set(xlabel=labels[0], ylabel=labels[1], yticks=range(len(names)), yticklabels=names)
    _whole(axes, len(rows[0]))
    figure.colorbar(image, label=labels[2])
    return figure


def rate_distortion(series: Series) -> Figure:
    """KL over coded bits, a curve for each family of methods."""
    figure, axes = _axes()
    for index, (name, points) in enumerate(series.items()):
        axes.plot(*_sorted(points), label=name, **_style(index))
    axes.set(
        xlabel="coded bits per value, metadata included",
        ylabel="KL from the uncompressed cache, nats a token",
        yscale="log",
    )
    axes.legend()
    return figure


def memory_growth(series: Series) -> Figure:
    """MiB held over tokens in the cache."""
    figure, axes = _axes()
    for (name, (x, y)), colour in zip(series.items(), COLOURS, strict=False):
        axes.plot(x, y, color=colour, linewidth=2, label=name, linestyle="--" if name == "uncompressed" else "-")
    axes.set(xlabel="tokens in the cache", ylabel="memory of the cache, MiB", ylim=(0, None), xlim=(0, None))
    axes.legend()
    return figure


def growth_series(memory: Mapping[str, Sequence[int]]) -> Series:
    """What ``memory_growth`` draws, of the "memory" of a bench's growth."""
    tokens = [float(token) for token in memory["tokens"]]
    return {name: (tokens, [size / 2**20 for size in memory[name]]) for name in ("kvcomp", "uncompressed")}


def speed_up(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The fastest dense method's time over kvcomp's, with its quartiles, over the context: above 1 kvcomp is faster.

    rows: "attention" of a bench (see ``kvcomp.bench.cases``); a panel for each number of threads and head size.
    """
    panels = sorted({(row["threads"], row["head_dim"]) for row in rows})
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(7 if columns > 1 else 5, 1 + 2.6 * lines), layout="constrained")
    grid: Any = figure.subplots(lines, columns, sharex=True, sharey="row", squeeze=False)
    panes = grid.ravel()[: len(panels)]
    for axes in grid.ravel()[len(panels) :]:
        axes.remove()
    for axes, (threads, head_dim) in zip(panes, panels, strict=True):
        here = [row for row in rows if (row["threads"], row["head_dim"]) == (threads, head_dim)]
        here = [row for row in here if threads == 1 or not row["from_rest"]]
        for index, (batch, group) in enumerate(sorted({(row["batch"], row["group"]) for row in here})):
            curve = sorted((r for r in here if (r["batch"], r["group"]) == (batch, group)), key=lambda r: r["context"])
            spreads = [row["time_over"][row["fastest_dense"]] for row in curve]
            y = [1 / spread["median"] for spread in spreads]
            spread = [
                [v - 1 / s["quartile_3"] for v, s in zip(y, spreads, strict=True)],
                [1 / s["quartile_1"] - v for v, s in zip(y, spreads, strict=True)],
            ]
            style = _style(index)
            label = f"batch {batch}, {group} quer{'y' if group == 1 else 'ies'} a KV head"
            axes.errorbar(
                [row["context"] for row in curve], y, yerr=spread, capsize=2, elinewidth=0.8, label=label, **style
            )
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        axes.set(
            xscale="log",
            title=f"{threads} thread{'s' if threads > 1 else ''}, head size {head_dim}",
        )
        contexts = sorted({row["context"] for row in here})
        axes.set_xticks(contexts, [f"{context / 1024:g}K" for context in contexts])
        axes.minorticks_off()
    for axes in panes:
        axes.set(ylim=(0, None))
    for axes in panes[-columns:]:
        axes.set(xlabel="tokens in the cache")
    figure.supylabel("fastest dense method's time / kvcomp's", fontsize=10)
    figure.legend(*panes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 if columns > 1 else 1)
    return figure


def bits_by_head(heads: Sequence[Mapping[str, Any]]) -> Figure:
    """Bits per value of each layer and head, K beside V. heads: of an Error in a results file."""
    layers, count = 1 + max(row["layer"] for row in heads), 1 + max(row["head"] for row in heads)
    bits = {kind: np.full((layers, count), np.nan) for kind in "KV"}
    for row in heads:
        if row["bits"] is not None:
            bits[row["kind"]][row["layer"], row["head"]] = row["bits"]
    figure = Figure(figsize=(3.2 + 0.6 * count, 1.6 + 0.32 * layers), layout="constrained")
    panes: Any = figure.subplots(1, 2, sharey=True)
    top = float(np.nanmax([np.nanmax(x) for x in bits.values()]))
    for axes, (kind, values) in zip(panes, bits.items(), strict=True):
        image = _cells(axes, values, 0, top)
        if values.size <= 128:
            _numbers(axes, values, top, "{:.1f}")
        axes.set(xlabel="KV head", title=kind)
        _whole(axes, count)
    panes[0].set(ylabel="layer", yticks=range(layers))
    figure.colorbar(image, ax=panes, label="bits a value")
    return figure


def error_histogram(histogram: Mapping[str, Mapping[str, Any]]) -> Figure:
    """How often each error occurs, of K and V, beside the bound where there is one. histogram: of an Error."""
    figure, axes = _axes()
    over = {kind: found["over"] for kind, found in histogram.items()}
    for index, (kind, found) in enumerate(histogram.items()):
        counts = np.asarray(found["counts"], float)
        share = 100 * counts / max(1.0, counts.sum())
        axes.stairs(
            share,
            found["edges"],
            color=COLOURS[index],
            linewidth=1.8,
            label=kind,
            linestyle="-" if index == 0 else "--",
        )
    if set(over.values()) == {"bound"}:
        lowest = min(min(found["edges"]) for found in histogram.values())
        for bound in (-1, 1) if lowest < 0 else (1,):
            axes.axvline(bound, color=INK, linewidth=1, linestyle=":")
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate("the bound", (1, 1), xytext=(-4, -4), ha="right", va="top", color=INK, **place)
    named = {"bound": "error over its bound", "rms": "error over the rms of its head"}
    axes.set(
        xlabel=" / ".join(named[name] for name in dict.fromkeys(over.values())),
        ylabel="share of the values, %",
        ylim=(0, None),
    )
    axes.legend()
    return figure


def lookup_accuracy(cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Share of right look-ups by context length and depth, a panel for each method. cells: by method."""
    lengths = sorted({cell["tokens"] for of in cells.values() for cell in of})
    depths = sorted({cell["depth"] for of in cells.values() for cell in of})
    columns = min(3, len(cells))
    rows = -(-len(cells) // columns)
    figure = Figure(
        figsize=(1.6 + columns * (0.9 + 0.55 * len(lengths)), 0.9 + rows * (0.7 + 0.3 * len(depths))),
        layout="constrained",
    )
    panes: Any = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panes.ravel()[len(cells) :]:
        axes.remove()
    for axes, (name, of) in zip(panes.ravel(), cells.items(), strict=False):
        right, asked = np.zeros((2, len(depths), len(lengths)))
        for cell in of:
            at = depths.index(cell["depth"]), lengths.index(cell["tokens"])
            right[at] += cell["right"]
            asked[at] += cell["asked"]
        with np.errstate(invalid="ignore"):
            share = 100 * right / asked
        image = _cells(axes, share, 0, 100)
        _numbers(axes, share, 100, "{:.0f}")
        axes.set(title=name)
        axes.set_xticks(range(len(lengths)), [f"{length / 1024:g}K" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    figure.supxlabel("context, tokens", fontsize=10)
    figure.supylabel("depth of what is asked for", fontsize=10)
    figure.colorbar(image, ax=panes.ravel()[: len(cells)].tolist(), label="right, %")
    return figure


def _axes() -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    return figure, figure.subplots()


def _style(index: int) -> dict[str, Any]:
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    dashed = index >= len(COLOURS)
    return {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.6, "linestyle": "--" if dashed else "-"}


def _sorted(points: tuple[Sequence[float], Sequence[float]]) -> tuple[Sequence[float], Sequence[float]]:
    x, y = zip(*sorted(zip(*points, strict=True)), strict=True)
    return x, y


def _cells(axes: Any, values: Any, low: float | None = None, high: float | None = None) -> Any:
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return axes.imshow(values, aspect="auto", vmin=low, vmax=high)


def _whole(axes: Any, count: int) -> None:
    """Ticks at whole numbers, not too many."""
    axes.set_xticks(range(0, count, max(1, count // 8)))


def _numbers(axes: Any, values: Any, top: float, form: str) -> None:
    """Each cell's number, dark on the bright end of the colours and bright on the dark one."""
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "#000001" if value > 0.55 * top else "#fffffe"
            axes.text(x, y, form.format(value), ha="center", va="center", fontsize=8, color=colour)
