"""The commands for .kvc files: ``kvcomp compress``, ``decompress``, ``inspect`` and ``verify``."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from functools import reduce
from math import isnan
from operator import add
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from rich.table import Table

from kvcomp.cli.common import (
    SPEC_NAMES,
    CalibrationFile,
    anywhere,
    check_spec,
    in_times,
    plain_errors,
    say,
    screen,
    writable,
)
from kvcomp.errors import InvalidInput
from kvcomp.spec import TensorSpec

Tensors = Annotated[
    Path, typer.Argument(help="Tensors k and v, or layers.N.k and layers.N.v", exists=True, dir_okay=False)
]
Compressed = Annotated[Path, typer.Argument(help="A .kvc file", exists=True, dir_okay=False)]


def compress(
    source: Tensors,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .kvc file to write", callback=writable)],
    spec: Annotated[str, typer.Option(help=SPEC_NAMES)] = "kvcomp",
    calibration: CalibrationFile = None,
) -> None:
    """Compress K and V, (batch, KV heads, tokens, head_dim) each, from a safetensors file.

    Every whole page of 64 tokens is compressed; what is left at the end stays as it is.
    """
    check_spec(spec)
    _check_other(source, output)
    with plain_errors():
        from kvcomp import files
        from kvcomp.calibration import resolve
        from kvcomp.store import sealed

        resolved, calibrated = resolve(spec, calibration)
        chosen = resolved.bare()
        stores = {}
        with screen.status("compressing"), _Source(source) as tensors:
            if tensors.layers != list(range(len(tensors.layers))):
                raise InvalidInput(f"{source} must hold the layers from 0 without gaps, not {tensors.layers}")
            for layer in tensors.layers:
                of_layer = calibrated.layer(layer, chosen) if calibrated else None
                spec_of_layer = chosen.layer(layer, len(tensors.layers))
                stores[layer] = sealed(spec_of_layer, *tensors.pair(layer), calibrated=of_layer)
        files.save(output, stores, chosen, len(stores))
        memory = reduce(add, (store.memory() for store in stores.values()))
        size = output.stat().st_size
        say(f"{output}: {size} bytes, {in_times(memory.dense / size)} than {memory.dense} bytes of values")


def decompress(
    source: Compressed,
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write", callback=writable)],
    calibration: CalibrationFile = None,
) -> None:
    """Write K and V of a .kvc file to a safetensors file, under the names that compress and verify read."""
    _check_other(source, output)
    with plain_errors():
        from safetensors.torch import save

        from kvcomp import disk, files
        from kvcomp.store.checks import check_expansion

        container = files.open_container(source)
        tensors = {}
        with screen.status("decompressing"):
            stores = files.load(container, calibration=_read(calibration))
            check_expansion(stores.values())
            for layer, store in stores.items():
                for kind, x in zip("kv", store.dense(), strict=True):
                    tensors[f"layers.{layer}.{kind}" if container.header.model_layers > 1 else kind] = x
        disk.write(output, [save(tensors)])
        say(f"{output}: {output.stat().st_size} bytes")


def inspect(
    source: Compressed,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON instead")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the bits of every layer and head to this file", callback=anywhere)
    ] = None,
    calibration: CalibrationFile = None,
) -> None:
    """Say what a .kvc file holds: its spec, its size by part, and the bits of each layer and head."""
    with plain_errors():
        from kvcomp import files
        from kvcomp.store.pages import bits_by_head

        container = files.open_container(source)
        stores = files.load(container, calibration=_read(calibration))
        bits = {layer: bits_by_head(store) for layer, store in stores.items()}
        memory = {layer: store.memory() for layer, store in stores.items()}
        if plot is not None:
            _draw(plot, bits)
        if as_json:
            typer.echo(json.dumps(_figures(source, container, memory, bits), indent=2))
        else:
            _show(source, container, memory, bits)


def verify(
    source: Compressed,
    against: Annotated[
        Path | None, typer.Option(help="The tensors it was made from: check every value", exists=True, dir_okay=False)
    ] = None,
    calibration: CalibrationFile = None,
) -> None:
    """Check the checksums and the structure of a .kvc file, and with --against the error bound of every value."""
    with plain_errors():
        from kvcomp import files
        from kvcomp.store.pages import Comparison, compare

        container = files.open_container(source)
        stores = files.load(container, calibration=_read(calibration))
        pages = sum(int(store.rows.count.sum()) for store in stores.values())
        states = files.load_states(container)
        with_states = f", and the states of {len(states)} layers," if states else ""
        say(f"{source}: {len(stores)} layers with {pages} pages{with_states} are as they should be")
        if against is None:
            return
        total = Comparison(0, 0, 0.0)
        with screen.status("comparing"), _Source(against) as tensors:
            if tensors.layers != list(stores):
                raise InvalidInput(f"{source} holds the layers {list(stores)}, {against} {tensors.layers}")
            for layer, store in stores.items():
                total += compare(store, *tensors.pair(layer))
        if total.missed:
            raise InvalidInput(
                f"{total.missed} of {total.values} values are not within their bound: these are other tensors"
            )
        screen.print(
            f"{total.values} values are within their bounds; the largest error is {100 * total.worst:.1f} % of its "
            "bound"
        )


def _read(calibration: Path | None) -> Any:
    from kvcomp.calibration import Calibration

    return None if calibration is None else Calibration.read(calibration)


def _check_other(source: Path, output: Path) -> None:
    """Refuse to write in the place of what is read."""
    if output.exists() and output.samefile(source):
        raise typer.BadParameter(f"{output} is what is read: give another file", param_hint="--output")


class _Source:
    """K and V in a safetensors file: ``k`` and ``v``, or ``layers.N.k`` and ``layers.N.v``."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        from kvcomp.disk import is_other

        if is_other(path):  # opening a pipe would wait for its writer
            raise InvalidInput(f"{path} is a folder, a pipe or a device: give a safetensors file")
        try:
            opened: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise InvalidInput(f"{path} is no safetensors file: {error}") from None
        self.file = opened
        names = set(opened.keys())
        self.single = names == {"k", "v"}
        found = {int(match[1]) for name in names if (match := re.fullmatch(r"layers\.(\d{1,6})\.[kv]", name))}
        self.layers = [0] if self.single else sorted(found)
        if not names or names != {self._name(layer, kind) for layer in self.layers for kind in "kv"}:
            raise InvalidInput(f"{path} must hold the tensors k and v, or layers.N.k and layers.N.v, and no others")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.__exit__(None, None, None)

    def pair(self, layer: int) -> tuple[Any, Any]:
        return self.file.get_tensor(self._name(layer, "k")), self.file.get_tensor(self._name(layer, "v"))

    def _name(self, layer: int, kind: str) -> str:
        return kind if self.single else f"layers.{layer}.{kind}"


def _figures(source: Path, container: Any, memory: dict[int, Any], bits: dict[int, Any]) -> dict[str, Any]:
    """Bytes, and bits of a value; null where a layer has no pages."""
    header = container.header
    total = reduce(add, memory.values())
    return {
        "bytes": source.stat().st_size,
        "dense_bytes": total.dense,
        "coded_bits": total.coded_bits,
        "spec": json.loads(header.spec.to_json()),
        "model": header.model,
        "model_layers": header.model_layers,
        "rows": header.rows,
        "tokens": header.tokens,
        "parts": _parts(container, total),
        "layers": [
            {
                "layer": head.layer,
                "heads": head.heads,
                "channels": head.channels,
                "value_channels": head.value_channels,
                "dtype": head.dtype,
                "sections": {name: section.size for name, section in head.sections.items()},
                "memory": asdict(memory[head.layer]),
                **{
                    kind: [None if isnan(x) else x for x in of]
                    for kind, of in zip("KV", bits[head.layer].tolist(), strict=True)
                },
            }
            for head in header.layers
        ],
    }


def _parts(container: Any, total: Any) -> dict[str, int]:
    """Bytes of the file by part; they add up to its size."""
    from kvcomp.store.memory import PAGE_PARTS

    parts = {part: getattr(total, part) for part in PAGE_PARTS}
    sections = container.header.layers[0].sections
    for name in sections:
        parts[name] = sum(layer.sections[name].size for layer in container.header.layers)
    parts["states"] = sum(state.section.size for state in container.header.states)
    parts["spare"] = parts.pop("pages") - sum(parts[part] for part in PAGE_PARTS)
    parts["header_and_padding"] = container.data.size - sum(parts.values())
    return parts


def _show(source: Path, container: Any, memory: dict[int, Any], bits: dict[int, Any]) -> None:
    header, total, size = container.header, reduce(add, memory.values()), source.stat().st_size
    tensors = " and ".join(
        f"{kind}: {tensor.unit} units, {_scales(tensor)}, {tensor.coding}"
        for kind, tensor in (("K", header.spec.key), ("V", header.spec.value))
    )
    say(f"{source}: {header.rows} rows of {header.tokens} tokens, {len(header.layers)} of {header.model_layers} layers")
    say(f"{tensors}; window {header.spec.window}, sinks {header.spec.sinks}")
    if header.model is not None:
        about = header.model.get("configuration")
        kind = about.get("model_type") if isinstance(about, dict) else None
        say(f"of a model of type {kind}, model_id {header.model.get('id')}")
    parts = Table("part", "bytes", "bits a value")
    for part, held in _parts(container, total).items():
        if held:
            parts.add_row(part.replace("_", " "), str(held), f"{8 * held / max(1, total.values):.3f}")
    parts.add_row("file", str(size), f"{8 * size / max(1, total.values):.3f}")
    parts.add_row("uncompressed", str(total.dense), f"{8 * total.dense / max(1, total.values):.3f}")
    screen.print(parts)
    heads = Table("layer", "dtype", "head size", *(f"{kind} bits by head" for kind in "KV"))
    for head in header.layers:
        by_head = (" ".join("-" if isnan(x) else f"{x:.2f}" for x in of) for of in bits[head.layer].tolist())
        sizes = dict.fromkeys([head.channels, head.value_channels])
        heads.add_row(str(head.layer), head.dtype, ", ".join(map(str, sizes)), *by_head)
    screen.print(heads)


def _scales(tensor: TensorSpec) -> str:
    steps = [step for layer in tensor.steps or () for step in layer]
    given = steps or tensor.scales
    least, most = min(given), max(given)
    return f"{'steps' if steps else 'relative scale'} {least:.4g}" + (f" to {most:.4g}" if most > least else "")


def _draw(path: Path, bits: dict[int, Any]) -> None:
    try:
        from kvcomp.results import plots
    except ImportError:
        raise InvalidInput("--plot needs matplotlib: pip install '.[plots]'") from None
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InvalidInput(f"--plot draws to files that end in .png, .svg or .pdf, not {path.name}")
    width = max(x.shape[1] for x in bits.values())
    rows = [[*of, *[float("nan")] * (width - len(of))] for x in bits.values() for of in x.tolist()]
    names = [f"{layer} {kind}" for layer in bits for kind in "KV"]
    plots.write(plots.heat_map(rows, names, ("head", "layer", "bits a value")), path)
