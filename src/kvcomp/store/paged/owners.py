"""Owners: which sequence holds which blocks, so that what nobody holds can be given back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from kvcomp.store.paged.blocks import Ints


class Owners:
    """Blocks by the name of the sequence that holds them; several may hold one."""

    def __init__(self) -> None:
        self._blocks: dict[str, list[int]] = {}
        self._holders: Counter[int] = Counter()

    def hold(self, owner: str, blocks: Iterable[int]) -> None:
        """Let a sequence hold these blocks besides those it has."""
        more = list(blocks)
        self._blocks.setdefault(owner, []).extend(more)
        self._holders.update(more)

    def release(self, owner: str) -> Ints:
        """Forget a sequence, and say which blocks nobody holds now; none for one that is not known."""
        blocks = self._blocks.pop(owner, [])
        self._holders.subtract(blocks)
        free = [block for block in blocks if not self._holders[block]]
        for block in free:
            self._holders.pop(block, None)
        return np.array(free, np.int64)
