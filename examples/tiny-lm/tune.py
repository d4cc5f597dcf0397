"""Find the relative scales of the spec that lies beside the model, kvcomp.json: one for each layer's K and V.

Each tensor is compressed alone at some scales, which gives its share of the KL and its size at each; for a price of KL every tensor then takes
the scale of least size + price * KL (Shoham & Gersho, 1988), and the lowest price is taken that keeps the top-1
agreement and the look-ups. All of it on text the model was trained on, and on look-up lists of
other seeds than the benchmarks': held-out text is left for measuring.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from kvcomp.evaluate.fidelity import Codec, Coded, Sample, kvcomp_codec, lookup_sample, lookups_right, sample, score
from kvcomp.evaluate.models import TUNED_SPEC, load_model
from kvcomp.evaluate.text import LookupLists, held_out_names, join, training_text
from kvcomp.spec import PRESETS, CodecSpec
from kvcomp.store import Memory

HERE = Path(__file__).parent
PROMPT, SCORED = 2048, 256
STEPS = (0.33, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)  # relative scales, as multiples of the preset's
SEED = 7

screen = Console()


def spec_of(scales: np.ndarray[Any, Any]) -> CodecSpec:
    """The preset with these relative scales, (layers, K|V)."""
    base = PRESETS["kvcomp"]
    key, value = (tuple(round(float(r), 4) for r in column) for column in scales.T)
    return replace(base, key=replace(base.key, relative_scale=key), value=replace(base.value, relative_scale=value))


def only(codec: Codec, layer: int, tensor: int) -> Codec:
    """Compress the K (0) or the V (1) of one layer, and nothing else."""

    def code(index: int, k: torch.Tensor, v: torch.Tensor) -> Coded:
        if index != layer:
            return Coded(k, v, Memory())
        coded = codec(index, k, v)
        return Coded(k if tensor else coded.k, coded.v if tensor else v, coded.memory)

    return code


def main(
    top1: Annotated[float, typer.Option(help="Least share of equal likeliest tokens")] = 0.965,
    lookups: Annotated[float, typer.Option(help="Most look-ups lost, as a share")] = 0.004,
    prompts: Annotated[int, typer.Option(help="Prompts of text")] = 10,
    lists: Annotated[int, typer.Option(help="Look-up lists of 85 look-ups")] = 10,
) -> None:
    """Write kvcomp.json beside the model."""
    model, tokenizer = load_model(HERE)
    layers = model.config.num_hidden_layers
    rng = np.random.default_rng(SEED)
    ids = join(tokenizer, training_text(held_out_names(HERE / "held_out.txt")))
    begins = rng.integers(0, ids.size - PROMPT - SCORED, prompts)
    texts: list[Sample] = [
        sample(model, torch.from_numpy(ids[at : at + PROMPT + SCORED])[None], PROMPT)
        for at in track(begins, "reading prompts", console=screen)
    ]
    drawn = [LookupLists(tokenizer).draw(rng, PROMPT) for _ in range(lists)]
    records = [lookup_sample(model, each) for each in track(drawn, "reading look-up lists", console=screen)]
    exact = np.mean([r for each, s in zip(drawn, records, strict=True) for r in lookups_right(model, each, s, None)])

    base = np.array([[PRESETS["kvcomp"].key.scale, PRESETS["kvcomp"].value.scale]] * layers)
    kl, size = np.zeros((2, layers, 2, len(STEPS)))
    for layer, tensor, step in track(list(np.ndindex(kl.shape)), "each layer's K and V alone", console=screen):
        scales = base.copy()
        scales[layer, tensor] *= STEPS[step]
        scored = score(model, [*texts, *records], only(kvcomp_codec(spec_of(scales), layers), layer, tensor))
        kl[layer, tensor, step] = np.mean(scored.kl)
        size[layer, tensor, step] = scored.memory.coded_bits

    low, high = 1.0, 1e5  # bits a value for a nat
    for _ in track(range(12), "lowest price that keeps the quality", console=screen):
        price = float(np.sqrt(low * high))
        scales = base * np.take(STEPS, np.argmin(size + price * kl, axis=2))
        coded = kvcomp_codec(spec_of(scales), layers)
        scored = score(model, texts, coded)
        right = np.mean([r for e, s in zip(drawn, records, strict=True) for r in lookups_right(model, e, s, coded)])
        kept = np.mean(scored.top1) >= top1 and exact - right <= lookups
        screen.print(
            f"price {price:.0f}: {scored.memory.coded_bits:.3f} coded bits, KL {np.mean(scored.kl):.2e}, "
            f"top-1 {np.mean(scored.top1):.4f}, look-ups {right:.4f} of {exact:.4f}"
        )
        low, high = (low, price) if kept else (price, high)
    spec = spec_of(base * np.take(STEPS, np.argmin(size + high * kl, axis=2)))
    (HERE / TUNED_SPEC).write_text(spec.to_json() + "\n", encoding="utf-8")
    screen.print(f"wrote {TUNED_SPEC}:", spec.key.relative_scale, spec.value.relative_scale)


if __name__ == "__main__":
    typer.run(main)
