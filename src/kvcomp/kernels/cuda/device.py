"""NVIDIA GPUs: which there are, and how a kernel is loaded and launched on one. Memory and streams are the caller's.

Kernels are compiled when first needed, for the GPU at hand, and kept on disk (compile.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from kvcomp.errors import BackendUnavailable, LimitExceeded
from kvcomp.kernels.cuda.compile import compile_kernel
from kvcomp.kernels.cuda.launch import Launch
from kvcomp.kernels.cuda.layout import Build, Machine, machine

DEFAULT_SHARED = 48 << 10  # more needs the kernel's consent


class Gpu:
    """One GPU.

    Parameters
    ----------
    index
        Which one.
    stream
        Gives the address of the stream that launches go to, in whose context the caller is.

    Raises
    ------
    BackendUnavailable
        If there is no such GPU, no driver, or the kernels are not built for it.
    """

    machine: Machine

    def __init__(self, index: int, stream: Callable[[], int]) -> None:
        self._driver = _driver()
        self._stream = stream
        device = self._check(self._driver.cuDeviceGet(index))
        of = self._driver.CUdevice_attribute
        major, minor, processors, shared = (
            int(self._check(self._driver.cuDeviceGetAttribute(attribute, device)))
            for attribute in (
                of.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                of.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                of.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                of.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )
        )
        known = machine(10 * major + minor, processors)
        self.machine = Machine(known.architecture, min(known.shared, shared), processors)
        self._context = self._check(self._driver.cuDevicePrimaryCtxRetain(device))  # that of torch
        self._modules: dict[tuple[str, Build], Any] = {}
        self._functions: dict[tuple[str, str, Build], Any] = {}

    def launch(self, of: Launch) -> None:
        """See ``Launcher``. Raises BackendUnavailable or LimitExceeded."""
        second = ctypes.c_int32(of.extra or 0)
        parameters = (ctypes.c_void_p * 2)(ctypes.addressof(of.arguments), ctypes.addressof(second))
        self._check(self._driver.cuCtxPushCurrent(self._context))  # a model's layers may lie on several GPUs
        try:
            function = self._function(of)
            threads, where = (of.threads, 1, 1), ctypes.addressof(parameters)
            self._check(self._driver.cuLaunchKernel(function, *of.grid, *threads, of.shared, self._stream(), where, 0))
        finally:
            self._driver.cuCtxPopCurrent()

    def _function(self, of: Launch) -> Any:
        name = of.source, of.kernel, of.build
        if name in self._functions:
            return self._functions[name]
        key = of.source, of.build
        if key not in self._modules:
            cubin = compile_kernel(f"{of.source}.cu", of.build.defines, self.machine.architecture)
            self._modules[key] = self._check(self._driver.cuModuleLoadData(cubin))
        function = self._check(self._driver.cuModuleGetFunction(self._modules[key], of.kernel.encode()))
        if of.shared > DEFAULT_SHARED:
            most = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._check(self._driver.cuFuncSetAttribute(function, most, of.shared))
        self._functions[name] = function
        if of.kernel == "attend":  # its first merge may come while a graph is captured, which loads nothing
            self._function(of._replace(kernel="merge", shared=0))
        return function

    def _check(self, result: tuple[Any, ...]) -> Any:
        """The value of a driver call.

        Raises LimitExceeded if memory is short, or BackendUnavailable with the driver's name for what is wrong.
        """
        codes = self._driver.CUresult
        if result[0] == codes.CUDA_ERROR_OUT_OF_MEMORY:
            raise LimitExceeded("the device has no memory left for a kernel: use a smaller batch or a shorter context")
        if result[0] != codes.CUDA_SUCCESS:
            raise BackendUnavailable(
                f"the CUDA driver fails: {result[0].name}. A kernel that failed before it, or a driver older than "
                "the CUDA of cuda-bindings and nvidia-cuda-nvrtc, can be the reason: install those of the driver's; "
                "backend='cpu' needs neither"
            )
        return result[1] if len(result) > 1 else None


@lru_cache(maxsize=1)
def _driver() -> Any:
    try:
        from cuda.bindings import driver

        (result,) = driver.cuInit(0)
    except ImportError:
        raise BackendUnavailable("the GPU backend needs cuda-bindings: pip install '.[cuda]'") from None
    except RuntimeError as error:
        raise BackendUnavailable(f"there is no NVIDIA driver on this machine ({error}): use backend='cpu'") from None
    if result != driver.CUresult.CUDA_SUCCESS:
        raise BackendUnavailable(f"the NVIDIA driver does not start ({result.name}): use backend='cpu'")
    return driver
