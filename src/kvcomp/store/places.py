"""Where the tokens of a store stand: the first real token of a row is at the place 0, whatever padding is before it.

It matters under a calibration whose means of K turn with the place (``kvcomp.calibration.rotary``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvcomp.store.cpu import KVStore


def places(store: KVStore, first: int, count: int) -> Tensor | None:
    """Places of ``count`` positions from ``first`` on, int64 (rows, count); None where they do not matter."""
    if store.calibrated is None or store.calibrated.key.rotation is None:
        return None
    return torch.arange(first, first + count) - torch.from_numpy(store.starts)[:, None]


def place_tail(store: KVStore, rows: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64]) -> None:
    """Give K of these rows, which lie in the tail alone, the places that it has with other starts."""
    held = store.tokens - store.tail_base
    old = places(store, store.tail_base, held)
    if old is not None and store.calibrated is not None:
        k, key, chosen = store.tail_k[:, :, :held], store.calibrated.key, torch.from_numpy(rows)
        new = old + torch.from_numpy(store.starts - starts)[:, None]
        k[chosen] = key.apply(key.undo(k[chosen], old[chosen]), new[chosen])


def bias(store: KVStore, q: Tensor) -> npt.NDArray[np.float32] | None:
    """``Transform.bias`` of queries (batch, heads, queries, D), as kernels take it."""
    found = None if store.transform is None else store.transform.bias(q, store.tokens)
    return None if found is None else found.view(store.batch, store.heads, -1, store.tokens).numpy()
