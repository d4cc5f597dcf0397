"""One layer's cache: a store per device, the attention over it, and what reads its pages."""

from torch import Tensor

from kvcomp.calibration import LayerCalibration
from kvcomp.spec import CodecSpec
from kvcomp.store.cpu import KVStore
from kvcomp.store.memory import Memory
from kvcomp.store.protocol import Store

__all__ = ["KVStore", "Memory", "Store", "new_store", "sealed"]


def new_store(spec: CodecSpec, backend: str, calibrated: LayerCalibration | None) -> Store:
    """An empty store of one layer. backend: ``cpu``, ``reference``, or ``gpu`` for the device of the first tokens."""
    if backend != "gpu":
        return KVStore(spec, backend, *(calibrated or ()))
    from kvcomp.store.gpu.store import GPUStore  # not before there is a GPU

    return GPUStore(spec, *(calibrated or ()))


def sealed(
    spec: CodecSpec, k: Tensor, v: Tensor, backend: str = "cpu", calibrated: LayerCalibration | None = None
) -> KVStore:
    """A store that holds these K and V, (batch, KV heads, tokens, head_dim) each, compressed as far as the
    spec says.
    """
    store = KVStore(spec, backend, *(calibrated or ()))
    store.append(k, v)
    store.seal()
    return store
