"""A measurement that was stopped goes on where it was."""

import json
from pathlib import Path

import pytest

from kvcomp.errors import CorruptData, InvalidInput, UnsupportedVersion
from kvcomp.results import schema as results
from kvcomp.results.journal import Journal


def test_pieces_are_there_again_after_a_stop(tmp_path: Path) -> None:
    path = tmp_path / "a.partial"
    first = Journal(path, {"model": "m", "seed": 1}, resume=False)
    first.piece("a", lambda: {"x": 1.5})
    first.piece("b", lambda: (1, 2))
    with path.open("a") as file:
        file.write('["c", {"x"')  # stopped while it was being written
    again = Journal(path, {"model": "m", "seed": 1}, resume=True)
    assert "c" not in again
    assert again["a"] == {"x": 1.5}
    assert again.piece("a", lambda: pytest.fail("it is there already")) == {"x": 1.5}
    assert again.piece("c", lambda: 3) == 3
    assert Journal(path, {"model": "m", "seed": 1}, resume=True).some(["a", "b", "c", "d"]) == [{"x": 1.5}, [1, 2], 3]
    again.close()
    assert not path.exists()


def test_a_part_of_a_journal_keeps_its_pieces_apart(tmp_path: Path) -> None:
    path = tmp_path / "results.json.partial"
    with_parts = Journal(path, {}, resume=False)
    for name in "a", "b":
        part = with_parts.part(name).part("x")
        assert part.piece("one", lambda name=name: name) == name  # type: ignore[misc]
        assert "one" in part
        assert part["one"] == name
        assert part.some(["none", "one"]) == [name]
        part.close()
    assert Journal(path, {}, resume=True).pieces == {"a/x/one": "a", "b/x/one": "b"}


def test_without_resume_it_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.partial"
    Journal(path, {}, resume=False).piece("a", lambda: 1)
    assert "a" not in Journal(path, {}, resume=False)


def test_pieces_of_another_measurement_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.partial"
    Journal(path, {"seed": 1}, resume=False)
    with pytest.raises(InvalidInput, match="another seed"):
        Journal(path, {"seed": 2}, resume=True)
    with pytest.raises(InvalidInput, match="nothing to resume"):
        Journal(tmp_path / "none.partial", {}, resume=True)


@pytest.mark.parametrize("content", [b"", b"noise", b"\xff\xfe\0", b"[1]\n", b"5\n", b'{}\n["a", 1]\n\xff\n'])
def test_what_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.partial"
    path.write_bytes(content)
    with pytest.raises(CorruptData, match="without --resume"):
        Journal(path, {}, resume=True)
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", ["5", "[1]", "null", "[1, 2, 3]", '["c", '])
def test_pieces_end_where_a_line_is_none(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.partial"
    path.write_text(f'{{}}\n["a", 1]\n{line}\n["b", 2]\n')
    journal = Journal(path, {}, resume=True)
    assert journal.pieces == {"a": 1}
    assert journal.piece("b", lambda: 3) == 3
    assert Journal(path, {}, resume=True).pieces == {"a": 1, "b": 3}


def test_results_come_back_with_their_setting(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    results.write(path, "evaluate", results.environment(seed=3), methods=[])
    found = results.read(path)
    assert found["setting"]["seed"] == 3
    assert found["setting"]["torch"]
    assert found["methods"] == []
    assert found["kind"] == "evaluate"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", CorruptData),
        ("[]", CorruptData),
        ('{"a": 1}', CorruptData),
        (json.dumps({"kvcomp_results": 99, "setting": {}}), UnsupportedVersion),
        ("\xff", CorruptData),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path: Path, text: str, error: type[Exception]) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(error):
        results.read(path)
    with pytest.raises(InvalidInput, match="cannot read"):
        results.read(tmp_path / "none.json")


def test_a_figure_of_one_sample_has_no_standard_error() -> None:
    assert results.figure([2.0]) == {"mean": 2.0, "standard_error": None, "count": 1}
    assert results.figure([1.0, 3.0]) == {"mean": 2.0, "standard_error": 1.0, "count": 2}
