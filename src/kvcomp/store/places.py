"""Where the tokens of a store stand: the first real token of a row is at the place 0, whatever padding is before it.

It matters under a calibration whose means of K turn with the place (``kvcomp.calibration.rotary``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.calibration.transform import Transform

if TYPE_CHECKING:
    from kvcomp.store.cpu import KVStore
    from kvcomp.store.gpu.store import GPUStore


def places(store: KVStore | GPUStore, first: int, count: int) -> Tensor | None:
    """Places of ``count`` positions from ``first`` on, int64 (rows, count); None where no mean turns with them."""
    if not isinstance(store.transform, Transform) or store.transform.key.rotation is None:
        return None
    starts = torch.from_numpy(store.starts).to(store.device)
    return torch.arange(first, first + count, device=store.device) - starts[:, None]


def place_tail(store: KVStore | GPUStore, k: Tensor, base: int, starts: npt.NDArray[np.int64]) -> None:
    """Give K of the tail, (rows, KV heads, tokens, D) from the position ``base`` on, the places of other starts."""
    held = store.tokens - base
    old = places(store, base, held)
    moved = torch.from_numpy(np.flatnonzero(starts != store.starts)).to(store.device)
    if old is not None and isinstance(store.transform, Transform) and moved.numel():
        new = old + torch.from_numpy(store.starts - starts).to(store.device)[:, None]
        key = store.transform.key
        k[moved, :, :held] = key.apply(key.undo(k[moved, :, :held], old[moved]), new[moved])
