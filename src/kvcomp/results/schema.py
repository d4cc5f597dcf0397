"""Results: one JSON schema for every measurement.

A results file is an object::

    kvcomp_results: 1
    kind: "evaluate" | "tune" | ...          what measured it
    partial: true while pieces are missing (an interrupted run)
    setting: device, versions, commit, date, seed, model, and the parameters of the measurement
    methods: one object for each, in the order asked for        (kind "evaluate")

A method is an object; what was not measured is absent::

    name, settings                           settings: its parameters, such as a spec
    memory: {mode: Size}                     mode: "teacher_forced" (the prompt) | "streaming" (prompt and text)
    fidelity: {mode: Fidelity}
    retrieval: [Cell]
    tasks: {task: {metric: Figure, ...}}     of lm-evaluation-harness
    error: Error
    suffering: [{layer, kind: "K" | "V", head, kl (if it alone is coded), why (a reason and its remedy)}]
                                             those that cost most, largest first
    failed: {piece: why it could not be measured}

    Figure:   {mean, standard_error, count}; standard_error is null for a count of 1
    Size:     {coded_bits, total_bits, ratio, allocated_bytes, dense_bytes, values, sealed_values,
               parts: {part: bits a value}}
    Fidelity: {kl: Figure, kl_99_9 (99.9 % quantile over tokens), top1: Figure, loss_difference: Figure (nats a token),
               perplexity, perplexity_uncompressed, prompt_tokens, scored_tokens, samples}
    Cell:     {task: "key-value" | "passkey", tokens, depth (0 to 1, middle of its bin), right, asked}
    Error:    {largest_over_bound or null, missed (values outside of their bound), values,
               heads: [{layer, kind, head, rms (over the values' rms), largest (over their largest), bits or null}],
               histogram: {K | V: {edges, counts, over: "bound" | "rms"}}   errors over their bound or head's rms}

Bits are for each value, bytes are counted, KL is KL(uncompressed || compressed) in nats a token.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from kvcomp import disk
from kvcomp.errors import CorruptData, InvalidInput, UnsupportedVersion
from kvcomp.store import Memory
from kvcomp.store.memory import PARTS

VERSION: Final = 1
PACKAGES = "kvcomp", "torch", "numpy", "numba", "transformers"


def environment(gpu: bool = False, **parameters: Any) -> dict[str, Any]:
    """The machine, load, software, commit and date of a measurement, and the measurement's own parameters.

    gpu: whether the first GPU is what was measured on.
    """
    return {
        **(_gpu() if gpu else {"device": _processor()}),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "default"),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **parameters,
    }


def figure(values: Sequence[float]) -> dict[str, Any]:
    """Mean of independent samples and its standard error, from their spread."""
    count = len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error, "count": count}


def size(memory: Memory) -> dict[str, Any]:
    """A Memory as a Size."""
    return {
        "coded_bits": memory.coded_bits,
        "total_bits": memory.total_bits,
        "ratio": memory.ratio,
        "allocated_bytes": memory.total,
        "dense_bytes": memory.dense,
        "values": memory.values,
        "sealed_values": memory.sealed_values,
        "parts": {part: 8 * n / max(1, memory.values) for part in PARTS if (n := getattr(memory, part))},
    }


def write(path: Path, kind: str, about: Mapping[str, Any], **content: Any) -> None:
    """Write a results file whole or not at all. about: what ``environment`` returned. Raises OSError."""
    text = json.dumps({"kvcomp_results": VERSION, "kind": kind, "setting": about, **content}, indent=2)
    disk.write(path, [text.encode() + b"\n"])


def read(path: Path) -> dict[str, Any]:
    """The content of a results file.

    Raises InvalidInput if it cannot be read, CorruptData if it is no results file, and UnsupportedVersion.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"cannot read the results file {path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CorruptData(f"{path} is no results file: {error}; measure again with kvcomp evaluate") from None
    if not isinstance(content, dict) or not isinstance(content.get("setting"), dict) or "kvcomp_results" not in content:
        raise CorruptData(f"{path} is no results file of kvcomp: measure again with kvcomp evaluate")
    if content["kvcomp_results"] != VERSION:
        raise UnsupportedVersion(
            f"{path} has results of version {content['kvcomp_results']!r}: this kvcomp reads {VERSION}"
        )
    return content


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
    }


def _commit() -> str:
    """The commit, ``-dirty`` where more than results differs from it; "unknown" in a folder of another repository."""
    if not _output("git", "ls-files", Path(__file__).name):
        return "unknown"
    changed = _output("git", "diff", "--name-only", "HEAD", "--", ":/", ":(top,exclude)benchmarks/results")
    return _output("git", "rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _output(*command: str) -> str:
    """What a command prints; nothing where there is no such command."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
