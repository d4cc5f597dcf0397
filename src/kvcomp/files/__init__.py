"""The .kvc file (docs/format.md, section 7): header, container, checks, and the layers in it."""

from kvcomp.files.layers import load, load_states, open_container, pack_stores, recent_only, save

__all__ = ["load", "load_states", "open_container", "pack_stores", "recent_only", "save"]
