"""Decode attention, encoding and decompression on a GPU, beside what torch has: benchmarks/results/gpu_attention.json.

Run by ``make gpu-check``. Times are medians of CUDA events over repeated launches; every result is compared with float32 attention
over the decompressed cache before it is timed. ``--once`` runs the fused kernel once on the middle shape, for a profiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvcomp.gpu_store import GPUStore
from kvcomp.spec import CodecSpec, TensorSpec

RESULTS = Path(__file__).parent / "results" / "gpu_attention.json"
HEADS, CHANNELS = 8, 128
SHAPES = ((1, 131072), (8, 32768), (32, 8192))
GROUPS = (1, 4, 8)
REPEATS = 20
SPECS = {
    "huffman, limit 10": CodecSpec(TensorSpec("block", 0.09, limit=10), TensorSpec("token", 0.11, limit=10)),
    "huffman, limit 12": CodecSpec(TensorSpec("block", 0.09), TensorSpec("token", 0.11)),
    "fixed width, 4 bits": CodecSpec(TensorSpec("block", 1 / 14, "fixed"), TensorSpec("token", 1 / 14, "fixed")),
    "fixed width, 2 bits": CodecSpec(TensorSpec("block", 0.34, "fixed"), TensorSpec("token", 0.34, "fixed")),
}
TOLERANCE = 0.02  # bfloat16 outputs, relative to the largest


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of one run, after three."""
    for _ in range(3):
        run()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(statistics.median(times))


def rivals(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Ways to attend to a plain cache: q (batch, heads, 1, D), k and v (batch, KV heads, tokens, D)."""
    group = q.shape[1] // k.shape[1]
    folded = q.view(q.shape[0], k.shape[1], group, q.shape[3])
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):

        def plain(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)

        def grouped(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(folded, k, v)

        yield f"sdpa {name}", plain
        yield f"sdpa {name}, group folded", grouped
    try:
        from flash_attn import flash_attn_with_kvcache

        kt, vt = (x.transpose(1, 2).contiguous() for x in (k, v))
        yield "flash_attn", lambda: flash_attn_with_kvcache(q.transpose(1, 2), kt, vt)
    except ImportError:
        pass
    if k.shape[0] == 1:
        try:
            import flashinfer

            kt, vt = (x[0].transpose(0, 1).contiguous() for x in (k, v))
            yield "flashinfer", lambda: flashinfer.single_decode_with_kv_cache(q[0, :, 0], kt, vt)
        except ImportError:
            pass


def fill(spec: CodecSpec, k: Tensor, v: Tensor) -> GPUStore:
    store = GPUStore(spec)
    store.append(k, v)
    store.seal()
    torch.cuda.synchronize()
    return store


def right(store: GPUStore, q: Tensor, out: Tensor) -> bool:
    """Whether the fused output is that of float32 attention over the decompressed cache, for the first row and KV head."""
    k, v = (x[0, 0].float() for x in store.dense())
    group = q.shape[1] // HEADS
    score = q[0, :group, 0].float() @ k.T * CHANNELS**-0.5
    expected = score.softmax(-1) @ v
    found = out[0, :group, 0].float()
    return bool(torch.isfinite(out).all() and (found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def measure_shape(batch: int, tokens: int) -> Iterator[dict[str, Any]]:
    k, v = (torch.randn((batch, HEADS, tokens, CHANNELS), device="cuda", dtype=torch.bfloat16) for _ in "KV")
    dense_bytes = k.nbytes + v.nbytes
    shape = {"batch": batch, "tokens": tokens}
    both = torch.stack([k.view(-1), v.view(-1)])
    copy = torch.empty_like(both)
    read, copied = milliseconds(lambda: both.view(torch.int32).amax()), milliseconds(lambda: copy.copy_(both))
    yield {**shape, "what": "read the same bytes once", "ms": read}
    yield {**shape, "what": "copy the same bytes", "ms": copied}
    both = copy = k[:0]
    queries = {
        group: torch.randn((batch, HEADS * group, 1, CHANNELS), device="cuda", dtype=torch.bfloat16) for group in GROUPS
    }
    for group, q in queries.items():
        for name, run in rivals(q, k, v):
            try:
                yield {**shape, "group": group, "what": name, "ms": milliseconds(run)}
            except (RuntimeError, TypeError, ValueError) as error:
                yield {**shape, "group": group, "what": name, "error": str(error).splitlines()[0]}
    for name, spec in SPECS.items():
        store = fill(spec, k, v)  # compiles
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        store = fill(spec, k, v)
        end.record()
        end.synchronize()
        took = begin.elapsed_time(end)
        yield {**shape, "what": f"encode, {name}", "ms": took, "gigabytes_a_second": dense_bytes / took / 1e6}
        pages = int(store.count[0])
        took = milliseconds(lambda store=store, pages=pages: store.tile(0, 0, pages))  # type: ignore[misc]
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
            yield {**row, "ms": milliseconds(lambda store=store, q=q: store.attend(q, CHANNELS**-0.5))}  # type: ignore[misc]
        del store


def setting() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=False, capture_output=True, text=True).stdout.strip()
    properties = torch.cuda.get_device_properties(0)
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        check=False,
        capture_output=True,
        text=True,
    )
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver": smi.stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": commit,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: for each shape and group the fastest rival, and ours."""
    lines = ["| batch x tokens | G | what | ms | x the fastest rival | bits |", "|---|---|---|---|---|---|"]
    for batch, tokens in SHAPES:
        for group in GROUPS:
            here = [
                r for r in rows if (r["batch"], r["tokens"], r.get("group")) == (batch, tokens, group) and "ms" in r
            ]
            plain = [r for r in here if not r["what"].startswith("kvcomp")]
            if not plain:
                continue
            best = min(plain, key=lambda r: float(r["ms"]))
            for r in [best, *(r for r in here if r["what"].startswith("kvcomp"))]:
                bits = f"{r['coded_bits']:.2f}" if "coded_bits" in r else "16"
                lines.append(
                    f"| {batch} x {tokens} | {group} | {r['what']} | {r['ms']:.3f} | {best['ms'] / r['ms']:.2f} | {bits} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true")
    once = parser.parse_args().once
    torch.manual_seed(0)
    if once:
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
        torch.cuda.empty_cache()
        RESULTS.write_text(json.dumps({"setting": setting(), "rows": rows}, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
