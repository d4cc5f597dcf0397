"""The CUDA sources compile without a GPU, for every architecture, as the committed table of registers, spills and
instructions says.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from kvcomp.errors import BackendUnavailable
from kvcomp.kernels.cuda import compile as gpu_compile
from kvcomp.kernels.cuda import device as gpu
from kvcomp.kernels.cuda.compile import compile_kernel, compile_now, nvrtc_version, options_for, sources_hash
from kvcomp.kernels.cuda.layout import machine, page_build
from kvcomp.spec import PRESETS

pytest.importorskip("cuda.bindings.nvrtc", exc_type=ImportError)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TABLE = json.loads((BENCHMARKS / "results" / "gpu_instructions.json").read_text())
ROWS = {(row["spec"], row["channels"], row["architecture"]): row for row in TABLE["builds"]}
QUICK = ("huffman, limit 12", 128, 90)
SPECS = {name: PRESETS[name].layer(0, 1) for name in ("kvcomp", "packed")}
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


@pytest.fixture(scope="module")
def gpu_instructions() -> Any:
    return importlib.import_module("gpu_instructions")


def test_the_table_is_of_these_sources(gpu_instructions: Any) -> None:
    assert TABLE["sources"] == sources_hash(gpu_instructions.SOURCE), "make gpu-compile"
    specs, channels, architectures = gpu_instructions.SPECS, gpu_instructions.CHANNELS, gpu_instructions.ARCHITECTURES
    assert set(ROWS) == {(name, d, sm) for name in specs for d in channels for sm in architectures}


@pytest.mark.parametrize("build", [QUICK, *(pytest.param(x, marks=pytest.mark.slow) for x in ROWS if x != QUICK)])
def test_a_row_is_what_the_compiler_makes(gpu_instructions: Any, build: tuple[str, int, int]) -> None:
    if nvrtc_version() != TABLE["nvrtc"]:
        pytest.skip(f"the table is of NVRTC {TABLE['nvrtc']}")
    assert gpu_instructions.measure(*build) == ROWS[build]


def test_no_build_spills_a_register_or_outgrows_the_shared_memory() -> None:
    for row in ROWS.values():
        assert row["spill_bytes"] == 0, row
        assert row["registers"] * 32 * row["warps"] <= 65536, row
        assert row["shared"] <= machine(row["architecture"]).shared, row


def test_the_fused_kernel_takes_at_most_five_instructions_a_code() -> None:
    of_page = {
        build: row["forms"]["symbols"]["instructions_a_code"]
        for build, row in ROWS.items()
        if build[1] == 128 and "symbols" in row["forms"]
    }
    of_paper = {build: count for build, count in of_page.items() if build[0].startswith("huffman")}
    assert len(of_paper) == 2 * len(ARCHITECTURES)
    assert max(of_paper.values()) <= 5.0
    # Pages of kvcomp-klt whose classes have no low bits, where the machine holds their tables: the same but for the
    # four classes.
    for (name, _, architecture), count in of_page.items():
        if name.startswith("kvcomp-klt"):
            assert count <= of_paper["huffman, limit 12", 128, architecture] + 0.2


@pytest.mark.parametrize("source", ["decompress.cu", "encode.cu"])
@pytest.mark.parametrize("architecture", [90, *(pytest.param(x, marks=pytest.mark.slow) for x in ARCHITECTURES)])
def test_the_other_kernels_compile(source: str, architecture: int) -> None:
    chosen = page_build(SPECS["kvcomp"], 128, "bfloat16")
    cubin, _ = compile_now(source, options_for(source, chosen.defines, architecture))
    assert cubin.startswith(b"\x7fELF")
    assert bytes([32])[0] == 32, "the empty log was written into the one b' ' that Python has"


def test_compiled_kernels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    defines = page_build(SPECS["packed"], 64, "float16").defines
    first = compile_kernel("decompress.cu", defines, 90)
    monkeypatch.setattr(gpu_compile, "compile_now", lambda *_: pytest.fail("compiled again"))
    assert compile_kernel("decompress.cu", defines, 90) == first


def test_a_cache_that_cannot_be_used_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_compile, "compile_now", lambda *_: (b"cubin", ""))
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compile_kernel("decompress.cu", {}, 90) == b"cubin"


def test_what_does_not_compile_says_so() -> None:
    with pytest.raises(BackendUnavailable, match=r"NVRTC does not compile decompress\.cu"):
        compile_now("decompress.cu", options_for("decompress.cu", {}, 90))


def test_what_no_kernel_is_built_for_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="not sm_75"):
        machine(75)
    with pytest.raises(BackendUnavailable, match="head_dim"):
        page_build(SPECS["kvcomp"], 32, "bfloat16")


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_without_a_driver_the_backend_is_unavailable() -> None:
    with pytest.raises(BackendUnavailable, match="driver"):
        gpu.Gpu(0, lambda: 0)
