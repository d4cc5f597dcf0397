"""Can the model still find what it has read? Look-ups in lists and a passkey in filler, by length and depth.

An answer is right if each of its tokens is the likeliest, given the right tokens before it.
Greedy generation would write it then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcomp.evaluate.fidelity import Sample, sample
from kvcomp.evaluate.text import LookupLists, Tokenizer, encode, start_ids

LEAST_LENGTH = 64  # tokens that hold a look-up or a passkey and what is asked
LEAST_KEYS = 64  # words of one token that a tokenizer must have for look-ups
DEPTHS = 5  # bins of a context, from its first token to its last
FILLER = "# The grass is green and the sky is blue.\n"


@dataclass(frozen=True)
class Quiz:
    """Questions on a context."""

    tokens: np.ndarray[Any, np.dtype[np.int64]]
    context: int
    """``tokens[:context]`` is what a cache holds before the first question."""
    answers: tuple[tuple[int, int], ...]
    """[start, end) of each answer in ``tokens``."""
    depths: tuple[int, ...]
    """For each answer the bin of the context that holds what is asked for."""


def lookup_quiz(lists: LookupLists, rng: np.random.Generator, length: int) -> Quiz:
    """Draw records and look-ups of some of them, ``length`` tokens in all.

    Raises ValueError if there are too few keys.
    """
    drawn = lists.draw(rng, length)
    depths = tuple(min(DEPTHS - 1, DEPTHS * begin // drawn.context) for begin, _ in drawn.records)
    return Quiz(drawn.tokens, drawn.context, drawn.answers, depths)


def quizzes(tokenizer: Tokenizer, rng: np.random.Generator, count: int, length: int) -> list[Quiz]:
    """Look-up lists of this many tokens; none if the tokenizer has too few words for them."""
    lists = LookupLists(tokenizer)
    try:
        return [lookup_quiz(lists, rng, length) for _ in range(count)] if lists.size >= LEAST_KEYS else []
    except ValueError:
        return []


def passkey_quiz(tokenizer: Tokenizer, lists: LookupLists, rng: np.random.Generator, length: int, depth: int) -> Quiz:
    """A record of a random key within filler, at a depth bin, asked for at the end; ``length`` tokens in all."""
    key, value = lists.key(rng), int(rng.integers(1000, 10000))
    record, question, whole, filler = encode(
        tokenizer,
        [f"### records\n{key} = {value}\n", f"### lookup\n{key} =", f"### lookup\n{key} = {value}", FILLER],
    )
    start = start_ids(tokenizer)
    room = length - len(start) - len(record) - len(whole)
    before = int(room * (depth + 0.5) / DEPTHS) // len(filler) * len(filler)
    filling = (filler * (room // len(filler) + 1))[:room]
    tokens = [*start, *filling[:before], *record, *filling[before:], *whole]
    answer = (length - len(whole) + len(question), length)
    return Quiz(np.asarray(tokens, np.int64), length - len(whole), (answer,), (depth,))


def quiz_sample(model: Any, quiz: Quiz) -> Sample:
    """The context as the prompt, the questions as the scored text."""
    return sample(model, torch.from_numpy(quiz.tokens)[None].to(model.device), quiz.context)


def answered(quiz: Quiz, log_probs: Tensor) -> list[bool]:
    """For each answer, whether all its tokens are the likeliest. log_probs: (tokens after the context, vocabulary)."""
    likeliest = log_probs.argmax(-1).cpu().numpy()
    offset = quiz.context + 1  # the prediction of a token stands one before it
    return [
        bool((likeliest[begin - offset : end - offset] == quiz.tokens[begin:end]).all()) for begin, end in quiz.answers
    ]


def lengths_up_to(limit: int) -> list[int]:
    """1K, 2K, 4K and so on, as far as the model's positions go."""
    return [1024 << i for i in range(24) if 1024 << i <= limit] or [limit]
