"""Hostile bytes under right checksums: refused by name, before memory is allocated for what they claim."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from calibrating import calibrated, like_keys
from containers import BATCH, SMALL, open_bytes, packed, refused, reopened
from kvcomp.calibration import Calibration
from kvcomp.codec.page import RAW
from kvcomp.errors import CorruptData, KVCompError, LimitExceeded
from kvcomp.files.header import LIMITS
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store import KVStore
from kvcomp.store.join import join
from sealing import NAMES, Sections, seal, seal_text, unseal

FREE = 64 << 20  # what a hostile file may make a reader allocate beyond its own size


@contextmanager
def traced() -> Iterator[list[int]]:
    """The most bytes that Python held at a time, once it is over."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        yield peak
    finally:
        peak.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()


def test_sealing_again_changes_nothing_that_matters() -> None:
    for data in (SMALL, BATCH):
        header, sections = unseal(data)
        again = seal(header, sections)
        assert unseal(again) == unseal(data)
        assert not refused(again)


def put(name: str, at: int, value: bytes) -> Callable[[dict[str, Any], Sections], None]:
    def edit(header: dict[str, Any], sections: Sections) -> None:
        old = sections[0][name]
        at_ = at % len(old)
        sections[0][name] = old[:at_] + value + old[at_ + len(value) :]

    return edit


def field(*path: Any, value: Any) -> Callable[[dict[str, Any], Sections], None]:
    def edit(header: dict[str, Any], sections: Sections) -> None:
        target: Any = header
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value

    return edit


def layer(name: str, value: Any) -> Callable[[dict[str, Any], Sections], None]:
    return field("layers", 0, name, value=value)


def word(value: int) -> bytes:
    return value.to_bytes(8, "little", signed=True)


def without(*path: Any) -> Callable[[dict[str, Any], Sections], None]:
    def edit(header: dict[str, Any], sections: Sections) -> None:
        target: Any = header
        for step in path[:-1]:
            target = target[step]
        del target[path[-1]]

    return edit


HUGE = 1 << 63
# Edits of the small file whose places and sizes stay as they were: the reader must not believe them.
HEADER_EDITS: list[tuple[Any, type[KVCompError], str]] = [
    (field("rows", value=HUGE), LimitExceeded, "claims rows"),
    (field("rows", value=1 << 16), CorruptData, "another size than its contents"),
    (field("rows", value=2), CorruptData, "another size"),
    (field("rows", value=0), CorruptData, "whole number from 1"),
    (field("rows", value=True), CorruptData, "whole number"),
    (field("rows", value=1.0), CorruptData, "whole number"),
    (field("rows", value="1"), CorruptData, "whole number"),
    (field("rows", value=-1), CorruptData, "whole number"),
    (field("tokens", value=HUGE), LimitExceeded, "claims tokens"),
    (field("tokens", value=(1 << 27) + 1), LimitExceeded, "claims tokens"),
    (field("tokens", value=2), CorruptData, "3 recent tokens"),
    (field("tokens", value=None), CorruptData, "whole number"),
    (field("model_layers", value=HUGE), LimitExceeded, "claims model_layers"),
    (field("model_layers", value=0), CorruptData, "whole number"),
    (field("model", value=[]), CorruptData, "a model, an object or null"),
    (field("layers", value={}), CorruptData, "a list of layers"),
    (field("layers", value=[1]), CorruptData, "a layer in the header must be an object"),
    (field("spec", value=None), CorruptData, "spec"),
    (field("spec", "window", value=-1), CorruptData, "spec in the header is wrong"),
    (field("spec", "key", "unit", value="head"), CorruptData, "spec in the header is wrong"),
    (field("spec", "key", "relative_scale", value=[0.1, 0.2]), CorruptData, "does not fit its layers"),
    (field("spec", "key", "relative_scale", value=float("nan")), CorruptData, "spec in the header is wrong"),
    (field("spec", "more", value=1), CorruptData, "spec in the header is wrong"),
    (field("more", value=1), CorruptData, "the header must be an object with the fields"),
    (without("model"), CorruptData, "the header must be an object with the fields"),
    (without("layers", 0, "books"), CorruptData, "a layer in the header must be"),
    (without("layers", 0, "sections", "tail"), CorruptData, "the sections of a layer must be"),
    (layer("layer", 1), CorruptData, "layer 1 is not in order"),
    (layer("layer", -1), CorruptData, "whole number"),
    (layer("heads", HUGE), LimitExceeded, "claims heads"),
    (layer("heads", 2), CorruptData, "another size"),
    (layer("channels", 20), CorruptData, "multiple of 8"),
    (layer("channels", 24), CorruptData, "another size"),
    (layer("channels", [16, 16]), CorruptData, "two that differ"),
    (layer("channels", [16, 32, 16]), CorruptData, "two that differ"),
    (layer("channels", [16, "32"]), CorruptData, "whole number"),
    (layer("channels", [16, 32]), CorruptData, "another size"),
    (layer("channels", 520), CorruptData, "multiple of 8"),
    (layer("channels", HUGE), LimitExceeded, "claims channels"),
    (layer("channels", 32), CorruptData, "another size"),
    (layer("dtype", "float64"), CorruptData, "unknown dtype"),
    (layer("dtype", ["float32"]), CorruptData, "unknown dtype"),
    (layer("dtype", "float32"), CorruptData, "another size"),
    (layer("sinks", 2), CorruptData, "2 sinks"),
    (layer("recent", 69), CorruptData, "69 recent tokens"),
    (layer("recent", 68), CorruptData, "another size"),
    (layer("entries", HUGE), LimitExceeded, "claims entries"),
    (layer("entries", HUGE - 1), CorruptData, "another size"),
    (layer("entries", 0), CorruptData, "another size"),
    (layer("books", HUGE), LimitExceeded, "claims books"),
    (layer("books", 1 << 50), LimitExceeded, "too many for a file of this size"),
    (layer("sections", []), CorruptData, "the sections of a layer must be"),
    *(
        (field("layers", 0, "sections", name, value=place), CorruptData, match)
        for name in NAMES
        for place, match in (
            ([0, 1 << 62, ""], "does not lie where|another size|sections end"),
            ([64, 0, ""], "does not lie where|another size|sections end"),
            ([0.0, 1, ""], "whole number"),
            ([0, 1], "needs an offset"),
            ([0, 1, 2], "needs an offset"),
            ("", "needs an offset"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HEADER_EDITS)))
def test_a_hostile_header_is_refused_before_anything_is_allocated(number: int) -> None:
    edit, error, match = HEADER_EDITS[number]
    header, sections = unseal(SMALL)
    length = int.from_bytes(SMALL[12:16], "little")
    body = SMALL[-(-(24 + length) // 64) * 64 :]
    edit(header, sections)
    data = seal_text(json.dumps(header).encode()) + body
    with traced() as peak, pytest.raises(error, match=match):
        for _ in open_bytes(data).layers():
            pass
    assert peak[0] < 1 << 20


SECTION_EDITS: list[tuple[Any, type[KVCompError], str]] = [
    (put("rows", 0, word(-1)), CorruptData, "a start, sinks or pages"),
    (put("rows", 0, word(69)), CorruptData, "a start, sinks or pages"),
    (put("rows", 0, word(1 << 62)), CorruptData, "a start, sinks or pages"),
    (put("rows", 0, word(4)), CorruptData, "are not its tokens"),
    (put("rows", 8, word(0)), CorruptData, "a start, sinks or pages"),
    (put("rows", 8, word(2)), CorruptData, "a start, sinks or pages"),
    (put("rows", 8, word(-1)), CorruptData, "a start, sinks or pages"),
    (put("rows", 16, word(0)), CorruptData, "a start, sinks or pages"),
    (put("rows", 16, word(2)), CorruptData, "a start, sinks or pages"),
    (put("rows", 16, word(-1)), CorruptData, "a start, sinks or pages"),
    (put("rows", 24, word(0)), CorruptData, "names a codebook"),
    (put("rows", 24, word(-2)), CorruptData, "names a codebook"),
    (put("rows", 32, word(1 << 62)), CorruptData, "names a codebook"),
    (put("rows", 40, word(-1)), CorruptData, "pair counts"),
    (put("rows", 40, word(128)), CorruptData, "pair counts"),
    (put("rows", 40, word(1 << 62)), CorruptData, "pair counts"),
    (put("table", 0, word(-16)), CorruptData, "do not begin at multiples of 16"),
    (put("table", 0, word(16)), CorruptData, "do not begin at multiples of 16"),
    (put("table", 0, word(1 << 62)), CorruptData, "do not begin at multiples of 16"),
    (put("table", 8, b"\0\0\0\0"), CorruptData, "counts other than 1 to 64"),
    (put("table", 8, b"\x41\0\0\0"), CorruptData, "counts other than 1 to 64"),
    (put("table", 8, b"\xff\xff\xff\xff"), CorruptData, "counts other than 1 to 64"),
    (put("table", 8, b"\x01\0\0\0"), CorruptData, "are not its tokens"),
    (put("pages", 0, b"\xff\xff\xff\xff"), CorruptData, "directory|unknown mode"),
    (put("pages", 0, b"\x13\0\0\0"), CorruptData, "directory"),
    (put("pages", 8, b"\0\0\0\0"), CorruptData, "directory"),
    (put("pages", 8, b"\xf0\xff\xff\xff"), CorruptData, "directory"),
]


def windowed() -> bytes:
    """A file of a sliding window that has left the sinks and two pages of 220 tokens."""
    store = KVStore(
        CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=2, sinks=4), sliding_window=80
    )
    store.append(*torch.randn(2, 1, 1, 220, 16))
    store.seal()
    assert store.rows.dropped.tolist() == [132]
    return packed({0: store}, store.spec, 1)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (put("rows", 56, word(-1)), "a start, sinks or pages"),
        (put("rows", 56, word(221)), "a start, sinks or pages"),
        (put("rows", 56, word(1 << 62)), "a start, sinks or pages"),
        (put("rows", 56, word(0)), "a start, sinks or pages"),
        (put("rows", 56, word(68)), "are not its tokens"),
        (put("rows", 56, word(220)), "are not its tokens"),
        (put("rows", 0, word(100)), "a start, sinks or pages"),
        (put("rows", 8, word(4)), "a start, sinks or pages"),
    ],
)
def test_hostile_numbers_of_dropped_tokens_are_refused(edit: Any, match: str) -> None:
    header, sections = unseal(windowed())
    edit(header, sections)
    with pytest.raises(CorruptData, match=match):
        reopened(seal(header, sections))


def test_a_row_has_no_more_sinks_than_the_file() -> None:
    store = KVStore(CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=2, sinks=4))
    store.append(*torch.randn(2, 1, 1, 9, 16))
    header, sections = unseal(packed({0: store}, store.spec, 1))
    put("rows", 8, word(5))(header, sections)
    with pytest.raises(CorruptData, match="a start, sinks or pages"):
        reopened(seal(header, sections))


def test_numbers_of_pages_that_only_add_up_are_refused() -> None:
    store = KVStore(CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=2, sinks=0))
    store.append(*torch.randn(2, 3, 1, 66, 16))
    store.set_starts([0, 66, 66])
    store.seal()
    assert store.rows.count.tolist() == [1, 0, 0]
    header, sections = unseal(packed({0: store}, store.spec, 1))
    put("rows", 56 + 16, word(1))(header, sections)
    put("rows", 112 + 16, word(-1))(header, sections)
    with pytest.raises(CorruptData, match="a start, sinks or pages"):
        reopened(seal(header, sections))


def test_rows_have_as_many_numbers_as_the_flag_says() -> None:
    for data, flags in ((windowed(), 0), (SMALL, 2)):
        header, sections = unseal(data)
        with pytest.raises(CorruptData, match="another size than its contents"):
            open_bytes(seal(header, sections, flags=flags))


def test_the_small_page_is_as_the_edits_of_it_expect() -> None:
    _, sections = unseal(SMALL)
    first, second, end = np.frombuffer(sections[0]["pages"][:12], "<u4").tolist()
    assert first == 16 + 256 | 1
    assert second & 15 == 1
    assert end == len(sections[0]["pages"]) - 16


PAGE_EDITS: list[tuple[Any, type[KVCompError], str]] = [
    (put("pages", 0, (272 | 3).to_bytes(4, "little")), CorruptData, "unknown mode 3"),
    (put("pages", 0, (272 | 8).to_bytes(4, "little")), CorruptData, "too short for its contents"),
    (put("pages", 0, (272 | 2).to_bytes(4, "little")), CorruptData, "own codebook, and there is none"),
    (put("pages", 0, (272 | 15).to_bytes(4, "little")), CorruptData, "too short for its contents"),
    (put("pages", 0, (272 | RAW).to_bytes(4, "little")), CorruptData, "too short for its contents"),
    (put("pages", 4, (256 | 1).to_bytes(4, "little")), CorruptData, "not in order"),
    (put("pages", 4, (272 | 1).to_bytes(4, "little")), CorruptData, "too short for its contents"),
    (put("pages", 4, (288 | 1).to_bytes(4, "little")), CorruptData, "too short for the lengths"),
    (put("pages", 272 + 9, b"\xff" * 64), CorruptData, "streams are longer"),
    (put("pages", 272 + 8, b"\x0a"), CorruptData, "too short for the lengths"),
    (put("pages", 272 + 8, b"\x0f"), CorruptData, "too short for the lengths"),
    *(
        (put("pages", 272, np.float32(scale).tobytes()), CorruptData, "a scale or a zero")
        for scale in (0.0, -1.0, np.nan, np.inf, 2.0**-101, 2.0**101)
    ),
    (put("pages", 276, (32768).to_bytes(4, "little")), CorruptData, "a scale or a zero"),
    (put("pages", 276, (-32768).to_bytes(4, "little", signed=True)), CorruptData, "a scale or a zero"),
    (put("pages", 16 + 20, b"\x80\x7f"), CorruptData, "a scale or a zero"),
    (put("pages", 16 + 20, b"\x80\xff"), CorruptData, "a scale or a zero"),
    (put("pages", 16 + 128 + 20, b"\0\x80"), CorruptData, "a scale or a zero"),
]


@pytest.mark.parametrize("number", range(len(SECTION_EDITS) + len(PAGE_EDITS)))
def test_hostile_sections_are_refused(number: int) -> None:
    edit, error, match = (SECTION_EDITS + PAGE_EDITS)[number]
    header, sections = unseal(SMALL)
    edit(header, sections)
    with pytest.raises(error, match=match):
        for _ in open_bytes(seal(header, sections)).layers():
            pass


def resized(name: str, edit: Callable[[bytes], bytes]) -> bytes:
    header, sections = unseal(BATCH)
    sections[0][name] = edit(sections[0][name])
    return seal(header, sections)


@pytest.mark.parametrize(
    ("name", "edit", "match"),
    [
        ("pages", lambda x: b"", "do not begin|too short|shorter"),
        ("pages", lambda x: x[:-16], "directory does not fit"),
        ("pages", lambda x: x[:-1], "do not begin"),
        ("pages", lambda x: x + bytes(16), "directory does not fit"),
        ("table", lambda x: x + bytes(12), "another size"),
        ("rows", lambda x: x[:-56], "another size"),
        ("sinks", lambda x: x + x, "another size"),
        ("tail", lambda x: b"", "another size"),
        ("books", lambda x: b"", "codebook is cut off"),
        ("books", lambda x: x[:1], "codebook is cut off"),
        ("books", lambda x: x[:13], "codebook is cut off"),
        ("books", lambda x: x[:-1], "codebook is cut off"),
        ("books", lambda x: x + b"\0", "longer than the codebooks"),
        ("books", lambda x: b"\0" + x[1:], "classes"),
        ("books", lambda x: b"\3" + x[1:], "codebook"),
        ("books", lambda x: b"\xff" + x[1:], "codebook"),
        ("books", lambda x: x[:1] + b"\x0d" + x[2:], "13 bits"),
        ("books", lambda x: x[:2] + b"\xff" + x[3:], "out of range"),
        ("books", lambda x: x[:3] + b"\xff" + x[4:], "codebook"),
        ("books", lambda x: x[:4] + b"\4" + x[5:], "out of range"),
        ("books", lambda x: x[:14] + bytes([x[14] ^ 1]) + x[15:], "no complete prefix code"),
        ("counts", lambda x: x + bytes(4), "pair counts has another size"),
    ],
)
def test_sections_of_another_size_are_refused(name: str, edit: Any, match: str) -> None:
    with pytest.raises(CorruptData, match=match):
        for _ in open_bytes(resized(name, edit)).layers():
            pass


def test_a_book_of_the_wrong_number_of_classes_is_refused() -> None:
    header, sections = unseal(BATCH)
    header["spec"]["key"]["classes"] = 1
    with pytest.raises(CorruptData, match="another number of classes"):
        open_bytes(seal(header, sections)).layer(0)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        "{}".encode("utf-16"),
        "\ufeff{}".encode(),
        b"[" * 17 + b"1" + b"]" * 17,
        b"null",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"1" * 10_000,
        b'{"rows":1,"rows":2}',
        b"[" + b"[]," * 300_000 + b"[]]",
        b'{"spec":' + b"9" * 5000 + b"}",
    ],
)
def test_a_header_that_is_no_header_is_refused(text: bytes) -> None:
    with traced() as peak, pytest.raises(CorruptData, match="the header"):
        open_bytes(seal_text(text))
    assert peak[0] < FREE


@pytest.mark.parametrize(("depth", "fine"), [(15, True), (16, False), (500, False)])
def test_a_header_is_nested_16_deep_at_most(depth: int, fine: bool) -> None:
    header, sections = unseal(SMALL)
    header["model"] = {"id": json.loads("[" * (depth - 1) + "1" + "]" * (depth - 1))}
    assert refused(seal(header, sections)) == (not fine)


def test_a_header_of_any_length_is_refused() -> None:
    with pytest.raises(LimitExceeded, match="the header claims"):
        open_bytes(seal_text(b"{}", length=0xFFFFFFFF))
    with pytest.raises(CorruptData, match="ends in its header"):
        open_bytes(seal_text(b"{}", length=1 << 20))


def bomb_of_rows() -> bytes:
    """Many rows without pages and one with many entries, of one page: the table of a store would be mostly empty."""
    header, sections = unseal(SMALL)
    rows, entries = 60_000, 60_000
    table = np.zeros((rows, 7), np.int64)
    table[:, 0] = header["tokens"] = 1 + 64 * entries
    table[:, 3:5] = -1
    table[0] = 0, 1, entries, -1, -1, 0, 0
    header["rows"], header["layers"][0]["entries"], header["layers"][0]["recent"] = rows, entries, 0
    token = 2 * rows * 16 * 2
    sections[0] |= {
        "table": bytes(8 * entries) + np.full(entries, 64, "<i4").tobytes(),
        "rows": table.tobytes(),
        "counts": b"",
        "sinks": bytes(token),
        "tail": b"",
    }
    return seal(header, sections)


def bomb_of_books() -> bytes:
    header, sections = unseal(SMALL)
    header["layers"][0]["books"] = 100_000
    sections[0]["books"] = b"\1\0\1\1\1" * 100_000
    return seal(header, sections)


def bomb_of_heads() -> bytes:
    """Of each of which kvcomp inspect says how many bits it takes."""
    header, _ = unseal(SMALL)
    header["spec"]["sinks"], header["tokens"], header["model_layers"] = 0, 0, 8
    empty = header["layers"][0] | {"heads": 1 << 16, "sinks": 0, "recent": 0, "entries": 0, "books": 0}
    header["layers"] = [empty | {"layer": layer, "sections": dict(empty["sections"])} for layer in range(8)]
    of_layer = {**dict.fromkeys(NAMES, b""), "rows": b"".join(map(word, (0, 0, 0, -1, -1, 0, 0)))}
    return seal(header, [of_layer] * 8)


def bomb_of_sinks() -> bytes:
    """Many heads without a token, of a spec with many sinks: a store has room for all of them."""
    header, sections = unseal(SMALL)
    header["spec"]["sinks"], header["tokens"] = 1 << 16, 0
    header["layers"][0] |= {"heads": 1 << 12, "channels": 512, "sinks": 0, "recent": 0, "entries": 0, "books": 0}
    sections[0] = {**dict.fromkeys(NAMES, b""), "rows": b"".join(map(word, (0, 0, 0, -1, -1, 0, 0)))}
    return seal(header, sections)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (bomb_of_rows, "mostly empty"),
        (bomb_of_books, "too many"),
        (bomb_of_heads, "too many"),
        (bomb_of_sinks, "room for 65536 sinks"),
    ],
)
def test_bombs_take_no_memory(make: Callable[[], bytes], match: str) -> None:
    data = make()
    with traced() as peak, pytest.raises(LimitExceeded, match=match):
        reopened(data)
    assert peak[0] < len(data) + FREE


def test_what_could_not_be_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    store = KVStore(CodecSpec(TensorSpec("block", 0.1), TensorSpec("token", 0.1), window=0, sinks=0))
    store.append(*torch.zeros(2, 1, 1, 64 * 900, 16))
    store.seal()
    short = deepcopy(store)
    short.crop(1)
    many = deepcopy(short)
    many.select(torch.zeros(5000, dtype=torch.int64))
    with pytest.raises(LimitExceeded, match="mostly empty"):
        packed({0: join([store, many])}, store.spec, 1)
    monkeypatch.setitem(LIMITS, "rows", 4999)
    with pytest.raises(LimitExceeded, match="claims rows"):
        packed({0: many}, store.spec, 1)


def test_steps_for_another_number_of_heads_are_refused() -> None:
    header, sections = unseal(SMALL)
    for steps in ([[1.0, 1.0]], [[1.0], [1.0]]):
        header["spec"]["key"] = {"unit": "head", "steps": steps}
        with pytest.raises(CorruptData, match=r"steps for 2 heads|2 layers"):
            open_bytes(seal(header, sections))


def test_the_unit_head_has_no_default_book_without_a_calibration() -> None:
    tensor = TensorSpec("head", steps=((0.5,),))
    store = KVStore(CodecSpec(tensor, tensor, window=0, sinks=0))
    store.append(*torch.randn(2, 1, 1, 320, 16))
    store.seal()
    data = packed({0: store}, store.spec, 1)
    assert not refused(data)
    header, sections = unseal(data)
    first = int.from_bytes(sections[0]["pages"][:4], "little")
    assert first & 15 == 2
    put("pages", 0, (first - 1).to_bytes(4, "little"))(header, sections)
    with pytest.raises(CorruptData, match="needs the default codebook"):
        open_bytes(seal(header, sections)).layer(0)


def calibrated_store() -> tuple[Calibration, CodecSpec, KVStore]:
    """A store of one layer under a calibration's level, whose spec is the second."""
    calibration = calibrated()
    spec = calibration.spec("balanced").bare()
    given = calibration.layer(0, spec)
    assert given is not None
    store = KVStore(spec.layer(0, 1), "cpu", *given)
    store.append(like_keys(1, 2, 128, 32, 5), like_keys(1, 2, 128, 32, 6))
    store.seal()
    return calibration, spec, store


def test_the_codebooks_of_a_calibration_are_for_its_huffman_spec_alone() -> None:
    """Blocks of Huffman codes under the spec of the same level that has no books: nothing could read them."""
    calibration, spec, store = calibrated_store()
    assert not refused(packed({0: store}, spec, 1))
    other = calibration.spec("balanced", "patched").bare()
    with pytest.raises(CorruptData, match="codebook"):
        open_bytes(packed({0: store}, other, 1)).layer(0)


def test_a_codebook_in_a_file_of_a_calibration_is_refused() -> None:
    """Pages would be read with it, and with the calibration's once they are saved again."""
    _, spec, store = calibrated_store()
    header, sections = unseal(packed({0: store}, spec, 1))
    own = store.default_books[0]
    assert own is not None
    sections[0]["books"], header["layers"][0]["books"] = own.to_bytes(), 1
    put("rows", 24, word(0))(header, sections)
    with pytest.raises(CorruptData, match="a calibration has those of all rows"):
        open_bytes(seal(header, sections)).layer(0)


def test_a_codebook_with_longer_codes_than_the_spec_is_refused() -> None:
    """Its codes would not fit the tables that kernels make for the spec's limit."""
    tensors = [TensorSpec("channel", 0.05, limit=limit) for limit in (12, 10)]
    store = KVStore(CodecSpec(tensors[0], tensors[0], window=0, sinks=0).layer(0, 1))
    store.append(*torch.randn(2, 1, 2, 640, 32, generator=torch.Generator().manual_seed(1)))
    store.seal()
    assert not refused(packed({0: store}, CodecSpec(tensors[0], tensors[0], window=0, sinks=0), 1))
    with pytest.raises(CorruptData, match="longer codes"):
        open_bytes(packed({0: store}, CodecSpec(tensors[1], tensors[1], window=0, sinks=0), 1)).layer(0)
