"""kvcomp: the KV cache of language models, error-bounded and entropy-coded, with attention on the compressed bits.

    packed = kvcomp.compress(k, v)      # (batch, kv_heads, tokens, head_dim)
    o = packed.attend(q)                # (batch, heads, 1, head_dim)

For Hugging Face transformers see ``kvcomp.integrations.transformers``.
"""

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
from kvcomp.packed import Packed, compress, load
from kvcomp.prefix import PrefixStore
from kvcomp.spec import PRESETS, CodecSpec, TensorSpec
from kvcomp.store import KVStore, Memory

__all__ = [
    "PRESETS",
    "BackendUnavailable",
    "CodecSpec",
    "CorruptData",
    "InvalidInput",
    "KVCompError",
    "KVStore",
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
