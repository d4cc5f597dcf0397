"""The cache of a serving engine, compressed: pages in the blocks that the engine's block table names.

An engine (vLLM) gives every sequence a row of block numbers and may share a block among sequences. Here a block is a
page of 64 tokens: raw while it is written, encoded once it has left the window.
"""

from kvcomp.store.paged.arena import Arena, Room
from kvcomp.store.paged.blocks import Blocks, Step
from kvcomp.store.paged.cache import PagedCache
from kvcomp.store.paged.layer import PagedLayer, Shape

__all__ = ["Arena", "Blocks", "PagedCache", "PagedLayer", "Room", "Shape", "Step"]
