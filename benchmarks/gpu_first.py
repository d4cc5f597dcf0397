"""What a run on a GPU begins with: versions, kernels that were compiled before, and one attention against float64.

``--compile 90`` needs no GPU: it compiles what the benchmarks and this script need for that architecture, into the
folder that gpu_check.py lets them find, so that no minute on the GPU is spent on it.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

import gpu_sanitise
from gpu_attention import CHANNELS, FEWER, HEADS, SPECS, fill
from kvcomp.errors import KVCompError
from kvcomp.kernels.cuda.compile import cache_directory, compile_kernel
from kvcomp.kernels.cuda.layout import attend_build, machine, page_build
from kvcomp.spec import CodecSpec

TOLERANCE = 0.01  # bfloat16 outputs, relative to the largest


def compile_all(architecture: int) -> None:
    on = machine(architecture)
    wanted = [(CHANNELS, spec, query) for spec, query in product(SPECS.values(), ("bfloat16", "float32"))]
    for channels, spec, query in [*wanted, *((*of, "bfloat16") for of in gpu_sanitise.SPECS)]:
        layer = spec.layer(0, 1)
        attend = attend_build(layer, channels, "bfloat16", query, False, on)
        pages = page_build(layer, channels, "bfloat16")
        fewer = replace(attend, warps=min(attend.warps, FEWER))
        for source, build in (
            ("decode_attention", attend),
            ("decode_attention", fewer),
            ("encode", pages),
            ("decompress", pages),
        ):
            begin = time.perf_counter()
            compile_kernel(f"{source}.cu", build.defines, architecture)
            print(f"{source}, {query}: {time.perf_counter() - begin:.1f} s", flush=True)
    print(f"in {cache_directory()}")


def error_of(spec: CodecSpec, q: Tensor, k: Tensor, v: Tensor) -> float:
    """How far attention is off, at most, relative to the largest output."""
    store = fill(spec, k, v)
    held_k, held_v = (x.double() for x in store.dense())
    score = q.double().view(len(q), HEADS, -1, CHANNELS) @ held_k.mT * CHANNELS**-0.5
    expected = (score.softmax(-1) @ held_v).view(q.shape)
    return float((store.attend(q, CHANNELS**-0.5).double() - expected).abs().max() / expected.abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", type=int, metavar="ARCHITECTURE")
    parser.add_argument("specs", nargs="*", metavar="SPEC", help="only these of gpu_attention.py")
    arguments = parser.parse_args()
    if arguments.compile:
        compile_all(arguments.compile)
        return 0
    torch.manual_seed(0)
    print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name(), flush=True)
    k, v = (torch.randn((2, HEADS, 4096, CHANNELS), device="cuda", dtype=torch.bfloat16) for _ in "KV")
    q = torch.randn((2, HEADS * 4, 1, CHANNELS), device="cuda", dtype=torch.bfloat16)
    worst = 0.0
    names = arguments.specs or list(SPECS)
    for number, name in enumerate(names, 1):
        begin = time.perf_counter()
        try:
            error = error_of(SPECS[name], q, k, v)
        except (KVCompError, RuntimeError) as failure:
            print(f"{name}: {failure}", flush=True)
            if names[number:]:  # need another process: one whose kernel trapped has lost the device
                subprocess.run([sys.executable, __file__, *names[number:]], check=False)
            return 1
        print(f"{name}: off by {error:.1e} of the largest output, {time.perf_counter() - begin:.1f} s", flush=True)
        worst = max(worst, float("inf") if math.isnan(error) else error)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
