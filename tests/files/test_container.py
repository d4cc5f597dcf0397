"""The container: what goes in comes out, a stranger can read it, and no hostile byte reaches a kernel."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from containers import BATCH, FILES, SMALL, open_bytes, packed, refused, reopened
from kvcomp import files
from kvcomp.codec import codebook
from kvcomp.codec.codebook import Codebook
from kvcomp.codec.dtypes import DTYPES
from kvcomp.codec.page import Layout
from kvcomp.codec.quantise import round_to
from kvcomp.errors import CorruptData, UnsupportedVersion
from kvcomp.kernels import reference
from kvcomp.spec import PRESETS, CodecSpec, TensorSpec
from kvcomp.store import KVStore
from kvcomp.store.attention import attend
from kvcomp.store.tensors import as_array
from sealing import seal, unseal


def assert_same(one: KVStore, other: KVStore) -> None:
    for x, y in zip(one.dense(), other.dense(), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert as_array(x).tobytes() == as_array(y).tobytes()


# Round trips

units = st.sampled_from(["block", "channel", "vector", "token"])


@st.composite
def tensor_specs(draw: Any) -> TensorSpec:
    return TensorSpec(
        draw(units),
        draw(st.sampled_from([0.02, 0.1, 0.3, 0.9])),
        draw(st.sampled_from(["huffman", "huffman", "fixed", "patched"])),
        draw(st.integers(10, 12)),
        draw(st.sampled_from([1, 4])),
    )


@st.composite
def stores(draw: Any) -> KVStore:
    """A store with a past: padding, several seals, rows that were selected, cropped within pages, constant and infinite
    values.
    """
    spec = CodecSpec(draw(tensor_specs()), draw(tensor_specs()), draw(st.integers(0, 70)), draw(st.integers(0, 5)))
    rows, heads, channels = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([(16, 16), (80, 80), (72, 72), (48, 32), (8, 40)])),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    store = KVStore(spec)

    def more(tokens: int) -> None:
        shape = store.batch or rows, heads, tokens
        k, v = (torch.randn(*shape, width, generator=generator) for width in channels)
        for x in (k, v):
            x[:, 0] *= draw(st.sampled_from([1.0, 1e-3, 0.0]))
        if draw(st.booleans()):
            k[0, 0, 0, 0] = torch.inf
        store.append(k.to(dtype), v.to(dtype))

    more(draw(st.sampled_from([1, 63, 64, 100, 300])))
    if draw(st.booleans()):
        store.set_starts([draw(st.integers(0, store.tokens)) for _ in range(rows)])
    for _ in range(draw(st.integers(0, 2))):
        store.seal()
        match draw(st.sampled_from(["select", "crop", "more"])):
            case "select":
                store.select(torch.tensor(draw(st.lists(st.integers(0, store.batch - 1), min_size=1, max_size=4))))
            case "crop":
                store.crop(draw(st.integers(1, store.tokens)))
        more(draw(st.sampled_from([1, 70])))
    return store


@given(stores())
def test_what_is_saved_comes_back_bit_by_bit_and_goes_on_the_same(store: KVStore) -> None:
    data = packed({0: store}, store.spec, 1)
    again = reopened(data)[0]
    assert_same(store, again)
    assert packed({0: again}, store.spec, 1) == data
    shape = store.batch, store.heads, 150
    more = [torch.randn(*shape, width).to(store.dtype) for width in (store.channels, store.value_channels)]
    for one in (store, again):
        one.append(*more)
        one.seal()
    assert_same(store, again)
    assert packed({0: again}, store.spec, 1) == packed({0: store}, store.spec, 1)
    if torch.isfinite(store.dense()[0].float()).all():
        q = torch.randn(store.batch, 2 * store.heads, 1, store.channels)
        assert torch.equal(attend(store, q, 0.1), attend(again, q, 0.1))


@given(stores())
def test_a_file_gives_back_as_many_pages_and_values(store: KVStore) -> None:
    data = packed({0: store}, store.spec, 1)
    again = reopened(data)[0]
    assert len(data) >= again.memory().pages == store.memory().pages
    assert again.memory().values == store.memory().values
    assert again.memory().table_entries == store.memory().table_entries


@given(
    st.sampled_from([(1, 450), (300, 120), (900,), (650, 1, 63)]),
    st.lists(st.integers(0, 90), min_size=1, max_size=3),
    st.sampled_from([PRESETS["kvcomp"], PRESETS["kvcomp:paper"], PRESETS["packed"]]),
    st.integers(0, 5),
)
def test_what_a_sliding_window_holds_comes_back_where_it_was(
    pieces: tuple[int, ...], starts: list[int], preset: CodecSpec, sinks: int
) -> None:
    store = KVStore(replace(preset, window=20, sinks=sinks), sliding_window=200)
    for number, new in enumerate(pieces):
        store.append(*torch.randn(2, len(starts), 2, new, 16))
        if not number:
            store.set_starts([min(start, new) for start in starts])
        store.seal()
    data = packed({0: store}, store.spec, 1)
    again = reopened(data)[0]
    assert bool(int.from_bytes(data[10:12], "little") & 2) == bool(store.rows.dropped.any())
    for name in ("starts", "dropped", "tail_begin", "sink_count", "count"):
        assert getattr(again.rows, name).tolist() == getattr(store.rows, name).tolist()
    assert packed({0: again}, store.spec, 1) == data
    for mine, theirs in zip(again.dense(), store.dense(), strict=True):
        assert torch.equal(mine, theirs)
    assert all(np.array_equal(x, y.numpy()) for x, y in zip(stranger_reads(data), store.dense(), strict=True))
    again.slide(200)
    more, q = torch.randn(2, len(starts), 2, 90, 16), torch.randn(len(starts), 4, 1, 16)
    for one in (store, again):
        one.append(*more)
        one.seal()
    assert torch.equal(attend(store, q, 0.1), attend(again, q, 0.1))
    assert packed({0: again}, store.spec, 1) == packed({0: store}, store.spec, 1)


def test_pages_of_several_rows_are_there_once() -> None:
    store = KVStore(PRESETS["kvcomp"])
    store.append(*torch.randn(2, 1, 2, 700, 32))
    store.seal()
    store.select(torch.zeros(5, dtype=torch.int64))
    _, sections = unseal(packed({0: store}, store.spec, 1))
    assert len(sections[0]["pages"]) == store.memory().pages + 32
    assert len(sections[0]["books"]) == sum(len(book.to_bytes()) for book in store.rows.books[0] if book)


@pytest.mark.usefixtures("poison")
def test_sinks_that_a_row_lacks_are_zero_in_the_file() -> None:
    store = KVStore(PRESETS["kvcomp"])
    store.append(*torch.randn(2, 2, 1, 200, 16))
    store.set_starts([0, 150])
    store.seal()
    assert store.rows.sink_count.tolist() == [4, 0]
    _, sections = unseal(packed({0: store}, store.spec, 1))
    sinks = np.frombuffer(sections[0]["sinks"], np.float32).reshape(2, 2, 1, 4, 16)
    assert not sinks[:, 1].any()


# The golden files, and a reader written from the documentation


def test_the_script_writes_the_committed_files_byte_by_byte(tmp_path: Path, backend: str) -> None:
    import_module("make_kvc").main(tmp_path, backend)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in FILES.iterdir())
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (FILES / path.name).read_bytes(), path.name


def stranger_reads(data: bytes) -> list[np.ndarray[Any, Any]]:
    """K and V of each layer, (rows, heads, tokens, D), by docs/format.md and the reference decoder of a page."""
    header, sections = unseal(data)
    spec, rows, tokens, found = header["spec"], header["rows"], header["tokens"], []
    for about, parts in zip(header["layers"], sections, strict=True):
        heads, channels, dtype = about["heads"], about["channels"], DTYPES[about["dtype"]].array
        layout = Layout(heads, (channels, channels), (spec["key"]["unit"], spec["value"]["unit"]), dtype.itemsize)
        books, raw = [], parts["books"]
        while raw:
            classes, limit = raw[:2]
            first, levels, split = (list(raw[2 + i : 2 + 3 * classes : 3]) for i in range(3))
            size = sum((-(-(n + 1) // 2**k)) ** 2 for n, k in zip(levels, split, strict=True))
            lengths = np.frombuffer(raw[2 + 3 * classes :][:size], np.uint8)
            books.append(Codebook(tuple(first), tuple(n + 1 for n in levels), tuple(split), limit, lengths))
            raw = raw[2 + 3 * classes + size :]
        default = []
        for kind in ("key", "value"):
            r = spec[kind]["relative_scale"]
            r = r[about["layer"]] if isinstance(r, list) else r
            default.append(codebook.default(r, spec[kind]["classes"], spec[kind]["limit"]))
        table = np.frombuffer(parts["rows"], "<i8").reshape(rows, -1)
        offsets = np.frombuffer(parts["table"][: 8 * about["entries"]], "<i8").tolist()
        valid = np.frombuffer(parts["table"][8 * about["entries"] :], "<i4").tolist()
        sinks = np.frombuffer(parts["sinks"], dtype).reshape(2, rows, heads, -1, channels)
        tail = np.frombuffer(parts["tail"], dtype).reshape(2, rows, heads, -1, channels)
        out = np.zeros((2, rows, heads, tokens, channels), dtype)
        for row, (start, sink_count, pages, k_book, v_book, _, _, *dropped) in enumerate(table.tolist()):
            own = [books[index] if index >= 0 else None for index in (k_book, v_book)]
            begin = at = start + sum(dropped)
            out[:, row, :, at : at + sink_count] = sinks[:, row, :, :sink_count]
            at += sink_count
            for _ in range(pages):
                offset, count = offsets.pop(0), valid.pop(0)
                size = int.from_bytes(parts["pages"][offset + 8 * heads : offset + 8 * heads + 4], "little")
                page = parts["pages"][offset : offset + size]
                both = reference.decode_page(page, layout, ((default[0], own[0]), (default[1], own[1])), dtype)
                for kind in (0, 1):
                    out[kind, row, :, at : at + count] = round_to(both[kind], dtype)[:, :count]
                at += count
            first = tokens - tail.shape[3] if at == begin and not any(dropped) else at
            out[:, row, :, first:] = tail[:, row, :, tail.shape[3] - (tokens - first) :]
        found += [out[0], out[1]]
    return found


@pytest.mark.parametrize("name", ["small", "batch"])
def test_a_golden_file_decodes_to_its_values_bit_by_bit(name: str, backend: str) -> None:
    data, values = (FILES / f"{name}.kvc").read_bytes(), (FILES / f"{name}.values.bin").read_bytes()
    found = files.load(open_bytes(data), backend)
    about = json.loads((FILES / f"{name}.json").read_text(encoding="utf-8"))
    assert list(found) == about["layers"]
    assert [store.batch for store in found.values()] == about["rows"]
    assert b"".join(as_array(x).tobytes() for store in found.values() for x in store.dense()) == values
    assert b"".join(x.tobytes() for x in stranger_reads(data)) == values


def test_the_golden_batch_has_what_it_says() -> None:
    container = open_bytes(BATCH)
    parts = container.layer(1)
    assert parts.layer == 2
    assert parts.start.tolist() == [3, 0, 3]
    assert np.array_equal(parts.row_books[0], parts.row_books[2])
    assert 0 < (parts.valid < 64).sum() < parts.valid.size
    assert len(set(parts.offsets.tolist())) < parts.offsets.size
    assert container.header.model == {"id": "golden", "configuration": {"model_type": "none"}}


# Damage


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_noticed(step: int) -> None:
    for position in range(0, 8 * len(SMALL), step):
        data = bytearray(SMALL)
        data[position // 8] ^= 1 << position % 8
        assert refused(bytes(data)), position


def test_flipped_bits_of_a_larger_file_are_noticed() -> None:
    for position in random.Random(1).sample(range(8 * len(BATCH)), 1500):
        data = bytearray(BATCH)
        data[position // 8] ^= 1 << position % 8
        assert refused(bytes(data)), position


def test_every_truncation_and_extension_is_noticed() -> None:
    for length in range(len(SMALL)):
        assert refused(SMALL[:length]), length
    for more in (b"\0", bytes(64), SMALL):
        assert refused(SMALL + more)


@pytest.mark.parametrize("data", [b"", b"PK\3\4" + bytes(1000), SMALL.replace(b"\r\n", b"\n"), b"{}" * 100])
def test_what_is_no_kvc_file(data: bytes) -> None:
    with pytest.raises(CorruptData, match=r"too few|does not begin"):
        open_bytes(data)


@pytest.mark.parametrize(("version", "flags"), [(0, 0), (2, 0), (65535, 0), *((1, 1 << bit) for bit in range(2, 16))])
def test_newer_files_are_named_as_such(version: int, flags: int) -> None:
    with pytest.raises(UnsupportedVersion, match="use a newer kvcomp"):
        open_bytes(seal(*unseal(SMALL), version=version, flags=flags))


def test_a_newer_spec_is_named_as_such() -> None:
    header, sections = unseal(SMALL)
    header["spec"]["kvcomp_spec"] = 2
    with pytest.raises(UnsupportedVersion, match="spec version 2"):
        open_bytes(seal(header, sections))
