"""Is a kernel right? Asked of the very data that is timed: no time is printed of a kernel that is not."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.codec.dtypes import RAW
from kvcomp.codec.page import directory_of
from kvcomp.errors import KVCompError
from kvcomp.kernels import reference
from kvcomp.spec import PAGE_TOKENS, CodecSpec
from kvcomp.store import KVStore, sealed
from kvcomp.store.attention import attend
from kvcomp.store.pages import compare
from kvcomp.store.tensors import as_array

TOLERANCE = 1e-4  # of attention, relative to the largest output; both sides decode the same float32 values
# Of 16-bit values, whose codes take factors of 16 bits: a quarter of what an output rounded to bfloat16 is off.
SHORT_TOLERANCE = 5e-4
REFERENCE_PAGES = 4  # the reference decodes a million values a second
CODEC_HEADS = 2


class CheckFailed(KVCompError):
    """A kernel that gives a wrong result: its time means nothing."""


def attention_error(store: KVStore, q: Tensor) -> float:
    """Largest error of fused attention, over its largest output.

    It is held against float64 on all that the store holds, and against the reference backend on its first pages.
    store: without left padding or a calibration, K and V of one head_dim. q: float32 (batch, heads, 1, head_dim).
    Raises CheckFailed above a tolerance.
    """
    scaling = store.channels**-0.5
    ours = attend(store, q, scaling).double()
    errors = []
    for row in range(store.batch):
        out = ours[row].view(store.heads, -1, store.channels)
        values = _seen(store, row)
        for head in range(store.heads):
            k, v = (torch.from_numpy(x[head]).double() for x in values)
            expected = torch.softmax(q[row].view(out.shape)[head].double() @ k.T * scaling, -1) @ v
            errors.append(_relative(out[head], expected))
    return _tolerable(max(*errors, reference_error(store, q)), store)


def reference_error(store: KVStore, q: Tensor) -> float:
    """The same against the reference backend, which decodes the first pages by itself. Raises CheckFailed.

    Of a sliding window, which cannot be cropped, all pages are read.
    """
    twin = deepcopy(store)
    if not store.rows.dropped.any():
        twin.crop(min(store.tokens, store.spec.sinks + REFERENCE_PAGES * PAGE_TOKENS))
    scaling = store.channels**-0.5
    ours = attend(twin, q, scaling).double()
    return _tolerable(_relative(ours, attend(twin.on("reference"), q, scaling).double()), store)


def check_codec(spec: CodecSpec, k: Tensor, v: Tensor) -> None:
    """Encoding and decompression of the first tokens give what the reference gives, byte by byte, within the bound.

    k, v: (batch, KV heads, tokens, head_dim). Raises CheckFailed.
    """
    tokens = REFERENCE_PAGES * PAGE_TOKENS
    k, v = (x[:1, :CODEC_HEADS, :tokens].contiguous() for x in (k, v))
    stores = [sealed(spec, k, v, backend) for backend in ("cpu", "reference")]
    ours, reference = (b"".join(buffer.tobytes() for buffer in store.rows.owners[0][:1]) for store in stores)
    if ours != reference:
        raise CheckFailed("the encoder's bytes differ from the reference's: no time is given for it")
    if not all(torch.equal(x, y) for x, y in zip(stores[0].dense(), stores[1].dense(), strict=True)):
        raise CheckFailed("decompression differs from the reference's: no time is given for it")
    if compare(stores[0], k, v).missed:
        raise CheckFailed("values come back outside of their bound: no time is given for the codec")


def _seen(store: KVStore, row: int) -> list[npt.NDArray[np.float32]]:
    """K and V of a row as attention takes them, float32 (heads, tokens, channels): codes not rounded to the dtype."""
    count, sinks, begin = (int(x[row]) for x in (store.rows.count, store.rows.sink_count, store.rows.tail_begin))
    k, v = (np.empty((store.heads, count * PAGE_TOKENS, held), np.float32) for held in store.held_channels)
    for index, buffer in enumerate(store.rows.owners[row]):
        page, part = store.rows.pages[row, index : index + 1], slice(index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS)
        modes, _ = directory_of(buffer, int(page[0]) - buffer.ctypes.data, store.heads)
        if RAW in modes[:-1]:  # its values have the store's dtype, and a kernel would read them in that of the output
            content, dtype = reference.page_bytes(int(page[0]), store.heads), as_array(store.tail_k).dtype
            k[:, part], v[:, part] = reference.decode_page(content, store.layout, store.books(row), dtype, store.steps)
        else:
            store.kernels.decompress(page, store.units, *store.books(row), k[:, part], v[:, part], store.steps)
    tail = slice(begin - store.tail_base, store.tokens - store.tail_base)
    raw = ((store.sinks_k, store.tail_k), (store.sinks_v, store.tail_v))
    held = (
        np.concatenate([first[row, :, :sinks].float().numpy(), middle, last[row, :, tail].float().numpy()], axis=1)
        for middle, (first, last) in zip((k, v), raw, strict=True)
    )
    return [x[:, :, : store.channels] for x in held]


def _relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


def _tolerable(error: float, store: KVStore) -> float:
    most = SHORT_TOLERANCE if store.dtype.itemsize == 2 else TOLERANCE
    if not error <= most:  # NaN is not tolerable
        raise CheckFailed(
            f"attention is wrong: its error is {error:.1e} of the largest output, {most:.0e} is allowed; "
            "no time is given for it"
        )
    return error
