"""Train the small model in this folder further or from scratch, or measure it."""

import argparse
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from kvcomp.evaluate.text import LookupLists, held_out_names, held_out_text, join, manual_text, training_text

HERE = Path(__file__).parent
CONTEXT = 4096
TOKENS_PER_STEP = 8192
ADAMW_RATE = 3e-3
MUON_RATE = 0.02
WARMUP_STEPS = 30
TEXT_WEIGHT = 1.0
ANSWER_WEIGHT = 2.0
REPEAT_WEIGHT = 0.5
QUESTION_WEIGHT = 0.05
RANDOM_WEIGHT = 0.02

Row = tuple[NDArray[np.int64], NDArray[np.float64]]


@dataclass(frozen=True)
class Stage:
    """Steps with sequences of these lengths; ``rate`` scales the learning rates, falling linearly."""

    steps: int
    lengths: tuple[int, ...]
    rate_from: float
    rate_to: float


LONG_CONTEXT = [
    Stage(200, (1024, 2048, 4096, 4096), rate_from=0.5, rate_to=0.357),
    Stage(200, (1024, 2048, 4096, 4096), rate_from=0.357, rate_to=0.0),
]
FROM_SCRATCH = [
    Stage(1500, (256,), rate_from=1.0, rate_to=1.0),
    Stage(1000, (512,), rate_from=1.0, rate_to=1.0),
    Stage(1500, (1024,), rate_from=1.0, rate_to=0.3),
    *LONG_CONTEXT,
]


class Batches:
    """Training batches: half text, a third look-up lists, a sixth repeated random tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: NDArray[np.int64]) -> None:
        self._lists = LookupLists(tokenizer)
        self._text = text
        self._vocabulary = len(tokenizer)

    def draw(self, rng: np.random.Generator, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of shape (rows, length + 1), and how much the loss of each counts."""
        kinds = (self._text_row, self._lookup_row, self._repeat_row)
        rows = [
            kinds[rng.choice(3, p=(1 / 2, 1 / 3, 1 / 6))](rng, length + 1) for _ in range(TOKENS_PER_STEP // length)
        ]
        tokens, weights = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return tokens, weights.float()

    def _text_row(self, rng: np.random.Generator, length: int) -> Row:
        start = rng.integers(len(self._text) - length)
        return self._text[start : start + length], np.full(length, TEXT_WEIGHT)

    def _lookup_row(self, rng: np.random.Generator, length: int) -> Row:
        """One list as long as the row, or several shorter ones."""
        tokens: list[NDArray[np.int64]] = []
        weights: list[NDArray[np.float64]] = []
        left = length
        while left:
            size = left if left < 512 or rng.random() < 0.7 else int(rng.integers(256, left - 200))
            lookups = int(rng.integers(size // 24, size // 18 + 1)) if size >= 200 else size // 24
            drawn = self._lists.draw(rng, size, lookups)
            weight = np.full(size, RANDOM_WEIGHT)
            weight[drawn.context :] = QUESTION_WEIGHT
            for start, end in drawn.answers:
                weight[start:end] = ANSWER_WEIGHT
            tokens.append(drawn.tokens)
            weights.append(weight)
            left -= size
        return np.concatenate(tokens), np.concatenate(weights)

    def _repeat_row(self, rng: np.random.Generator, length: int) -> Row:
        """Runs of random tokens, each two to four times over."""
        tokens: list[NDArray[np.int64]] = []
        weights: list[NDArray[np.float64]] = []
        while sum(map(len, tokens)) < length:
            run = rng.integers(1, self._vocabulary, size=rng.integers(10, length // 3))
            times = int(rng.integers(2, 5))
            tokens += [run] * times
            weights += [np.full(len(run), RANDOM_WEIGHT)] + [np.full(len(run), REPEAT_WEIGHT)] * (times - 1)
        return np.concatenate(tokens)[:length], np.concatenate(weights)[:length]


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices, AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "embed" not in name]
    others = [parameter for name, parameter in named if parameter.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def stage_at(stages: Sequence[Stage], step: int) -> tuple[Stage, float]:
    """The stage of a step, and the scale of the learning rates there."""
    for stage in stages:
        if step < stage.steps:
            rate = stage.rate_from + (stage.rate_to - stage.rate_from) * step / stage.steps
            return stage, rate
        step -= stage.steps
    raise ValueError("step lies beyond the last stage")


def train(
    model: LlamaForCausalLM,
    batches: Batches,
    stages: Sequence[Stage],
    checkpoint: Path,
    seed: int,
) -> None:
    """Train in place, from the checkpoint where there is one; a batch depends on seed and step alone."""
    rules = optimizers(model)
    peak_rates = [rule.param_groups[0]["lr"] for rule in rules]
    step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        step = saved["step"]
        model.load_state_dict(saved["model"])
        for rule, state in zip(rules, saved["optimizers"], strict=True):
            rule.load_state_dict(state)
    total = sum(stage.steps for stage in stages)
    began, first = time.monotonic(), step
    model.train()
    while step < total:
        stage, rate = stage_at(stages, step)
        rng = np.random.default_rng([seed, step])
        tokens, weights = batches.draw(rng, int(rng.choice(stage.lengths)))
        losses = token_losses(model, tokens)
        weights = weights[:, 1:]
        torch.autograd.backward((losses * weights).sum() / weights.sum())
        torch.nn.utils.clip_grad_norm_(rules[1].param_groups[0]["params"], 1.0)
        for rule, peak in zip(rules, peak_rates, strict=True):
            rule.param_groups[0]["lr"] = peak * rate * min(1.0, (step + 1) / WARMUP_STEPS)
            rule.step()
            rule.zero_grad()
        step += 1
        if step % 10 == 0:
            pace = (time.monotonic() - began) / (step - first)
            print(f"step {step}/{total}, {pace:.1f} s each: {summary(losses, weights)}", flush=True)
        if step % 50 == 0 or step == total:
            save_checkpoint(checkpoint, step, model, rules)


def token_losses(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Loss of each token but the first, computed in bfloat16 where that is safe."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")


def summary(losses: torch.Tensor, weights: torch.Tensor) -> str:
    """Mean loss of each kind of token in a batch."""
    kinds = {"text": TEXT_WEIGHT, "look-ups": ANSWER_WEIGHT, "repeats": REPEAT_WEIGHT}
    means = {kind: losses[weights == weight].mean().item() for kind, weight in kinds.items()}
    return ", ".join(f"{kind} {mean:.3f}" for kind, mean in means.items() if not math.isnan(mean))


def save_checkpoint(path: Path, step: int, model: LlamaForCausalLM, rules: Sequence[torch.optim.Optimizer]) -> None:
    state = {"step": step, "model": model.state_dict(), "optimizers": [rule.state_dict() for rule in rules]}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@torch.inference_mode()
def text_loss(model: LlamaForCausalLM, tokens: NDArray[np.int64], length: int) -> tuple[float, int]:
    """Mean loss in nats a token over windows of this length, and the number of tokens."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - length, length):
        window = torch.from_numpy(tokens[start : start + length + 1])
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
        total += F.cross_entropy(logits.float(), window[1:], reduction="sum").item()
        count += length
    return total / count, count


@torch.inference_mode()
def lookup_accuracy(
    model: LlamaForCausalLM, lists: LookupLists, length: int, count: int, seed: int
) -> tuple[int, int, int, int]:
    """Tokens right, tokens, whole values right and values, over ``count`` lists, greedy."""
    rng = np.random.default_rng([seed, length])
    right: list[NDArray[np.bool_]] = []
    for _ in range(count):
        drawn = lists.draw(rng, length)
        logits = model(input_ids=torch.from_numpy(drawn.tokens)[None], use_cache=False).logits[0]
        hits = logits[:-1].argmax(-1).numpy() == drawn.tokens[1:]
        right += [hits[start - 1 : end - 1] for start, end in drawn.answers]
    return (
        sum(int(hits.sum()) for hits in right),
        sum(map(len, right)),
        sum(bool(hits.all()) for hits in right),
        len(right),
    )


def evaluate(folder: Path, lists_per_length: int, seed: int) -> None:
    """Print the loss on held-out text and the look-up accuracy of a saved model."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {
        "held-out sources": join(tokenizer, held_out_text(held_out_names(HERE / "held_out.txt"))),
        "Python manual": join(tokenizer, manual_text()),
    }
    for name, tokens in texts.items():
        for length in (1024, 2048, CONTEXT):
            loss, count = text_loss(model, tokens, length)
            print(f"{name}, windows of {length}: {loss:.3f} nats a token over {count} tokens", flush=True)
    lists = LookupLists(tokenizer)
    for length in (1024, 2048, 3072, CONTEXT):
        right, tokens_asked, whole, values = lookup_accuracy(model, lists, length, lists_per_length, seed)
        print(
            f"look-ups at {length}: {right}/{tokens_asked} tokens ({right / tokens_asked:.2%}), "
            f"{whole}/{values} values ({whole / values:.2%})",
            flush=True,
        )


def save(model: LlamaForCausalLM, output: Path) -> None:
    """Save the weights in bfloat16, with the tokenizer and the names of the held-out files."""
    model.bfloat16().save_pretrained(output)
    for name in ("tokenizer.json", "tokenizer_config.json", "held_out.txt"):
        if (output / name).resolve() != (HERE / name).resolve():
            shutil.copyfile(HERE / name, output / name)


def main() -> None:
    arguments = argparse.ArgumentParser(description="Train or measure the small model in this folder.")
    arguments.add_argument("--output", type=Path, default=HERE, help="folder to save to or to evaluate")
    arguments.add_argument("--checkpoint", type=Path, default=Path("tiny-lm.checkpoint"))
    arguments.add_argument("--from-scratch", action="store_true", help="start from random weights")
    arguments.add_argument("--evaluate", action="store_true", help="measure the model, train nothing")
    arguments.add_argument("--lists", type=int, default=20, help="look-up lists of each length to evaluate")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.evaluate:
        evaluate(chosen.output, chosen.lists, chosen.seed)
        return
    torch.manual_seed(chosen.seed)
    if chosen.from_scratch:
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(HERE))
    else:
        model = LlamaForCausalLM.from_pretrained(HERE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    text = join(tokenizer, training_text(held_out_names(HERE / "held_out.txt")))
    stages = FROM_SCRATCH if chosen.from_scratch else LONG_CONTEXT
    train(model, Batches(tokenizer, text), stages, chosen.checkpoint, chosen.seed)
    save(model, chosen.output)


if __name__ == "__main__":
    main()
