"""Registers, shared memory, spills and instructions of the attention kernel, from machine code compiled without a GPU.

Compiles the shipped builds for every architecture, disassembles them and writes benchmarks/results/gpu_instructions.json. The
instructions for each code are those of the inner loops, which decode a tile, dequantise it and feed the tensor cores. Around them
stands, once for a page, the rest: copies, stream starts, softmax and weights, which only a GPU's counters can tell (``make gpu-check``).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from kvcomp.kernels.gpu_compile import compile_now, nvrtc_version, options_for, sources_hash
from kvcomp.kernels.gpu_layout import AttendBuild, attend_build, machine
from kvcomp.spec import CodecSpec, TensorSpec

RESULTS = Path(__file__).parent / "results" / "gpu_instructions.json"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
CHANNELS = (128, 64, 256, 96, 80, 192)
SPECS = {
    "huffman, limit 10": CodecSpec(TensorSpec("block", 0.05, limit=10), TensorSpec("token", 0.1, limit=10)),
    "huffman, limit 12": CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1)),
    "fixed width": CodecSpec(TensorSpec("block", 1 / 14, "fixed"), TensorSpec("token", 1 / 14, "fixed")),
}


@dataclass(frozen=True)
class Loop:
    """An innermost loop with tensor-core products. begin, end: places in the listing. counts: instructions by name."""

    begin: int
    end: int
    counts: dict[str, int]

    @property
    def instructions(self) -> int:
        return sum(self.counts.values())


def tool(name: str) -> str:
    """Path of a CUDA tool, from pip's packages or the PATH."""
    of_pip = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / name
    found = str(of_pip) if of_pip.exists() else shutil.which(name)
    if not found:
        raise SystemExit(f"{name} is missing: pip install nvidia-cuda-{name}")
    return found


def listing(cubin: bytes, kernel: str) -> list[tuple[str, str, str]]:
    """(label, "", "") and ("", instruction, operands) of a kernel, in order."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool("nvdisasm"), "-c", file.name], check=True, capture_output=True, text=True).stdout
    section = next(part for part in re.split(r"\n\s*\.section\s+\.text\.", text)[1:] if part.startswith(kernel))
    lines = []
    for line in section.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            lines.append((label.group(1), "", ""))
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", line):
            lines.append(("", found.group(1).split(".")[0], found.group(2)))
    return lines


def loops(lines: list[tuple[str, str, str]]) -> Iterator[Loop]:
    """The loops, by their backward branches."""
    at = {label: i for i, (label, _, _) in enumerate(lines) if label}
    for end, (_, name, operands) in enumerate(lines):
        target = re.search(r"\.L_\w+", operands) if name == "BRA" else None
        if target and at.get(target.group(), end) < end:
            begin = at[target.group()]
            counts: dict[str, int] = {}
            for _, inside, _ in lines[begin : end + 1]:
                if inside and inside != "NOP":
                    counts[inside] = counts.get(inside, 0) + 1
            yield Loop(begin, end, counts)


def innermost(lines: list[tuple[str, str, str]]) -> list[Loop]:
    every = list(loops(lines))
    return [x for x in every if not any(x.begin <= y.begin and y.end <= x.end and y != x for y in every)]


def fastest(found: list[Loop], pairs: int, huffman: bool) -> int | None:
    """Instructions of the cheapest inner loop that decodes so many pairs: with a look-up in shared memory for each, or, at a fixed width,
    with fewer loads than pairs; raw values need more. None where the tables do not fit the shared memory."""

    def decodes(loop: Loop) -> bool:
        looked_up, loaded = loop.counts.get("LDS", 0), loop.counts.get("LD", 0) + loop.counts.get("LDG", 0)
        return looked_up >= pairs if huffman else looked_up < pairs and loaded <= pairs

    return min((loop.instructions for loop in found if decodes(loop)), default=None)


def measure(build: AttendBuild, architecture: int) -> dict[str, Any]:
    options = (*options_for("decode_attention.cu", build.defines, architecture), "--ptxas-options=-v")
    cubin, messages = compile_now("decode_attention.cu", options)
    of_attend = messages[messages.index("'attend'") :]
    spills, registers = (
        int(re.search(pattern, of_attend).group(1))  # type: ignore[union-attr]
        for pattern in (r"(\d+) bytes spill stores", r"Used (\d+) registers")
    )
    lines = listing(cubin, "attend")
    inner = [loop for loop in innermost(lines) if loop.counts.get("HMMA")]
    with_sums = [loop for loop in inner if loop.counts.get("STS")]  # those of V
    without = [loop for loop in inner if not loop.counts.get("STS")]
    keys = fastest(without, build.channels // 4, build.k_bits > 0)
    values = fastest(with_sums, 16, build.v_bits > 0)
    # A lane takes 2 D codes of K in four tiles, and 2 D codes of V in D / 16 pairs of tiles.
    return {
        **asdict(build),
        "architecture": architecture,
        "shared": build.shared,
        "registers": registers,
        "spill_bytes": spills,
        "key_instructions_a_code": None if keys is None else round(keys / (build.channels / 2), 3),
        "value_instructions_a_code": None if values is None else round(values / 32, 3),
    }


def main() -> None:
    """Adds what is missing for the present sources; half an hour for all."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if found.get("sources") != sources_hash():
        found = {"sources": sources_hash(), "nvrtc": nvrtc_version(), "builds": []}
    rows = found["builds"]
    done = {(row["spec"], row["architecture"], row["channels"]) for row in rows}
    for channels, architecture, name in product(CHANNELS, ARCHITECTURES, SPECS):
        if (name, architecture, channels) not in done:
            chosen = attend_build(SPECS[name], channels, "bfloat16", "bfloat16", False, machine(architecture))
            rows.append({"spec": name, **measure(chosen, architecture)})
            print(rows[-1], flush=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: instructions a code of K and of V, registers, spills."""
    lines = [
        "| build | sm | D | warps | copies | registers | spilled | K | V |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["spec"], row["channels"], row["architecture"])):
        names = ("spec", "architecture", "channels", "warps", "k_copies", "registers", "spill_bytes")
        codes = ("key_instructions_a_code", "value_instructions_a_code")
        lines.append("| " + " | ".join(str(row[name]) for name in (*names, *codes)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
