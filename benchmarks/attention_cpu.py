"""How fast is decode attention on compressed pages, next to attention on the same cache uncompressed? And the encoder, and decompression?

    python benchmarks/attention_cpu.py [--quick] [--output benchmarks/results/attention_cpu.json]

Every time is taken in rounds that run all methods one after the other, so that a noisy neighbour hits all of them; a ratio is taken within
a round. OpenMP's workers go on spinning for a while after a call of torch and take a core from whoever comes next, so with two threads there are two
figures: each call from rest, and back to back with the others, as between the layers of a model. The result is checked against float64 before anything is timed. K: scale for each block, r = 0.05; V: scale for each token,
r = 0.1; Laplace and normal values with a spread of channels and tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite.binding import get_host_cpu_name
from setting import RESULTS, setting
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvcomp import codebook
from kvcomp.kernels import Books, cpu
from kvcomp.spec import Coding, Unit

UNITS: tuple[Unit, Unit] = ("block", "token")
CODING: tuple[Coding, Coding] = ("huffman", "huffman")
SCALES = (0.05, 0.1)
REST = 0.02  # seconds
TOLERANCE = 1e-4  # against float64, relative to the largest output

Array = npt.NDArray[Any]


class Cache:
    """A sequence of one layer, in bfloat16 and compressed."""

    def __init__(self, heads: int, tokens: int, channels: int) -> None:
        rng = np.random.default_rng(tokens + channels)
        spread_k, spread_v = (
            np.exp(rng.normal(size=(heads, 1, channels)) / 2),
            np.exp(rng.normal(size=(heads, tokens, 1)) * 0.3),
        )
        self.k, self.v = (
            torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16)
            for x in (
                rng.laplace(size=(heads, tokens, channels)) * spread_k,
                rng.normal(size=(heads, tokens, channels)) * spread_v,
            )
        )
        self.bits = [x.view(torch.int16).numpy().view(np.uint16) for x in (self.k, self.v)]
        self.books = self.train()
        self.buffer, self.offsets = self.encode(tokens)
        self.pages = (self.buffer.ctypes.data + self.offsets[:-1])[None]

    def train(self) -> tuple[Books, Books]:
        books = []
        for x, kind, unit, scale in zip(self.bits, ("K", "V"), UNITS, SCALES, strict=True):
            counts = cpu.count_pairs(cpu.quantise(x, unit, scale), "K" if kind == "K" else "V", 1)
            books.append((codebook.default(scale, 1, 12), codebook.train(counts, 12)))
        return books[0], books[1]

    def encode(self, tokens: int) -> tuple[Array, Array]:
        """Quantise, count and encode the first tokens."""
        k, v = (x[:, :tokens] for x in self.bits)
        kq, vq = (cpu.quantise(x, unit, scale) for x, unit, scale in zip((k, v), UNITS, SCALES, strict=True))
        cpu.count_pairs(kq, "K", 1)
        cpu.count_pairs(vq, "V", 1)
        return cpu.encode_pages(k, v, kq, vq, CODING, UNITS, *self.books)

    def decompress(self, dtype: str = "uint16") -> list[Array]:
        """The values, rounded to bfloat16 or, as float32, as attention sees them (no block here is raw)."""
        out = [np.empty(x.shape, dtype) for x in self.bits]
        cpu.decompress(self.pages[0], UNITS, *self.books, *out)
        return out

    def attend(self, q: Array, threads: int) -> Array:
        none = np.zeros((1, self.k.shape[0], 0, self.k.shape[2]), np.uint16)
        pages, zero = self.pages.shape[1], np.zeros(1, np.int64)
        valid, ends = np.full((1, pages), 64, np.int32), np.zeros(q.shape[2], np.int64)
        books, count = [self.books], np.array([pages])
        scaling = float(q.shape[3] ** -0.5)
        return cpu.attend(
            q, self.pages, valid, count, UNITS, books, none, none, zero, none, none, zero, ends, scaling, 0.0, threads
        )[0]


def dense_methods(k: Tensor, v: Tensor, q: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Attention on bfloat16 K and V (heads, tokens, channels), q (heads, group, channels)."""
    heads, group, channels = q.shape
    scaling = channels**-0.5

    def grouped_matmul() -> Tensor:
        return torch.softmax((q @ k.mT).float() * scaling, -1).to(torch.bfloat16) @ v

    return {
        "sdpa_enable_gqa": lambda: sdpa(
            q.reshape(1, heads * group, 1, channels), k[None], v[None], enable_gqa=True, scale=scaling
        ),
        "sdpa_group_folded": lambda: sdpa(q[None], k[None], v[None], scale=scaling),
        "grouped_matmul": grouped_matmul,
    }


def check(cache: Cache, q: Array) -> float:
    """Largest error of the output, relative to its largest value, against float64 on what the pages hold."""
    values = [torch.from_numpy(x).double() for x in cache.decompress("float32")]
    weights = torch.softmax(torch.from_numpy(q[0]).double() @ values[0].mT * q.shape[3] ** -0.5, -1)
    expected = (weights @ values[1]).numpy()
    error = float(np.abs(cache.attend(q, 2)[0] - expected).max() / np.abs(expected).max())
    if not error < TOLERANCE:
        raise SystemExit(f"attention is wrong: error {error:.1e}")
    return error


def seconds(function: Callable[[], Any], threads: int = 1, rest: float = 0.0) -> float:
    """Time of a call after ``rest`` seconds of sleep: on one thread that of the processor, which others on the machine do not lengthen, else that of the clock."""
    time.sleep(rest)
    clock = time.process_time if threads == 1 else time.perf_counter
    begin = clock()
    function()
    return clock() - begin


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": round(float(middle), 5), "quartile_1": round(float(low), 5), "quartile_3": round(float(high), 5)}


def time_attention(cache: Cache, group: int, threads: int, rounds: int, rest: float) -> dict[str, Any]:
    heads, tokens, channels = cache.k.shape
    q = np.random.default_rng(group).normal(size=(1, heads, group, channels)).astype(np.float32)
    error = check(cache, q)
    torch.set_num_threads(threads)
    methods: dict[str, Callable[[], Any]] = {"kvcomp": lambda: cache.attend(q, threads)}
    methods |= dense_methods(cache.k, cache.v, torch.from_numpy(q[0]).to(torch.bfloat16))
    for method in methods.values():
        method()
    taken = [{name: seconds(method, threads, rest) for name, method in methods.items()} for _ in range(rounds)]
    values = 2 * cache.k.numel()
    dense = [name for name in methods if name != "kvcomp"]
    fastest = min(dense, key=lambda name: float(np.median([of_round[name] for of_round in taken])))
    return {
        "group": group,
        "tokens": tokens,
        "threads": threads,
        "from_rest": rest > 0,
        "clock": "process_time" if threads == 1 else "perf_counter",
        "error": error,
        "ns_per_value": {name: quartiles([of_round[name] / values * 1e9 for of_round in taken]) for name in methods},
        "time_over": {name: quartiles([of_round["kvcomp"] / of_round[name] for of_round in taken]) for name in dense},
        "fastest_dense": fastest,
        "load_average": os.getloadavg()[0],
    }


def time_codec(cache: Cache, rounds: int) -> dict[str, Any]:
    tokens = min(4096, cache.k.shape[1])
    values = 2 * cache.k.shape[0] * tokens * cache.k.shape[2]
    encode = [seconds(lambda: cache.encode(tokens)) for _ in range(rounds)]
    page = [seconds(lambda: cache.encode(64)) for _ in range(10 * rounds)]
    decompress = [seconds(cache.decompress) / (2 * cache.k.numel()) * 1e9 for _ in range(rounds)]
    return {
        "encode_ns_per_value": quartiles([x / values * 1e9 for x in encode]),
        "encode_megabytes_per_second": quartiles([2 * values / x / 1e6 for x in encode]),
        "encode_one_page_microseconds": quartiles([x * 1e6 for x in page]),
        "decompress_ns_per_value": quartiles(decompress),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, 8K tokens only")
    parser.add_argument("--output", type=Path, default=RESULTS / "attention_cpu.json")
    options = parser.parse_args()
    rounds = 5 if options.quick else 41
    result: dict[str, Any] = {
        "setting": setting(llvm_cpu=get_host_cpu_name(), kv_heads=8, head_dim=128),
        "attention": [],
    }
    for tokens in (8192,) if options.quick else (8192, 32768):
        cache = Cache(8, tokens, 128)
        bits = 8 * int(cache.offsets[-1]) / (2 * cache.k.numel())
        print(f"{tokens} tokens, {bits:.2f} bits a value")
        for threads, rest in ((1, REST), (2, REST), (2, 0.0)):
            for group in (1, 4, 8):
                row = time_attention(cache, group, threads, rounds, rest)
                row["bits_per_value"] = bits
                result["attention"].append(row)
                ratio, ours = row["time_over"][row["fastest_dense"]], row["ns_per_value"]["kvcomp"]["median"]
                print(
                    f"  group {group}, {threads} thread(s){'' if rest else ', back to back'}: {ours:.3f} ns a value, {ratio['median']:.2f}x the time of {row['fastest_dense']} "
                    f"({ratio['quartile_1']:.2f} to {ratio['quartile_3']:.2f}), error {row['error']:.0e}"
                )
        if "codec" not in result:
            torch.set_num_threads(1)
            result["codec"] = time_codec(cache, rounds)
            print(json.dumps(result["codec"], indent=2))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
