"""What a measurement has done so far, on disk, so that an interrupted one can go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kvcomp import disk
from kvcomp.errors import CorruptData, InvalidInput


def pieces(output: Path) -> Path:
    """Where an interrupted run leaves its pieces."""
    return output.with_name(output.name + ".partial")


class Journal:
    """Pieces of a measurement that are done, a JSON line each, so that a run that was stopped can go on.

    path: ends in ``.partial``, beside the results file. identity: what all pieces of one measurement share.
    resume: take the pieces that are there. Raises InvalidInput if they are of another measurement, or there are none.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], resume: bool) -> None:
        self.path = path
        self.pieces: dict[str, Any] = {}
        head = json.loads(json.dumps(identity, default=str))
        if resume:
            self._read(head)
        else:
            path.write_text(json.dumps(head) + "\n", encoding="utf-8")

    def _read(self, head: Any) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise InvalidInput(f"there is nothing to resume: {error}; run once without --resume") from None
        except UnicodeDecodeError:
            lines = []
        try:
            first = json.loads(lines[0])
        except (IndexError, ValueError):
            first = None
        if not isinstance(first, dict):
            raise CorruptData(f"{self.path} is not what an interrupted run left: run again without --resume")
        if first != head:
            other = sorted(name for name in {*first, *head} if first.get(name) != head.get(name))
            raise InvalidInput(
                f"{self.path} is of a run with another {', '.join(other)}: "
                "give the same options, or run again without --resume"
            )
        for line in lines[1:]:
            try:
                key, value = json.loads(line)
            except (TypeError, ValueError):
                break  # the line that was being written
            self.pieces[key] = value
        kept = [json.dumps(head), *(json.dumps([key, value]) for key, value in self.pieces.items())]
        disk.write(self.path, ["\n".join(kept).encode() + b"\n"])

    def __contains__(self, key: object) -> bool:
        return key in self.pieces

    def __getitem__(self, key: str) -> Any:
        return self.pieces[key]

    def piece(self, key: str, make: Callable[[], Any]) -> Any:
        """The piece of this key, as JSON gives it back; one that is missing is made, and then on disk."""
        if key not in self.pieces:
            line = json.dumps([key, make()])
            self.pieces[key] = json.loads(line)[1]
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        return self.pieces[key]

    def some(self, keys: Iterable[str]) -> list[Any]:
        """Those of these pieces that are there."""
        return [self.pieces[key] for key in keys if key in self.pieces]

    def part(self, name: str) -> Journal:
        """The pieces whose keys begin with a name and a slash, as a journal of their own in the same file."""
        return _Part(self, f"{name}/")

    def close(self) -> None:
        """The measurement is whole: forget the pieces."""
        self.path.unlink(missing_ok=True)

    def refused(self) -> None:
        """The measurement was refused: leave nothing unless something was measured before."""
        if not self.pieces:
            self.close()


class _Part(Journal):
    def __init__(self, whole: Journal, prefix: str) -> None:
        self.whole, self.prefix = whole, prefix

    def __contains__(self, key: object) -> bool:
        return f"{self.prefix}{key}" in self.whole

    def __getitem__(self, key: str) -> Any:
        return self.whole[self.prefix + key]

    def piece(self, key: str, make: Callable[[], Any]) -> Any:
        return self.whole.piece(self.prefix + key, make)

    def some(self, keys: Iterable[str]) -> list[Any]:
        return self.whole.some(self.prefix + key for key in keys)

    def part(self, name: str) -> Journal:
        return _Part(self.whole, f"{self.prefix}{name}/")

    def close(self) -> None:
        """Nothing to do: the whole journal is closed."""
