"""Rates of a GPU's pipes that the model of the attention kernel takes for granted: benchmarks/results/gpu_rates.json.

Cycles of a scheduler for an instruction of one warp: with one chain its latency, with several chains and warps its
rate. ``modelled`` stands beside it where the model has a number. Run by ``make gpu-check``.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver

from gpu_pipes import ALU, FLOAT, INTEGER, LATENCY, MATRIX, SCHEDULERS, busy
from kvcomp.kernels.cuda.compile import compile_now
from kvcomp.results.schema import environment

RESULTS = Path(__file__).parent / "results" / "gpu_rates.json"
SOURCE = Path(__file__).with_suffix(".cu")
TURNS, UNROLLED = 64, 8  # as gpu_rates.cu has them
PIPE_OF = {"lop3": ALU, "shf": ALU, "prmt": ALU, "imad": INTEGER, "ffma": FLOAT, "mma": MATRIX}
WARPS = (4, 8, 12)
DEGREES = (1, 2, 3, 4, 8, 32)


def check(result: tuple[Any, ...]) -> Any:
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(result[0].name)
    return result[1] if len(result) > 1 else None


def compiled(architecture: int, chains: int) -> bytes:
    cubin, _ = compile_now(str(SOURCE), (f"--gpu-architecture=sm_{architecture}", "-std=c++17", f"-DCHAINS={chains}"))
    return cubin


def cycles(module: Any, name: str, warps: int, degree: int) -> int:
    """Cycles that one CTA of so many warps takes for all its turns."""
    out = torch.zeros(2, dtype=torch.int64, device="cuda")
    arguments = (out.data_ptr(), 5, 3, degree), (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32)
    kernel = check(driver.cuModuleGetFunction(module, name.encode()))
    for _ in range(3):  # the first time it comes from memory
        check(driver.cuLaunchKernel(kernel, 1, 1, 1, 32 * warps, 1, 1, 0, 0, arguments, 0))
        torch.cuda.synchronize()
    return int(out[0])


def main() -> None:
    torch.zeros(1, device="cuda")  # makes the context
    major, minor = torch.cuda.get_device_capability()
    rows: list[dict[str, Any]] = []
    for chains in (1, 4):
        module = check(driver.cuModuleLoadData(compiled(10 * major + minor, chains)))
        jobs = [(name, 1) for name in PIPE_OF] + [("lds", degree) for degree in DEGREES]
        for name, degree in jobs:
            for warps in WARPS:
                instructions = TURNS * UNROLLED * chains * warps / SCHEDULERS
                row: dict[str, Any] = {"instruction": name, "chains": chains, "warps": warps}
                row["cycles"] = round(cycles(module, name, warps, degree) / instructions, 2)
                if name == "lds":
                    waiting = (LATENCY + degree - 1) * SCHEDULERS / (chains * warps)
                    row |= {"degree": degree, "modelled": max(SCHEDULERS * degree, waiting)}
                elif chains > 1 and warps > SCHEDULERS:
                    row["modelled"] = busy(10 * major + minor)[PIPE_OF[name]]
                rows.append(row)
                print(row, flush=True)
                RESULTS.write_text(json.dumps({"setting": environment(gpu=True), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
