"""Prefixes that many prompts share, stored in chunks."""

from kvcomp.prefix.store import PrefixStore

__all__ = ["PrefixStore"]
