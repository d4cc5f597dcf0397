"""Find the relative scales of the spec that lies beside the model, kvcomp.json: one for each layer's K and V.

For small steps a tensor's share of the KL grows with the square of its step, so the fewest bits for a given KL have every tensor add the
same: r_i = c r_0 / sqrt(KL_i), KL_i measured with that tensor alone compressed at r_0. Then the largest c is taken that keeps
the top-1 agreement and the look-ups. All of it on text the model was trained on, and on look-up lists of
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

HERE = Path(__file__).parent
PROMPT, SCORED = 2048, 256
COARSEST, FINEST = 0.5, 0.016
SEED = 7

screen = Console()


def only(codec: Codec, layer: int, key: bool) -> Codec:
    """Compress the K or the V of one layer, and nothing else."""

    def code(index: int, k: torch.Tensor, v: torch.Tensor) -> Coded:
        coded = codec(index, k, v)
        if index != layer:
            return Coded(k, v, coded.memory)
        return Coded(coded.k, v, coded.memory) if key else Coded(k, coded.v, coded.memory)

    return code


def spec_for(kl: np.ndarray[Any, Any], c: float) -> CodecSpec:
    """The spec whose tensors, kl[layer, K|V] each at the preset's scales, all add the same to the KL."""
    base = PRESETS["kvcomp"]
    start = np.array([base.key.scale, base.value.scale])
    scales = np.clip(c * start / np.sqrt(kl), FINEST, COARSEST).round(4)
    key, value = (tuple(float(r) for r in column) for column in scales.T)
    return replace(base, key=replace(base.key, relative_scale=key), value=replace(base.value, relative_scale=value))


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

    codec = kvcomp_codec(PRESETS["kvcomp"], layers)
    kl = np.array(
        [
            [np.mean(score(model, [*texts, *records], only(codec, layer, key)).kl) for key in (True, False)]
            for layer in track(range(layers), "sensitivity of each layer", console=screen)
        ]
    )
    screen.print("KL of each layer's K and V alone:", kl.round(5).tolist())

    low, high = 0.0, 0.5  # the KL of each tensor is about c^2 times its share
    for _ in track(range(7), "largest scales that keep the quality", console=screen):
        c = (low + high) / 2
        coded = kvcomp_codec(spec_for(kl, c), layers)
        scored = score(model, texts, coded)
        right = np.mean([r for e, s in zip(drawn, records, strict=True) for r in lookups_right(model, e, s, coded)])
        kept = np.mean(scored.top1) >= top1 and exact - right <= lookups
        screen.print(
            f"c {c:.4f}: {scored.memory.coded_bits:.3f} coded bits, KL {np.mean(scored.kl):.2e}, "
            f"top-1 {np.mean(scored.top1):.4f}, look-ups {right:.4f} of {exact:.4f}"
        )
        low, high = (c, high) if kept else (low, c)
    spec = spec_for(kl, low)
    (HERE / TUNED_SPEC).write_text(spec.to_json() + "\n", encoding="utf-8")
    screen.print(f"wrote {TUNED_SPEC}:", spec.key.relative_scale, spec.value.relative_scale)


if __name__ == "__main__":
    typer.run(main)
