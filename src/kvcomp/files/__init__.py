"""The .kvc file (docs/format.md, section 7): header, container, checks, and the layers in it."""

from kvcomp.files.layers import load, open_container, pack_stores, recent_only, save

__all__ = ["load", "open_container", "pack_stores", "recent_only", "save"]
