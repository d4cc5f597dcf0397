"""Write the golden files of version 1: ``python tests/golden/make.py [folder]``.

A test runs this and compares every byte. For each case of ``valid`` there are NAME.page.bin, a page; NAME.values.bin,
the K and then the V that it decodes to, (heads, 64, channels) each, in the dtype, little-endian; NAME.json, what a
decoder has to know besides. The input is made of integers over powers of two, so that every machine makes the same.
``invalid`` holds pages (NAME.bin, NAME.json), books and specs that must be refused.

These bytes are an interface: if a change of the source changes them, what was written before can no longer be read.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcomp.codec import codebook
from kvcomp.codec.codebook import Codebook
from kvcomp.codec.dtypes import PATCHED
from kvcomp.codec.page import Layout, blocks_of
from kvcomp.codec.patched import PIECE_BYTES, head_bytes
from kvcomp.codec.quantise import round_to
from kvcomp.kernels import Books, Steps, reference
from kvcomp.spec import Coding, Unit

FOLDER = Path(__file__).parent / "v1"
NUMPY_TYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
Array = npt.NDArray[Any]
Scale = float | tuple[float, ...]


@dataclass(frozen=True)
class Case:
    """A page: K has the unit and relative scale (for the unit ``head`` the heads' steps) at 0, V that at 1. data: how
    the input is made, see ``source``."""

    name: str
    why: str
    dtype: str
    heads: int
    channels: int
    units: tuple[Unit, Unit]
    scales: tuple[Scale, Scale]
    coding: Coding = "huffman"
    classes: int = 1
    limit: int = 12
    own: bool = False
    data: str = "plain"

    @property
    def layout(self) -> Layout:
        return Layout(self.heads, (self.channels, self.channels), self.units, NUMPY_TYPES[self.dtype].itemsize)

    @property
    def steps(self) -> Steps:
        key, value = (scale if isinstance(scale, tuple) else None for scale in self.scales)
        return key, value


CASES = (
    Case(
        "preset",
        "units and relative scales of the preset kvcomp, default books",
        "bfloat16",
        2,
        16,
        ("block", "token"),
        (0.05, 0.1),
    ),
    Case("float32", "f32 scales of a block, bf16 scales of vectors", "float32", 1, 16, ("block", "vector"), (0.3, 0.4)),
    Case(
        "own-books",
        "trained books of four classes",
        "float16",
        1,
        16,
        ("channel", "vector"),
        (0.2, 0.3),
        classes=4,
        own=True,
    ),
    Case(
        "split-2",
        "101 levels: two low bits of each code apart",
        "float32",
        1,
        16,
        ("vector", "channel"),
        (0.0201, 0.025),
    ),
    Case(
        "limit-10", "the limit of 10 bits bites", "bfloat16", 1, 16, ("token", "block"), (0.09, 0.1), limit=10, own=True
    ),
    Case(
        "wide-head",
        "more than 128 channels: lengths in units of 8 bits",
        "bfloat16",
        1,
        144,
        ("channel", "token"),
        (0.2, 0.15),
        classes=4,
    ),
    Case(
        "constants",
        "a book of a single symbol",
        "float16",
        1,
        16,
        ("token", "block"),
        (0.5, 0.5),
        own=True,
        data="constant",
    ),
    Case(
        "raw-blocks",
        "not finite and too wide: raw blocks beside coded ones",
        "float16",
        3,
        16,
        ("block", "token"),
        (0.3, 0.3),
        data="broken",
    ),
    Case(
        "lacking",
        "a head has codes that the own book lacks: default book",
        "bfloat16",
        2,
        16,
        ("block", "block"),
        (0.2, 0.25),
        own=True,
        data="late",
    ),
    Case(
        "offset",
        "values far from 0 with a small range",
        "bfloat16",
        1,
        16,
        ("channel", "channel"),
        (0.05, 0.1),
        data="offset",
    ),
    Case(
        "fixed-1-2",
        "fixed width; a constant head has width 1",
        "float16",
        2,
        16,
        ("block", "block"),
        (0.99, 0.5),
        coding="fixed",
        data="late",
    ),
    Case(
        "fixed-3-4", "fixed width, words straddled", "float16", 1, 16, ("token", "vector"), (0.16, 0.08), coding="fixed"
    ),
    Case(
        "fixed-5-6",
        "fixed width, words straddled",
        "bfloat16",
        1,
        16,
        ("channel", "token"),
        (0.05, 0.022),
        coding="fixed",
    ),
    Case(
        "fixed-7-7",
        "fixed width, small values",
        "float32",
        1,
        16,
        ("vector", "channel"),
        (0.011, 0.013),
        coding="fixed",
        data="small",
    ),
    Case(
        "head-own",
        "steps of heads; classes with one symbol and with low bits apart",
        "bfloat16",
        2,
        16,
        ("head", "head"),
        ((0.1875, 1.5), (0.375, 2.0)),
        classes=4,
        own=True,
    ),
    Case(
        "head-late",
        "steps of heads: a head that only the default book covers, and one that no book covers",
        "bfloat16",
        3,
        16,
        ("head", "head"),
        ((0.5, 0.5, 0.0625), (1.0, 2.0, 0.125)),
        own=True,
        data="late",
    ),
    Case(
        "head-wide",
        "steps of heads, more than 192 levels, half a step away from 0",
        "float32",
        1,
        16,
        ("head", "block"),
        ((0.036,), 0.1),
        limit=11,
        data="wide",
    ),
    Case(
        "head-fixed-8",
        "steps of heads and fixed width: codes on both sides of 0, a width of 8, a value that has no code",
        "float16",
        3,
        16,
        ("head", "head"),
        ((0.03125, 0.25, 0.5), (1.25, 8.0, 0.03125)),
        coding="fixed",
        data="broken",
    ),
    Case(
        "patched",
        "pieces with widths of their own and exceptions; token scales beside blocks",
        "bfloat16",
        1,
        16,
        ("block", "token"),
        (0.015, 0.02),
        coding="patched",
        data="falling",
    ),
    Case(
        "patched-head",
        "steps of heads: pieces on both sides of 0, and odd widths",
        "float16",
        1,
        32,
        ("head", "head"),
        ((0.125,), (0.0625,)),
        coding="patched",
        data="falling",
    ),
    Case(
        "patched-fixed",
        "a block that a fixed width makes smaller",
        "float16",
        1,
        16,
        ("channel", "vector"),
        (0.16, 0.08),
        coding="patched",
    ),
)


def numbers(seed: int) -> Iterator[int]:
    """Whole numbers from -32 to 32, those near 0 more often."""
    state = seed
    while True:
        total = 0
        for _ in range(4):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            total += (state >> 33) % 17 - 8
        yield total


def source(case: Case) -> tuple[Array, Array]:
    """K and V of a case, (heads, 64, channels) in its dtype; bfloat16 as bits."""
    shape = case.heads, 64, case.channels
    draws = numbers(len(case.name) + 1000 * case.channels)
    both = []
    for _ in "kv":
        x = np.array([next(draws) for _ in range(shape[0] * shape[1] * shape[2])], np.float32).reshape(shape) / 8
        if case.data == "constant":
            x[:] = np.arange(64, dtype=np.float32)[None, :, None] * 8 - 100 if not both else -4.625
        elif case.data == "offset":
            x += np.arange(case.channels, dtype=np.float32) * 16
        elif case.data == "small":
            x *= np.float32(2.0**-80)
        elif case.data == "late":
            x[0] = 3
        elif case.data == "broken":
            x[1, 5, 7] = np.nan if not both else -np.inf
            x[2, 63, 15] = 65504
            x[2, 0, 0] = -65504 if not both else 2.0**-24
        elif case.data == "falling":
            x *= 2.0 ** -np.floor(np.arange(case.channels, dtype=np.float32) * 8 / case.channels)
            x[0, 9:12, -1] = 3, -4, 5
        elif case.data == "wide":
            x += np.float32(2.0**-6)
        both.append(round_to(x, NUMPY_TYPES[case.dtype]))
    return both[0], both[1]


def books_of(case: Case, kernels: Any = reference) -> tuple[Books, Books]:
    """The default books of a case and, if it has any, those trained on its page (where "late", on its first head)."""
    books = []
    for index, x in enumerate(source(case)):
        own = None
        if case.own:
            seen = x[:1] if case.data == "late" else x
            scale = case.scales[index]
            q = kernels.quantise(seen, case.units[index], scale[: seen.shape[0]] if isinstance(scale, tuple) else scale)
            own = codebook.train(kernels.count_pairs(q, "KV"[index], case.classes), case.limit)
        books.append((default_book(case, index, x, kernels), own))
    return books[0], books[1]


def default_book(case: Case, index: int, x: Array, kernels: Any) -> Codebook:
    """That of the relative scale; of the unit ``head``, as a calibration might give it, one trained on two heads at
    nine tenths of the step.
    """
    scale = case.scales[index]
    if not isinstance(scale, tuple):
        return codebook.default(scale, case.classes, case.limit)
    some = slice(None, 2)
    finer = kernels.quantise(x[some], "head", tuple(step * 0.9 for step in scale[some]))
    return codebook.train(kernels.count_pairs(finer, "KV"[index], case.classes), case.limit)


def encode(case: Case, kernels: Any = reference) -> bytes:
    """The page of a case, by a backend."""
    k, v = source(case)
    kq, vq = (kernels.quantise(x, case.units[i], case.scales[i]) for i, x in enumerate((k, v)))
    page, offsets = kernels.encode_pages(k, v, kq, vq, (case.coding,) * 2, case.units, *books_of(case, kernels))
    return bytes(page.tobytes()[: offsets[-1]])


def decode(case: Case, page: bytes, books: tuple[Books, Books], kernels: Any = reference) -> bytes:
    """K and V of a page in the dtype, by a backend."""
    memory = np.frombuffer(page + bytes(case.channels), np.uint8).copy()
    k, v = np.zeros((2, case.heads, 64, case.channels), NUMPY_TYPES[case.dtype])
    kernels.decompress(np.array([memory.ctypes.data], np.int64), case.units, *books, k, v, case.steps)
    return k.tobytes() + v.tobytes()


def describe(case: Case) -> dict[str, Any]:
    """What NAME.json says."""
    books = books_of(case)
    return {
        "why": case.why,
        "format": 1,
        "dtype": case.dtype,
        "heads": case.heads,
        "channels": case.channels,
        "units": case.units,
        "relative_scales": [None if isinstance(scale, tuple) else scale for scale in case.scales],
        "steps": case.steps,
        "coding": case.coding,
        "modes": [mode for mode, _ in blocks_of(encode(case), case.layout)],
        "default_books": [book_data(default) for default, _ in books] if case.coding == "huffman" else None,
        "own_books": [book_data(own) if own else None for _, own in books],
    }


def book_data(book: Codebook) -> dict[str, Any]:
    """A book as plain data; the lengths of each class as a hexadecimal digit a symbol."""
    lengths = ["".join(f"{n:x}" for n in book.lengths_of(index).tolist()) for index in range(book.classes)]
    parts = {"first": book.first, "levels": book.levels, "split": book.split}
    return {name: list(part) for name, part in parts.items()} | {"limit": book.limit, "lengths": lengths}


def book_from(data: dict[str, Any]) -> Codebook:
    lengths = np.array([int(n, 16) for lengths in data["lengths"] for n in lengths], np.uint8)
    first, levels, split = (tuple(data[name]) for name in ("first", "levels", "split"))
    return Codebook(first, levels, split, data["limit"], lengths)


def invalid_pages() -> Iterator[tuple[str, str, Case, bytes]]:
    """(name, why, the case whose page this was, bytes)."""
    huffman, fixed = (next(case for case in CASES if case.name == name) for name in ("float32", "fixed-3-4"))
    page, first = encode(huffman), huffman.layout.first_block
    k, v, end = struct.unpack_from("<3I", page)

    def words(*values: int) -> bytes:
        return struct.pack(f"<{len(values)}I", *values) + page[4 * len(values) :]

    yield "empty", "no bytes at all", huffman, b""
    yield "half-directory", "ends in the directory", huffman, page[:9]
    yield "only-directory", "ends after the directory", huffman, page[:first]
    yield "cut", "the last 16 bytes are missing", huffman, page[:-16]
    yield "end-behind", "the directory says one unit more than there is", huffman, words(k, v, end + 16)
    yield "end-far-behind", "the directory says 4 GiB", huffman, words(k, v, 0xFFFFFFF0)
    yield "end-mode", "the size of the page has a mode", huffman, words(k, v, end | 2)
    yield "gap", "the first block does not follow the directory", huffman, words(k + 16, v, end)
    yield "overlap", "the first block lies in the directory", huffman, words(k - 16, v, end)
    yield "backwards", "the second block begins before the first", huffman, words(k, (k & ~15) - 16 | v & 15, end)
    yield "no-room", "a block without room for its lengths", huffman, words(k, (k & ~15) + 16 | v & 15, end)
    yield "no-room-at-all", "a block without bytes", huffman, words(k, k & ~15 | v & 15, end)
    yield "raw-no-room", "a raw block without room for its values", huffman, words(k & ~15, v, end)
    yield "unknown-mode-3", "a mode that does not exist", huffman, words(k, v & ~15 | 3, end)
    yield "fixed-8-no-room", "a width of 8, which has the mode of width 0", huffman, words(k, v & ~15 | 8, end)
    yield "no-own-book", "the own book of a sequence that has none", huffman, words(k & ~15 | 2, v, end)
    begin = k & ~15
    yield "streams-too-long", "the lengths of the streams exceed the block", huffman, put(page, begin + 9, b"\xff" * 64)
    yield "lengths-too-wide", "differences of 10 bits", huffman, put(page, begin + 8, b"\x0a")
    for name, value in (("zero", 0.0), ("negative", -1.0), ("nan", np.nan), ("inf", np.inf), ("tiny", 2.0**-101)):
        yield f"scale-{name}", "a scale that no encoder writes", huffman, put(page, begin, struct.pack("<f", value))
    yield "zero-too-large", "a zero that no encoder writes", huffman, put(page, begin + 4, struct.pack("<i", 32768))
    page = encode(fixed)
    yield "token-scale-inf", "an infinite token scale", fixed, put(page, fixed.layout.directory_bytes + 20, b"\x80\x7f")
    k, v, end = struct.unpack_from("<3I", page)
    yield "fixed-no-room", "a fixed block without room for codes of its width", fixed, words(k | 15, v, end)
    yield from invalid_pieces(next(case for case in CASES if case.name == "patched"))


def invalid_pieces(case: Case) -> Iterator[tuple[str, str, Case, bytes]]:
    """The same of a page whose blocks are patched."""
    page, pieces = encode(case), case.channels // 8
    block = struct.unpack_from("<I", page)[0] & ~15
    begin = block + 8  # behind the scale of K
    counts = page[begin + 2 * pieces : begin + 3 * pieces]
    which = next(piece for piece, count in enumerate(counts) if count)
    assert counts[which] > 1
    codes = begin + head_bytes(case.channels) + PIECE_BYTES * sum(page[begin : begin + pieces])
    (entry,) = struct.unpack_from("<H", page, codes)

    def exception(value: int) -> bytes:
        return put(page, codes, struct.pack("<H", value))

    yield (
        "patched-no-room",
        "a block without room for its widths",
        case,
        put(page, 4, struct.pack("<I", block | PATCHED)),
    )
    yield "width-9", "a piece of nine bits a code", case, put(page, begin, b"\x09")
    yield (
        "widths-too-wide",
        "codes of the widths exceed the block",
        case,
        put(page, begin, b"\x08" * pieces + b"\x80" * pieces),
    )
    yield "frame-127", "codes beyond 127", case, put(page, begin + pieces, b"\x7f")
    yield (
        "exceptions-too-many",
        "the exceptions exceed the block",
        case,
        put(page, begin + 2 * pieces, b"\xff" * pieces),
    )
    yield "exception-offset-0", "an exception that is none", case, exception(entry & 511 | 64 << 9)
    yield "exception-moved", "an exception whose code is not at the end of its piece's", case, exception(entry ^ 1)
    yield (
        "exception-twice",
        "an exception after one at the same place",
        case,
        put(page, codes + 2, page[codes : codes + 2]),
    )
    yield (
        "exception-beyond-127",
        "an exception beyond 127",
        case,
        put(
            put(page, begin + pieces + which, bytes([128 - (1 << page[begin + which])])),
            codes,
            struct.pack("<H", entry & 511 | 127 << 9),
        ),
    )


def put(page: bytes, at: int, value: bytes) -> bytes:
    return page[:at] + value + page[at + len(value) :]


def invalid_book(why: str, lengths: str | list[str], **change: Any) -> dict[str, Any]:
    classes = [lengths] if isinstance(lengths, str) else lengths
    good = {name: [value] * len(classes) for name, value in (("first", 0), ("levels", 2), ("split", 0))}
    return {"why": why, **good, "limit": 3, "lengths": classes} | change


INVALID_BOOKS = [
    invalid_book("incomplete", "1230"),
    invalid_book("over-full", "1222"),
    invalid_book("empty", "0000"),
    invalid_book("one code word where several symbols are possible", "0010"),
    invalid_book("a single symbol that takes bits", "1", levels=[1]),
    invalid_book("longer than the limit", "1244"),
    invalid_book("too few symbols", "122"),
    invalid_book("two classes", ["2222", "2222"]),
    invalid_book("257 levels", "0" * 33 * 33, levels=[257], split=[3]),
    invalid_book("four low bits", "0", levels=[8], split=[4]),
    invalid_book("13 bits", "2222", limit=13),
    invalid_book("codes beyond 255", "2222", first=[255]),
    invalid_book("a symbol of the codes 255 and 256", "2222", first=[253], levels=[3], split=[1]),
    invalid_book("one class of four incomplete", ["1233", "1233", "1230", "2222"]),
]
INVALID_SPECS = [
    {"why": "a newer version", "error": "UnsupportedVersion", "spec": {"kvcomp_spec": 2}},
    {"why": "no version", "error": "InvalidInput", "spec": {"key": {"unit": "block", "relative_scale": 0.1}}},
    {
        "why": "no value",
        "error": "InvalidInput",
        "spec": {"kvcomp_spec": 1, "key": {"unit": "block", "relative_scale": 0.1}},
    },
    {
        "why": "an unknown field",
        "error": "InvalidInput",
        "spec": {
            "kvcomp_spec": 1,
            "key": {"unit": "block", "relative_scale": 0.1, "transform": "klt"},
            "value": {"unit": "token", "relative_scale": 0.1},
        },
    },
    {
        "why": "steps and a relative scale",
        "error": "InvalidInput",
        "spec": {
            "kvcomp_spec": 1,
            "key": {"unit": "head", "relative_scale": 0.1, "steps": [[1.0]]},
            "value": {"unit": "token", "relative_scale": 0.1},
        },
    },
]


def main(folder: Path = FOLDER) -> None:
    """Write all files."""
    valid, invalid = folder / "valid", folder / "invalid"
    for part in (valid, invalid):
        part.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        page = encode(case)
        (valid / f"{case.name}.page.bin").write_bytes(page)
        (valid / f"{case.name}.values.bin").write_bytes(decode(case, page, books_of(case)))
        write_json(valid / f"{case.name}.json", describe(case))
    for name, why, case, data in invalid_pages():
        (invalid / f"{name}.bin").write_bytes(data)
        write_json(invalid / f"{name}.json", {"why": why, "error": "CorruptData", "page_of": case.name})
    write_json(invalid / "books.json", INVALID_BOOKS)
    write_json(invalid / "specs.json", INVALID_SPECS)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
