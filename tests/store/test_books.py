"""Which codebook codes a page, and when a row learns its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvcomp.codec.codebook import Codebook, default, train
from kvcomp.codec.page import DEFAULT_BOOK, FIXED, OWN_BOOK, RAW, blocks_of
from kvcomp.errors import InvalidInput
from kvcomp.kernels import reference
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store import KVStore
from kvcomp.store.tensors import as_array
from stores import check_row, fill, page_bytes, ragged, spec_of, tokens

pytestmark = pytest.mark.usefixtures("poison")


def counted(store: KVStore, k: Tensor, v: Tensor, row: int = 0) -> list[Codebook]:
    """The books that the sealed tokens of a row train, by the reference."""
    books = []
    begin = int(store.rows.sink_count[row])
    part = slice(begin, begin + 64 * int(store.rows.count[row]))
    kinds: Any = ("K", "V")
    for kind, x, tensor in zip(kinds, (k, v), (store.spec.key, store.spec.value), strict=True):
        q = reference.quantise(as_array(x[row, :, part]), tensor.unit, tensor.scale)
        books.append(train(reference.count_pairs(q, kind, tensor.classes), tensor.limit))
    return books


def modes(store: KVStore, row: int = 0) -> list[set[int]]:
    return [{mode for mode, _ in blocks_of(page, store.layout)} for page in page_bytes(store)[row]]


@pytest.mark.parametrize("chunks", [[], [80, 70, 200], [268]])
def test_a_row_learns_its_books_at_256_sealed_tokens_and_keeps_them(backend: str, chunks: list[int]) -> None:
    k, v = tokens(600)
    spec = spec_of(classes=4, r=0.5)
    store = KVStore(spec, backend)
    at = 0
    for chunk in [*chunks, *[1] * (268 - sum(chunks))]:
        assert store.rows.books == ([[None, None]] if at else [])
        fill(store, k[:, :, at : at + chunk], v[:, :, at : at + chunk], [chunk])
        at += chunk
    learned = store.rows.books[0]
    assert store.rows.count.tolist() == [(at - 12) // 64]
    assert learned == counted(store, k, v)
    assert store.rows.pair_counts == [[None, None]]
    # the pages before are coded with the default book, those of the call that reached 256 tokens with the new one
    earlier = max(0, sum(chunks[:-1]) - 12) // 64 if sum(chunks) >= 268 else 3
    assert modes(store) == [{DEFAULT_BOOK}] * earlier + [{OWN_BOOK}] * (int(store.rows.count[0]) - earlier)
    fill(store, k[:, :, at:], v[:, :, at:], [])
    assert all(a is b for a, b in zip(store.rows.books[0], learned, strict=True))
    check_row(store, 0, k[0], v[0])


def test_before_256_tokens_the_default_book_serves(backend: str) -> None:
    store = fill(KVStore(spec_of(classes=4, r=0.5), backend), *tokens(267), [250])
    assert store.rows.count.tolist() == [3]
    assert store.rows.books == [[None, None]]
    assert store.books(0) == ((default(0.5, 4, 12), None), (default(0.5, 4, 11), None))
    assert modes(store) == [{DEFAULT_BOOK}] * 3


def test_a_block_whose_codes_the_own_book_lacks_takes_the_default_book(backend: str) -> None:
    k, v = tokens(400)
    k[:, :, :330] = 3.0  # constants: their only code is 0
    store = fill(KVStore(spec_of("block", "token", r=0.5), backend), k, v, [268])
    book = store.rows.books[0][0]
    assert book is not None
    assert book.levels == (1,)
    assert [mode for mode, _ in blocks_of(page_bytes(store)[0][-1], store.layout)] == [DEFAULT_BOOK] * 2 + [
        OWN_BOOK
    ] * 2
    check_row(store, 0, k[0], v[0])


@pytest.mark.parametrize("steps", [(0.5, 0.25), (0.1, 0.002)])
def test_the_unit_head_learns_its_book_over_several_seals_as_at_once(backend: str, steps: tuple[float, ...]) -> None:
    tensor = TensorSpec("head", classes=4, steps=(steps,))
    spec = CodecSpec(tensor, tensor, window=0, sinks=0)
    k, v = tokens(384)
    slow = fill(KVStore(spec, backend), k, v, [100])
    at_once = fill(KVStore(spec, backend), k[:, :, :256], v[:, :, :256], [256])
    assert slow.rows.books == at_once.rows.books
    assert [{mode >= FIXED or mode == RAW for mode in of_page} for of_page in modes(slow)[:3]] == [{True}] * 3
    assert OWN_BOOK in modes(slow)[-1]
    check_row(slow, 0, k[0], v[0])


def test_counts_of_the_unit_head_are_kept_around_0(backend: str) -> None:
    tensor = TensorSpec("head", steps=((1.0, 1.0),))
    k, v = torch.zeros(1, 2, 64, 16), torch.zeros(1, 2, 64, 16)
    k[0, 0, 3, 4], v[0, 1, 5, 5] = -7, 9
    store = fill(KVStore(CodecSpec(tensor, tensor, window=0, sinks=0), backend), k, v, [64])
    for counts, (n, code) in zip(store.rows.pair_counts[0], ((14, -7), (20, 9)), strict=True):
        assert counts is not None
        assert counts.shape == (1, n, n)
        assert counts.sum() == 2 * 64 * 8
        assert counts[0].sum(axis=1)[n // 2 + code] + counts[0].sum(axis=0)[n // 2 + code] == 1


def test_books_that_are_given_serve_from_the_first_page_and_none_is_trained(backend: str) -> None:
    tensor = TensorSpec("head", classes=4, steps=((0.5, 0.5),))
    spec = CodecSpec(tensor, tensor, window=0, sinks=0)
    k, v = tokens(640)
    wide = fill(KVStore(spec, backend), 4 * k, 4 * v, [640]).rows.books[0]
    narrow = fill(KVStore(spec, backend), k, v, [640]).rows.books[0]
    books = (wide[0], narrow[0]), (wide[1], narrow[1])
    k[:, 0, 64:] *= 3  # what the narrow book lacks
    store = fill(KVStore(spec, backend, books), k[:, :, :384], v[:, :, :384], [64])
    assert store.rows.books == [narrow]
    assert store.books(0) == books
    assert store.rows.pair_counts == [[None, None]]
    assert modes(store)[0] == {OWN_BOOK}
    assert {DEFAULT_BOOK, OWN_BOOK} <= set().union(*modes(store)[1:])
    check_row(store, 0, k[0, :, :384], v[0, :, :384])
    store.select(torch.tensor([0, 0]))
    assert store.rows.books == [narrow] * 2


def test_books_that_do_not_fit_the_spec_are_refused(backend: str) -> None:
    tensor = TensorSpec("head", classes=4, steps=((0.5, 0.5),))
    book = default(0.5, 1, 12)
    with pytest.raises(InvalidInput, match="1 classes"):
        KVStore(CodecSpec(tensor, tensor), backend, ((None, None), (None, book)))
    with pytest.raises(InvalidInput, match="by its relative scale"):
        KVStore(CodecSpec(TensorSpec("block", 0.1), tensor), backend, ((None, None), (None, None)))


def test_steps_must_be_for_the_heads_of_the_tensors(backend: str) -> None:
    tensor = TensorSpec("head", steps=((0.5, 0.5, 1.0),))
    with pytest.raises(InvalidInput, match="3 KV heads"):
        KVStore(CodecSpec(tensor, TensorSpec("block", 0.1)), backend).append(*tokens(10))


def test_each_row_learns_its_own_books(backend: str) -> None:
    starts = [0, 100]
    k, v = ragged(starts, 300, 0)
    store = KVStore(spec_of(r=0.5), backend)
    store.append(k, v)
    store.set_starts(starts)
    store.seal()
    assert store.rows.books[0] == counted(store, k, v)
    assert store.rows.books[1] == [None, None]


def test_fixed_width_needs_no_books(backend: str) -> None:
    store = fill(KVStore(spec_of(coding="fixed"), backend), *tokens(300), [300])
    assert store.rows.books == [[None, None]]
    assert store.rows.pair_counts == [[None, None]]
    assert all(mode > 8 for page in modes(store) for mode in page)
