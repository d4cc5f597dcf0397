"""Bits at equal quality: the paper's scheme against KIVI-style quantisation, on held-out text; and what the tuned spec keeps.

Prompts of 2,048 tokens of held-out text are cached and coded; the 256 tokens after each are scored teacher-forced. Both methods keep the
same sinks and window raw. `coded` bits count sealed tokens with all their metadata, `total` bits everything the cache allocates.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from setting import RESULTS, setting

from kvcomp.evaluate.fidelity import (
    Codec,
    Score,
    bits_at,
    kivi_codec,
    kvcomp_codec,
    lookup_sample,
    lookups_right,
    sample,
    score,
)
from kvcomp.evaluate.models import default_spec, held_out_ids, load_model, shipped_model
from kvcomp.evaluate.plots import lines
from kvcomp.evaluate.text import LookupLists
from kvcomp.spec import CodecSpec, TensorSpec

PROMPT, SCORED = 2048, 256
KEY_SCALES = (0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.14, 0.2)
VALUE_OVER_KEY = (2, 3, 5)
SEED = 20261121

screen = Console()


def figures(scored: Score) -> dict[str, float]:
    """Means over the prompts, with the standard error of the KL."""
    return {
        "coded_bits": scored.memory.coded_bits,
        "total_bits": scored.memory.total_bits,
        "kl": float(np.mean(scored.kl)),
        "kl_standard_error": float(np.std(scored.kl, ddof=1) / np.sqrt(len(scored.kl))),
        "top1": float(np.mean(scored.top1)),
    }


def paper(key: float, value: float) -> CodecSpec:
    return CodecSpec(TensorSpec("block", key), TensorSpec("token", value))


def at_the_kl_of(kivi: dict[str, float], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fewest bits of the paper's scheme at KIVI's KL: over the splits, log KL interpolated between the rates of one split."""
    bits = {}
    for ratio in VALUE_OVER_KEY:
        split = [row for row in rows if row["value_over_key"] == ratio]
        bits[ratio] = {
            name: bits_at(kivi["kl"], [row[name] for row in split], [row["kl"] for row in split])
            for name in ("coded_bits", "total_bits")
        }
    best = min(VALUE_OVER_KEY, key=lambda ratio: bits[ratio]["coded_bits"])
    return {
        "value_over_key": best,
        **bits[best],
        "coded_ratio": bits[best]["coded_bits"] / kivi["coded_bits"],
        "total_ratio": bits[best]["total_bits"] / kivi["total_bits"],
    }


def plot(kivi: dict[int, Any], rows: list[dict[str, Any]], tuned: dict[str, Any], path: Path) -> None:
    """KL over coded bits."""

    def curve(results: list[Any]) -> tuple[list[float], list[float]]:
        return [r["coded_bits"] for r in results], [r["kl"] for r in results]

    series = {"KIVI-style, group 32": curve(list(kivi.values()))}
    for ratio in VALUE_OVER_KEY:
        series[f"paper, V scale {ratio} x K's"] = curve([row for row in rows if row["value_over_key"] == ratio])
    series["tuned for the model"] = curve([tuned])
    lines(path, series, ("coded bits per value", "KL from the uncompressed cache, nats a token"))


def main(
    prompts: Annotated[int, typer.Option(help="Prompts of held-out text")] = 24,
    lists: Annotated[int, typer.Option(help="Look-up lists of 85 look-ups")] = 24,
    output: Annotated[Path, typer.Option(help="Where the results go")] = RESULTS / "quality.json",
) -> None:
    place = shipped_model()
    model, tokenizer = load_model(place)
    layers = model.config.num_hidden_layers
    ids = np.asarray(held_out_ids(tokenizer, place))
    begins = np.linspace(0, ids.size - PROMPT - SCORED, prompts).astype(int)
    samples = [
        sample(model, torch.from_numpy(ids[at : at + PROMPT + SCORED])[None], PROMPT)
        for at in track(begins, "reading prompts", console=screen)
    ]

    def measure(codec: Codec) -> dict[str, float]:
        return figures(score(model, samples, codec))

    kivi = {bits: measure(kivi_codec(bits, bits)) for bits in track((4, 3, 2), "KIVI-style", console=screen)}
    grid = [(key, min(0.9, key * ratio), ratio) for key, ratio in product(KEY_SCALES, VALUE_OVER_KEY)]
    rows: list[dict[str, Any]] = [
        {"key": key, "value": value, "value_over_key": ratio, **measure(kvcomp_codec(paper(key, value), layers))}
        for key, value, ratio in track(grid, "the paper's scheme", console=screen)
    ]
    equal = {bits: at_the_kl_of(result, rows) for bits, result in kivi.items()}

    spec = default_spec(place)
    tuned: dict[str, Any] = {"spec": json.loads(spec.to_json()), **measure(kvcomp_codec(spec, layers))}
    rng = np.random.default_rng(SEED)
    right: dict[str, list[bool]] = {"uncompressed": [], "tuned": [], "kvcomp": [], "kivi-2": [], "kivi-4": []}
    codecs: dict[str, Codec | None] = {
        "uncompressed": None,
        "tuned": kvcomp_codec(spec, layers),
        "kvcomp": kvcomp_codec(CodecSpec.resolve("kvcomp"), layers),
        "kivi-2": kivi_codec(2, 2),
        "kivi-4": kivi_codec(4, 4),
    }
    for _ in track(range(lists), "look-ups", console=screen):
        drawn = LookupLists(tokenizer).draw(rng, PROMPT)
        records = lookup_sample(model, drawn)
        for name, codec in codecs.items():
            right[name] += lookups_right(model, drawn, records, codec)
    lookups = {"count": len(right["tuned"]), **{name: float(np.mean(hits)) for name, hits in right.items()}}

    output.write_text(
        json.dumps(
            {
                "setting": setting(prompts=prompts, prompt_tokens=PROMPT, scored_tokens=SCORED, seed=SEED),
                "kivi": kivi,
                "paper": rows,
                "paper_at_the_kl_of_kivi": equal,
                "tuned": tuned,
                "lookups": lookups,
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    plot(kivi, rows, tuned, output.with_suffix(".svg"))
    table = Table("method", "coded bits", "total bits", "KL", "top-1", title=f"{prompts} prompts of {PROMPT} tokens")
    for name, result in [
        *((f"KIVI-{bits} style, group 32", result) for bits, result in kivi.items()),
        *((f"paper, K {row['key']}, V {row['value']:.2f}", row) for row in rows),
        ("tuned for the shipped model", tuned),
    ]:
        table.add_row(
            name,
            f"{result['coded_bits']:.2f}",
            f"{result['total_bits']:.2f}",
            f"{result['kl']:.2e} ± {result['kl_standard_error']:.0e}",
            f"{result['top1']:.4f}",
        )
    screen.print(table)
    for bits, result in equal.items():
        screen.print(
            f"at the KL of KIVI-{bits}: {result['coded_bits']:.2f} coded bits, {result['coded_ratio']:.3f} of KIVI's "
            f"({result['total_bits']:.2f} total bits, {result['total_ratio']:.3f})"
        )
    screen.print("look-ups right:", lookups)


if __name__ == "__main__":
    typer.run(main)
