"""The committed files of format version 1: read bit by bit, written byte by byte, and the invalid ones refused."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcomp import errors
from kvcomp.codec import codebook
from kvcomp.codec.page import Layout
from kvcomp.codec.quantise import error_bound, to_float32
from kvcomp.kernels import load_backend, reference
from kvcomp.spec import CodecSpec

GOLDEN = Path(__file__).parents[1] / "golden"
VALID, INVALID = GOLDEN / "v1" / "valid", GOLDEN / "v1" / "invalid"
NAMES = sorted(path.stem for path in VALID.glob("*.json"))
BAD_PAGES = sorted(path.stem for path in INVALID.glob("*.bin"))


@pytest.fixture(scope="module")
def make() -> Any:
    """The script; a fixture, so that a broken one fails its tests alone."""
    return import_module("make")


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((VALID / f"{name}.json").read_text(encoding="utf-8"))
    return content


def stored_books(make: Any, about: dict[str, Any]) -> Any:
    """The books as the JSON has them."""
    default = [make.book_from(book) if book else None for book in about["default_books"] or [None, None]]
    own = [make.book_from(book) if book else None for book in about["own_books"]]
    return tuple(zip(default, own, strict=True))


def steps_of(about: dict[str, Any]) -> Any:
    return tuple(None if of_kind is None else tuple(of_kind) for of_kind in about["steps"])


def case_of(make: Any, name: str) -> Any:
    return next(case for case in make.CASES if case.name == name)


def test_the_files_are_those_of_the_cases_and_small(make: Any) -> None:
    assert sorted(case.name for case in make.CASES) == NAMES
    assert sorted(name for name, *_ in make.invalid_pages()) == BAD_PAGES
    assert sum(path.stat().st_size for path in (GOLDEN / "v1").rglob("*.*")) < 320_000


def test_the_script_writes_the_committed_files_byte_by_byte(make: Any, tmp_path: Path) -> None:
    make.main(tmp_path)
    written = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*.*")}
    assert set(written) == {path.relative_to(GOLDEN / "v1") for path in (GOLDEN / "v1").rglob("*.*")}
    for relative, path in written.items():
        assert path.read_bytes() == (GOLDEN / "v1" / relative).read_bytes(), relative


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_page_decodes_to_its_values_bit_by_bit(make: Any, name: str, backend: str) -> None:
    """From what the JSON says alone, by ``decompress``."""
    about = read(name)
    dtype = make.NUMPY_TYPES[about["dtype"]]
    shape = about["heads"], 64, about["channels"]
    page = (VALID / f"{name}.page.bin").read_bytes()
    memory = np.frombuffer(page + bytes(about["channels"]), np.uint8).copy()
    k, v = np.zeros(shape, dtype), np.zeros(shape, dtype)
    units = tuple(about["units"])
    load_backend(backend).decompress(
        np.array([memory.ctypes.data], np.int64),
        units,
        *stored_books(make, about),
        k,
        v,
        steps_of(about),
    )
    assert k.tobytes() + v.tobytes() == (VALID / f"{name}.values.bin").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_input_of_a_golden_page_encodes_to_its_bytes(make: Any, name: str, backend: str) -> None:
    assert make.encode(case_of(make, name), load_backend(backend)) == (VALID / f"{name}.page.bin").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_values_of_a_golden_page_are_within_the_bound_of_its_input(make: Any, name: str) -> None:
    about, case = read(name), case_of(make, name)
    values = np.frombuffer((VALID / f"{name}.values.bin").read_bytes(), make.NUMPY_TYPES[case.dtype])
    halves = values.reshape(2, case.heads, 64, case.channels)
    for kind, (x, decoded) in enumerate(zip(make.source(case), halves, strict=True)):
        with np.errstate(invalid="ignore"):
            bound = error_bound(x, case.units[kind], case.scales[kind])[0]
            error = np.abs(to_float32(decoded).astype(np.float64) - to_float32(x))
            if case.units[kind] == "head":  # kept before the rounding to the dtype
                places = {"float32": 23, "float16": 10, "bfloat16": 7}[case.dtype]
                top = np.log2(np.maximum(np.abs(to_float32(x).astype(np.float64)) + bound, 2.0**-14))
                bound = bound + np.exp2(np.floor(top) - places - 1)
        for head in range(case.heads):
            if about["modes"][kind * case.heads + head] == 0:
                assert decoded[head].tobytes() == x[head].tobytes()
            else:
                assert (error <= np.broadcast_to(bound, error.shape))[head].all()


@pytest.mark.parametrize("name", [name for name in NAMES if "fixed" not in name and "patched" not in name])
def test_the_default_books_are_those_stored(make: Any, name: str) -> None:
    case = case_of(make, name)
    for (default, own), r in zip(stored_books(make, read(name)), case.scales, strict=True):
        if not isinstance(r, tuple):
            assert codebook.default(r, case.classes, case.limit) == default
        assert (own is not None) == case.own


def test_the_golden_pages_have_every_mode_unit_dtype_and_kind_of_book() -> None:
    every = [read(name) for name in NAMES]
    assert {mode for about in every for mode in about["modes"]} == {0, 1, 2, 4, *range(8, 16)}
    assert {unit for about in every for unit in about["units"]} == {"block", "channel", "vector", "token", "head"}
    assert {about["dtype"] for about in every} == {"float32", "float16", "bfloat16"}
    books = [book for about in every for key in ("default_books", "own_books") for book in about[key] or [] if book]
    assert {k for book in books for k in book["split"]} == {0, 1, 2, 3}
    assert {len(book["lengths"]) for book in books} == {1, 4}
    assert 1 in {levels for book in books for levels in book["levels"]}
    assert max(levels for book in books for levels in book["levels"]) > 192
    assert max(about["channels"] for about in every) > 128


@pytest.mark.parametrize("name", BAD_PAGES)
def test_an_invalid_page_is_refused(make: Any, name: str) -> None:
    about = json.loads((INVALID / f"{name}.json").read_text(encoding="utf-8"))
    origin = read(about["page_of"])
    layout = Layout(
        origin["heads"], (origin["channels"],) * 2, tuple(origin["units"]), make.NUMPY_TYPES[origin["dtype"]].itemsize
    )
    page = (INVALID / f"{name}.bin").read_bytes()
    assert page != (VALID / f"{about['page_of']}.page.bin").read_bytes()
    with pytest.raises(getattr(errors, about["error"])):
        reference.decode_page(
            page, layout, stored_books(make, origin), make.NUMPY_TYPES[origin["dtype"]], steps_of(origin)
        )


def test_invalid_books_are_refused(make: Any) -> None:
    for book in json.loads((INVALID / "books.json").read_text(encoding="utf-8")):
        with pytest.raises(errors.CorruptData):
            make.book_from(book)


def test_invalid_specs_are_refused() -> None:
    for entry in json.loads((INVALID / "specs.json").read_text(encoding="utf-8")):
        with pytest.raises(getattr(errors, entry["error"])):
            CodecSpec.from_json(json.dumps(entry["spec"]))
