"""The cache of a layer with a sliding window, compressed."""

from __future__ import annotations

from torch import Tensor

from kvcomp.errors import InvalidInput
from kvcomp.integrations.transformers.layer import CompressedLayer
from kvcomp.integrations.transformers.session import Session
from kvcomp.spec import CodecSpec
from kvcomp.store import KVStore


class SlidingLayer(CompressedLayer):
    """A compressed layer whose tokens see a window of the last ones, with the interface of transformers' own.

    What the window has left is dropped page by page, and not compressed where a prompt is longer.
    """

    is_sliding = True
    store: KVStore

    def __init__(self, spec: CodecSpec, backend: str, session: Session, sliding_window: int) -> None:
        self.sliding_window = sliding_window
        super().__init__(spec, backend, session)

    def reset(self) -> None:
        super().reset()
        self.record_past = False
        self.store = KVStore(self.spec, self.backend, sliding_window=self.sliding_window)

    def activate_past_recording(self) -> None:
        """From now on and until a ``reset``, tokens that the window has left are dropped by ``crop`` alone."""
        self.record_past = True

    def seen(self, new: int) -> int:
        return min(self.store.tokens - new, self.sliding_window - 1) + new

    def holds(self, seen: int) -> bool:
        rows = self.store.rows
        return not ((rows.dropped > 0) & (rows.begins > self.store.tokens - seen)).any()

    def dense(self, seen: int) -> tuple[Tensor, Tensor]:
        return self.store.dense(self.store.tokens - seen)

    def seal(self) -> None:
        self.store.seal(drops=not self.record_past)
        self.unsealed = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        before = min(self.store.tokens, self.sliding_window - 1)
        return before + query_length, self.store.tokens - before

    def get_max_length(self) -> int:
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.store.drop()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise InvalidInput if ``crop`` would: what the window then sees was dropped."""
        if self.store.batch:
            self.store.check_crop(self.kept(tokens_to_remove))

    def roll_back(self, tokens: int) -> None:
        try:
            super().roll_back(tokens)
        except InvalidInput:
            self.session.lost = True
