"""kvcomp: the KV cache of language models, error-bounded and entropy-coded, with attention on the compressed bits.

    packed = kvcomp.compress(k, v)      # (batch, kv_heads, tokens, head_dim)
    o = packed.attend(q)                # (batch, heads, 1, head_dim)

For Hugging Face transformers see ``kvcomp.integrations.transformers``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvcomp.errors import (
    BackendUnavailable,
    CorruptData,
    InvalidInput,
    KVCompError,
    LimitExceeded,
    StoreUnavailable,
    UnsupportedModel,
    UnsupportedVersion,
)
from kvcomp.spec import PRESETS, CodecSpec, TensorSpec

if TYPE_CHECKING:
    from kvcomp.calibration import Calibration
    from kvcomp.packed import Packed, compress, load
    from kvcomp.prefix import PrefixStore
    from kvcomp.store import Memory

# What needs torch is imported when it is first used, so that the command line answers at once (PEP 562).
_LAZY = {
    "Calibration": "kvcomp.calibration",
    "Memory": "kvcomp.store",
    "Packed": "kvcomp.packed",
    "PrefixStore": "kvcomp.prefix",
    "compress": "kvcomp.packed",
    "load": "kvcomp.packed",
}

__all__ = [
    "PRESETS",
    "BackendUnavailable",
    "Calibration",
    "CodecSpec",
    "CorruptData",
    "InvalidInput",
    "KVCompError",
    "LimitExceeded",
    "Memory",
    "Packed",
    "PrefixStore",
    "StoreUnavailable",
    "TensorSpec",
    "UnsupportedModel",
    "UnsupportedVersion",
    "compress",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvcomp' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
