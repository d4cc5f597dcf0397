"""What quality is measured in: mean KL on each kind of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcomp.fit.curves import UNSEEN_KL
from kvcomp.fit.windows import TextKind


@dataclass(frozen=True)
class Quality:
    """Mean KL in nats a token on text that goes on, on text that repeats, and on sources where there are some."""

    text: float
    repeated: float
    sources: float | None = None

    @property
    def mean(self) -> float:
        """On the text that is fitted to."""
        return (self.text + self.repeated) / 2

    def over(self, other: Quality) -> float:
        """How many times worse than another, on the kind of text where it is most."""
        pairs = [(self.text, other.text), (self.repeated, other.repeated)]
        if self.sources is not None and other.sources is not None:
            pairs.append((self.sources, other.sources))
        return max(max(mine, UNSEEN_KL) / max(theirs, UNSEEN_KL) for mine, theirs in pairs)


def quality_of(kls: Sequence[tuple[TextKind, float]]) -> Quality:
    """The mean of each kind."""
    of = {kind: [kl for each, kl in kls if each == kind] for kind, _ in kls}
    return Quality(**{kind: float(np.mean(each)) for kind, each in of.items()})
