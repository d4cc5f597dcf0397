"""What may be asked of a store, on any device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.calibration.transform import Transform
from kvcomp.errors import InvalidInput, LimitExceeded
from kvcomp.kernels import Steps
from kvcomp.store.padding import padding
from kvcomp.store.protocol import Store
from kvcomp.store.tensors import NAMES

if TYPE_CHECKING:
    from kvcomp.store.cpu import KVStore


FREE_VALUES, MAX_EXPANSION = 1 << 28, 1 << 12  # bytes to decompress to: always allowed, and for each byte that is held


def check_expansion(stores: Collection[KVStore]) -> None:
    """Raise LimitExceeded for what would take far more memory decompressed than a cache can be compressed: padding."""
    values = sum(
        one.batch * one.tokens * one.heads * (one.channels + one.value_channels) * one.dtype.itemsize for one in stores
    )
    if values <= FREE_VALUES:  # to count what is held looks at every page
        return
    held = sum(one.memory().total for one in stores)
    if values > MAX_EXPANSION * held:
        raise LimitExceeded(f"the cache claims {values} bytes of values, mostly padding, and holds {held} bytes")


def check_tensor(name: str, x: object) -> None:
    """Raise InvalidInput unless this is a dense tensor."""
    if not isinstance(x, Tensor):
        fix = ": torch.from_numpy makes one" if isinstance(x, np.ndarray) else ""
        raise InvalidInput(f"{name} must be a torch tensor, not {type(x).__name__}{fix}")
    if x.layout != torch.strided or x.is_nested:
        raise InvalidInput(f"{name} must be dense, and is {'nested' if x.is_nested else x.layout}: give x.to_dense()")


def check_shape(steps: Steps, transform: Transform | None, heads: int, channels: tuple[int, int]) -> None:
    """Raise InvalidInput unless spec and calibration are for so many KV heads and channels of K and V."""
    padding(channels)
    for of_kind in steps:
        if of_kind is not None and len(of_kind) != heads:
            raise InvalidInput(f"the spec has steps for {len(of_kind)} KV heads, not {heads}")
    if transform is not None and (transform.heads, transform.channels, transform.channels) != (heads, *channels):
        raise InvalidInput(
            f"the calibration is for {transform.heads} KV heads of {transform.channels} channels, "
            f"not {heads} of {channels[0] if channels[0] == channels[1] else channels}"
        )


def check_kv(k: Tensor, v: Tensor) -> None:
    """Raise InvalidInput unless K and V are (batch, KV heads, tokens, head_dim), the same but for head_dim, and of one
    dtype that kvcomp codes.
    """
    check_tensor("K", k)
    check_tensor("V", v)
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise InvalidInput(
            f"K and V must both be (batch, KV heads, tokens, head_dim) of the same tokens, "
            f"not {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.dtype != v.dtype or k.dtype not in NAMES:
        raise InvalidInput(f"K and V must both be float32, float16 or bfloat16, not {k.dtype} and {v.dtype}")
    if 0 in k.shape or 0 in v.shape:
        raise InvalidInput(f"K and V are empty: {tuple(k.shape)}; give at least one token")


def check_more(k: Tensor, v: Tensor, held: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Raise InvalidInput unless K and V go on what a cache holds: its batch, KV heads, head_dim of K and of V, and
    dtype.
    """
    new = k.shape[0], k.shape[1], k.shape[3], v.shape[3]
    if new != held or k.dtype != dtype:
        raise InvalidInput(
            f"this cache holds (batch, KV heads, head_dim of K, of V) = {held} of {dtype}, not {new} of {k.dtype}: "
            "use a cache for one model and batch"
        )


def check_starts(starts: Sequence[int], batch: int, tokens: int) -> None:
    """Raise InvalidInput unless there is one position for each row."""
    if len(starts) != batch or not all(0 <= start <= tokens for start in starts):
        raise InvalidInput(f"starts must be {batch} positions from 0 to {tokens}, not {list(starts)}")


def check_crop(tokens: int, held: int) -> None:
    """Raise InvalidInput unless a cache holds so many tokens."""
    if not isinstance(tokens, int) or not 0 <= tokens <= held:
        raise InvalidInput(f"cannot crop a cache of {held} tokens to {tokens}")


def check_window(store: KVStore, tokens: int) -> None:
    """Raise InvalidInput unless a store holds what the next token sees behind the first ``tokens``."""
    first = max(0, tokens + 1 - (store.sliding_window or 1))
    if tokens and ((store.rows.dropped > 0) & (store.rows.begins > first)).any():
        raise InvalidInput(
            f"no {tokens} of {store.tokens} tokens can be kept: a sliding window has left what the next one sees. Call "
            "activate_past_recording before the tokens come that may go again, or compute the shorter text anew"
        )


def check_joined(stores: Sequence[Store]) -> None:
    """Raise InvalidInput unless stores hold tokens and are of one kind, spec, shape, dtype and device."""
    if len({type(store) for store in stores}) > 1:
        raise InvalidInput("a cache on a GPU and one in main memory cannot be joined: use one backend")
    if not stores or not all(store.batch for store in stores):
        raise InvalidInput("only stores that hold tokens can be joined")
    shapes = {(x.spec, x.heads, x.channels, x.value_channels, x.dtype, x.device) for x in stores}
    if len(shapes) > 1:
        raise InvalidInput("only rows of one spec, shape, dtype and device can be joined")


def row_index(rows: Tensor | Sequence[int], batch: int) -> npt.NDArray[np.int64]:
    """The numbers of rows from 0. Raises InvalidInput for rows that do not exist."""
    try:
        rows = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(f"rows must be a list or tensor of row numbers, not {rows!r}") from None
    if rows.numel() and (rows.is_floating_point() or rows.dtype == torch.bool):
        raise InvalidInput(f"rows must be whole numbers, not {rows.dtype}")
    index = rows.detach().cpu().numpy().astype(np.int64).ravel()
    if index.size == 0 or index.min() < -batch or index.max() >= batch:
        raise InvalidInput(f"rows must be some of the {batch} that the cache holds, not {index.tolist()}")
    return index % batch
