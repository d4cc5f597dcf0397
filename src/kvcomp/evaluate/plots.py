"""Pictures of results, as SVG (or what else the path's suffix says). The only module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

matplotlib.rcParams["svg.hashsalt"] = "kvcomp"  # the same results give the same bytes


def lines(
    path: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], labels: tuple[str, str], log: bool = True
) -> None:
    """Draw one line for each name, (x, y), y on a log axis where ``log``; labels of x and y."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes: Any = figure.subplots()
    for name, (x, y) in series.items():
        axes.plot(x, y, marker="o", markersize=4, label=name)
    axes.set(xlabel=labels[0], ylabel=labels[1], yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def heat_map(path: Path, rows: Sequence[Sequence[float]], names: Sequence[str], labels: tuple[str, str, str]) -> None:
    """Draw one coloured cell for each number, a named row for each row; labels of x, y and the colours. NaN stays empty."""
    figure = Figure(figsize=(2.5 + 0.35 * len(rows[0]), 1.5 + 0.25 * len(rows)), layout="constrained")
    axes: Any = figure.subplots()
    image = axes.imshow(rows, aspect="auto", cmap="viridis")
    axes.set(xlabel=labels[0], ylabel=labels[1], yticks=range(len(names)), yticklabels=names)
    figure.colorbar(image, label=labels[2])
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
