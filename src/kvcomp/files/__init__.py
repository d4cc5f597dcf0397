"""The .kvc file (docs/format.md, section 7): header, container, checks, and the layers in it."""

from kvcomp.files.layers import NAMES, TYPES, load, open_container, pack_stores, recent_only, save

__all__ = ["NAMES", "TYPES", "load", "open_container", "pack_stores", "recent_only", "save"]
