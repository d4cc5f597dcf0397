"""What the codec of calibrated caches costs the CPU kernels beside the paper's preset: ``make bench-codec_cpu``.

One core, CPU time of the thread, so that other work on the machine counts little; every round times each operation of each codec in turn,
and the median is kept. Values have the spectrum that a KLT leaves: a variance that falls with the channel.
Writes benchmarks/results/codec_cpu.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcomp.codec import codebook
from kvcomp.codec.quantise import round_to
from kvcomp.kernels import NO_STEPS, Books, Steps
from kvcomp.kernels.cpu import backend as cpu
from kvcomp.spec import Kind, TensorSpec, Unit
from setting import RESULTS, setting

FILE = RESULTS / "codec_cpu.json"
HEADS, TOKENS, ROUNDS = 4, 4096, 15
GROUPS = 1, 4
FALL = 3.5  # natural logarithm of the standard deviation of the first channel over the last
STEPS = {"near-lossless": 1.0, "balanced": 1.9, "aggressive": 2.8}  # over the median standard deviation
KINDS: tuple[Kind, Kind] = ("K", "V")

Array = npt.NDArray[Any]


class Codec:
    """Pages of one codec, and its operations."""

    def __init__(self, name: str, k: Array, v: Array, units: tuple[Unit, Unit], scales: Any, classes: int) -> None:
        self.name, self.k, self.v, self.units, self.scales, self.classes = name, k, v, units, scales, classes
        self.given = units[0] == "head"
        key, value = scales
        self.steps: Steps = (key, value) if self.given else NO_STEPS
        self.books: tuple[Books, Books] = self.train()
        self.pages, offsets = self.encode()
        self.addresses = self.pages.ctypes.data + offsets[:-1]
        self.bits = 8 * int(offsets[-1]) / (k.size + v.size)

    def train(self) -> tuple[Books, Books]:
        books: list[Books] = []
        for x, unit, scale, kind in zip((self.k, self.v), self.units, self.scales, KINDS, strict=True):
            own = codebook.train(cpu.count_pairs(cpu.quantise(x, unit, scale), kind, self.classes), 12)
            books.append((own if self.given else codebook.default(scale, self.classes, 12), own))
        return books[0], books[1]

    def encode(self) -> tuple[Array, Array]:
        """As a prefill does: without a calibration pairs are counted for the sequence's own books."""
        q = [cpu.quantise(x, unit, s) for x, unit, s in zip((self.k, self.v), self.units, self.scales, strict=True)]
        if not self.given:
            for of_kind, kind in zip(q, KINDS, strict=True):
                cpu.count_pairs(of_kind, kind, self.classes)
        return cpu.encode_pages(self.k, self.v, q[0], q[1], ("huffman", "huffman"), self.units, *self.books)

    def decompress(self) -> None:
        out = np.empty_like(self.k), np.empty_like(self.v)
        cpu.decompress(self.addresses, self.units, *self.books, *out, steps=self.steps)

    def attend(self, group: int) -> None:
        heads, _, channels = self.k.shape
        q = np.random.default_rng(group).normal(size=(1, heads, group, channels)).astype(np.float32)
        none, zero = np.zeros((1, heads, 0, channels), np.uint16), np.zeros(1, np.int64)
        pages = self.addresses.size
        valid, ends = np.full((1, pages), 64, np.int32), np.zeros(group, np.int64)
        cpu.attend(
            q, self.addresses[None], valid, np.array([pages]), self.units, [self.books], none, none, zero, none, none,
            zero, ends, float(channels**-0.5), steps=self.steps,
        )  # fmt: skip


def codecs(channels: int) -> list[Codec]:
    """The paper's preset on plain values, and steps of heads with four classes at three sizes on values after a KLT."""
    rng = np.random.default_rng(channels)
    bfloat16 = np.dtype(np.uint16)
    shape = HEADS, TOKENS, channels
    k, v = (round_to(rng.laplace(size=shape).astype(np.float32), bfloat16) for _ in KINDS)
    spread = np.exp(-FALL * np.arange(channels) / channels)
    y = [round_to((rng.normal(size=shape) * spread).astype(np.float32), bfloat16) for _ in KINDS]
    middle = float(np.median(spread))
    found = [Codec("kvcomp", k, v, ("block", "token"), (0.05, 0.1), 1)]
    for name, share in STEPS.items():
        steps = TensorSpec("head", steps=((share * middle,) * HEADS,)).heads
        found.append(Codec(f"head, {name}", y[0], y[1], ("head", "head"), (steps, steps), 4))
    return found


def measure(channels: int) -> list[dict[str, Any]]:
    """Median CPU nanoseconds a value of every operation of every codec."""
    found = codecs(channels)
    operations: dict[str, Callable[[Codec], object]] = {"encode": Codec.encode, "decompress": Codec.decompress}
    for group in GROUPS:
        operations[f"attention, {group} queries"] = partial(Codec.attend, group=group)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for name, operation in operations.items():
            for codec in found:
                begin = time.thread_time()
                operation(codec)
                times.setdefault((codec.name, name), []).append(time.thread_time() - begin)
    values = 2 * HEADS * TOKENS * channels
    rows = []
    for codec in found:
        median = {name: float(np.median(times[codec.name, name])) for name in operations}
        paper = {name: float(np.median(times["kvcomp", name])) for name in operations}
        rows.append(
            {
                "codec": codec.name,
                "channels": channels,
                "bits": round(codec.bits, 3),
                "ns_a_value": {name: round(1e9 * t / values, 4) for name, t in median.items()},
                "over_kvcomp": {name: round(t / paper[name], 3) for name, t in median.items()},
            }
        )
    return rows


def main() -> None:
    """Measure, print and write."""
    rows = [row for channels in (64, 128) for row in measure(channels)]
    for row in rows:
        print(f"{row['channels']:4} {row['codec']:22} {row['bits']:.2f} bits", row["ns_a_value"], row["over_kvcomp"])
    content = {"setting": setting(heads=HEADS, tokens=TOKENS, rounds=ROUNDS), "results": rows}
    FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
