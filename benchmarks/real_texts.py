"""Text for real models, read from the machine: prose and code of the running Python and of Debian, and conversations.

Each kind is some documents one after the other, cut into sequences that do not overlap and begin with a document.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvcomp.errors import InvalidInput
from kvcomp.evaluate.text import Tokens, encode, manual_text, start_ids, training_text

LICENSES, DOCUMENTS = Path("/usr/share/common-licenses"), Path("/usr/share/doc")
SHORTEST = 2000  # characters of a document
LARGEST = 60_000  # of which no more is read
TURNS = "{% for m in messages %}{{ m['role'].capitalize() }}: {{ m['content'] }}\n\n{% endfor %}"  # without a template

Documents = Iterator[str]


def prose(rng: np.random.Generator) -> Documents:
    """Topics of Python's manual, licences and what packages say of themselves, in turns."""
    manual = [text for _, text in manual_text()]
    sources = [manual, _files(LICENSES, "*"), _files(DOCUMENTS, "*/README*"), _files(DOCUMENTS, "*/*.txt")]
    orders = [[one[index] for index in rng.permutation(len(one))] for one in sources if one]
    while any(orders):
        for order in orders:
            if order:
                yield order.pop()


def code(rng: np.random.Generator) -> Documents:
    """Files of the standard library."""
    files = [text for _, text in training_text([])]
    for index in rng.permutation(len(files)):
        if len(files[index]) >= SHORTEST:
            yield files[index][:LARGEST]


def conversations(rng: np.random.Generator, tokenizer: Any) -> Documents:
    """Questions on functions of the standard library, topics of its manual and sums, answered from there, as the
    model's chat template lays them out.
    """
    described, topics = functions(rng), [text for _, text in manual_text()]
    template = None if tokenizer.chat_template else TURNS
    while True:
        turns: list[tuple[str, str]] = []
        for _ in range(int(rng.integers(24, 40))):
            kind = rng.integers(6)
            if kind < 4:
                found = next(described, None)
                if found is None:
                    return
                module, name, about, source = found
                turns.append((f"What does {name} in the module {module} do?", about))
                if kind < 2:
                    turns.append(("Show me how it is written.", f"```python\n{source}\n```"))
            elif kind == 4:
                text = topics[int(rng.integers(len(topics)))].strip().split("\n\n")
                turns.append((f"Explain this to me: {text[0][:80]}", "\n\n".join(text[1:6])[:1500] or text[0]))
            else:
                a, b = rng.integers(10, 1000, 2).tolist()
                turns.append((f"And what is {a} times {b}?", f"{a} times {b} is {a * b}."))
        messages = [
            {"role": role, "content": content}
            for asked, answer in turns
            for role, content in (("user", asked), ("assistant", answer))
        ]
        options = {"chat_template": template} if template else {}
        yield tokenizer.apply_chat_template(messages, tokenize=False, **options)


KINDS: dict[str, Callable[[np.random.Generator, Any], Documents]] = {
    "prose": lambda rng, tokenizer: prose(rng),
    "code": lambda rng, tokenizer: code(rng),
    "chat": conversations,
}


def sequences(kind: str, tokenizer: Any, count: int, tokens: int, seed: int) -> Tokens:
    """Token ids of ``count`` sequences of so many tokens each, one after the other.

    Raises InvalidInput if this machine has too little text.
    """
    start = [] if kind == "chat" and tokenizer.chat_template else start_ids(tokenizer)
    documents = KINDS[kind](np.random.default_rng(seed), tokenizer)
    found = []
    for _ in range(count):
        ids: list[int] = []
        while len(ids) < tokens:
            text = next(documents, None)
            if text is None:
                raise InvalidInput(f"this machine has not enough {kind}: lower the number of prompts")
            ids += [*start, *encode(tokenizer, [text])[0]]
        found.append(np.asarray(ids[:tokens], dtype=np.int64))
    return np.concatenate(found)


def _files(folder: Path, pattern: str) -> list[str]:
    """Texts of a folder, each once."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        try:
            text = path.read_text(encoding="utf-8")[:LARGEST] if path.is_file() else ""
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= SHORTEST:
            found[text] = path
    return list(found)


def functions(rng: np.random.Generator) -> Iterator[tuple[str, str, str, str]]:
    """(module, name, what its docstring says, source) of functions of the standard library."""
    files = training_text([])
    for index in rng.permutation(len(files)):
        name, text = files[index]
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        lines = text.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (about := ast.get_docstring(node)):
                source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                if len(source) < 4000:
                    module = name.removesuffix(".py").replace("/", ".")
                    yield module, node.name, inspect.cleandoc(about), source
