"""How a GPUStore is read: attention, decompression, and the bytes it takes. The store must be in ``sync``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp.calibration.product import product
from kvcomp.kernels.cuda import launch
from kvcomp.kernels.cuda.layout import BFLOAT16_128, AttendArguments, DecompressArguments
from kvcomp.spec import PAGE_TOKENS
from kvcomp.store.memory import Memory
from kvcomp.store.places import places
from kvcomp.store.read import in_order, undone
from kvcomp.store.sink_logits import take_share

if TYPE_CHECKING:
    from kvcomp.store.gpu.store import GPUStore


def attend(store: GPUStore, q: Tensor, scaling: float, softcap: float, sink_logits: Tensor | None) -> Tensor:
    """Fused attention of the last tokens, decoding the sealed pages on the fly. Arguments as ``GPUStore.attend`` has
    them, and as ``kvcomp.store.attention.attend`` has checked them.
    """
    rows, heads, new, channels = q.shape
    inner = (q.detach() if store.transform is None else store.transform.queries(q)).contiguous()
    turned = turned_scores(store, q)
    build = store.kernels.attend_build(inner.dtype, bool(softcap), turned is not None)
    queries = heads // store.heads * new
    most = PAGE_TOKENS * store.table.capacity + store.tail.room  # changes only when the table or the tail moves
    splits = launch.splits_for(store.kernels.on, build, rows, store.heads, queries, most)
    out = torch.empty_like(inner)
    lse = torch.empty((rows, store.heads, queries), dtype=torch.float32, device=store.device)
    parts = splits if splits > 1 else 0
    partial = torch.empty((parts, *lse.shape, channels), dtype=torch.float32, device=store.device)
    peaks = torch.empty((2, parts, *lse.shape), dtype=torch.float32, device=store.device)
    a = _view(store, AttendArguments(rows=rows, heads=store.heads, queries=queries, new_tokens=new))
    a.scaling, a.softcap = scaling, softcap
    a.q, a.out, a.lse, a.partial_out = inner.data_ptr(), out.data_ptr(), lse.data_ptr(), partial.data_ptr()
    if turned is not None:
        a.turned, a.slots = turned.data_ptr(), turned.shape[3]
    if parts:
        a.partial_peak, a.partial_total = peaks[0].data_ptr(), peaks[1].data_ptr()
    launch.attend(store.kernels.on, build, a, splits)
    if store.transform is not None:
        out = store.transform.outputs(out)
    if sink_logits is not None:
        out = take_share(out.view(q.shape), lse.view(q.shape[:3]), sink_logits, q, scaling, store.transform)
    return out.to(q.dtype).view(q.shape)


def next_waves(store: GPUStore, new: int) -> Tensor | None:
    """``Rotation.waves`` of the next tokens, (rows, new, 2 pairs); None where no mean turns.

    They follow from what the device knows, so that a recorded step can be repeated.
    """
    rotation = store.transform.key.rotation if store.transform is not None else None
    if rotation is None:
        return None
    after = torch.arange(new, device=store.device)
    return rotation.waves_on_device(store.table.tail_places[:, None] + store.tail.held + after)


def turned_scores(store: GPUStore, q: Tensor) -> Tensor | None:
    """What scores of K' lack because means turn, float32 (rows, heads, queries, slots, 64); None if none does.

    Slots are the pages for which the table has room, and then the raw tokens, 64 at a time: sinks, then the tail.
    """
    turning = store.transform.turning(q) if store.transform is not None else None
    if turning is None:
        return None
    z, rotation = turning
    sinks, valid = store.table.sinks, store.table.valid
    ends = sinks[:, None] + valid.cumsum(1)  # places behind pages
    sink_chunks = -(-sinks // PAGE_TOKENS)
    chunks = -(-store.spec.sinks // PAGE_TOKENS) - (-store.tail.room // PAGE_TOKENS)
    chunk = torch.arange(chunks, device=store.device)
    of_tail = ends[:, -1:] + PAGE_TOKENS * (chunk - sink_chunks[:, None])
    raw = torch.where(chunk < sink_chunks[:, None], PAGE_TOKENS * chunk, of_tail)
    ahead = rotation.ahead(z, torch.cat([ends - valid, raw], 1))
    return product(ahead, rotation.first_waves(store.device).mT)


def _view(store: GPUStore, a: AttendArguments) -> AttendArguments:
    """Fill in where the kernel finds pages, books, sinks and tail."""
    a.pages, a.books = store.table.pages.data_ptr(), store.device_books.decoding.data_ptr()
    a.capacity, a.ones = store.table.capacity, BFLOAT16_128
    a.valid, a.count, a.sink_count, a.tail_begin = store.table.addresses
    a.tail_tokens = store.tail.held.data_ptr()  # the low half of a number below 2^31
    a.k_steps, a.v_steps = store.kernels.step_addresses
    raw = (a.sinks_k, store.sinks_k), (a.sinks_v, store.sinks_v), (a.tail_k, store.tail.k), (a.tail_v, store.tail.v)
    for described, x in raw:
        described.values = x.data_ptr()
        described.row, described.head, described.token, _ = x.stride()
    return a


def tile(store: GPUStore, row: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """K and V, or K' and V', of the pages ``first`` to ``last`` of a row, (KV heads, tokens, head_dim)."""
    shape = store.heads, (last - first) * PAGE_TOKENS, store.channels
    k, v = (torch.empty(shape, dtype=store.dtype, device=store.device) for _ in "KV")
    a = DecompressArguments(page_count=last - first, heads=store.heads, ones=BFLOAT16_128)
    a.pages = store.table.pages[row, first:last].data_ptr()
    a.books = store.device_books.decoding[row].data_ptr()
    a.k_steps, a.v_steps = store.kernels.step_addresses
    a.out_k, a.out_v = k.data_ptr(), v.data_ptr()
    a.k_head, a.k_token, a.v_head, a.v_token = (*k.stride()[:2], *v.stride()[:2])
    launch.decompress(store.kernels.on, store.kernels.page_build, a)
    valid = store.rows[row].valid[first:last]
    if all(tokens == PAGE_TOKENS for tokens in valid):
        return k, v
    used = torch.tensor([t < tokens for tokens in valid for t in range(PAGE_TOKENS)], device=store.device)
    return k[:, used], v[:, used]


def tiles(store: GPUStore, row: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """``Store.tiles``."""
    of, tail, recent = store.rows[row], store.tail, slice(store.tokens - store.tail.base)
    first = store.sinks_k[row, :, : of.sinks], store.sinks_v[row, :, : of.sinks]
    last = tail.k[row, :, recent], tail.v[row, :, recent]
    return in_order(of.start, first, len(of.valid), partial(store.tile, row), tail.base, last)


def dense(store: GPUStore) -> tuple[Tensor, Tensor]:
    """``Store.dense``."""
    padding = [row.start if row.tail_begin > row.start else 0 for row in store.rows]
    return undone(store.transform, *held(store), padding, places(store, 0, store.tokens))


def held(store: GPUStore) -> tuple[Tensor, Tensor]:
    """The same as it is held: K' and V' where there is a transform."""
    shape = store.batch, store.heads, store.tokens, store.channels
    k, v = (torch.zeros(shape, dtype=store.dtype, device=store.device) for _ in "KV")
    base = store.tail.base
    for index, row in enumerate(store.rows):
        begin = base if row.tail_begin == row.start else row.tail_begin  # nothing sealed: give the padding as it came
        pages = tile(store, index, 0, len(row.valid)) if row.valid else None
        first = row.start + row.sinks
        for i, (out, sinks, tail) in enumerate(((k, store.sinks_k, store.tail.k), (v, store.sinks_v, store.tail.v))):
            out[index, :, row.start : first] = sinks[index, :, : row.sinks]
            if pages is not None:
                out[index, :, first : row.tail_begin] = pages[i]
            out[index, :, begin:] = tail[index, :, begin - base : store.tokens - base]
    return k, v


def memory(store: GPUStore) -> Memory:
    """Bytes by part, pages as one (``codes``); waits for the device."""
    chunks = {id(chunk): chunk for row in store.rows for chunk in row.chunks}
    used = int(torch.cat([chunk.cursor for chunk in chunks.values()]).sum()) if chunks else 0
    values = 2 * store.heads * store.channels
    tokens = sum(store.tokens - row.start for row in store.rows)
    return Memory(
        codes=used,
        spare=sum(chunk.memory.nbytes for chunk in chunks.values()) - used,
        table=store.table.nbytes,
        table_entries=12 * sum(len(row.valid) for row in store.rows),
        books=store.device_books.nbytes,
        window=store.tail.nbytes,
        sinks=store.sinks_k.nbytes + store.sinks_v.nbytes,
        sealed_values=sum(row.tail_begin - row.start - row.sinks for row in store.rows) * values,
        values=tokens * values,
        dense=tokens * values * store.dtype.itemsize,
    )
