"""One layer's cache: a store per device, the attention over it, and what reads its pages."""

from kvcomp.store.cpu import KVStore
from kvcomp.store.memory import Memory

__all__ = ["KVStore", "Memory"]
