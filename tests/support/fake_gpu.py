"""A GPU as far as torch's rules go, on the CPU: tensors that say they are on ``cuda:0`` and lie in main memory.

Who mixes them with tensors of main memory, or gives them to NumPy, gets an error, as on a GPU. Streams and events do
nothing: all work is done in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = torch.device("cuda", 0)
OWN = "fakegpu"  # what torch's own code calls it, which knows no CUDA here
# At once: torch counts devices when gradients are first asked for.
_setup_privateuseone_for_python_backend(OWN)
MAKE = Tensor._make_wrapper_subclass

CROSSING = {"copy_", "_to_copy", "_copy_from"}  # from one memory to the other
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # with indices that may be in main memory


class OnGpu(Tensor):
    """A tensor on the GPU. inner: its values, in main memory."""

    inner: Tensor
    device = DEVICE
    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    @torch.inference_mode(False)  # a view of what was made outside of it belongs there
    def __new__(cls, inner: Tensor) -> Self:
        made = MAKE(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{OWN}:0",
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnGpu({self.inner})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        made = OnGpu(self.inner.clone())
        memo[id(self)] = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        copied: Tensor = memo[id(self)]
        return copied

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def record_stream(self, stream: Any) -> None:
        """Memory is freed when nobody holds it."""


class FakeGpu(TorchDispatchMode):
    """While it is active ``cuda:0`` is a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for kind in types:
            if kind not in (OnGpu, Tensor, nn.Parameter):  # kvcomp's handles, which make tensors of their own
                with self:
                    return kind.__torch_dispatch__(func, types, args, kwargs)
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.removeprefix("aten::")
    leaves = tree_leaves((args, kwargs))
    given = [x for x in leaves if isinstance(x, Tensor)]
    here = any(isinstance(x, OnGpu) for x in given)
    asked = [x for x in leaves if isinstance(x, torch.device)]
    if asked:
        here = asked[0].type in (OWN, DEVICE.type)
    elif name in CROSSING:
        here = isinstance(args[0], OnGpu)
    elif here:
        strangers = {x.shape for x in given if not isinstance(x, OnGpu) and x.dim()}
        if strangers and not (name in INDEXING and isinstance(args[0], OnGpu)):
            raise RuntimeError(f"{name}: tensors on a GPU and tensors in main memory, {strangers}")
    if kwargs.get("pin_memory"):
        kwargs = kwargs | {"pin_memory": False}
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if name == "_local_scalar_dense" or not here:
        return out
    if func._schema.is_mutable:
        return args[0]
    return tree_map(lambda x: OnGpu(x) if isinstance(x, Tensor) else x, out)


def _wrapper(kind: type[Tensor], shape: Any, *, device: Any, **options: Any) -> Tensor:
    """``Tensor._make_wrapper_subclass`` for a GPU that torch knows here."""
    on_gpu = torch.device(device).type == DEVICE.type
    made: Tensor = MAKE(kind, shape, device=f"{OWN}:0" if on_gpu else device, **options)
    return made


def _inner(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.inner if isinstance(x, OnGpu) else x


class Stream:
    """All work is done when it is queued."""

    cuda_stream = 0
    device = DEVICE

    def __init__(self, *device: Any) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...


class Event:
    """It has happened."""

    def record(self, *stream: Stream) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Torch has a GPU."""
    stream = Stream()
    with pytest.MonkeyPatch.context() as patch, FakeGpu():
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="a", multi_processor_count=1))
        patch.setattr(torch.cuda, "max_memory_allocated", lambda _: 0)
        patch.setattr(torch.cuda, "current_stream", lambda *_: stream)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        patch.setattr(Tensor, "pin_memory", lambda x, *_: x)
        patch.setattr(Tensor, "_make_wrapper_subclass", _wrapper)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its values in main memory, then moves them
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # ``.data =`` leaves ``inner`` behind
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_overwrite_module_params_on_conversion(False)
