"""The CUDA sources compile without a GPU, for every architecture, and the shipped builds spill no register."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvcomp.errors import BackendUnavailable
from kvcomp.kernels import gpu, gpu_compile
from kvcomp.kernels.gpu_compile import compile_kernel, compile_now, options_for
from kvcomp.kernels.gpu_layout import attend_build, machine, page_build
from kvcomp.spec import PRESETS, CodecSpec, TensorSpec

pytest.importorskip("cuda.bindings.nvrtc", exc_type=ImportError)

KLT = CodecSpec(
    TensorSpec("head", None, classes=4, limit=10, steps=((0.1,),)),
    TensorSpec("head", None, classes=4, limit=10, steps=((0.1,),)),
)
SPECS = {"kvcomp": PRESETS["kvcomp"].layer(0, 1), "packed": PRESETS["packed"].layer(0, 1), "head": KLT.layer(0, 1)}
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
EVERY = [(spec, channels, arch) for spec in SPECS for channels in (64, 80, 96, 128, 192, 256) for arch in ARCHITECTURES]
QUICK = [("kvcomp", 128, 90)]
SPILLS = {("kvcomp", 256, 120): "four bytes, with three warps and tables of twelve bits"}


def _marks(build: tuple[str, int, int]) -> list[pytest.MarkDecorator]:
    spills = SPILLS.get(build)
    return [pytest.mark.slow, *([pytest.mark.xfail(reason=spills, strict=True)] if spills else [])]


def spilled(messages: str) -> list[int]:
    return [int(size) for size in re.findall(r"(\d+) bytes spill", messages)]


@pytest.mark.parametrize(
    ("spec", "channels", "architecture"), [*QUICK, *(pytest.param(*x, marks=_marks(x)) for x in EVERY)]
)
def test_attention_spills_nothing(spec: str, channels: int, architecture: int) -> None:
    chosen = attend_build(SPECS[spec], channels, "bfloat16", "bfloat16", False, machine(architecture))
    options = (*options_for("decode_attention.cu", chosen.defines, architecture), "--ptxas-options=-v")
    cubin, messages = compile_now("decode_attention.cu", options)
    assert cubin.startswith(b"\x7fELF")
    assert chosen.shared <= machine(architecture).shared
    assert not any(spilled(messages)), messages


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
