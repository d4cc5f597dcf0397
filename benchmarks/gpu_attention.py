"""Decode attention, encoding and decompression on a GPU, beside what torch has: benchmarks/results/gpu_attention.json.

Run by ``make gpu-check``. A time is that of a CUDA graph of CALLS calls, or, where a call cannot be recorded, of as
many calls one after the other; the host's time for a call stands beside it. Every result is compared with float32
attention over the decompressed cache before it is timed, and the file is written after every row. ``--once`` runs some
builds of the fused kernel once each on the first shape, for a profiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvcomp.errors import KVCompError
from kvcomp.kernels.cuda.layout import AttendBuild
from kvcomp.results.schema import environment
from kvcomp.spec import PRESETS, CodecSpec, Coding, TensorSpec
from kvcomp.store.gpu.store import GPUStore

RESULTS = Path(__file__).parent / "results" / "gpu_attention.json"
HEADS, CHANNELS = 8, 128
SHAPES = ((8, 32768), (1, 131072), (32, 8192))
GROUPS = (4, 1, 8)
CALLS, BATCHES = 10, 5
PAGE = 16  # tokens of FlashInfer's


def _klt(step: float, coding: Coding = "huffman") -> CodecSpec:
    of_both = TensorSpec("head", None, coding, limit=10, classes=4, steps=((step,) * HEADS,))
    return CodecSpec(of_both, of_both)


SPECS = {
    "packed:paper": PRESETS["packed:paper"],
    "kvcomp:paper": PRESETS["kvcomp:paper"],
    "kvcomp": PRESETS["kvcomp"],
    "packed": PRESETS["packed"],
    "kvcomp:paper, limit 10": CodecSpec(TensorSpec("block", 0.05, limit=10), TensorSpec("token", 0.1, limit=10)),
    "kvcomp-klt": _klt(0.7),  # 2.5 bits of normal values
    "packed-klt": _klt(0.7, "patched"),
    "fixed width, 2 bits": CodecSpec(TensorSpec("block", 0.34, "fixed"), TensorSpec("token", 0.34, "fixed")),
}
FEWER = 8  # warps of a CTA that are timed beside the most that fit
TOLERANCE = 0.02  # bfloat16 outputs, relative to the largest


def _batch(run: Callable[[], object], calls: int) -> float:
    """Milliseconds a call of so many, one after the other."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls


def timed(run: Callable[[], object]) -> dict[str, Any]:
    """ms: of the device for a call, the median of BATCHES; ms_eager: without a graph; host_us: of the host."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS):
        run()
    host = (time.perf_counter() - begin) / CALLS
    torch.cuda.synchronize()
    eager = statistics.median(_batch(run, CALLS) for _ in range(BATCHES))
    found = {"ms": eager, "ms_eager": eager, "host_us": 1e6 * host, "graph": False}
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                run()
    except RuntimeError:  # some wait for the device, or allocate
        torch.cuda.synchronize()
        return found
    replayed = statistics.median(_batch(graph.replay, 1) for _ in range(BATCHES)) / CALLS
    return {**found, "ms": replayed, "graph": True}


def rivals(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Ways to attend to a plain cache: q (batch, heads, 1, D), k and v (batch, KV heads, tokens, D)."""
    group = q.shape[1] // k.shape[1]
    folded = q.view(q.shape[0], k.shape[1], group, q.shape[3])
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def plain(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)

        def grouped(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(folded, k, v)

        yield f"sdpa {name}", plain
        if group > 1:
            yield f"sdpa {name}, group folded", grouped
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        pass
    else:
        kt, vt = (x.transpose(1, 2).contiguous() for x in (k, v))
        yield "flash_attn", lambda: flash_attn_with_kvcache(q.transpose(1, 2), kt, vt)
    try:
        import flashinfer
    except ImportError:
        return
    batch, heads, tokens, channels = k.shape
    paged = torch.stack([x.transpose(1, 2).reshape(-1, PAGE, heads, channels) for x in (k, v)], dim=1)
    each = tokens // PAGE
    begins = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * each
    indices = torch.arange(batch * each, dtype=torch.int32, device=q.device)
    last = torch.full((batch,), PAGE, dtype=torch.int32, device=q.device)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=group >= 4)
    types = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
    wrapper.plan(begins, indices, last, q.shape[1], heads, channels, PAGE, **types)
    yield "flashinfer", lambda: wrapper.run(q[:, :, 0], paged)


def fill(spec: CodecSpec, k: Tensor, v: Tensor) -> GPUStore:
    store = GPUStore(spec.layer(0, 1))
    store.append(k, v)
    store.seal()
    store.sync()
    torch.cuda.synchronize()
    return store


def right(store: GPUStore, q: Tensor, out: Tensor) -> bool:
    """Whether the fused output is that of float32 attention over the decompressed cache, for the first row and KV head
    and the last.
    """
    group = q.shape[1] // HEADS
    held_k, held_v = store.dense()
    for row, head in ((0, 0), (q.shape[0] - 1, HEADS - 1)):
        k, v = (x[row, head].float() for x in (held_k, held_v))
        queries = slice(head * group, (head + 1) * group)
        expected = (q[row, queries, 0].float() @ k.T * CHANNELS**-0.5).softmax(-1) @ v
        error = (out[row, queries, 0].float() - expected).abs().max()
        if not (torch.isfinite(out).all() and error <= TOLERANCE * expected.abs().max()):
            return False
    return True


def builds(store: GPUStore) -> Iterator[tuple[str, AttendBuild]]:
    """The build that a store takes, and the same with fewer warps if it has more."""
    build = store.kernels.attend_build(torch.bfloat16, False, False)
    yield "", build
    if build.warps > FEWER:
        yield f", {FEWER} warps", replace(build, warps=FEWER)


def measure_shape(batch: int, tokens: int) -> Iterator[dict[str, Any]]:
    torch.cuda.empty_cache()  # of another shape's
    k, v = (torch.randn((batch, HEADS, tokens, CHANNELS), device="cuda", dtype=torch.bfloat16) for _ in "KV")
    dense_bytes = k.nbytes + v.nbytes
    shape = {"batch": batch, "tokens": tokens}
    both = torch.stack([k.view(-1), v.view(-1)]).view(torch.int32)
    read = timed(both.amax)
    yield {**shape, "what": "read the same bytes once", **read, "gigabytes_a_second": dense_bytes / read["ms"] / 1e6}
    del both
    queries = {
        group: torch.randn((batch, HEADS * group, 1, CHANNELS), device="cuda", dtype=torch.bfloat16) for group in GROUPS
    }
    for group, q in queries.items():
        try:
            for name, run in rivals(q, k, v):
                try:
                    yield {**shape, "group": group, "what": name, **timed(run)}
                except (RuntimeError, TypeError, ValueError) as error:
                    yield {**shape, "group": group, "what": name, "error": str(error).splitlines()[0]}
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # a package of another version
            yield {**shape, "group": group, "what": "the rest", "error": str(error).splitlines()[0]}
    for name, spec in SPECS.items():
        try:
            yield from ({**shape, **row} for row in measure_spec(name, spec, k, v, queries, read["ms"]))
        except (KVCompError, RuntimeError) as error:
            yield {**shape, "what": f"the rest, {name}", "error": str(error).splitlines()[0]}


def what_works(batch: int, tokens: int) -> Iterator[dict[str, Any]]:
    """``measure_shape``, and what ended it if that was an error."""
    try:
        yield from measure_shape(batch, tokens)
    except (KVCompError, RuntimeError) as error:
        yield {"batch": batch, "tokens": tokens, "what": "the rest", "error": str(error).splitlines()[0]}


def measure_spec(
    name: str, spec: CodecSpec, k: Tensor, v: Tensor, queries: dict[int, Tensor], roof: float
) -> Iterator[dict[str, Any]]:
    """queries: by group. roof: milliseconds in which the uncompressed K and V are read."""
    dense_bytes = k.nbytes + v.nbytes
    store = fill(spec, k, v)  # compiles
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        store = fill(spec, k, v)
        times.append(1e3 * (time.perf_counter() - begin))
    took = statistics.median(times)  # by the clock, with all that the host does
    yield {"what": f"encode, {name}", "ms": took, "gigabytes_a_second": dense_bytes / took / 1e6}
    pages = len(store.rows[0].valid)
    took = timed(lambda store=store, pages=pages: store.tile(0, 0, pages))["ms"]  # type: ignore[misc]
    row_bytes = dense_bytes / len(k)
    yield {"what": f"decompress a row, {name}", "ms": took, "gigabytes_a_second": row_bytes / took / 1e6}
    memory = store.memory()
    for group, q in queries.items():
        for variant, build in builds(store):
            row: dict[str, Any] = {"group": group, "what": f"kvcomp, {name}{variant}", "warps": build.warps}
            row |= {"coded_bits": memory.coded_bits, "bytes": memory.total}
            with patch.object(store.kernels, "attend_build", lambda *_, build=build: build):
                if not right(store, q, store.attend(q, CHANNELS**-0.5)):
                    yield {**row, "error": "the output is wrong"}
                    continue
                found = timed(lambda store=store, q=q: store.attend(q, CHANNELS**-0.5))  # type: ignore[misc]
            yield {**row, **found, "share_of_roof": memory.total / dense_bytes * roof / found["ms"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: for each shape and group the fastest rival, and ours; encoding and decompression."""
    lines = [
        "| batch x tokens | G | what | ms | host us | x the fastest rival | bits | share of the memory roof |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for batch, tokens in SHAPES:
        of_shape = [r for r in rows if (r["batch"], r["tokens"]) == (batch, tokens) and "ms" in r]
        for group in GROUPS:
            here = [r for r in of_shape if r.get("group") == group]
            plain = [r for r in here if not r["what"].startswith("kvcomp")]
            if not plain:
                continue
            best = min(plain, key=lambda r: float(r["ms"]))
            for r in [best, *(r for r in here if r["what"].startswith("kvcomp"))]:
                bits, share = (
                    f"{r.get('coded_bits', 16):.2f}",
                    f"{r['share_of_roof']:.2f}" if "share_of_roof" in r else "",
                )
                times = f"{r['ms']:.3f} | {r['host_us']:.0f} | {best['ms'] / r['ms']:.2f}"
                lines.append(f"| {batch} x {tokens} | {group} | {r['what']} | {times} | {bits} | {share} |")
    lines += ["", "| batch x tokens | what | ms | GB/s |", "|---|---|---|---|"]
    lines += [
        f"| {r['batch']} x {r['tokens']} | {r['what']} | {r['ms']:.3f} | {r['gigabytes_a_second']:.0f} |"
        for r in rows
        if "gigabytes_a_second" in r
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--limit", type=float, default=3600.0, metavar="SECONDS", help="nothing is begun after it")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.limit
    torch.manual_seed(0)
    if arguments.once:
        k, v = (torch.randn((8, HEADS, 32768, CHANNELS), device="cuda", dtype=torch.bfloat16) for _ in "KV")
        q = torch.randn((8, HEADS * 4, 1, CHANNELS), device="cuda", dtype=torch.bfloat16)
        for name in ("packed:paper", "kvcomp:paper"):
            store = fill(SPECS[name], k, v)
            for _, build in builds(store):
                with patch.object(store.kernels, "attend_build", lambda *_, build=build: build):
                    store.attend(q, CHANNELS**-0.5)
        torch.cuda.synchronize()
        return
    rows: list[dict[str, Any]] = []
    about = environment(gpu=True)
    for row in chain.from_iterable(what_works(*shape) for shape in SHAPES):
        rows.append(row)
        print(row, flush=True)
        over = time.monotonic() > end
        RESULTS.write_text(json.dumps({"setting": about, "complete": not over, "rows": rows}, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(rows) + "\n")
        if over:
            print("out of time")
            break
    print(table(rows))


if __name__ == "__main__":
    main()
