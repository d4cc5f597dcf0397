"""When a row's codebooks are trained, on which counts, and which are used before."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvcomp.codec import codebook
from kvcomp.codec.codebook import TRAINING_TOKENS, Codebook
from kvcomp.codec.quantise import HEAD_ZERO
from kvcomp.errors import InvalidInput
from kvcomp.kernels import Books
from kvcomp.spec import CodecSpec, TensorSpec


def counted(tensor: TensorSpec, n: int) -> slice:
    """The n codes whose pair counts are kept: the lowest, of the unit ``head`` those around 0."""
    first = -HEAD_ZERO - n // 2 if tensor.unit == "head" else 0
    return slice(first, first + n)


def kept_counts(tensor: TensorSpec, counts: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Pair counts (classes, 256, 256) cut down to (classes, n, n), the codes seen."""
    seen = np.array(np.nonzero(counts)[1:])
    if tensor.unit == "head":
        n = 2 * int(np.max(np.maximum(seen + HEAD_ZERO + 1, -HEAD_ZERO - seen), initial=1))
    else:
        n = 1 + int(np.max(seen, initial=0))
    some = counted(tensor, n)
    return counts[:, some, some].astype(np.uint32)


def learns(tensor: TensorSpec, given: bool, own: Codebook | None) -> bool:
    """Whether a row trains a book for this tensor: it has none of its own, and none was given."""
    return tensor.coding == "huffman" and not given and own is None


def learn(
    tensor: TensorSpec, earlier: npt.NDArray[np.uint32] | None, pairs: npt.NDArray[np.uint64], tokens: int
) -> tuple[Codebook | None, npt.NDArray[np.uint32] | None]:
    """A row's own book once its pages hold tokens enough, and the pair counts to keep until then.

    pairs: counts of the new pages, (classes, 256, 256), overwritten. earlier: counts kept before. tokens: of all pages.
    """
    if earlier is not None:
        some = counted(tensor, earlier.shape[1])
        pairs[:, some, some] += earlier
    if tokens >= TRAINING_TOKENS and pairs.any():
        return codebook.train(pairs, tensor.limit), None
    return None, kept_counts(tensor, pairs)


def default_book(tensor: TensorSpec) -> Codebook | None:
    """The default book of a tensor with a relative scale."""
    return codebook.default(tensor.scales[0], tensor.classes, tensor.limit) if tensor.scales else None


def check_books(spec: CodecSpec, books: tuple[Books, Books]) -> None:
    """Raise InvalidInput unless these are books of a calibration that fit the spec."""
    for tensor, of_kind in zip((spec.key, spec.value), books, strict=True):
        for book in of_kind:
            if book is not None and book.classes != tensor.classes:
                raise InvalidInput(f"a codebook has {book.classes} classes, the spec {tensor.classes}")
        if tensor.unit != "head":
            raise InvalidInput(f"the unit {tensor.unit!r} has a default book by its relative scale: give no books")
