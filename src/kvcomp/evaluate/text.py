"""Text to score a model on: Python's own standard library, and generated look-up lists.

Nothing is stored with the package. The standard library is read from the running Python, and the look-up lists are
drawn from a seed.
"""

import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvcomp.errors import InvalidInput

Tokens = NDArray[np.int64]

_MANUAL = "pydoc_data/topics.py"


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    @property
    def bos_token_id(self) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    if not texts:  # which not every tokenizer takes
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids


def held_out_names(path: Path) -> list[str]:
    """Names listed one a line in a model's ``held_out.txt``, relative to the standard library."""
    return path.read_text(encoding="utf-8").split()


def held_out_text(names: Iterable[str], library: Path | None = None) -> list[tuple[str, str]]:
    """(name, text) of each held-out file that this Python has."""
    root = library or _standard_library()
    found = ((name, _read(root / name)) for name in sorted(names))
    return [(name, text) for name, text in found if text is not None]


def training_text(held_out: Iterable[str], library: Path | None = None) -> list[tuple[str, str]]:
    """(name, text) of the rest of the standard library, less its tests and the manual."""
    root = library or _standard_library()
    excluded = {*held_out, _MANUAL}
    pairs: list[tuple[str, str]] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        folders = name.split("/")[:-1]
        if name in excluded or "test" in folders or name.startswith("lib2to3/tests/"):
            continue
        if "site-packages" in folders or "dist-packages" in folders:
            continue
        text = _read(path)
        if text:
            pairs.append((name, text))
    return pairs


def manual_text() -> list[tuple[str, str]]:
    """(topic, text) of the Python manual that `help` shows: prose, and never trained on."""
    from pydoc_data.topics import topics

    return sorted(topics.items())


def join(tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]]) -> Tokens:
    """Token ids of the texts one after the other, each led by the begin-of-text token. Raises InvalidInput for none."""
    start, texts = start_ids(tokenizer), [text for _, text in pairs]
    if not texts:
        raise InvalidInput("this Python has no sources of its standard library to read: give a --text")
    parts = [start + ids for ids in encode(tokenizer, texts)]
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


@dataclass(frozen=True)
class LookupList:
    """Records of key and value, then look-ups of some of them, as one token sequence."""

    tokens: Tokens
    context: int
    """``tokens[:context]`` is what a cache holds before the first look-up."""
    answers: tuple[tuple[int, int], ...]
    """[start, end) of the values looked up."""
    records: tuple[tuple[int, int], ...]
    """[start, end) of the same values in the records."""


class LookupLists:
    """Draws look-up lists for one tokenizer.

    A key is a lower-case word of one token; a value is a 4-digit number or two such words.
    The tokens are those that the tokenizer gives for the whole text::

        ### records
        key = 1234
        other = two words
        ### lookup
        other = two words
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        vocabulary = sorted({_letters(token) for token in tokenizer.get_vocab()} - {""})
        as_key = encode(tokenizer, vocabulary)
        as_value = encode(tokenizer, [f"= {word}" for word in vocabulary])
        self._words = [word for word, ids in zip(vocabulary, as_value, strict=True) if len(ids) == 2]
        single = {word for word, ids in zip(vocabulary, as_key, strict=True) if len(ids) == 1}
        self._keys = [word for word in self._words if word in single]

    @property
    def size(self) -> int:
        """How many keys there are."""
        return len(self._keys)

    def key(self, rng: np.random.Generator) -> str:
        """A key at random."""
        return self._keys[int(rng.integers(len(self._keys)))]

    def draw(self, rng: np.random.Generator, tokens: int, lookups: int | None = None) -> LookupList:
        """Draw a list of exactly ``tokens`` tokens that ends in ``lookups`` look-ups, one in 24 tokens if None.

        A first line of words takes up the tokens that are too few for one more record.
        Raises ValueError if there are too few tokens, or too few keys.
        """
        lookups = tokens // 24 if lookups is None else lookups
        lines, answer_at = self._lines(rng, min(len(self._keys), tokens // 4))
        lengths = [len(line) for line in lines]
        newline, records_title, lookup_title = encode(self._tokenizer, ["\n", "### records\n", "### lookup\n"])
        start = start_ids(self._tokenizer)
        room = tokens - len(start) - len(records_title) - len(lookup_title) - 2 * sum(lengths[:lookups])
        count = lookups
        while count < len(lines) and lengths[count] <= room:
            room -= lengths[count]
            count += 1
        if room < 0 or lookups > len(lines):
            raise ValueError(f"{lookups} look-ups do not fit in {tokens} tokens")
        if count == len(lines) and room > max(lengths):
            raise ValueError(f"{len(lines)} keys do not fill {tokens} tokens: ask for more look-ups")

        padding = rng.choice(len(self._words), size=max(room - 1, 0))
        ids = [*start, *_padding_line(self._tokenizer, [self._words[i] for i in padding], room, newline)]
        ids += records_title
        record_at: dict[int, int] = {}
        for index in rng.permutation(count):
            record_at[int(index)] = len(ids)
            ids += lines[index]
        ids += lookup_title
        context = len(ids)
        answers, records = [], []
        for index in rng.permutation(lookups):
            value = (answer_at[index], lengths[index] - len(newline))
            answers.append((len(ids) + value[0], len(ids) + value[1]))
            records.append((record_at[int(index)] + value[0], record_at[int(index)] + value[1]))
            ids += lines[index]
        return LookupList(np.asarray(ids, dtype=np.int64), context, tuple(answers), tuple(records))

    def _lines(self, rng: np.random.Generator, count: int) -> tuple[list[list[int]], list[int]]:
        """Token ids of ``count`` records of different keys, and where the value starts in each."""
        keys = [self._keys[i] for i in rng.permutation(len(self._keys))[:count]]
        numbers = rng.integers(1000, 10000, size=count)
        words = rng.integers(len(self._words), size=(count, 2))
        is_number = rng.random(count) < 0.6
        values = [
            str(numbers[i]) if is_number[i] else " ".join(self._words[word] for word in words[i]) for i in range(count)
        ]
        lines = encode(self._tokenizer, [f"{key} = {value}\n" for key, value in zip(keys, values, strict=True)])
        openings = encode(self._tokenizer, [f"{key} = " for key in keys])
        return lines, [_common(line, opening) for line, opening in zip(lines, openings, strict=True)]


def _padding_line(tokenizer: Tokenizer, words: Sequence[str], length: int, newline: Sequence[int]) -> list[int]:
    if length == 0:
        return []
    ids = encode(tokenizer, ["=" + "".join(f" {word}" for word in words)])[0][1:]
    return [*ids, *newline]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _letters(token: str) -> str:
    """The word of a vocabulary entry, or "" where it is none: entries may mark a space before the word."""
    word = token.lstrip("Ġ▁")
    return word if word.isascii() and word.isalpha() and word.islower() and 3 <= len(word) <= 9 else ""


def start_ids(tokenizer: Tokenizer) -> list[int]:
    """The begin-of-text token, if the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _read(path: Path) -> str | None:
    """The file's text, or None where there is no such file or it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
