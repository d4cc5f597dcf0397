"""kvcomp: the KV cache of language models, error-bounded and entropy-coded, with attention on the compressed bits.

    compressed = kvcomp.compress(k, v)  # (batch, kv_heads, tokens, head_dim)
    o = compressed.attend(q)            # (batch, heads, 1, head_dim)

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
from kvcomp.spec import PRESETS, CodecSpec, TensorSpec, WindowSpec

if TYPE_CHECKING:
    from kvcomp.calibration import Calibration
    from kvcomp.compressed import CompressedKV, compress, load
    from kvcomp.fit.cached import calibrate
    from kvcomp.prefix import PrefixStore
    from kvcomp.store import Memory

# What needs torch is imported when it is first used, so that the command line answers at once (PEP 562).
_LAZY = {
    "Calibration": "kvcomp.calibration",
    "Memory": "kvcomp.store",
    "CompressedKV": "kvcomp.compressed",
    "PrefixStore": "kvcomp.prefix",
    "calibrate": "kvcomp.fit.cached",
    "compress": "kvcomp.compressed",
    "load": "kvcomp.compressed",
}

__all__ = [
    "PRESETS",
    "BackendUnavailable",
    "Calibration",
    "CodecSpec",
    "CompressedKV",
    "CorruptData",
    "InvalidInput",
    "KVCompError",
    "LimitExceeded",
    "Memory",
    "PrefixStore",
    "StoreUnavailable",
    "TensorSpec",
    "UnsupportedModel",
    "UnsupportedVersion",
    "WindowSpec",
    "calibrate",
    "compress",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvcomp' has no attribute {name!r}")
    try:
        value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("platformdirs", "transformers"):
            raise
        raise ModuleNotFoundError(f"kvcomp.{name} needs {error.name}: pip install '.[hf]'", name=error.name) from None
    return value


def __dir__() -> list[str]:
    return __all__
