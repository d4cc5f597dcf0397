"""The newest tokens of a batch, raw, in the memory of a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Tail:
    """K and V of the last tokens, the same positions for all rows.

    ``k`` and ``v`` are (rows, KV heads, room, head_dim), ``base`` is the position of the first token. ``held``, int64
    (1,) on the device, counts the tokens. One new token is written where it says, so that this is the same work every
    time.
    """

    def __init__(self, k: Tensor, v: Tensor, base: int = 0) -> None:
        self.k, self.v, self.base = k, v, base
        self.held = torch.zeros(1, dtype=torch.int64, device=k.device)

    @property
    def room(self) -> int:
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def append(self, k: Tensor, v: Tensor, held: int) -> None:
        """Add tokens behind the ``held`` that there are; there is room for them."""
        new = k.shape[2]
        if new == 1:
            self.k.index_copy_(2, self.held, k.detach())
            self.v.index_copy_(2, self.held, v.detach())
            self.held.add_(1)
        else:
            self.k[:, :, held : held + new] = k.detach()
            self.v[:, :, held : held + new] = v.detach()
            self.held.fill_(held + new)

    @torch.inference_mode(False)  # the buffers outlive the mode they were filled in
    def move(self, base: int, kept: int, room: int) -> None:
        """Let the tail begin at a later position, with this much room; the buffers stay if the room does."""
        first = base - self.base
        held = [x[:, :, first : first + kept] for x in (self.k, self.v)]
        if room == self.room:
            for x, part in zip((self.k, self.v), held, strict=True):
                x[:, :, :kept] = part.clone() if kept > first else part
        else:
            shape = *self.k.shape[:2], room, self.k.shape[3]
            larger = self.k.new_empty(shape), self.v.new_empty(shape)
            for x, part in zip(larger, held, strict=True):
                x[:, :, :kept] = part
            self.k, self.v = larger
        self.base = base
        self.held.fill_(kept)

    @classmethod
    def joined(cls, tails: Sequence[tuple[Tail, int]], tokens: int, base: int, room: int) -> Tail:
        """One tail of several, each given with its tokens, that ends at position ``tokens``; 0 where a row has none."""
        first, _ = tails[0]
        recent = tokens - base
        room = max(room, recent)
        rows = sum(tail.k.shape[0] for tail, _ in tails)
        shape = rows, first.k.shape[1], room, first.k.shape[3]
        made = cls(first.k.new_zeros(shape), first.k.new_zeros(shape), base)
        at = 0
        for tail, held in tails:
            kept, last = min(recent, held), at + tail.k.shape[0]
            made.k[at:last, :, recent - kept : recent] = tail.k[:, :, held - kept : held]
            made.v[at:last, :, recent - kept : recent] = tail.v[:, :, held - kept : held]
            at = last
        return made

    def select(self, index: Tensor) -> Tail:
        """The tails of these rows, int64 on the device, which may repeat."""
        chosen = Tail(self.k.index_select(0, index), self.v.index_select(0, index), self.base)
        chosen.held.copy_(self.held)
        return chosen
