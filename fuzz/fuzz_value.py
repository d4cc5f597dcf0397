"""Bytes as a value of a remote store: the chunk that was asked for, or a typed error.

All kinds of value: the chunks of LMCache's tier and vLLM's connector, and those of prefixes and the states behind them,
of which a file's header says in its first bytes.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

from harness import instrumented

with instrumented(
    "kvcomp.files.check",
    "kvcomp.files.container",
    "kvcomp.files.header",
    "kvcomp.serve.chunks",
    "kvcomp.prefix.chain",
    "kvcomp.prefix.state",
):
    from kvcomp.prefix import chain, state
    from kvcomp.serve import chunks

import torch

from harness import LARGEST, Guarded, fuzz, mend, mutate
from kvcomp.errors import CorruptData, LimitExceeded, UnsupportedVersion
from kvcomp.files.header import Shapes
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store.tensors import NAMES

KEY = "kvcomp:chunk"
SPEC = CodecSpec(TensorSpec("channel", 0.05), TensorSpec("token", 0.1), window=0, sinks=0)
SHAPE = chunks.ChunkShape(layers=2, heads=1, tokens=68, channels=16, dtype=torch.bfloat16)
ORIGIN = chain.Origin({"id": "a", "configuration": {}}, 1, [0], "bfloat16", CodecSpec(SPEC.key, SPEC.value, 0, 1))
PREFIX_CHUNK = 0
SEEDS = Path(__file__).parent / "seeds" / "value"
HYBRID = replace(ORIGIN, layers=3)
"""A compressed layer, one with a sliding window and one with linear attention."""
STATE_TOKENS = ORIGIN.end(PREFIX_CHUNK) + 5
SHAPES = Shapes(
    {0: (1, 16, 16, "bfloat16"), 1: (1, 16, 16, "bfloat16")},
    {2: {"conv_states.0": ((6, 4), "bfloat16"), "recurrent_states.0": ((2, 4, 4), "float32")}},
)

guarded = Guarded()
torch.set_num_threads(1)


def check_chunk(value: memoryview) -> None:
    stores = chunks.open_chunk(value, KEY, SPEC, SHAPE)
    if len(stores) != SHAPE.layers:
        raise AssertionError("a chunk of other layers came back")
    for store in stores:
        for x in chunks.unpack(store):
            if x.shape != (SHAPE.heads, SHAPE.tokens, SHAPE.channels) or x.dtype != SHAPE.dtype:
                raise AssertionError("a chunk of another shape came back")


def check_prefix(value: memoryview) -> None:
    _, stores = chain.unpack(ORIGIN, value, PREFIX_CHUNK, KEY, "cpu")
    for store in stores.values():
        if chain.join_chunks([store]).dense()[0].shape[2] != ORIGIN.end(PREFIX_CHUNK):
            raise AssertionError("a prefix of another length came back")


def check_state(value: memoryview) -> None:
    found = state.unpack_state(HYBRID, value, KEY, STATE_TOKENS, books(), SHAPES, "cpu")
    if found.chunks != 1 or {store.tokens for store in found.stores.values()} != {STATE_TOKENS}:
        raise AssertionError("the state of another place came back")
    for layer, shapes in SHAPES.linear.items():
        if {name: (tuple(x.shape[1:]), NAMES[x.dtype]) for name, x in found.linear[layer].items()} != shapes:
            raise AssertionError("a state of another shape came back")
    for layer, store in found.stores.items():
        k, v = store.dense()
        heads, *channels, dtype = SHAPES.attention[layer]
        if [k.shape[3], v.shape[3]] != channels or k.shape[1] != heads or NAMES[k.dtype] != dtype:
            raise AssertionError("a layer of another shape came back")


@cache
def books() -> bytes:
    """What tells the codebooks of the chunk before the state from others."""
    return chain.books_of(chain.header_of([(SEEDS / "prefix").read_bytes()]))


def target(data: bytes) -> None:
    value = guarded.place(mend(data[:LARGEST])).data
    with suppress(CorruptData, LimitExceeded, UnsupportedVersion):
        if b'"states"' in data[:8192]:
            check_state(value)
        else:
            (check_prefix if b'"prefix"' in data[:2048] else check_chunk)(value)


if __name__ == "__main__":
    fuzz(target, mutate, SEEDS)
