"""What kvcomp-klt costs a CPU beside the paper's preset: decode attention and compression of the shipped model's
layers, on one thread.

K and V are those of held-out text, prompt after prompt. Processor time, all presets and layers in turn in every round;
attention is ``attend`` as a model calls it, the transform's products included. Writes
benchmarks/results/klt_timings.json.

    make bench-klt_timings
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from klt_methods import PROMPT
from kvcomp.bench.timing import Rounds, in_rounds, quartiles
from kvcomp.calibration import Calibration
from kvcomp.evaluate.models import CALIBRATION, held_out_ids, load_model, shipped_model
from kvcomp.results import schema as results
from kvcomp.spec import LEVELS, CodecSpec
from kvcomp.store import KVStore
from kvcomp.store.attention import attend

OUTPUT = Path(__file__).parent / "results" / "klt_timings.json"
LENGTHS = (8192, 32768)
PAPER, NAMES = "kvcomp:paper", ("kvcomp:paper", *LEVELS)
SEED = 20261121

screen = Console()


@torch.inference_mode()
def tensors(model: Any, ids: np.ndarray[Any, Any]) -> list[tuple[Tensor, Tensor]]:
    """K and V of every layer, (1, KV heads, the longest of LENGTHS, head_dim), of prompts from all over the text."""
    prompts: list[list[tuple[Tensor, Tensor]]] = []
    for at in track(np.linspace(0, ids.size - PROMPT, max(LENGTHS) // PROMPT).astype(int), "prompts", console=screen):
        cache = DynamicCache(config=model.config)
        model(torch.from_numpy(ids[at : at + PROMPT])[None], past_key_values=cache, logits_to_keep=1)
        held: list[Any] = list(cache.layers)
        prompts.append([(layer.keys, layer.values) for layer in held])
    layers = zip(*prompts, strict=True)
    return [(torch.cat([k for k, _ in layer], 2), torch.cat([v for _, v in layer], 2)) for layer in layers]


def fill(name: str, layer: int, layers: int, calibration: Calibration, k: Tensor, v: Tensor) -> KVStore:
    """A store of one layer, the paper's preset or a level's, with everything sealed that can be."""
    spec = CodecSpec.resolve(PAPER) if name == PAPER else calibration.spec(name)
    store = KVStore(spec.layer(layer, layers), "cpu", *(() if name == PAPER else calibration.layer(layer, spec) or ()))
    store.append(k, v)
    store.seal()
    return store


def compared(taken: Rounds, layers: int) -> dict[str, Any]:
    """Seconds and the share of the paper preset's, of all layers together and of each."""

    def over(some: range) -> dict[str, Any]:
        sums = {name: [sum(of[f"{name} {layer}"] for layer in some) for of in taken] for name in NAMES}
        return {
            name: {
                "seconds": quartiles(times),
                "over_paper": quartiles([x / y for x, y in zip(times, sums[PAPER], strict=True)]),
            }
            for name, times in sums.items()
        }

    return {"all": over(range(layers)), "layers": [over(range(layer, layer + 1)) for layer in range(layers)]}


def main(
    rounds: Annotated[int, typer.Option(help="Rounds, of which the median is taken")] = 101,
    budget: Annotated[float, typer.Option(help="Seconds for the rounds of each measurement")] = 120.0,
    output: Annotated[Path, typer.Option(help="Where the results go")] = OUTPUT,
) -> None:
    torch.set_num_threads(1)
    place = shipped_model()
    model, tokenizer = load_model(place)
    calibration = Calibration.read(place / CALIBRATION)
    cache = tensors(model, np.asarray(held_out_ids(tokenizer, place)))
    about = results.environment(rounds=rounds, budget=budget, lengths=LENGTHS, seed=SEED)
    q = torch.randn(
        (1, model.config.num_attention_heads, 1, cache[0][0].shape[3]), generator=torch.Generator().manual_seed(SEED)
    ).to(cache[0][0].dtype)
    found: dict[str, Any] = {"attend": {}, "encode": {}}
    for tokens in LENGTHS:
        encode: dict[str, Callable[[], Any]] = {
            f"{name} {layer}": partial(fill, name, layer, len(cache), calibration, k[:, :, :tokens], v[:, :, :tokens])
            for layer, (k, v) in enumerate(cache)
            for name in NAMES
        }
        read = {name: partial(attend, action(), q, q.shape[3] ** -0.5) for name, action in encode.items()}
        found["attend"][tokens] = compared(in_rounds(read, rounds, budget), len(cache))
        found["encode"][tokens] = compared(in_rounds(encode, rounds, budget), len(cache))
    results.write(output, "klt_timings", about, calibration=calibration.fingerprint, **found)
    show(found)


def show(found: Mapping[str, Any]) -> None:
    """Shares of the paper preset's time, median and quartiles."""
    for what, lengths in found.items():
        table = Table("tokens", "layers", *LEVELS, title=f"{what}, over the paper preset")
        for tokens, one in lengths.items():
            for layers, row in (("all", one["all"]), *((str(i), row) for i, row in enumerate(one["layers"]))):
                shares = [row[level]["over_paper"] for level in LEVELS]
                cells = (f"{x['median']:.3f} [{x['quartile_1']:.3f} {x['quartile_3']:.3f}]" for x in shares)
                table.add_row(str(tokens), layers, *cells)
        screen.print(table)


if __name__ == "__main__":
    typer.run(main)
