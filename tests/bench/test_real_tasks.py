"""Documents of the tasks for real models: what is asked for was said, far enough back to be compressed."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")

import real_tasks
from kvcomp.errors import InvalidInput

COUNT = 30


@pytest.mark.parametrize("task", real_tasks.TASKS)
@pytest.mark.parametrize("seed", range(3))
def test_only_the_right_choice_was_said_and_it_may_be_compressed(task: str, seed: int) -> None:
    for one in islice(real_tasks.TASKS[task](np.random.default_rng(seed)), COUNT):
        assert len(set(one["choices"])) == real_tasks.CHOICES
        compressed = one["text"][: -real_tasks.RAW_CHARACTERS]
        said = [choice for choice in one["choices"] if choice in compressed]
        if task == "recall":  # every choice is a word of the passage
            assert len(said) == real_tasks.CHOICES
            words = one["text"][-real_tasks.RAW_CHARACTERS :].split()
            assert not set(words) & set(one["choices"])
        else:
            assert said == [one["choices"][one["answer"]]]


def test_documents_follow_from_the_seed(tmp_path: Path) -> None:
    texts = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths = real_tasks.write(tmp_path / name, COUNT)
        texts.append([path.with_suffix(".json").read_text(encoding="utf-8") for path in paths])
    assert texts[0] == texts[1]
    answers = [json.loads(line)["answer"] for text in texts[0] for line in text.splitlines()]
    assert set(answers) == set(range(real_tasks.CHOICES))  # no place is always right


def test_too_many_documents_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_tasks, "TASKS", {"functions": real_tasks.explained})
    with pytest.raises(InvalidInput, match="lower --documents"):
        real_tasks.write(tmp_path, 10_000)
