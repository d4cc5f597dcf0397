"""Tasks of lm-evaluation-harness that small models can do, made from the running Python's own documentation.

- recall: a passage of Python's manual, and which of four of its words comes next. All four stand far enough back to be
  compressed, and nowhere since.
- functions: a list of functions and what their docstrings say; which of four of them says what one function does.
- codes: a list of words with a number each; which of four of them is the number of one word.

Ten questions are asked of a list. Documents are drawn from a seed, so that all methods answer the same ones, and
written where only this run sees them. The model is one of `make models`.

    python benchmarks/real_tasks.py [--resume]
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from kvcomp.cli.common import plain_errors, resumable
from kvcomp.errors import InvalidInput
from kvcomp.evaluate.methods import KVComp, Method, baseline
from kvcomp.evaluate.tasks import Tasks
from kvcomp.evaluate.text import manual_text
from kvcomp.results import schema as results
from real import CALIBRATIONS, calibrated
from real_models import REAL_MODELS, load
from real_texts import functions

OUTPUT = Path(__file__).parent / "results" / "real_tasks.json"
SEED = 20261129
CHARACTERS = 2400  # of a context, some 600 tokens
RAW_CHARACTERS = 600  # at its end, of which nothing may be compressed yet: 127 tokens of a window
CHOICES = 4
QUESTIONS = 10  # of a list
WORD = re.compile(r"(?<= )[a-z]{5,12}(?=[ ,.;:])")
AGAIN = "\n\nAgain:"  # a list ends here, for all its questions, so that it is read once
LEVEL = "kvcomp-klt:balanced"

Document = dict[str, Any]
screen = Console()


def recall(rng: np.random.Generator) -> Iterator[Document]:
    """Passages, each followed by a word that they had before."""
    topics = [re.sub(r"\s+", " ", text) for _, text in manual_text()]
    topics = [text for text in topics if len(text) > CHARACTERS + RAW_CHARACTERS]
    while True:
        text = topics[int(rng.integers(len(topics)))]
        begin = int(rng.integers(len(text) - CHARACTERS - RAW_CHARACTERS))
        begin = text.index(" ", begin) + 1
        raw = begin + CHARACTERS - RAW_CHARACTERS
        far, near = set(WORD.findall(text[begin:raw])), set(WORD.findall(text[raw : begin + CHARACTERS]))
        known = sorted(far - near)
        for found in WORD.finditer(text, begin + CHARACTERS):
            if found[0] in known and len(known) >= CHOICES:
                others = [word for word in known if word != found[0]]
                yield _choice(rng, text[begin : found.start() - 1], found[0], others)
                break
            near.add(found[0])
            known = sorted(far - near)


def explained(rng: np.random.Generator) -> Iterator[Document]:
    """Lists of functions with the first paragraph of their docstrings."""
    about: dict[str, str] = {}
    for _, name, text, _ in functions(rng):
        line = re.sub(r"\s+", " ", text.split("\n\n")[0]).strip()
        if 30 <= len(line) <= 120 and not name.startswith("_") and line not in about.values():
            about.setdefault(name, line)
        if sum(map(len, [*about, *about.values()])) >= CHARACTERS:
            yield from _asked(rng, {f"{name}:": line for name, line in about.items()})
            about = {}


def codes(rng: np.random.Generator) -> Iterator[Document]:
    """Lists of words and numbers."""
    words = sorted({word for _, text in manual_text() for word in WORD.findall(text)})
    while True:
        drawn = rng.permutation(len(words))[: CHARACTERS // 30]
        numbers = rng.permutation(np.arange(1000, 10_000))
        pairs = zip(drawn, numbers, strict=False)
        yield from _asked(rng, {f"The code of {words[word]} is": f"{number}." for word, number in pairs})


def _asked(rng: np.random.Generator, pairs: dict[str, str]) -> Iterator[Document]:
    """Questions on a list of pairs, those whose end may be raw left out."""
    lines = [f"{asked} {answer}" for asked, answer in pairs.items()]
    ends = np.cumsum([len(line) + 1 for line in lines])
    far = np.flatnonzero(ends < ends[-1] - RAW_CHARACTERS)
    for index in rng.permutation(far)[:QUESTIONS]:
        asked, right = list(pairs.items())[index]
        others = [f"{asked} {answer}" for answer in pairs.values() if answer != right]
        yield _choice(rng, "\n".join(lines) + AGAIN, f"{asked} {right}", others)


def _choice(rng: np.random.Generator, text: str, right: str, others: Sequence[str]) -> Document:
    """A question with its choices in any order."""
    choices = [right, *(others[index] for index in rng.permutation(len(others))[: CHOICES - 1])]
    choices = [choices[index] for index in rng.permutation(CHOICES)]
    return {"text": text, "choices": choices, "answer": choices.index(right)}


TASKS: dict[str, Callable[[np.random.Generator], Iterator[Document]]] = {
    "recall": recall,
    "functions": explained,
    "codes": codes,
}
FORM = {
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}


def write(folder: Path, count: int) -> list[Path]:
    """A task's .yaml file for each, beside so many documents. Raises InvalidInput if Python documents too little."""
    paths: list[Path] = []
    for name, make in TASKS.items():
        found = make(np.random.default_rng([SEED, len(paths)]))
        data, path = folder / f"{name}.json", folder / f"{name}.yaml"
        lines = [json.dumps(one) for one in islice(found, count)]
        if len(lines) < count:
            raise InvalidInput(f"this Python documents too little for {count} of {name}: lower --documents")
        data.write_text("\n".join(lines), encoding="utf-8")
        where = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        form = {"dataset_path": "json", "dataset_kwargs": where, **FORM}
        rows = [f"task: kvcomp_{name}", *(f"{key}: {json.dumps(value)}" for key, value in form.items())]
        path.write_text("\n".join(rows), encoding="utf-8")
        paths.append(path)
    return paths


def methods(config: Any) -> list[Method]:
    """What answers."""
    ours = [one for one in calibrated(config, sorted(CALIBRATIONS.glob("*.kvcal"))) if one.name == LEVEL]
    presets = map(KVComp, ("kvcomp", "kvcomp:fine"))
    return [baseline("uncompressed"), *presets, *ours, baseline("kivi-4")]


def show(runs: Sequence[dict[str, Any]]) -> None:
    for run in runs:
        table = Table("method", *run["methods"][0]["tasks"], title=run["model"])
        for one in run["methods"]:
            cells = [
                f"{100 * of['acc']['mean']:.1f} ± {100 * of['acc']['standard_error']:.1f}"
                for of in one["tasks"].values()
            ]
            table.add_row(one["name"], *cells)
        screen.print(table)


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"{' or '.join(REAL_MODELS)}")] = None,
    task: Annotated[list[str] | None, typer.Option(help=f"{', '.join(TASKS)} [default: all]")] = None,
    documents: Annotated[int, typer.Option(min=2, help="Of each task")] = 100,
    output: Annotated[Path, typer.Option(help="Where the results go")] = OUTPUT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run was stopped")] = False,
) -> None:
    with plain_errors(), tempfile.TemporaryDirectory() as folder:
        names, asked = model or ["smollm2-135m"], task or list(TASKS)
        if not {*names} <= {*REAL_MODELS} or not {*asked} <= {*TASKS}:
            raise InvalidInput(f"models are {', '.join(REAL_MODELS)} and tasks {', '.join(TASKS)}")
        paths = [path for path in write(Path(folder), documents) if path.stem in asked]
        chosen: dict[str, Any] = {"models": names, "documents": documents, "characters": CHARACTERS, "seed": SEED}
        about = results.environment(**chosen, tasks=asked)
        runs: list[dict[str, Any]] = []

        def report(stopped: bool) -> None:
            results.write(output, "real_tasks", about, partial=stopped, runs=runs)
            show(runs)

        with resumable(output, chosen, resume, report) as journal:
            harness = Tasks([str(path) for path in paths])
            for name in names:
                loaded, tokenizer = load(name)
                chosen_methods = methods(loaded.config)
                of_model: list[dict[str, Any]] = [
                    {"name": one.name, "settings": one.settings(), "tasks": {}} for one in chosen_methods
                ]
                runs.append({"model": name, "methods": of_model})
                for path, name_there in zip(paths, harness.names, strict=True):
                    for method, found in zip(chosen_methods, of_model, strict=True):
                        run = partial(harness.run, name_there, loaded, tokenizer, method, None, SEED)
                        found["tasks"][path.stem] = journal.piece(f"{name}/{method.name}/{path.stem}", run)


if __name__ == "__main__":
    typer.run(main)
