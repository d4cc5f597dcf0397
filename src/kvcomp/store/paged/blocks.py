"""Blocks: which blocks of an engine's cache hold what, and what one step of the engine does to them.

All layers of a model do the same to their pages, so a step is planned once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcomp.errors import InvalidInput
from kvcomp.spec import PAGE_TOKENS, CodecSpec

Ints = npt.NDArray[np.int64]


class Seals(NamedTuple):
    """Blocks to be encoded."""

    blocks: Ints
    """Their numbers."""
    sinks: Ints
    """How many of each block's first tokens stay raw."""


@dataclass(frozen=True)
class Prefill:
    """A sequence that gets several tokens in a step."""

    begin: int
    """Its first token among those of the step."""
    end: int
    """Behind its last one."""
    tokens: int
    """Of the sequence, these included."""
    blocks: Ints
    """That hold it."""


@dataclass(frozen=True)
class Step:
    """What a step does, in this order: write, attend, seal."""

    fresh: Ints
    """Blocks that begin anew: what they held is dead."""
    block: Ints
    """(tokens,) the block of each token of the step."""
    offset: Ints
    """(tokens,) its place there."""
    position: Ints
    """(tokens,) its place in its sequence."""
    decoding: Ints
    """(rows,) the tokens that are the only one of their sequence in this step."""
    table: Ints
    """(rows, blocks) the blocks of their sequences; 0 behind the last."""
    valid: npt.NDArray[np.int32]
    """(rows, blocks) tokens of each block that count."""
    count: Ints
    """(rows,) blocks of each sequence."""
    prefills: list[Prefill]
    """The other sequences."""
    seals: Seals
    """What is encoded at the end of the step."""


class Blocks:
    """The state of every block: free, raw and so far filled, or sealed.

    Parameters
    ----------
    blocks
        How many the engine has.
    spec
        Its ``sinks`` stay raw, the ``window`` keeps the newest blocks raw. Sinks of a block or more keep whole blocks.
    """

    def __init__(self, blocks: int, spec: CodecSpec) -> None:
        self.raw = np.zeros(blocks, np.bool_)
        self.filled = np.zeros(blocks, np.int64)
        """Tokens written; 0 of a free block."""
        self._leads = np.zeros(blocks, np.bool_)  # whether a sequence begins with it
        self._sinks = spec.sinks if spec.sinks < PAGE_TOKENS else 0  # of a leading block
        self._first, self._window = 0 if self._sinks else -(-spec.sinks // PAGE_TOKENS), spec.window

    def step(self, table: Ints, lengths: Ints, begins: Ints) -> Step:
        """Plan a step and take the blocks' new states.

        Parameters
        ----------
        table
            (rows, blocks) block numbers of each sequence.
        lengths
            (rows,) tokens of each sequence, the new ones included.
        begins
            (rows + 1,) where each row's new tokens begin in the step, and the end of the last.

        Returns
        -------
        Step

        Raises
        ------
        InvalidInput
            If a row goes on in a block at another place than where it ended: the engine does what this cache does not
            know, and no token may be written wrongly.
        """
        new = np.diff(begins)
        row = np.repeat(np.arange(new.size), new)
        position = np.arange(row.size) + (lengths - new - begins[:-1])[row]
        block, offset = table[row, position // PAGE_TOKENS], position % PAGE_TOKENS
        fresh = block[offset == 0]
        self._check(block, offset, fresh)
        self.raw[fresh], self.filled[fresh], self._leads[fresh] = True, 0, position[offset == 0] == 0
        np.maximum.at(self.filled, block, offset + 1)
        decoding = np.flatnonzero(new == 1)
        count = -(-lengths[decoding] // PAGE_TOKENS)
        column = np.arange(count.max(initial=0))
        valid = np.clip(lengths[decoding, None] - column * PAGE_TOKENS, 0, PAGE_TOKENS)
        return Step(
            fresh=fresh,
            block=block,
            offset=offset,
            position=position,
            decoding=begins[decoding],
            table=np.where(valid > 0, table[decoding, : column.size], 0),
            valid=valid.astype(np.int32),
            count=count,
            prefills=[
                Prefill(int(begins[i]), int(begins[i + 1]), int(n), table[i, : -(-n // PAGE_TOKENS)])
                for i, n in enumerate(lengths.tolist())
                if new[i] > 1
            ],
            seals=self._sealed(self._leaving(table, lengths)),
        )

    def finished(self, blocks: Ints, shared: bool) -> tuple[Ints, Seals]:
        """What becomes of the blocks of a sequence that is over: (those that are free now, those to seal).

        shared: whether a later sequence may begin with its whole blocks.
        """
        blocks = np.unique(blocks[self.filled[blocks] > 0])
        whole = self.filled[blocks] == PAGE_TOKENS
        dead = blocks[~whole] if shared else blocks
        self.drop(dead)
        return dead, self._sealed(blocks[whole & self.raw[blocks]] if shared else blocks[:0])

    def drop(self, blocks: Ints) -> None:
        """Let blocks be free."""
        self.filled[blocks], self.raw[blocks] = 0, False

    def _check(self, block: Ints, offset: Ints, fresh: Ints) -> None:
        begins = np.flatnonzero((offset > 0) & (np.diff(block, prepend=-1) != 0))
        going_on = block[begins]
        if (
            np.unique(fresh).size != fresh.size
            or not (self.raw[going_on] & (self.filled[going_on] == offset[begins]) & ~np.isin(going_on, fresh)).all()
        ):
            raise InvalidInput(
                "the engine writes into a block at another place than where it ended: "
                "turn speculative decoding, KV transfer and what else rewrites its cache off"
            )

    def _leaving(self, table: Ints, lengths: Ints) -> Ints:
        """The raw blocks that are out of their sequence's window and not all sinks."""
        column = np.arange(table.shape[1])
        out = (column >= self._first) & (column < ((lengths - self._window) // PAGE_TOKENS)[:, None])
        blocks = np.unique(table[out])
        return blocks[self.raw[blocks]]

    def _sealed(self, blocks: Ints) -> Seals:
        self.raw[blocks] = False
        return Seals(blocks, np.where(self._leads[blocks], self._sinks, 0))
