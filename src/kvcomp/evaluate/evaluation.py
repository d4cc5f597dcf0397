"""``kvcomp evaluate``: methods x measurements, piece by piece, so that it can stop and go on anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import torch

from kvcomp.errors import InvalidInput, KVCompError, LimitExceeded
from kvcomp.evaluate.fidelity import Sample, fill, measure, predict, sample
from kvcomp.evaluate.methods import Method
from kvcomp.evaluate.models import attends_to_all
from kvcomp.evaluate.retrieval import (
    DEPTHS,
    LEAST_KEYS,
    LEAST_LENGTH,
    Quiz,
    answered,
    lengths_up_to,
    lookup_quiz,
    passkey_quiz,
    quiz_sample,
)
from kvcomp.evaluate.sensitivity import Probed, errors_by_head, probe, sensitivity
from kvcomp.evaluate.text import LookupLists, Tokenizer, Tokens
from kvcomp.results import schema as results
from kvcomp.results.journal import Journal
from kvcomp.store import Memory

MODES = ("teacher_forced", "streaming")
FAILED = "failed"
FOREIGN = (  # what a baseline, which may be anybody's, can raise where it does not fit
    KVCompError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
)  # fmt: skip
LOST = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()  # a GPU, which computes nothing more


@dataclass(frozen=True)
class Plan:
    """How much is measured. Lengths are in tokens."""

    prompts: int = 8
    """Teacher-forced samples, each of ``prompt`` coded and ``scored`` scored tokens."""
    prompt: int = 2048
    scored: int = 256
    streams: int = 2
    """Streamed samples, ``streaming_prompt`` tokens at once and then ``streamed`` tokens."""
    streaming_prompt: int = 256
    streamed: int = 512
    lengths: tuple[int, ...] = ()
    """Of look-up lists and of passkeys' contexts."""
    lists: int = 2
    """Look-up lists of each length."""
    passkeys: int = 2
    """Passkeys of each length and depth."""
    details: bool = True
    """Whether to measure errors by head, and the sensitivity to each layer."""
    seed: int = 0
    """Of the look-ups."""

    @classmethod
    def for_model(cls, limit: int, **chosen: Any) -> Plan:
        """The plan for a model of so many positions, options that are None chosen. Raises InvalidInput if none fits."""
        options = {name: value for name, value in chosen.items() if value is not None}
        plan = cls(**options)
        if "prompt" not in options and plan.prompt + plan.scored > limit:
            options["prompt"] = limit - plan.scored
        if "streamed" not in options:
            options["streamed"] = min(plan.streamed, limit - plan.streaming_prompt)
        if "lengths" not in options:
            options["lengths"] = tuple(lengths_up_to(min(limit, 4 * plan.prompt)))
        plan = cls(**options)
        longest = max(plan.prompt + plan.scored, plan.streaming_prompt + plan.streamed, *plan.lengths)
        if min(plan.lengths, default=LEAST_LENGTH) < LEAST_LENGTH:
            raise InvalidInput(f"look-ups need contexts of at least {LEAST_LENGTH} tokens, not {min(plan.lengths)}")
        if plan.prompt < 1 or longest > limit:
            raise InvalidInput(
                f"the model has {limit} positions and {longest} tokens are asked for: "
                "lower --prompt-tokens, --scored-tokens or --lengths"
            )
        return plan


class TaskRunner(Protocol):
    """Benchmarks by name: ``tasks.Tasks``, which needs a package that this module does not."""

    names: list[str]

    def run(self, name: str, model: Any, tokenizer: Any, method: Method, limit: int | None, seed: int) -> Any: ...


@dataclass(frozen=True)
class Piece:
    """A sample to take, and what to measure on it."""

    key: str
    cost: float
    """For the progress, in any unit."""
    make: Callable[[], Any]
    """A ``Sample``, or what else is measured on."""
    measure: Callable[[Any, Method], Any]


@dataclass
class Evaluation:
    """Methods on a model's text. Raises InvalidInput if the text is too short."""

    model: Any
    tokenizer: Tokenizer
    ids: Tokens
    """The text, int64."""
    methods: Sequence[Method]
    plan: Plan
    journal: Journal
    """What has been measured so far."""

    def __post_init__(self) -> None:
        forced, streamed = self.plan.prompt + self.plan.scored, self.plan.streaming_prompt + self.plan.streamed
        need = max(forced, streamed) if self.plan.streams else forced
        if self.ids.size < need:
            raise InvalidInput(
                f"the text has {self.ids.size} tokens and {need} are needed: "
                "give a longer --text, or lower --prompt-tokens and --scored-tokens"
            )
        lists = LookupLists(self.tokenizer) if self.plan.lengths else None
        self.lists = lists if lists is not None and lists.size >= LEAST_KEYS else None
        self.pieces = list(self._all_pieces())

    def run(self, advance: Callable[[str, float], None]) -> None:
        """Measure what the journal lacks; a KeyboardInterrupt leaves there what is done.

        ``advance`` is told what is done, and its cost.
        """
        for piece in self.pieces:
            made = cache(piece.make)  # once for all methods, and only if one of them is missing
            for method in self.methods:
                self.journal.piece(f"{method.name}/{piece.key}", partial(_measured, piece, made, method))
                advance(f"{method.name}: {piece.key}", piece.cost)

    def run_tasks(self, tasks: TaskRunner, limit: int | None) -> None:
        """Run the tasks that the journal lacks, method after method."""
        for method in self.methods:
            for name in tasks.names:
                run = partial(tasks.run, name, self.model, self.tokenizer, method, limit, self.plan.seed)
                self.journal.piece(f"{method.name}/tasks/{name}", run)

    @property
    def cost(self) -> float:
        return len(self.methods) * sum(piece.cost for piece in self.pieces)

    def _all_pieces(self) -> Iterator[Piece]:
        """All there is to measure, in order; nothing is computed before a piece's sample is made."""
        plan = self.plan
        for index, at in enumerate(self._begins(plan.prompts, plan.prompt + plan.scored)):
            make = self._sampler(at, plan.prompt, plan.scored)
            yield Piece(f"teacher_forced/{index}", 1.0, make, self._fidelity(streaming=False))
            if index == 0 and plan.details and attends_to_all(self.model.config):
                yield Piece("error", 0.5, make, lambda each, method: errors_by_head(self.model, each, method))
                yield Piece("suffering", 4.0, self._prober(make), self._suffering)
        for index, at in enumerate(self._begins(plan.streams, plan.streaming_prompt + plan.streamed)):
            make = self._sampler(at, plan.streaming_prompt, plan.streamed)
            yield Piece(f"streaming/{index}", 20.0, make, self._fidelity(streaming=True))
        for length in plan.lengths if self.lists else ():
            for index in range(plan.lists):
                yield from self._quiz(f"key-value/{length}/{index}", length / 1024, self._lookups(length, index))
            for depth in range(DEPTHS):
                for index in range(plan.passkeys):
                    make_quiz = self._passkey(length, depth, index)
                    yield from self._quiz(f"passkey/{length}/{depth}.{index}", length / 2048, make_quiz)

    def _begins(self, count: int, length: int) -> list[int]:
        found: list[int] = np.linspace(0, self.ids.size - length, count).astype(int).tolist()
        return found

    def _sampler(self, at: int, prompt: int, scored: int) -> Callable[[], Sample]:
        def make() -> Sample:
            ids = torch.from_numpy(self.ids[at : at + prompt + scored])[None].to(self.model.device)
            return sample(self.model, ids, prompt)

        return make

    def _prober(self, make: Callable[[], Sample]) -> Callable[[], Probed]:
        return lambda: probe(self.model, make())

    def _suffering(self, probed: Probed, method: Method) -> Any:
        return sensitivity(self.model, probed, method)

    def _fidelity(self, streaming: bool) -> Callable[[Sample, Method], Any]:
        def run(each: Sample, method: Method) -> Any:
            compared, memory = measure(self.model, each, method, streaming)
            return asdict(compared) | {"memory": asdict(memory)}

        return run

    def _lookups(self, length: int, index: int) -> Callable[[], Quiz | None]:
        def draw() -> Quiz | None:
            assert self.lists is not None
            rng = np.random.default_rng([self.plan.seed, length, index])
            try:
                return lookup_quiz(self.lists, rng, length)
            except ValueError:  # the tokenizer has too few words for a list so long
                return None

        return draw

    def _passkey(self, length: int, depth: int, index: int) -> Callable[[], Quiz | None]:
        def draw() -> Quiz | None:
            assert self.lists is not None
            rng = np.random.default_rng([self.plan.seed, length, depth, index])
            return passkey_quiz(self.tokenizer, self.lists, rng, length, depth)

        return draw

    def _quiz(self, key: str, cost: float, draw: Callable[[], Quiz | None]) -> Iterator[Piece]:
        quiz = draw()
        if quiz is None:
            return

        def answer(each: Sample, method: Method) -> Any:
            log_probs = predict(self.model, each.text, fill(self.model, each, method), method)
            return [[depth, right] for depth, right in zip(quiz.depths, answered(quiz, log_probs), strict=True)]

        yield Piece(key, cost, lambda: quiz_sample(self.model, quiz), answer)

    def collected(self, tasks: Sequence[str] = ()) -> tuple[list[dict[str, Any]], bool]:
        """The methods' results as a results file has them, and whether something is missing. tasks: those asked for."""
        keys = [*(piece.key for piece in self.pieces), *(f"tasks/{name}" for name in tasks)]
        whole = True
        found = []
        for method in self.methods:
            one: dict[str, Any] = {"name": method.name, "settings": method.settings()}
            have = {key: self.journal[f"{method.name}/{key}"] for key in keys if f"{method.name}/{key}" in self.journal}
            whole = whole and len(have) == len(keys)
            failed = {key: value[FAILED] for key, value in have.items() if isinstance(value, dict) and FAILED in value}
            if failed:
                one[FAILED] = failed
                have = {key: value for key, value in have.items() if key not in failed}
            one["memory"], one["fidelity"] = {}, {}
            for mode in MODES:
                if rows := [value for key, value in have.items() if key.startswith(f"{mode}/")]:
                    one["memory"][mode], one["fidelity"][mode] = self._summary(mode, rows)
            one |= {name: have[name] for name in ("error", "suffering") if name in have}
            one["retrieval"] = _cells(have)
            if tasks:
                one["tasks"] = {name: have[f"tasks/{name}"] for name in tasks if f"tasks/{name}" in have}
            found.append(one)
        return found, not whole

    def _summary(self, mode: str, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        memory = sum((Memory(**row["memory"]) for row in rows), Memory())
        loss, exact = (float(np.mean([row[name] for row in rows])) for name in ("loss", "loss_uncompressed"))
        plan = self.plan
        streaming = mode == "streaming"
        return results.size(memory), {
            "kl": results.figure([row["kl"] for row in rows]),
            "kl_99_9": float(np.quantile(np.concatenate([row["kls"] for row in rows]), 0.999)),
            "top1": results.figure([row["top1"] for row in rows]),
            "loss_difference": results.figure([row["loss"] - row["loss_uncompressed"] for row in rows]),
            "perplexity": float(np.exp(loss)),
            "perplexity_uncompressed": float(np.exp(exact)),
            "prompt_tokens": plan.streaming_prompt if streaming else plan.prompt,
            "scored_tokens": plan.streamed if streaming else plan.scored,
            "samples": len(rows),
        }


def _measured(piece: Piece, made: Callable[[], Sample], method: Method) -> Any:
    """What a method gives on a piece, or why it fails: the other methods go on."""
    try:
        return piece.measure(made(), method)
    except torch.OutOfMemoryError as error:
        raise LimitExceeded(
            f"{method.name}: {error}; lower --prompt-tokens or --lengths, and go on with --resume"
        ) from None
    except LOST:
        raise
    except FOREIGN as error:
        return {FAILED: f"{type(error).__name__}: {error}"}


def _cells(have: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers by task, length and depth."""
    cells: dict[tuple[str, int, int], list[bool]] = {}
    for key, value in have.items():
        task, _, rest = key.partition("/")
        if task in ("key-value", "passkey"):
            for depth, right in value:
                cells.setdefault((task, int(rest.split("/")[0]), depth), []).append(right)
    return [
        {"task": task, "tokens": tokens, "depth": (depth + 0.5) / DEPTHS, "right": sum(hits), "asked": len(hits)}
        for (task, tokens, depth), hits in sorted(cells.items())
    ]
