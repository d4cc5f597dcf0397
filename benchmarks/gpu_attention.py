"""Decode attention, encoding and decompression on a GPU, beside what torch has: benchmarks/results/gpu_attention.json.

Run by ``make gpu-check``. A time is that of a CUDA graph of CALLS calls, or, where a call cannot be recorded, of as
many calls one after the other; the host's time for a call stands beside it. Every result is compared with float32
attention over the decompressed cache before it is timed. ``--once`` runs the fused kernel once on the middle shape, for
a profiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvcomp.results.schema import environment
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store.gpu.store import GPUStore

RESULTS = Path(__file__).parent / "results" / "gpu_attention.json"
HEADS, CHANNELS = 8, 128
SHAPES = ((8, 32768), (1, 131072), (32, 8192))
GROUPS = (4, 1, 8)
CALLS, BATCHES = 10, 5
PAGE = 16  # tokens of FlashInfer's


def _klt(step: float) -> CodecSpec:
    of_both = TensorSpec("head", None, limit=10, classes=4, steps=((step,) * HEADS,))
    return CodecSpec(of_both, of_both)


SPECS = {
    "huffman, limit 10": CodecSpec(TensorSpec("block", 0.09, limit=10), TensorSpec("token", 0.11, limit=10)),
    "huffman, limit 12": CodecSpec(TensorSpec("block", 0.09), TensorSpec("token", 0.11)),
    "kvcomp-klt": _klt(0.7),  # 2.5 bits of normal values
    "fixed width, 4 bits": CodecSpec(TensorSpec("block", 1 / 14, "fixed"), TensorSpec("token", 1 / 12, "fixed")),
    "fixed width, 2 bits": CodecSpec(TensorSpec("block", 0.34, "fixed"), TensorSpec("token", 0.34, "fixed")),
}
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
    """Whether the fused output is that of float32 attention over the decompressed cache, for the first row
    and KV head.
    """
    tile_k, tile_v = store.dense()
    k, v = (x[0, 0].float() for x in (tile_k, tile_v))
    group = q.shape[1] // HEADS
    score = q[0, :group, 0].float() @ k.T * CHANNELS**-0.5
    expected = score.softmax(-1) @ v
    found = out[0, :group, 0].float()
    return bool(torch.isfinite(out).all() and (found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def measure_shape(batch: int, tokens: int) -> Iterator[dict[str, Any]]:
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
        store = fill(spec, k, v)  # compiles
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            store = fill(spec, k, v)
            times.append(1e3 * (time.perf_counter() - begin))
        took = statistics.median(times)  # by the clock, with all that the host does
        yield {**shape, "what": f"encode, {name}", "ms": took, "gigabytes_a_second": dense_bytes / took / 1e6}
        pages = len(store.rows[0].valid)
        took = timed(lambda store=store, pages=pages: store.tile(0, 0, pages))["ms"]  # type: ignore[misc]
        row_bytes = dense_bytes / batch
        yield {**shape, "what": f"decompress a row, {name}", "ms": took, "gigabytes_a_second": row_bytes / took / 1e6}
        memory = store.memory()
        for group, q in queries.items():
            out = store.attend(q, CHANNELS**-0.5)
            row = {
                **shape,
                "group": group,
                "what": f"kvcomp, {name}",
                "coded_bits": memory.coded_bits,
                "bytes": memory.total,
            }
            if not right(store, q, out):
                yield {**row, "error": "the output is wrong"}
                continue
            found = timed(lambda store=store, q=q: store.attend(q, CHANNELS**-0.5))  # type: ignore[misc]
            yield {**row, **found, "share_of_roof": memory.total / dense_bytes * read["ms"] / found["ms"]}
        del store


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
        store = fill(SPECS["huffman, limit 10"], k, v)
        store.attend(torch.randn((8, HEADS * 4, 1, CHANNELS), device="cuda", dtype=torch.bfloat16), CHANNELS**-0.5)
        torch.cuda.synchronize()
        return
    rows: list[dict[str, Any]] = []
    for batch, tokens in SHAPES:
        for row in measure_shape(batch, tokens):
            rows.append(row)
            print(row, flush=True)
            if time.monotonic() > end:
                break
        torch.cuda.empty_cache()
        RESULTS.write_text(
            json.dumps({"setting": environment(), "complete": time.monotonic() <= end, "rows": rows}, indent=1) + "\n"
        )
        if time.monotonic() > end:
            print("out of time")
            break
    RESULTS.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
