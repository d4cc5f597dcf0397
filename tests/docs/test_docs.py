"""The documentation does what it says: its Python runs, its commands exist, its tables are those of the results."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

import tables
from kvcomp.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in [*PAGES, ROOT / "CONTRIBUTING.md"]}
BLOCKS = [
    pytest.param(code, id=f"{name} {i}")
    for name, text in TEXTS.items()
    if name != "quickstart.md"  # whose blocks belong together
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
COMMANDS = [
    pytest.param(line, id=f"{name}: {line}")
    for name, text in TEXTS.items()
    for line in re.findall(r"^\$ (kvcomp .*)$", text, re.MULTILINE)
]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_in_the_documentation_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    runpy.run_path(str(tmp_path / "example.py"))


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_in_the_documentation_exist_with_their_options(line: str) -> None:
    words = shlex.split(line.partition("#")[0])
    command: Any = typer.main.get_command(app)
    assert words[1] in command.commands, f"there is no command {words[1]}"
    known = {option for parameter in command.commands[words[1]].params for option in parameter.opts}
    for word in words[2:]:
        if word.startswith("-"):
            assert word.partition("=")[0] in known, word


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) >= 5
    assert len(COMMANDS) >= 8


def test_every_table_is_made_from_the_results() -> None:
    marked = 0
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        marked += len(re.findall(tables.MARKED, text, re.DOTALL))
        assert tables.filled(text) == text, f"{path.name}: run make tables"
        assert text.count("<!-- table:") == len(re.findall(tables.MARKED, text, re.DOTALL))
    assert marked >= 8


def test_every_page_is_in_the_navigation() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r"[\w-]+\.md", str(site["nav"])))
    assert listed == {path.name for path in PAGES}


def test_the_citation_is_of_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    assert paper["identifiers"][0]["value"] == "arXiv:2509.00579"
    assert [author["family-names"] for author in paper["authors"]] == ["Jiang", "Yang", "Liu", "Zhang", "He", "Jin"]


def test_no_picture_asks_for_anything_from_elsewhere() -> None:
    pictures = sorted((ROOT / "docs" / "figures").glob("*.svg"))
    assert len(pictures) >= 3
    for picture in pictures:
        text = picture.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http" not in text
        assert "<title" in text


EXEMPT = {"format.md", "decisions.md"}  # a format needs its conditions in one sentence; decisions are notes
LONGEST = 30  # words of a sentence


@pytest.mark.parametrize("name", sorted({*TEXTS, "README.md"} - EXEMPT))
def test_sentences_are_short(name: str) -> None:
    text = TEXTS.get(name) or (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)  # code and markers
    text = re.sub(r"^(\|.*|#.*|    .*)$", "\n", text, flags=re.MULTILINE)  # tables, headings, indented code
    text = re.sub(r"`[^`]*`", "X", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text))
    paragraphs = re.split(r"\n\s*\n|\n- |\n\d+\. ", text)
    sentences = [one for part in paragraphs for one in re.split(r"(?<=[.!?:;])\s+", part)]
    assert [one for one in sentences if len(one.split()) > LONGEST] == []
