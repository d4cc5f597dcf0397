"""What the pages of a store cost, head by head, and whether they keep their bound, value by value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvcomp.codec.dtypes import dtype_of
from kvcomp.codec.page import directory_of
from kvcomp.codec.quantise import error_bound, to_float32
from kvcomp.errors import InvalidInput
from kvcomp.spec import KINDS, PAGE_TOKENS, Kind, TensorSpec
from kvcomp.store.cpu import KVStore
from kvcomp.store.places import places
from kvcomp.store.tensors import as_array


def bits_by_head(store: KVStore) -> npt.NDArray[np.float64]:
    """Bits for each value in the blocks of K and V of each head, (2, heads); pages that rows share count once. NaN
    without pages.
    """
    sizes = np.zeros(2 * store.heads, np.int64)
    seen: set[int] = set()
    for owners, addresses, count in zip(
        store.rows.owners, store.rows.pages.tolist(), store.rows.count.tolist(), strict=True
    ):
        for buffer, address in zip(owners, addresses[:count], strict=True):
            if address not in seen:
                seen.add(address)
                _, offsets = directory_of(buffer, address - buffer.ctypes.data, store.heads)
                sizes += np.diff(offsets)
    values = len(seen) * PAGE_TOKENS * np.array([[store.channels], [store.value_channels]])
    of_head = 8.0 * sizes.reshape(2, store.heads)
    return of_head / values if seen else np.full_like(of_head, np.nan)


@dataclass(frozen=True)
class Comparison:
    """Values compared, those that miss their bound or, kept raw, differ, and the largest error over its bound."""

    values: int
    missed: int
    worst: float

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(self.values + other.values, self.missed + other.missed, max(self.worst, other.worst))


def compare(store: KVStore, k: Tensor, v: Tensor, rounding: float = 0.0) -> Comparison:
    """Hold what a store gives back against what went in, each value with the bound of its unit.

    Parameters
    ----------
    k, v
        (batch, KV heads, tokens, head_dim) of the store's dtype; left padding and dropped tokens are of no account.
    rounding
        What may come on top of the bound, over the largest value of a token's head: for K and V computed again.

    Raises
    ------
    InvalidInput
        For tensors of another shape or dtype, and for a store whose pages were cropped: their bounds depend on tokens
        that it no longer has.
    """
    for x, channels in ((k, store.channels), (v, store.value_channels)):
        shape = store.batch, store.heads, store.tokens, channels
        if tuple(x.shape) != shape or x.dtype != store.dtype:
            raise InvalidInput(
                f"the cache holds {shape} of {store.dtype}, the tensors to compare are {tuple(x.shape)} of {x.dtype}"
            )
    total = Comparison(0, 0, 0.0)
    for given, back, tensor in zip(_held(store, k, v), store.held(), (store.spec.key, store.spec.value), strict=True):
        for row in range(store.batch):
            start, begin = int(store.rows.begins[row]), int(store.rows.tail_begin[row])
            if (store.rows.valid[row, : store.rows.count[row]] < PAGE_TOKENS).any():
                raise InvalidInput("the cache was cropped within a page, whose bounds can no longer be known")
            first = start + int(store.rows.sink_count[row])
            x, y = as_array(given)[row], as_array(back)[row]
            for exact in (slice(start, first), slice(begin, None)):
                total += _compare(x[:, exact], y[:, exact], np.zeros(1), rounding)
            if first < begin:
                bound = (1 + rounding) * _bound(x[:, first:begin], y[:, first:begin], tensor)
                total += _compare(_pages(x[:, first:begin]), _pages(y[:, first:begin]), bound, rounding)
    return total


def error_shares(store: KVStore, k: Tensor, v: Tensor) -> Iterator[tuple[Kind, npt.NDArray[np.float64]]]:
    """Errors of what is sealed over their bounds, signed, of K and of V; without those of exact values. Arguments as in
    ``compare``.
    """
    tensors = store.spec.key, store.spec.value
    for kind, given, back, tensor in zip(KINDS, _held(store, k, v), store.held(), tensors, strict=True):
        for row in range(store.batch):
            first, begin = int(store.rows.begins[row] + store.rows.sink_count[row]), int(store.rows.tail_begin[row])
            if first < begin:
                x, y = (as_array(values)[row, :, first:begin] for values in (given, back))
                error = to_float32(_pages(y)).astype(np.float64) - to_float32(_pages(x))
                share = error / np.maximum(_bound(x, y, tensor), np.finfo(np.float64).tiny)
                yield kind, share[error != 0]


def _held(store: KVStore, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V in the coordinates that the store holds and bounds them in."""
    if store.transform is None:
        return k, v
    return store.transform.key.apply(k, places(store, 0, store.tokens)), store.transform.value.apply(v)


def _bound(x: npt.NDArray[Any], y: npt.NDArray[Any], tensor: TensorSpec) -> npt.NDArray[np.float64]:
    """The bound of each value, (pages, heads, 64 or 1, D or 1); the unit ``head`` keeps its own before the rounding to
    the type, so that half of the type's spacing comes on top."""
    bound = error_bound(x, tensor.unit, tensor.scale)
    if tensor.unit != "head":
        return bound
    exponent = np.frexp(to_float32(_pages(y)).astype(np.float64))[1]
    half_spacing: npt.NDArray[np.float64] = np.ldexp(0.5, exponent - dtype_of(y.dtype).significand)
    return bound + half_spacing


def _pages(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(heads, 64*pages, D) -> (pages, heads, 64, D)."""
    return x.reshape(x.shape[0], -1, PAGE_TOKENS, x.shape[2]).swapaxes(0, 1)


def _compare(x: npt.NDArray[Any], y: npt.NDArray[Any], bound: npt.NDArray[np.float64], rounding: float) -> Comparison:
    """What is the same bit by bit, as raw blocks are, is right even where it is no number."""
    bits = np.uint32 if x.dtype.itemsize == 4 else np.uint16
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        exact = to_float32(x).astype(np.float64)
        error = np.abs(to_float32(y).astype(np.float64) - exact)
        if rounding:
            bound = bound + rounding * np.abs(exact).max(-1, keepdims=True)
        same = np.ascontiguousarray(x).view(bits) == np.ascontiguousarray(y).view(bits)
        missed = ~(same | (error <= bound))  # a NaN fails the comparison
        share = np.where(same, 0, error / bound)
    return Comparison(x.size, int(missed.sum()), float(np.nanmax(share, initial=0.0)))
