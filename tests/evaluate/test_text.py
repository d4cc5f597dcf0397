"""Tests of the text that models are scored on."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kvcomp.errors import InvalidInput
from kvcomp.evaluate.text import LookupLists, encode, held_out_names, held_out_text, join, manual_text, training_text

MODEL = Path(__file__).parents[2] / "examples" / "tiny-lm"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODEL)
    return loaded


@pytest.fixture(scope="module")
def lists(tokenizer: PreTrainedTokenizerBase) -> LookupLists:
    return LookupLists(tokenizer)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name in (
        "kept.py",
        "held.py",
        "package/held.py",
        "package/kept.py",
        "test/test_kept.py",
        "unittest/test/testmock.py",
        "lib2to3/tests/data.py",
        "site-packages/other.py",
        "dist-packages/other.py",
        "pydoc_data/topics.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    return tmp_path


def test_held_out_text_skips_files_that_are_missing(library: Path) -> None:
    names = ["package/held.py", "distutils/gone.py", "held.py"]
    assert held_out_text(names, library) == [
        ("held.py", "# held.py\n"),
        ("package/held.py", "# package/held.py\n"),
    ]


def test_training_text_leaves_out_held_out_files_tests_and_packages(library: Path) -> None:
    names = ["package/held.py", "held.py"]
    assert [name for name, _ in training_text(names, library)] == ["kept.py", "package/kept.py"]


def test_held_out_and_training_text_of_this_python_are_disjoint() -> None:
    names = held_out_names(MODEL / "held_out.txt")
    held_out = held_out_text(names)
    training = training_text(names)
    assert not {name for name, _ in held_out} & {name for name, _ in training}
    assert not {text for _, text in held_out} & {text for _, text in training if text.strip()}
    assert len(training) > 10 * len(held_out)


def test_there_are_50_000_tokens_of_held_out_text(tokenizer: PreTrainedTokenizerBase) -> None:
    split_away = ("distutils/", "idlelib/", "lib2to3/", "tkinter/", "turtledemo/")
    names = [name for name in held_out_names(MODEL / "held_out.txt") if not name.startswith(split_away)]
    assert len(join(tokenizer, held_out_text(names))) > 50_000
    assert len(join(tokenizer, manual_text())) > 50_000


def test_join_leads_each_text_with_the_begin_of_text_token(tokenizer: PreTrainedTokenizerBase) -> None:
    first, second = encode(tokenizer, ["import os\n", "x = 1\n"])
    joined = join(tokenizer, [("a", "import os\n"), ("b", "x = 1\n")])
    assert joined.tolist() == [0, *first, 0, *second]


@pytest.mark.parametrize("tokens", [128, 129, 130, 131, 132, 133, 134, 135, 1024, 2048, 4096])
def test_list_has_the_requested_length(lists: LookupLists, tokens: int) -> None:
    drawn = lists.draw(np.random.default_rng(1), tokens)
    assert drawn.tokens.shape == (tokens,)
    assert len(drawn.answers) == len(drawn.records) == tokens // 24


def test_list_is_a_function_of_the_seed(lists: LookupLists) -> None:
    first, again, other = (lists.draw(np.random.default_rng(seed), 512) for seed in (3, 3, 4))
    assert first.tokens.tolist() == again.tokens.tolist()
    assert first.answers == again.answers
    assert first.tokens.tolist() != other.tokens.tolist()


def test_list_tokens_are_those_of_its_text(lists: LookupLists, tokenizer: PreTrainedTokenizerBase) -> None:
    drawn = lists.draw(np.random.default_rng(5), 1000)
    assert drawn.tokens[0] == tokenizer.bos_token_id
    tokens = drawn.tokens[1:].tolist()
    assert encode(tokenizer, [str(tokenizer.decode(tokens))]) == [tokens]


def test_spans_point_at_the_values(lists: LookupLists, tokenizer: PreTrainedTokenizerBase) -> None:
    drawn = lists.draw(np.random.default_rng(7), 1000, lookups=30)
    text = str(tokenizer.decode(drawn.tokens[1:].tolist()))
    opening, asked = text.split("### lookup\n")
    written = dict(line.split(" = ") for line in opening.split("### records\n")[1].splitlines())
    lookups = [line.split(" = ") for line in asked.splitlines()]
    assert str(tokenizer.decode(drawn.tokens[drawn.context :].tolist())) == asked
    assert len({key for key, _ in lookups}) == len(lookups) == 30
    for (key, value), answer, record in zip(lookups, drawn.answers, drawn.records, strict=True):
        assert written[key] == value
        for start, end in (answer, record):
            assert str(tokenizer.decode(drawn.tokens[start:end].tolist())).strip() == value
        assert record[1] < drawn.context < answer[0]
        assert answer[1] - answer[0] == (4 if value.isdigit() else 2)


def test_list_too_short_for_its_lookups_is_refused(lists: LookupLists) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        lists.draw(np.random.default_rng(0), 100, lookups=50)


def test_list_with_too_few_keys_is_refused(lists: LookupLists) -> None:
    with pytest.raises(ValueError, match="ask for more look-ups"):
        lists.draw(np.random.default_rng(0), 16_384, lookups=10)


def test_a_python_without_its_sources_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidInput, match="no sources of its standard library"):
        join(tokenizer, [])
