"""The two codebooks of a calibration: what they cover, and that they cost the fewest bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from kvcomp.codec import codebook
from kvcomp.fit.codebooks import LIMIT, fit_books
from kvcomp.kernels import Books, load_backend

ZERO, WIDTH = 128, 8


def blocks(count: int, spread: float, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Blocks of codes, (count, 64, 4, 8), each class half as wide as the one before."""
    normal = np.random.default_rng(seed).standard_normal((count, 64, 4, WIDTH))
    sizes = spread * 0.5 ** np.arange(4)[:, None]
    return np.clip(np.rint(normal * sizes) + ZERO, 0, 255).astype(np.uint8)


def covered(codes: npt.NDArray[np.uint8], book: codebook.Codebook) -> npt.NDArray[np.bool_]:
    """Blocks of whose codes the book has all."""
    first, levels = np.array(book.first), np.array(book.levels)
    return ((codes.min((1, 3)) >= first) & (codes.max((1, 3)) < first + levels)).all(1)


def encoded(codes: npt.NDArray[np.uint8], books: Books, kind: int) -> float:
    """Bits a value of pages whose only head has these codes."""
    kernels = load_backend("cpu")
    x = (codes.reshape(1, -1, 4 * WIDTH).astype(np.float32) - ZERO) * 0.5
    coded = kernels.quantise(x, "head", (0.5,))
    both = (books, books)
    page, _ = kernels.encode_pages(x, x, coded, coded, ("huffman",) * 2, ("head",) * 2, *both)
    return 8 * page.size / (2 * codes.size)


@pytest.mark.parametrize("kind", [0, 1])
def test_quiet_and_loud_heads_get_a_book_each(kind: int) -> None:
    quiet, loud = blocks(60, 0.9), blocks(60, 12.0, 1)
    wide, narrow = fit_books(np.concatenate([quiet, loud]), kind)
    assert narrow is not None
    assert covered(quiet, narrow).mean() > 0.6
    assert not covered(loud, narrow).any()
    assert covered(loud, wide).all()
    assert covered(quiet, wide).all()


def test_what_is_rare_does_not_widen_the_narrow_book() -> None:
    codes = blocks(400, 0.8)
    codes[::50, 3, 3, 0] += 9
    wide, narrow = fit_books(codes, 0)
    assert narrow is not None
    assert narrow.levels[3] < 5
    assert covered(codes, narrow).mean() > 0.7
    assert covered(codes, wide).all()
    assert wide.levels[3] > 9 + 8  # with room for what was not seen


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("spread", [0.5, 3.0, 20.0])
def test_two_books_cost_no_more_than_one(kind: int, spread: float) -> None:
    codes = np.concatenate([blocks(40, spread), blocks(40, 2 * spread, 1)])
    books = fit_books(codes, kind)
    one = load_backend("cpu").quantise(
        (codes.reshape(1, -1, 4 * WIDTH).astype(np.float32) - ZERO) * 0.5, "head", (0.5,)
    )
    single = codebook.train(load_backend("cpu").count_pairs(one, "VK"[kind == 0], 4), LIMIT)
    assert encoded(codes, books, kind) < encoded(codes, (single, None), kind) * 1.01


def test_without_any_block_there_are_books_all_the_same() -> None:
    wide, narrow = fit_books(blocks(0, 1.0), 0)
    assert wide.classes == 4
    assert narrow is not None
    assert narrow.levels == (1, 1, 1, 1)
