"""A budget of bytes in place of a quality level: each layer takes the level at which bytes save most KL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from kvcomp.calibration.file import Calibration
from kvcomp.errors import InvalidInput, LimitExceeded
from kvcomp.spec import PAGE_TOKENS, CodecSpec

UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
MIB, GIB = 1 << 20, 1 << 30
MOST_BYTES = 1 << 60


class Plan(NamedTuple):
    """What a budget buys."""

    spec: CodecSpec
    levels: dict[int, str]
    """The level of each compressed layer."""
    nbytes: int
    """Bytes to expect of the whole cache, the calibration's among them."""
    kl: float
    """Mean KL to expect, nats a token, on text such as that of the calibration; without what sliding windows add."""

    def __str__(self) -> str:
        counts = {level: list(self.levels.values()).count(level) for level in dict.fromkeys(self.levels.values())}
        layers = ", ".join(f"{count} {level}" for level, count in sorted(counts.items()))
        return f"layers: {layers}; {readable(self.nbytes)} and a KL of {self.kl:.1e} nats a token to expect"


def parse_bytes(text: str | int) -> int:
    """Bytes of ``2GiB``, ``500MB`` or a plain number. Raises InvalidInput for what is no size."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    size = 0.0 if match is None else float(match[1]) * (1024 if match[3] else 1000) ** UNITS[match[2].lower()]
    if not 1 <= size <= MOST_BYTES:
        raise InvalidInput(f"a budget must be a size such as 2GiB or 500MB, not {str(text)[:64]!r}")
    return int(size)


def readable(nbytes: float) -> str:
    """Bytes as people read them."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.2f} MiB"


def within(
    calibration: Calibration,
    budget: int,
    tokens: int,
    itemsize: int,
    other: int = 0,
    windows: str | None = None,
) -> Plan:
    """The levels of layers with which a cache of so many tokens fits.

    Every layer begins at its coarsest level. Steps to finer ones follow, those that save most KL for a byte first, as
    long as there are bytes.

    Parameters
    ----------
    calibration
        With prices, which ``kvcomp calibrate`` measures.
    budget
        Bytes of the cache, with the calibration's.
    tokens
        Of the longest sequence.
    itemsize
        Bytes of a value that is not compressed.
    other
        Bytes of the other layers.
    windows
        The level of sliding windows; the finest if None.

    Returns
    -------
    Plan
        The spec, and what to expect.

    Raises
    ------
    InvalidInput
        If the calibration has no prices.
    LimitExceeded
        If the coarsest levels do not fit.
    """
    prices = {index: _prices(calibration, index) for index in calibration.layers}
    spec = calibration.spec(calibration.levels[0])
    sealed, raw = held(spec, tokens)
    bits: dict[int, dict[str, float]] = {}
    fixed: float = other
    for index, (transform, _) in calibration.layers.items():
        values = 2 * transform.heads * transform.channels
        fixed += values * raw * itemsize
        sides = {level: 8 * (calibration.nbytes(level, [index]) + transform.nbytes) for level in prices[index]}
        bits[index] = {level: sides[level] + sealed * values * one["bits"] for level, one in prices[index].items()}
    chosen = {index: min(of, key=of.__getitem__) for index, of in bits.items()}
    spent = fixed + sum(bits[index][level] for index, level in chosen.items()) / 8
    if spent > budget:
        raise LimitExceeded(
            f"{tokens:,} tokens need {readable(spent)} at the coarsest levels, and the budget is {readable(budget)}: "
            "give more, or fewer tokens"
        )
    while steps := _finer(chosen, bits, prices, 8 * (budget - spent)):
        _, index, level = max(steps)
        spent += (bits[index][level] - bits[index][chosen[index]]) / 8
        chosen[index] = level
    kl = sum(prices[index][level]["kl"] for index, level in chosen.items())
    return Plan(calibration.mixed(chosen, windows=windows), chosen, int(spent), kl)


def held(spec: CodecSpec, tokens: int) -> tuple[int, int]:
    """Of so many tokens those in pages, and those that are raw at most."""
    sealed = max(0, tokens - spec.window - spec.sinks) // PAGE_TOKENS * PAGE_TOKENS
    return sealed, spec.sinks + min(tokens, spec.window + PAGE_TOKENS)


def _finer(
    chosen: Mapping[int, str],
    bits: Mapping[int, Mapping[str, float]],
    prices: Mapping[int, Mapping[str, Mapping[str, float]]],
    left: float,
) -> list[tuple[float, int, str]]:
    """Steps to finer levels that so many bits allow: KL saved for a bit, layer, level."""
    found = []
    for index, now in chosen.items():
        for level, size in bits[index].items():
            more, saved = size - bits[index][now], prices[index][now]["kl"] - prices[index][level]["kl"]
            if saved > 0 and more <= left:
                found.append((saved / max(more, 1.0), index, level))
    return found


def _prices(calibration: Calibration, index: int) -> dict[str, dict[str, float]]:
    """Bits a value and KL of a layer at each level. Raises InvalidInput if they have not been measured."""
    found = {level: about.get("layers", {}).get(str(index)) for level, about in calibration.about.levels.items()}
    if None in found.values():
        raise InvalidInput("this calibration has no prices of layers, which a budget needs: make it anew")
    return found
