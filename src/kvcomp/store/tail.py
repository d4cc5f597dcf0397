"""How much room the raw tail has, on any device."""

from __future__ import annotations

from kvcomp.spec import PAGE_TOKENS, CodecSpec

TILE_PAGES = 16  # pages decompressed at a time where queries are many


def steady_room(spec: CodecSpec, batch: int, compressed: bool) -> int:
    """Tokens the tail holds between two seals: the window, a page, and what rows that seal at other times need."""
    ragged = PAGE_TOKENS - 1 if batch > 1 else 0
    page = max(PAGE_TOKENS, spec.window // 4)  # a wide window is not moved at every page
    return spec.window + page + ragged + (0 if compressed else spec.sinks)


def grown_room(kept: int, new: int, steady: int, room: int = 0) -> int:
    """Room for ``new`` tokens behind ``kept`` ones.

    ``room`` is what a GPU has already and does not give back: a recorded step needs a tail that stays where it is.
    """
    need = kept + new
    if need <= steady:
        return max(min(2 * need, steady), min(room, steady))
    return need * 5 // 4 if kept else need
