"""Instructions along a path through a kernel's machine code: basic blocks from nvdisasm, and the longest way from one
to another.

A path is longest among all that the control flow allows, so what it counts is a bound, whatever the branches on it
decide.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

LINE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+\{?\s*(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
ENCODING = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/\s*$")  # the upper half of an instruction, on a line of its own
LABEL = re.compile(r"(\.L_\w+|\$__\w+):")
PLACE = re.compile(r'//## File "[^"]*?([^/"]+)", line (\d+)')
TARGET = re.compile(r"`\(([.$]\w+)\)")


@dataclass(frozen=True)
class Control:
    """What the compiler tells the scheduler (Jia et al., Dissecting the NVIDIA Volta GPU architecture, 2018, 2.1).

    stall: cycles until the warp's next instruction. sets, frees: the barrier, of six, that is released when the result
    is there or the operands are read; NONE for none. waits: the barriers to wait for, a bit each.
    """

    NONE = 7
    stall: int = 1
    sets: int = NONE
    frees: int = NONE
    waits: int = 0

    @classmethod
    def of(cls, upper: int) -> Control:
        """From the upper 64 bits of an instruction."""
        bits = upper >> 41
        return cls(bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)


@dataclass(frozen=True)
class Instruction:
    """name: of the operation, such as LDS. places: (file, line) that it comes from, innermost function first."""

    name: str
    operation: str
    predicate: str
    operands: str
    places: tuple[tuple[str, int], ...]
    control: Control = Control()


@dataclass
class Block:
    """Instructions that run one after the other. after: numbers of the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    def count(self, name: str) -> int:
        return sum(x.name == name for x in self.instructions)


def nvdisasm() -> str:
    """Path of NVIDIA's disassembler, from pip's packages or the PATH. Raises SystemExit if it is not installed."""
    of_pip = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvdisasm"
    found = str(of_pip) if of_pip.exists() else shutil.which("nvdisasm")
    if not found:
        raise SystemExit("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    return found


def listing(cubin: bytes) -> list[str | Instruction]:
    """Labels and instructions of the kernel ``attend``, in order. cubin: compiled with -lineinfo if places are
    wanted.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([nvdisasm(), "-c", "-gi", "-hex", file.name], check=True, capture_output=True, text=True)
    section = next(x for x in re.split(r"\n\s*\.section\s+\.text\.", text.stdout)[1:] if x.startswith("attend"))
    found: list[str | Instruction] = []
    places: list[tuple[str, int]] = []
    last_was_place = False
    for line in section.splitlines():
        if place := PLACE.search(line):
            places = [*places, (place[1], int(place[2]))] if last_was_place else [(place[1], int(place[2]))]
        elif label := LABEL.match(line):
            found.append(label[1])
        elif code := LINE.match(line):
            found.append(Instruction(code[2].split(".")[0], code[2], (code[1] or "").strip(), code[3], tuple(places)))
        elif (upper := ENCODING.match(line)) and isinstance(found[-1], Instruction):
            found[-1] = replace(found[-1], control=Control.of(int(upper[1], 16)))
        last_was_place = bool(place)
    return found


def blocks(lines: Iterable[str | Instruction]) -> list[Block]:
    """The control flow of a warp that keeps together: it takes BRA.CONV and never BRA.DIV, which are there for lanes
    that have parted.
    """
    made, labels = [Block()], dict[str, int]()
    targets = list[tuple[int, str]]()
    falls = True  # whether control runs from the last block into what comes next
    for line in lines:
        new = isinstance(line, str) or not falls or bool(targets and targets[-1][0] == len(made) - 1)
        if new and made[-1].instructions:
            if falls:
                made[-1].after.append(len(made))
            made.append(Block())
        if isinstance(line, str):
            labels[line] = len(made) - 1
            falls = True
            continue
        made[-1].instructions.append(line)
        falls = True
        target = TARGET.search(line.operands)
        of_block = len(made) - 1
        local = target is not None and target[1].startswith(".L")
        if target and local and (line.name == "CALL" or (line.name == "BRA" and line.operation != "BRA.DIV")):
            targets.append((of_block, target[1]))
            falls = line.operation != "BRA.CONV" and bool(line.predicate or "P" in line.operands.split("`")[0])
        elif line.name == "BRX":  # to a place of a table, which nvdisasm lists
            targets += [(of_block, label) for label in re.findall(r"\.L_\w+", line.operands)]
            falls = False
        elif line.name in ("EXIT", "RET"):
            falls = bool(line.predicate)
    for number, label in targets:
        made[number].after.append(labels[label])
    return made


def loops(made: list[Block]) -> dict[int, frozenset[int]]:
    """The blocks of each natural loop, by its header."""
    order = _dominators(made)
    before: dict[int, list[int]] = {}
    for number, block in enumerate(made):
        for after in block.after:
            before.setdefault(after, []).append(number)
    found: dict[int, set[int]] = {}
    for tail, block in enumerate(made):
        for header in block.after:
            if tail in order and header in order[tail]:
                body, left = found.setdefault(header, {header}), [tail]
                while left:
                    at = left.pop()
                    if at not in body:
                        body.add(at)
                        left += before.get(at, [])
    return {header: frozenset(body) for header, body in found.items()}


def _dominators(made: list[Block]) -> dict[int, set[int]]:
    reached, left = set(), [0]
    while left:
        at = left.pop()
        if at not in reached:
            reached.add(at)
            left += made[at].after
    before: dict[int, set[int]] = {at: set() for at in reached}
    for at in reached:
        for after in made[at].after:
            before[after].add(at)
    found = {at: set(reached) for at in reached}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for at in sorted(reached - {0}):
            new = {at} | set.intersection(*(found[x] for x in before[at]))
            if new != found[at]:
                found[at], changed = new, True
    return found


def longest(
    made: list[Block], begin: int, end: int, within: frozenset[int], times: Mapping[int, int], through: Iterable[int]
) -> list[int] | None:
    """Blocks of the path with most instructions from ``begin`` to ``end`` inside ``within`` that meets all of
    ``through``.

    Edges back to the header of a loop are left out: a block of a loop that runs n times has n in ``times``.
    """
    back = {(at, header) for header, loop in loops(made).items() for at in loop if header in made[at].after}
    wanted = tuple(through)
    best: dict[tuple[int, frozenset[int]], tuple[int, int | None] | None] = {}

    def visit(at: int, left: frozenset[int]) -> tuple[int, int | None] | None:
        """Most instructions from ``at`` on and the block after it, with ``left`` to be met; None if there is no way."""
        left = left - {at}
        if (at, left) not in best:
            own = len(made[at].instructions) * times.get(at, 1)
            ways = []
            for after in made[at].after if at != end else []:
                if after in within and (at, after) not in back:
                    rest = visit(after, left)
                    if rest is not None:
                        ways.append((own + rest[0], after))
            if at == end:
                best[at, left] = None if left else (own, None)
            else:
                best[at, left] = max(ways, default=None)
        return best[at, left]

    left, path, at = frozenset(wanted), [], begin
    if visit(begin, left) is None:
        return None
    while True:
        path.append(at)
        step = visit(at, left)
        left = left - {at}
        if step is None or step[1] is None:
            return path
        at = step[1]
