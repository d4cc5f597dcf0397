"""CUDA sources to machine code at run time, by NVRTC: no compiler and no GPU needed.

Compiled kernels are kept on disk by source, architecture and options.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvcomp import disk
from kvcomp.errors import BackendUnavailable, InvalidInput
from kvcomp.kernels.cuda.layout import SOURCES

# The encoder's bounds are proved for the arithmetic as it is written.
OPTIONS: Mapping[str, tuple[str, ...]] = {"encode.cu": ("--fmad=false",)}
COMMON = ("-std=c++17", "-default-device")


def compile_kernel(source: str, defines: Mapping[str, int], architecture: int) -> bytes:
    """Compile a kernel for one architecture, or read it from the disk if it was compiled before.

    Parameters
    ----------
    source
        Name of a file of ``kernels/cuda``.
    defines
        Constants of the build.
    architecture
        Compute capability, such as 90.

    Returns
    -------
    bytes
        The cubin.

    Raises
    ------
    BackendUnavailable
        If NVRTC is missing or refuses.
    """
    options = options_for(source, defines, architecture)
    path = cache_directory() / f"{Path(source).stem}-{architecture}-{_key(source, options)}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass  # it is not there, or cannot be read
    logging.getLogger("kvcomp").info("compiling %s for sm_%d, once on this machine ...", source, architecture)
    cubin, _ = compile_now(source, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write(path, [cubin])
    except (OSError, InvalidInput) as error:  # a cache that cannot be written costs time, not results
        logging.getLogger("kvcomp").warning("cannot keep compiled kernels in %s: %s", path.parent, error)
    return cubin


def options_for(source: str, defines: Mapping[str, int], architecture: int) -> tuple[str, ...]:
    """List the options of the compiler."""
    constants = (f"-D{name}={value}" for name, value in sorted(defines.items()))
    return (f"--gpu-architecture=sm_{architecture}", *COMMON, *OPTIONS.get(source, ()), *constants)


def compile_now(source: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """Compile a file to a cubin, and give the compiler's messages. Raises BackendUnavailable as ``compile_kernel``."""
    nvrtc = _nvrtc()
    program = _check(nvrtc, nvrtc.nvrtcCreateProgram((SOURCES / source).read_bytes(), source.encode(), 0, [], []))
    every = [option.encode() for option in (*options, f"-I{SOURCES}")]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(every), every)
    # NVRTC writes into these bytes. One more than it asks for: Python has only one b" ", which everybody shares.
    log = b" " * (1 + _check(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
    nvrtc.nvrtcGetProgramLog(program, log)
    messages = log.rstrip(b"\0 ").decode(errors="replace")
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendUnavailable(f"NVRTC does not compile {source} ({result.name}), use backend='cpu':\n{messages}")
    cubin = b" " * _check(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return cubin, messages


def cache_directory() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcomp" / "kernels"


@lru_cache
def sources_hash(source: str) -> str:
    """Hash a CUDA source and all that it includes."""
    digest, names = hashlib.sha256(), [source]
    for name in names:
        content = (SOURCES / name).read_bytes()
        digest.update(name.encode() + b"\0" + content)
        included = (found.decode() for found in re.findall(rb'^#include [<"](\w+\.cuh)', content, re.MULTILINE))
        names += [other for other in included if other not in names]
    return digest.hexdigest()


def _key(source: str, options: tuple[str, ...]) -> str:
    text = "\n".join((source, sources_hash(source), nvrtc_version(), *options))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def nvrtc_version() -> str:
    """Version of NVRTC. Raises BackendUnavailable if it is not there."""
    _, major, minor = _nvrtc().nvrtcVersion()
    return f"{major}.{minor}"


@lru_cache(maxsize=1)
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise BackendUnavailable(
            f"the GPU kernels are compiled by NVRTC, which is not there ({error}): pip install '.[cuda]'"
        ) from None
    return nvrtc


def _check(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendUnavailable(f"NVRTC fails ({result[0].name}): use backend='cpu'")
    return result[1]
