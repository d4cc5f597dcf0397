"""Rows that join a batch and leave it in mid-generation, each beside a store of its own that holds nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

HEADS, CHANNELS, GROUP = 2, 64, 2


@dataclass
class Batch:
    """make: an empty store. join: of stores and a number of positions. attend: of a store, queries and a scaling.
    pages: of a store, for each row their bytes."""

    make: Callable[[], Any]
    join: Callable[[list[Any], int], Any]
    attend: Callable[[Any, Tensor, float], Tensor]
    pages: Callable[[Any], list[list[bytes]]]
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: Any = None
    alone: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(self.device, torch.bfloat16)

    def enter(self, lengths: list[int]) -> None:
        """Rows with prompts of these lengths join, padded to one batch on the left."""
        new, longest = self.make(), max(lengths)
        k, v = (self.values(len(lengths), HEADS, longest, CHANNELS) for _ in "KV")
        new.append(k, v)
        new.set_starts([longest - length for length in lengths])
        new.seal()
        for row, length in enumerate(lengths):
            self.alone.append(self.make())
            self.alone[-1].append(k[row : row + 1, :, longest - length :], v[row : row + 1, :, longest - length :])
            self.alone[-1].seal()
        before = [] if self.store is None else [self.store]
        tokens = max(store.tokens for store in self.alone)
        self.store = self.join([*before, new], tokens)
        assert self.store.tokens == tokens

    def leave(self, row: int) -> None:
        del self.alone[row]
        self.store.select(torch.tensor([other for other in range(self.store.batch) if other != row]))

    def step(self, tokens: int) -> None:
        """A few tokens more for every row."""
        k, v = (self.values(len(self.alone), HEADS, tokens, CHANNELS) for _ in "KV")
        self.store.append(k, v)
        self.store.seal()
        for row, store in enumerate(self.alone):
            store.append(k[row : row + 1], v[row : row + 1])
            store.seal()

    def check(self, tolerance: float) -> None:
        """The same pages, bit by bit, and the same attention as each row alone."""
        q = self.values(len(self.alone), HEADS * GROUP, 1, CHANNELS).float()
        out = self.attend(self.store, q, 0.125)
        together = self.pages(self.store)
        k, v = self.store.dense()
        for row, store in enumerate(self.alone):
            (apart,) = self.pages(store)
            assert together[row] == apart
            start = int(self.store.starts[row])
            assert self.store.tokens - start == store.tokens
            assert torch.equal(k[row, :, start:], store.dense()[0][0])
            assert torch.equal(v[row, :, start:], store.dense()[1][0])
            expected = self.attend(store, q[row : row + 1], 0.125)
            assert (out[row] - expected[0]).abs().max() <= tolerance * expected.abs().max()

    def live(self, tolerance: float, rounds: int = 12) -> None:
        """A random life."""
        choose = np.random.default_rng(self.seed)
        self.enter([int(choose.integers(1, 300))])
        for _ in range(rounds):
            if len(self.alone) < 4 and choose.random() < 0.5:
                self.enter([int(length) for length in choose.integers(1, 300, choose.integers(1, 3))])
            elif len(self.alone) > 1 and choose.random() < 0.4:
                self.leave(int(choose.integers(len(self.alone))))
            for _ in range(int(choose.integers(1, 4))):
                self.step(int(choose.choice([1, 1, 5, 70])))
            self.check(tolerance)
