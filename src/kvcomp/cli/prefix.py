"""What a prefix store does for one ``kvcomp generate``: what it loads, stores and saves."""

from __future__ import annotations

import time
from typing import Any

from kvcomp.spec import CodecSpec


class Prefixes:
    """A prefix store around one generation, and its times. Attributes in seconds, ``loading`` with all that is stored
    before the prompt ends; ``without`` is None if nothing was loaded. how: the cache's calibration and backend.
    """

    def __init__(self, url: str, ids: Any, model: Any, spec: CodecSpec, how: dict[str, Any]) -> None:
        from kvcomp.prefix import PrefixStore

        self.store, self.ids, self.model, self.spec = PrefixStore(url), ids, model, spec
        self.how = how
        self.stored = 0
        self.without: float | None = None
        self._first_token(ids[:, :2])  # the first forward pass of a process takes longer
        begin = time.perf_counter()
        self.cache = self.store.load(ids, model, spec, **how)
        self.loaded = self.cache.get_seq_length()
        self.store.prefill(ids, self.cache, model)
        self.loading = time.perf_counter() - begin

    def keep(self, new: list[int]) -> None:
        """Store the prompt and what followed it; then compute the prompt from its beginning, for the time
        that takes.
        """
        with self.store:
            self.stored = self.store.save([*self.ids[0].tolist(), *new], self.cache, self.model)
        if self.loaded:
            self.without = self._first_token(self.ids)

    def _first_token(self, ids: Any) -> float:
        """Seconds from nothing to the first token after a prompt."""
        from kvcomp.evaluate import generation
        from kvcomp.integrations.transformers import KVCompCache

        cache = KVCompCache(self.model.config, self.spec, **self.how)
        return generation.generate(self.model, ids, cache, 1).timing.first

    def rows(self, first: float) -> list[tuple[str, str]]:
        """first: seconds to the first token once the cache was loaded."""
        found = [("prompt tokens from the prefix store", str(self.loaded)), ("tokens in it now", str(self.stored))]
        found.append(("first token with it, loading included, s", f"{self.loading + first:.3f}"))
        return found if self.without is None else [*found, ("first token without it, s", f"{self.without:.3f}")]

    def figures(self, first: float) -> dict[str, Any]:
        return {
            "loaded_tokens": self.loaded,
            "stored_tokens": self.stored,
            "loading_seconds": self.loading,
            "first_token_seconds": self.loading + first,
            "first_token_seconds_without": self.without,
        }
