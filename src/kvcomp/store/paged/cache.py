"""PagedCache: all layers of a model over one engine's blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from kvcomp.store.paged.arena import Room
from kvcomp.store.paged.blocks import Blocks, Ints, Step
from kvcomp.store.paged.layer import PagedLayer
from kvcomp.store.paged.owners import Owners


@dataclass(frozen=True)
class PagedMemory:
    """Where the bytes of an engine's cache are."""

    room: int
    """What the engine allocated."""
    used: int
    """Pages in it."""
    outside: int
    """Pages that found no room in it."""
    tokens: int
    """Tokens in these pages, those of sequences that are over included."""


class PagedCache:
    """The layers of a model and the sequences that an engine runs.

    Parameters
    ----------
    blocks
        Their state.
    room
        Where their pages lie.
    layers
        By the engine's name.
    shared
        Whether the engine lets a sequence begin with the blocks of one that is over (prefix caching).
    """

    def __init__(self, blocks: Blocks, room: Room, layers: Mapping[str, PagedLayer], shared: bool) -> None:
        self.layers = dict(layers)
        self._blocks, self._room, self._shared, self._owners = blocks, room, shared, Owners()

    def begin(self, table: Ints, lengths: Ints, begins: Ints) -> Step:
        """Plan a step that every layer then takes; ``Blocks.step``."""
        return self._blocks.step(table, lengths, begins)

    def hold(self, sequence: str, blocks: Iterable[int]) -> None:
        """Note more blocks of a sequence."""
        self._owners.hold(sequence, blocks)

    def end(self, sequence: str) -> None:
        """Give back what nobody needs once a sequence is over or preempted, and seal what a later one may need."""
        dead, seals = self._blocks.finished(self._owners.release(sequence), self._shared)
        for layer in self.layers.values():
            layer.free(dead)
            layer.seal(seals)

    def drop(self, blocks: Iterable[int]) -> None:
        """Give back the pages of blocks that the engine takes out of use."""
        dead = np.fromiter(blocks, np.int64)
        self._blocks.drop(dead)
        for layer in self.layers.values():
            layer.free(dead)

    def memory(self) -> PagedMemory:
        """Bytes of all layers."""
        layers = self.layers.values()
        return PagedMemory(
            room=self._room.size,
            used=self._room.used,
            outside=sum(layer.outside for layer in layers),
            tokens=int(self._blocks.filled.sum()),
        )
