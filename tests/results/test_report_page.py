"""kvcomp report: a page that stands alone, is valid, and carries the numbers of the results."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kvcomp.cli import app

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

SETTING: dict[str, Any] = {
    "device": "a <processor>",
    "cores": 2,
    "load_average": 0.2,
    "torch": "2.x",
    "model": "models/small",
    "date": "2026-11-21",
}


def figure(mean: float) -> dict[str, Any]:
    return {"mean": mean, "standard_error": mean / 10, "count": 4}


def size(coded: float, total: float) -> dict[str, Any]:
    parts = {"codes": coded, "window": total - coded}
    return {
        "coded_bits": coded,
        "total_bits": total,
        "ratio": 16 / total,
        "allocated_bytes": 123457,
        "dense_bytes": 9999999,
        "values": 1000,
        "sealed_values": 900 if coded < 16 else 0,
        "parts": parts,
    }


def method(name: str, coded: float, total: float, kl: float, spec: bool) -> dict[str, Any]:
    fidelity = {
        "kl": figure(kl),
        "top1": figure(0.987),
        "loss_difference": figure(kl),
        "perplexity": 11.25,
        "perplexity_uncompressed": 11.0,
    }
    fidelity |= {"prompt_tokens": 2048, "scored_tokens": 256, "samples": 4}
    heads = [
        {"layer": layer, "kind": kind, "head": head, "rms": 0.01, "largest": 0.02, "bits": 2.5 + layer}
        for layer in (0, 1)
        for kind in "KV"
        for head in (0, 1)
    ]
    histogram = {kind: {"edges": [0.0, 0.5, 1.0], "counts": [6, 2], "over": "bound"} for kind in "KV"}
    return {
        "name": name,
        "settings": {"spec": {}} if spec else {},
        "memory": {"teacher_forced": size(coded, total), "streaming": size(coded, total)},
        "fidelity": {"teacher_forced": fidelity, "streaming": {**fidelity, "kl": figure(2 * kl)}},
        "retrieval": [
            {"task": "key-value", "tokens": tokens, "depth": depth, "right": 17, "asked": 20}
            for tokens in (1024, 2048)
            for depth in (0.25, 0.75)
        ],
        "error": {"largest_over_bound": 0.993, "missed": 0, "values": 4242, "heads": heads, "histogram": histogram},
        "suffering": [{"layer": 1, "kind": "K", "head": 0, "kl": 0.00321, "why": "one channel is large"}],
    }


def spread(middle: float) -> dict[str, float]:
    return {"median": middle, "quartile_1": 0.9 * middle, "quartile_3": 1.1 * middle}


EVALUATION: dict[str, Any] = {
    "kvcomp_results": 1,
    "kind": "evaluate",
    "partial": False,
    "setting": SETTING,
    "methods": [
        method("uncompressed", 16.0, 16.0, 0.0, False),
        method("kvcomp", 2.71, 3.55, 0.0059, True),
        method("kivi-4", 5.0, 5.69, 0.004, False),
        {"name": "quanto-2", "settings": {}, "fidelity": {}, "failed": {"error": "the package is <missing>"}},
    ],
}
BENCH: dict[str, Any] = {
    "kvcomp_results": 1,
    "kind": "bench",
    "partial": True,
    "setting": {**SETTING, "backend": "cpu", "load_average": 6.5, "not_compared": {"FlashAttention": "needs a GPU"}},
    "attention": [
        {
            "context": context,
            "batch": 1,
            "group": 4,
            "head_dim": 128,
            "threads": 1,
            "from_rest": True,
            "error": 2e-5,
            "bits_per_value": 2.83,
            "milliseconds": {"kvcomp": spread(1.37)},
            "time_over": {"sdpa_gqa": spread(0.41), "matmul": spread(1.13)},
            "fastest_dense": "matmul",
        }
        for context in (2048, 8192)
    ],
    "codec": [
        {
            "tokens": 4096,
            "head_dim": 128,
            "bits_per_value": 2.83,
            "encode_ns_per_value": spread(1.9),
            "seal_page_microseconds": spread(312),
            "decompress_ns_per_value": spread(0.44),
            "decompress_over_copy": spread(3.3),
        }
    ],
    "generate": [
        {
            "prompt_tokens": 2048,
            "new_tokens": 32,
            "batch": 1,
            "total_bits": 4.44,
            "first_token_seconds": {"kvcomp": spread(0.31), "uncompressed": spread(0.29)},
            "milliseconds_per_token": {"kvcomp": spread(5.5), "uncompressed": spread(9.1)},
            "time_over": spread(0.8),
        }
    ],
    "growth": [
        {"tokens": 96, "memory": {"tokens": [64, 96], "kvcomp": [40000, 41000], "uncompressed": [131072, 196608]}}
    ],
}
TUNED: dict[str, Any] = {
    "kvcomp_results": 1,
    "kind": "tune",
    "setting": SETTING,
    "spec": "{}",
    "coded_bits": 2.61, "total_bits": 3.4, "kl": 0.0071, "top1": 0.97,
    "before": {"kvcomp": {"coded_bits": 3.61, "total_bits": 4.5, "kl": 0.0085, "top1": 0.96}},
    "advice": {"size": [{"context": 1024, "total_bits": 5.3}],
        "size_from": 1024,
        "speed": [{"context": 1024, "ratio": spread(1.4), "fastest": "matmul"}], "speed_from": None,
        "sentences": ["Do not compress contexts below 1,024 tokens."]},
}  # fmt: skip


class Page(HTMLParser):
    """Text, tags and attributes of a page; every tag must be closed in its order."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def run(tmp_path: Path, *contents: Any) -> Result:
    paths = []
    for i, content in enumerate(contents):
        paths.append(tmp_path / f"results-{i}.json")
        paths[-1].write_text(json.dumps(content), encoding="utf-8")
    return CliRunner().invoke(app, ["report", *map(str, paths), "-o", str(tmp_path / "report.html")])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    tmp_path = tmp_path_factory.mktemp("report")
    result = run(tmp_path, BENCH, EVALUATION, TUNED)
    assert result.exit_code == 0, result.output
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(parsed.tags)
    for name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("#", "data:image/png;base64,")), value
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)'\"]+)", page))


def test_the_page_is_valid(page: str) -> None:
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>")
    for tag in ("html", "head", "title", "body", "main", "h1"):
        assert parsed.tags.count(tag) >= 1
    assert ("lang", "en") in parsed.attributes
    identifiers = [value for name, value in parsed.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    used = {value[1:] for name, value in parsed.attributes if name in ("href", "xlink:href") and value[0] == "#"}
    used |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(identifiers)


def test_the_page_carries_the_numbers_of_the_results(page: str) -> None:
    text = " ".join(Page(page).words)
    for number in (
        "2.71",
        "3.55",
        "5.90e-03",
        "98.7 %",
        "+0.250",
        "1.18e-02",
        "85.0 % of 40",
        "123,457",
        "99.3 %",
        "4,242",
        "3.2e-03",
    ):
        assert number in text, number  # of the evaluation
    for number in (
        "1.37",
        "0.41x",
        "1.13 (1.02 to 1.24)",
        "2e-05",
        "312",
        "0.44",
        "0.310",
        "5.50",
        "0.80 (0.72 to 0.88)",
        "196,608",
        "4.80x",
    ):
        assert number in text, number  # of the bench
    for number in ("2.61", "7.10e-03", "1.40 (1.26 to 1.54)", "Do not compress contexts below 1,024 tokens."):
        assert number in text, number  # of the tuning
    for sentence in (
        "quanto-2 could not be measured on error: the package is <missing>",
        "FlashAttention was not compared: needs a GPU",
        "a <processor>",
        "Backend cpu",
    ):
        assert sentence in text, sentence
    assert "results-0.json was stopped before its end" in text
    assert "The machine was busy (load average 6.5)" in text
    assert page.count("<svg") == 6


def test_another_number_gives_another_page(tmp_path: Path, page: str) -> None:
    changed = copy.deepcopy(EVALUATION)
    changed["methods"][1]["memory"]["teacher_forced"]["coded_bits"] = 2.94
    assert run(tmp_path, changed).exit_code == 0
    other = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2.94" in other
    assert "2.94" not in page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kvcomp_results": 1, "kind": "other", "setting": {}}, "holds results of kind 'other'"),
        ({"kvcomp_results": 9, "kind": "bench", "setting": {}}, "version 9"),
        ({"kvcomp_results": 1, "kind": "tune", "setting": {}}, "lack what a report needs"),
        ({"kvcomp_results": 1, "kind": "bench", "setting": {"load_average": "busy"}}, "lack what a report needs"),
        ({"kvcomp_results": 1, "kind": "bench", "setting": {}, "attention": [{}]}, "lack what a report needs"),
        ({"kvcomp_results": 1, "kind": "tune", "setting": {}, "curves": []}, "lack what a report needs"),
        ([1, 2], "no results file"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    result = run(tmp_path, content)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "report.html").exists()


def test_without_results_it_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report"])
    assert result.exit_code == 1
    assert "run kvcomp evaluate" in " ".join(result.output.split())
