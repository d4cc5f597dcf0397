"""What a CUDA graph does, on the CPU: the work of one step with its addresses, repeated without Python's part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emulator import Emulator
from kvcomp.kernels.cuda.launch import Launch

WAITING = {
    "_local_scalar_dense",
    "lift_fresh",
    "nonzero",
    "equal",
    "is_nonzero",
}  # for the device, or with numbers of the host's


class Recorder(TorchDispatchMode):
    """While it is active torch's operations and the kernels of ``on`` are written down; what changes memory is not
    done.

    ``repeat`` does all of it on the same memory. Operations that would let the host wait for a GPU are refused, as
    under capture.
    """

    def __init__(self, on: RecordingEmulator) -> None:
        super().__init__()
        self._on = on
        self.work: list[Callable[[], None]] = []
        self.names: list[str] = []
        self._kept: list[Any] = []

    def __enter__(self) -> Any:
        self._on.recorder = self
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self._on.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        assert name not in WAITING, f"{name} cannot be captured"
        if func._schema.is_mutable:
            assert name.endswith("_"), f"{name} cannot be repeated here"
            self.names.append(name)
            self.work.append(lambda: func(*args, **kwargs))
            return args[0]
        out = func(*args, **kwargs)
        self._kept.append((out, args, kwargs))
        given = {_storage(x) for x in _tensors((args, kwargs))}
        fresh = [x for x in _tensors(out) if _storage(x) not in given]
        if fresh and "empty" not in name:
            self.names.append(name)

            def again() -> None:
                for to, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                    if _storage(to) not in given:
                        to.copy_(new)

            self.work.append(again)
        return out

    def launch(self, of: Launch) -> None:
        copied = of._replace(arguments=type(of.arguments).from_buffer_copy(of.arguments))
        self.names.append(of.kernel)
        self.work.append(lambda: self._on.launch(copied))

    @torch.inference_mode()
    def repeat(self) -> None:
        for work in self.work:
            work()


class RecordingEmulator(Emulator):
    """An emulator whose launches are written down while a recorder is active."""

    recorder: Recorder | None = None

    def launch(self, of: Launch) -> None:
        (super() if self.recorder is None else self.recorder).launch(of)


def _tensors(of: Any) -> Iterable[Tensor]:
    return [x for x in tree_leaves(of) if isinstance(x, Tensor)]


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
