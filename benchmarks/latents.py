"""How fine a latent has to be coded: a real model's K and V, cached as multi-head latent attention (MLA) would.

No model with MLA is small enough for this machine, and random ones say nothing of quality. So SmolLM2's cache is put
into the form that transformers gives to DeepSeek-V3's: one head whose K is a *latent*, from which the model computes V
and the part of K that positions leave alone, and whose V is the other part of K, turned by its position. Here the half
of K's channel pairs that turns slowly is taken before RoPE. With V it makes the latent, in an orthonormal basis: the
principal components, or these turned at random, between which a trained model's will lie. Both parts go through the
codec as a layer's K and V do. After the inverse the model scores the text that follows.

    python benchmarks/latents.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from kvcomp.cli.common import bar, plain_errors
from kvcomp.evaluate.fidelity import Sample, compare, predict_from
from kvcomp.evaluate.methods import Pair
from kvcomp.results import schema as results
from kvcomp.spec import PRESETS, CodecSpec, TensorSpec
from kvcomp.store import Memory, sealed
from real import SCORED, SEED, samples, show, summary
from real_models import load

OUTPUT = Path(__file__).parent / "results" / "latents.json"
MODEL = "smollm2-135m"
SCALES = (0.08, 0.09, 0.1, 0.12)  # of a latent's channels; its turned part has that of V


class Turns(NamedTuple):
    """RoPE of every position: (tokens, head_dim) each."""

    cosine: Tensor
    sine: Tensor

    def apply(self, k: Tensor, sign: int = 1) -> Tensor:
        """K (heads, tokens, head_dim) turned by its positions, or back."""
        half = k.shape[-1] // 2
        return k * self.cosine + sign * torch.cat([-k[..., half:], k[..., :half]], -1) * self.sine


def turns(model: Any, tokens: int) -> Turns:
    cosine, sine = model.model.rotary_emb(torch.zeros(1), torch.arange(tokens)[None])
    return Turns(cosine[0], sine[0])


def rows(x: Tensor) -> Tensor:
    """(heads, tokens, channels) as (tokens, heads * channels)."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def heads(x: Tensor, count: int) -> Tensor:
    """The inverse of ``rows``."""
    return x.reshape(len(x), count, -1).transpose(0, 1)


def principal(content: Tensor, layer: int) -> Tensor:
    """An orthonormal basis (channels, channels), largest variance first."""
    basis: Tensor = torch.linalg.svd(content - content.mean(0), full_matrices=False).Vh
    return basis


def mixed(content: Tensor, layer: int) -> Tensor:
    """The same, turned at random."""
    drawn = torch.randn(content.shape[1], content.shape[1], generator=torch.Generator().manual_seed(layer))
    turned: Tensor = torch.linalg.qr(drawn).Q @ principal(content, layer)
    return turned


def as_latents(
    pair: Pair, turn: Turns, basis: Callable[[Tensor, int], Tensor], layer: int, spec: CodecSpec
) -> tuple[Pair, Memory]:
    """K and V (1, KV heads, tokens, head_dim) after they were coded as latents, and the bytes of these."""
    k, v = pair[0][0], pair[1][0]
    count, channels = k.shape[0], k.shape[-1]
    slow = torch.arange(channels) % (channels // 2) >= channels // 4
    unturned = turn.apply(k, -1)
    content = torch.cat([rows(unturned[..., slow]), rows(v)], 1)
    vectors = basis(content, layer)
    held = sealed(spec, (content @ vectors.T)[None, None], rows(k[..., ~slow])[None, None])
    latent, turned = (one[0, 0] for one in held.dense())
    slow_rows, v_rows = (latent @ vectors).split([count * channels // 2, count * channels], 1)
    unturned[..., slow] = heads(slow_rows, count)
    found = turn.apply(unturned)
    found[..., ~slow] = heads(turned, count)
    return (found[None], heads(v_rows, count)[None]), held.memory()


def as_heads(pair: Pair, spec: CodecSpec) -> tuple[Pair, Memory]:
    """The same coded as the heads they are."""
    held = sealed(spec, *pair)
    return held.dense(), held.memory()


def ways(turn: Turns) -> Iterator[tuple[str, dict[str, Any], Callable[[int, Pair], tuple[Pair, Memory]]]]:
    """(name, settings, how a layer's K and V are coded) of all that is compared."""
    preset = PRESETS["kvcomp"]
    yield "kvcomp, as heads", {"spec": asdict(preset)}, lambda layer, pair: as_heads(pair, preset)
    for basis in (principal, mixed):
        for scale in SCALES:
            spec = CodecSpec(TensorSpec("channel", scale), preset.value)

            def coded(layer: int, pair: Pair, basis: Any = basis, spec: CodecSpec = spec) -> tuple[Pair, Memory]:
                return as_latents(pair, turn, basis, layer, spec)

            yield f"latents, {basis.__name__}, {scale:g}", {"spec": asdict(spec)}, coded


@torch.inference_mode()
def measure(model: Any, each: Sample, coded: Callable[[int, Pair], tuple[Pair, Memory]]) -> dict[str, Any]:
    layers = [coded(layer, pair) for layer, pair in enumerate(each.cache)]
    predicted = predict_from(model, each, [pair for pair, _ in layers])
    total = Memory(**{name: sum(getattr(one, name) for _, one in layers) for name in asdict(layers[0][1])})
    return asdict(compare(each, predicted)) | {"memory": asdict(total)}


def main(
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in all, of every kind of text")] = 6,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each")] = 1024,
    output: Annotated[Path, typer.Option(help="Where the results go")] = OUTPUT,
) -> None:
    with plain_errors(), bar() as progress:
        model, tokenizer = load(MODEL)
        chosen = list(ways(turns(model, prompt_tokens)))
        about = results.environment(model=MODEL, prompt_tokens=prompt_tokens, scored=SCORED, seed=SEED)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name, *_ in chosen}
        task = progress.add_task(MODEL, total=prompts * len(chosen))
        for kind, each in samples(model, tokenizer, prompts, prompt_tokens):
            for name, _, coded in chosen:
                found[name].append(measure(model, each, coded) | {"kind": kind})
                progress.update(task, advance=1)
        methods = [summary(name, settings, found[name]) for name, settings, _ in chosen]
        run = {"model": MODEL, "dtype": "float32", "prompt_tokens": prompt_tokens, "methods": methods}
        results.write(output, "latents", about, runs=[run | {"equal_quality": {}}])
        show([run | {"equal_quality": {}}])


if __name__ == "__main__":
    typer.run(main)
