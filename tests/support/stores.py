"""Random stores, what they must hold, and every byte that they reach."""

from __future__ import annotations

import itertools
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcomp.kernels import reference
from kvcomp.spec import CodecSpec, Coding, TensorSpec, Unit
from kvcomp.store import KVStore

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def spec_of(
    key: Unit = "block",
    value: Unit = "token",
    r: float = 0.4,
    coding: Coding = "huffman",
    window: int = 8,
    sinks: int = 4,
    classes: int = 1,
    heads: int = 2,
) -> CodecSpec:
    """A spec of few levels, so that the reference is fast; K and V have books of their own."""

    def tensor(unit: Unit, limit: int) -> TensorSpec:
        if unit == "head":
            return TensorSpec(unit, None, coding, limit, classes, (tuple(2 * r + head / 4 for head in range(heads)),))
        return TensorSpec(unit, r, coding, limit, classes)

    return CodecSpec(tensor(key, 12), tensor(value, 11), window, sinks)


def tokens(
    count: int, batch: int = 1, heads: int = 2, channels: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """Random K and V, (batch, heads, count, channels)."""
    generator = torch.Generator().manual_seed(seed + 1000 * count)
    return tuple(torch.randn((batch, heads, count, channels), generator=generator).to(dtype) for _ in "kv")


def ragged(starts: list[int], width: int, more: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """K and V of a left-padded batch; the padding is NaN, so that whoever reads it is found out."""
    k, v = tokens(width + more, batch=len(starts), dtype=dtype)
    for row, start in enumerate(starts):
        k[row, :, :start] = v[row, :, :start] = torch.nan
    return k, v


def fill(store: KVStore, k: Tensor, v: Tensor, chunks: list[int]) -> KVStore:
    """Append in chunks, sealing after each; what remains one by one."""
    at = 0
    for chunk in itertools.chain(chunks, itertools.repeat(1)):
        if at >= k.shape[2]:
            return store
        store.append(k[:, :, at : at + chunk], v[:, :, at : at + chunk])
        store.seal()
        at += chunk
    raise AssertionError


def page_bytes(store: KVStore) -> list[list[bytes]]:
    """Of each row the bytes of its pages."""
    return [
        [reference.page_bytes(address, store.heads) for address in row[:count]]
        for row, count in zip(store.rows.pages.tolist(), store.rows.count.tolist(), strict=True)
    ]


ROWS = ("starts", "tail_begin", "sink_count", "count", "pages", "valid")


def snapshot(store: KVStore) -> dict[str, Any]:
    """All that a store holds, copied."""
    if not store.batch:
        return {"tokens": store.tokens, "batch": store.batch, "heads": store.heads, "dtype": store.dtype}
    return {
        "tokens": store.tokens,
        "tail_base": store.tail_base,
        **{name: getattr(store.rows, name).tolist() for name in ROWS},
        "dense": [x.tolist() for x in store.dense()],
        "pages": page_bytes(store),
        "memory": replace(store.memory(), books=0),  # the default book, which all share, grows with its first use
        "books": [list(books) for books in store.rows.books],
        "counts": [[None if c is None else c.tolist() for c in counts] for counts in store.rows.pair_counts],
    }


def bound_of(page: Tensor, unit: Unit, r: float | tuple[float, ...]) -> Tensor:
    """r (max - min) / 2 for the values (heads, 64, channels) of a page; of the unit ``head`` half a step and half a
    unit in the last place.
    """
    if isinstance(r, tuple):
        step = torch.tensor(r, dtype=torch.float64)[:, None, None]
        top = (page.double().abs() + step / 2).log2().floor().exp2()
        return step / 2 + top * torch.finfo(page.dtype).eps / 2
    axes = {"block": (1, 2), "channel": (1,), "vector": (2,), "token": (0, 2)}[unit]
    x = page.double()
    return (r * (x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True)) / 2).expand(x.shape)


def check_row(store: KVStore, row: int, k: Tensor, v: Tensor, start: int = 0) -> None:
    """Row ``row`` holds k and v, (heads, tokens, channels) from its first real token on: raw or within the bound.

    Only for a row that was never cropped: its pages follow its sinks.
    """
    count, sinks = int(store.rows.count[row]), int(store.rows.sink_count[row])
    sealed = slice(sinks, sinks + 64 * count)
    for found, given, tensor in zip(store.dense(), (k, v), (store.spec.key, store.spec.value), strict=True):
        mine = found[row, :, start:]
        assert mine.shape == given.shape
        torch.testing.assert_close(mine[:, :sinks], given[:, :sinks], rtol=0, atol=0)
        torch.testing.assert_close(mine[:, sealed.stop :], given[:, sealed.stop :], rtol=0, atol=0)
        for page in range(count):
            part = slice(sinks + 64 * page, sinks + 64 * page + 64)
            error = (mine[:, part].double() - given[:, part].double()).abs()
            assert (error <= bound_of(given[:, part], tensor.unit, tensor.scale)).all()
        if count:
            assert not torch.equal(mine[:, sealed], given[:, sealed])  # it is compressed after all


def held(thing: Any, seen: dict[Any, int]) -> None:
    """Gather the bytes of every array and tensor storage that an object reaches, each once."""
    if isinstance(thing, Tensor):
        storage = thing.untyped_storage()
        seen["tensor", storage.data_ptr() or id(thing)] = storage.nbytes()
    elif isinstance(thing, np.ndarray):
        while isinstance(thing.base, np.ndarray):
            thing = thing.base
        seen["array", id(thing)] = thing.nbytes
    elif isinstance(thing, list | tuple | set):
        for part in thing:
            held(part, seen)
    elif isinstance(thing, dict):
        held(list(thing.values()), seen)
    elif type(thing).__module__.startswith("kvcomp"):
        names = {field.name for field in fields(thing)} if is_dataclass(thing) else set()
        names |= set(getattr(thing, "__dict__", {}))  # whatever an object keeps for later counts too
        held([getattr(thing, name) for name in names], seen)


def allocated(store: KVStore) -> int:
    seen: dict[Any, int] = {}
    held(store, seen)
    return sum(seen.values())
