"""kvcomp in Hugging Face transformers; importing it registers the attention "kvcomp"."""

from kvcomp.integrations.transformers.cache import KVCompCache

__all__ = ["KVCompCache"]
