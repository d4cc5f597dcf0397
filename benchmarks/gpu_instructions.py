"""Registers, shared memory, spills and instructions of the attention kernel, from machine code compiled without a GPU.

Compiles the shipped builds for every architecture and writes benchmarks/results/gpu_instructions.json. Instructions are
those of the path of a whole page through the machine code, from one page to the next: look-up of the page, copies,
stream starts, scores, softmax, weights, sums. Where branches leave a choice the longest path counts, without

- what reads raw tokens, or pages of which not all tokens count (RARE), and readers other than the one that is asked
  for;
- scaling down the sums, which a page asks for only if a score is 2^8 times as likely as any before (``scale_down``);
- copies of what lies behind the first 4 KB of a block, where 2.5 bits a code do not reach (at 256 channels they do, and
  count).

A loop runs as often as makes the tensor-core products of a page. An instruction counts for all lanes whether its
predicate holds or not. tests/emulator holds the products, shuffles and powers on the path against those of a run.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import groupby, islice, product
from pathlib import Path
from typing import Any

from kvcomp.kernels.cuda.compile import compile_now, nvrtc_version, options_for, sources_hash
from kvcomp.kernels.cuda.layout import LANES, SOURCES, AttendBuild, attend_build, machine
from kvcomp.spec import CodecSpec, Coding, TensorSpec
from sass import Block, Instruction, blocks, listing, longest, loops

RESULTS = Path(__file__).parent / "results" / "gpu_instructions.json"
SOURCE = "decode_attention.cu"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
CHANNELS = (128, 64, 256, 96, 80, 192)
BITS = 2.5
FIRST_COPIES = 4096  # bytes of a block that ``stage`` copies without a question
RARE = {"weigh_some", "scale_down", "RawChunk", "raw_values"}


def _klt(limit: int, coding: Coding = "huffman") -> CodecSpec:
    of_both = TensorSpec("head", None, coding, limit=limit, classes=4, steps=((0.1,),))
    return CodecSpec(of_both, of_both).layer(0, 1)


SPECS = {
    "huffman, limit 10": CodecSpec(TensorSpec("block", 0.05, limit=10), TensorSpec("token", 0.1, limit=10)),
    "huffman, limit 12": CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1)),
    "fixed width": CodecSpec(TensorSpec("block", 1 / 14, "fixed"), TensorSpec("token", 1 / 14, "fixed")),
    "kvcomp-klt, limit 10": _klt(10),
    "kvcomp-klt, limit 12": _klt(12),
    "packed-klt": _klt(12, "patched"),
}
# Loads for each product of the readers of a fixed width, at least and at most.
WIDTHS = {f"{width} bits": (width / 8, width / 8) for width in range(1, 8)}
# How the codes of a block are read: by symbols that are the codes, with low bits behind them, with more of them
# than two pairs of a window have, out of tables in global memory, at a fixed width.
FORMS = ("symbols", "split", "long", "global tables", *WIDTHS)
# Pieces of so many bits, with as many exceptions in two of them as lanes put to their places in one round.
PIECES = {f"pieces, {width} bits": width for width in (2, 3, 4)}
# The same of all that do not read shared memory alone.
LOADS = {"global tables": (1.5, 3), "any width": (0.9, 1.25), **WIDTHS}
WIDE = ("long", "global tables", "any width")  # codes up to 255


@dataclass(frozen=True)
class Turn:
    """What the loop over the pieces of a block takes at once: the widths of its pieces, and their exceptions."""

    widths: tuple[int, ...]
    exceptions: int

    @property
    def rounds(self) -> int:
        """In how many the lanes of a warp put the exceptions to their places."""
        return -(-self.exceptions // LANES)


@dataclass(frozen=True)
class Page:
    """One page for one KV head. trace: the instructions of a lane in order. keys, values: how many of them read blocks
    of K and of V.
    """

    trace: tuple[Instruction, ...]
    keys: int
    values: int

    @property
    def rest(self) -> int:
        """Instructions outside of the readers."""
        return len(self.trace) - self.keys - self.values

    @cached_property
    def names(self) -> Counter[str]:
        """How many of each operation."""
        return Counter(one.name for one in self.trace)

    def a_code(self, channels: int) -> float:
        """For each code: a lane decodes 2 D of K and 2 D of V."""
        return len(self.trace) / (4 * channels)


@lru_cache(maxsize=1)
def functions() -> dict[tuple[str, int], str]:
    """The function that a line of the sources belongs to."""
    found = {}
    for path in SOURCES.glob("*.cu*"):
        name = ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if begin := re.match(r"\s*(?:INLINE|KERNEL) .*?(?<!__launch_bounds__)\b(?!__launch_bounds__)(\w+)\(", line):
                name = begin[1]
            found[path.name, number] = name
    return found


def _inside(instruction: Instruction, names: set[str]) -> bool:
    return any(functions().get(place) in names for place in instruction.places)


def _off_the_path(block: Block, behind: bool) -> bool:
    """Whether a block is there for what a page seldom is. behind: leave out what copies the end of a long block."""
    work = _work(block)
    copies = [x for x in work if x.name == "LDGSTS"]
    few = behind and 0 < len(copies) < FIRST_COPIES // 512 and all(_inside(x, {"copy_lane"}) for x in copies)
    return few or (bool(work) and all(_inside(x, RARE) for x in work))


def page_of(lines: list[str | Instruction], build: AttendBuild, form: str, of_values: str = "") -> Page | None:
    """What a page costs whose blocks of K and V are of this form; None if the build does not read such blocks so.

    of_values: the form of the blocks of V, where it is another.
    """
    made = blocks(lines)
    of_loops = loops(made)

    def count(of: frozenset[int], name: str) -> int:
        return sum(made[i].count(name) for i in of)

    header, page = max((x for x in of_loops.items() if count(x[1], "HMMA")), key=lambda x: len(x[1]))
    readers = [x for x in of_loops.values() if x < page and count(x, "HMMA")]

    def size(of: frozenset[int]) -> int:
        return sum(len(made[i].instructions) for i in of)

    def reader(function: str, form: str) -> frozenset[int] | None:
        mine = [x for x in readers if any(_inside(one, {function}) for i in x for one in made[i].instructions)]
        in_shared = [x for x in mine if count(x, "LDS") >= 1.75 * count(x, "HMMA")]
        if form in FORMS[:3]:
            long = [x for x in in_shared if count(x, "LDS") < 2.5 * count(x, "HMMA")]
            found = long if form == "long" else sorted((x for x in in_shared if x not in long), key=size)
            return next(islice(found, form == "split", None), None)
        least, most = LOADS[form]
        fits = (x for x in mine if x not in in_shared and least <= count(x, "LD") / count(x, "HMMA") <= most)
        return next(fits, None)

    forms = form, of_values or form
    keys, values = reader("multiply_keys", forms[0]), reader("multiply_values", forms[1])
    if keys is None or values is None:
        return None
    # Codes up to 255 take two products.
    products = [build.channels // 2 * (2 if one in WIDE else 1) for one in forms]
    times = {i: of // count(x, "HMMA") for x, of in zip((keys, values), products, strict=True) for i in x}
    behind = build.channels * 64 * BITS / 8 <= FIRST_COPIES
    others = frozenset().union(*readers) - keys - values
    within = frozenset(i for i in page - others if i in keys | values or not _off_the_path(made[i], behind))
    through = [max(x, key=lambda i: made[i].count("HMMA")) for x in (keys, values)]
    paths = [longest(made, header, i, within, times, through) for i in within if header in made[i].after]
    path = max((x for x in paths if x), key=lambda x: sum(len(made[i].instructions) * times.get(i, 1) for i in x))
    for x, function, of in zip((keys, values), ("multiply_keys", "multiply_values"), products, strict=True):
        # The compiler may take the first turn of a loop out of it.
        ahead = [one for i in path if i not in x for one in made[i].instructions if _inside(one, {function})]
        times |= dict.fromkeys(x, (of - sum(one.name == "HMMA" for one in ahead)) // count(x, "HMMA"))
    trace = list[Instruction]()
    for turns, turn in groupby(path, key=lambda i: next((x for x in (keys, values) if i in x), None)):
        once = [one for i in turn for one in made[i].instructions]
        trace += once * (times[next(iter(turns))] if turns else 1)
    if any(one.name == "CALL" and "`(.L" not in one.operands for one in trace):
        raise ValueError("the path calls what is not counted")
    read = (sum(len(made[i].instructions) * times[i] for i in path if i in x) for x in (keys, values))
    return Page(tuple(trace), *read)


def page_of_pieces(
    lines: list[str | Instruction],
    build: AttendBuild,
    keys: Sequence[Turn],
    values: Sequence[Turn],
) -> Page:
    """What a page costs whose blocks of K and V are such pieces, and lie in shared memory."""
    made = blocks(lines)
    of_loops = loops(made)

    def count(of: frozenset[int], name: str) -> int:
        return sum(made[i].count(name) for i in of)

    header, page = max((x for x in of_loops.items() if count(x[1], "HMMA")), key=lambda x: len(x[1]))

    def reader(function: str) -> frozenset[int]:
        """The innermost loop of a function that multiplies, and reads shared memory."""

        def share(of: frozenset[int]) -> float:
            inside = [_inside(x, {function}) for i in of for x in made[i].instructions if x.name == "HMMA"]
            return sum(inside) / max(1, len(inside))

        found = [x for x in of_loops.values() if x < page and not count(x, "LD") and share(x) > 0.9]
        return min(found, key=len)

    of_keys, of_values = reader("multiply_keys_of_pieces"), reader("multiply_values_of_pieces")
    halves = min((x for x in of_loops.values() if of_keys < x < page), key=len)
    readers = [x for x in of_loops.values() if x < page and count(x, "HMMA")]
    kept = halves | of_values
    others = frozenset().union(*readers) - kept
    behind = build.channels * 64 * BITS / 8 <= FIRST_COPIES
    within = frozenset(i for i in page - others if i in kept or not _off_the_path(made[i], behind))
    through = [max(x, key=lambda i: made[i].count("HMMA")) for x in (of_keys, of_values)]
    paths = [longest(made, header, i, within, {}, through) for i in within if header in made[i].after]
    path = max((x for x in paths if x), key=len)
    trace, read = list[Instruction](), [0, 0]
    turns_of = {
        kind: [_turn(made, of_loops, x, turn) for turn in turns]
        for kind, (x, turns) in enumerate(((of_keys, keys), (of_values, values)))
    }

    def of_blocks(numbers: Iterable[int]) -> list[Instruction]:
        return [one for i in numbers for one in made[i].instructions]

    for where, group in groupby(path, key=lambda i: 0 if i in halves else 1 if i in of_values else None):
        numbers = list(group)
        begin = len(trace)
        if where == 0:
            before = [i for i in numbers if i not in of_keys and i < min(of_keys)]
            after = [i for i in numbers if i not in of_keys and i not in before]
            half = len(keys) // 2
            for turns in (turns_of[0][:half], turns_of[0][half:]):
                trace += of_blocks(before)
                trace += [one for turn in turns for one in of_blocks(turn)]
                trace += of_blocks(after)
        elif where == 1:
            trace += [one for turn in turns_of[1] for one in of_blocks(turn)]
        else:
            trace += of_blocks(numbers)
        if where is not None:
            read[where] += len(trace) - begin
    return Page(tuple(trace), *read)


def _turn(made: list[Block], of_loops: Mapping[int, frozenset[int]], loop: frozenset[int], turn: Turn) -> list[int]:
    """The path of a turn through the loop over pieces."""
    header = next(number for number, of in of_loops.items() if of == loop)
    fields = [
        i
        for i in sorted(loop)
        if _words(made[i]) and all(_inside(x, {"take_fields", "take_fields_of"}) for x in _work(made[i]))
    ]
    each = len(fields) // len(turn.widths)
    copies = [fields[i : i + each] for i in range(0, each * len(turn.widths), each)]
    # The compiler puts them in any order: a width has so many words, and half a one if it is odd.
    of_width = [{_words(made[i]): i for i in copy} for copy in copies]
    if not all(width in of for of, width in zip(of_width, turn.widths, strict=True) if width):
        raise ValueError(f"no reader of each of {turn.widths} bits is there")
    not_taken = {i for of, width in zip(of_width, turn.widths, strict=True) for w, i in of.items() if w != width}
    inner = frozenset().union(*(of for of in of_loops.values() if of < loop))
    of_exceptions = {i for i in loop if any(_inside(x, {"put", "clear"}) for x in _work(made[i]))}
    if not turn.rounds:
        not_taken |= of_exceptions
    if turn.rounds < 2:
        not_taken |= inner
    wide = {i for i in loop if made[i].count("HMMA") and made[i].count("LOP3") >= 8}
    if 8 not in turn.widths:
        not_taken |= wide
    within = loop - not_taken
    through = [of[width] for of, width in zip(of_width, turn.widths, strict=True) if width]
    through += [i for i in of_exceptions - inner if turn.rounds and made[i].count("STS") and _words(made[i])]
    ends = [i for i in loop if header in made[i].after]
    paths = [longest(made, header, end, within, {}, through) for end in ends if end in within]
    path = max((x for x in paths if x), key=lambda x: sum(len(made[i].instructions) for i in x))
    again = max(0, turn.rounds - 2)
    return [i for i in path for _ in range(1 + again if i in inner else 1)]


def _words(block: Block) -> int:
    """Halves of words that a block loads of its lane's."""
    loads = [x.operation for x in block.instructions if x.name == "LDS" and ".128" not in x.operation]
    return sum(1 if ".U16" in load else 2 for load in loads)


def _work(block: Block) -> list[Instruction]:
    return [x for x in block.instructions if x.name not in ("BRA", "BSSY", "BSYNC", "NOP", "WARPSYNC")]


def compiled(build: AttendBuild, architecture: int) -> tuple[list[str | Instruction], int, int]:
    """Listing, registers and spilled bytes of the kernel."""
    options = (*options_for(SOURCE, build.defines, architecture), "-lineinfo", "--ptxas-options=-v")
    cubin, messages = compile_now(SOURCE, options)
    of_attend = messages[messages.index("'attend'") :]
    patterns = (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    registers, spills = (int(re.search(x, of_attend).group(1)) for x in patterns)  # type: ignore[union-attr]
    return listing(cubin), registers, spills


def measure(spec: str, channels: int, architecture: int) -> dict[str, Any]:
    """A row of the table."""
    build = attend_build(SPECS[spec], channels, "bfloat16", "bfloat16", False, machine(architecture))
    lines, registers, spills = compiled(build, architecture)
    pages = {form: page_of(lines, build, form) for form in FORMS}
    if build.k_patched and build.v_patched:
        at_once = 1 if channels // 16 % 2 else 2
        for form, width in PIECES.items():
            keys = [Turn((width,) * at_once, LANES)] * (channels // 8 // at_once)
            pages[form] = page_of_pieces(lines, build, keys, [Turn((width,) * 2, LANES)] * (channels // 16))
    return {
        "spec": spec,
        "architecture": architecture,
        **asdict(build),
        "shared": build.shared,
        "registers": registers,
        "spill_bytes": spills,
        "forms": {
            form: {
                "instructions_a_code": round(page.a_code(channels), 3),
                "keys": page.keys,
                "values": page.values,
                "rest": page.rest,
            }
            for form, page in pages.items()
            if page is not None
        },
    }


def main() -> None:
    """Adds what is missing for the present sources; some minutes for all."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if (found.get("sources"), found.get("nvrtc")) != (sources_hash(SOURCE), nvrtc_version()):
        found = {"sources": sources_hash(SOURCE), "nvrtc": nvrtc_version(), "builds": []}
    rows = found["builds"]
    done = {(row["spec"], row["channels"], row["architecture"]) for row in rows}
    for channels, architecture, spec in product(CHANNELS, ARCHITECTURES, SPECS):
        if (spec, channels, architecture) not in done:
            rows.append(measure(spec, channels, architecture))
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    RESULTS.with_suffix(".md").write_text(table(rows) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: registers, spills, and instructions a code by form."""
    lines = [
        "| build | D | sm | warps | copies | registers | spilled | shared KB | " + " | ".join((*FORMS, *PIECES)) + " |",
        "|" + "---|" * (8 + len(FORMS) + len(PIECES)),
    ]
    for row in sorted(rows, key=lambda row: (row["spec"], row["channels"], row["architecture"])):
        names = ("spec", "channels", "architecture", "warps", "k_copies", "registers", "spill_bytes")
        forms = (row["forms"].get(form) for form in (*FORMS, *PIECES))
        cells = [str(row[name]) for name in names] + [f"{row['shared'] / 1024:.0f}"]
        cells += [f"{form['instructions_a_code']:.2f}" if form else "" for form in forms]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
