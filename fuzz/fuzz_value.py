"""Bytes as a value of a remote store: the chunk that was asked for, or a typed error.

Both kinds of value: the chunks of LMCache's tier and vLLM's connector, and those of prefixes, of which a file's header
says in its first bytes.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from harness import instrumented

with instrumented(
    "kvcomp.files.check", "kvcomp.files.container", "kvcomp.files.header", "kvcomp.serve.chunks", "kvcomp.prefix.chain"
):
    from kvcomp.prefix import chain
    from kvcomp.serve import chunks

import torch

from harness import LARGEST, Guarded, fuzz, mend, mutate
from kvcomp.errors import CorruptData, LimitExceeded, UnsupportedVersion
from kvcomp.spec import CodecSpec, TensorSpec

KEY = "kvcomp:chunk"
SPEC = CodecSpec(TensorSpec("channel", 0.05), TensorSpec("token", 0.1), window=0, sinks=0)
SHAPE = chunks.ChunkShape(layers=2, heads=1, tokens=68, channels=16, dtype=torch.bfloat16)
ORIGIN = chain.Origin({"id": "a", "configuration": {}}, 1, [0], "bfloat16", CodecSpec(SPEC.key, SPEC.value, 0, 1))
PREFIX_CHUNK = 0

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


def target(data: bytes) -> None:
    value = guarded.place(mend(data[:LARGEST])).data
    with suppress(CorruptData, LimitExceeded, UnsupportedVersion):
        (check_prefix if b'"prefix"' in data[:2048] else check_chunk)(value)


if __name__ == "__main__":
    fuzz(target, mutate, Path(__file__).parent / "seeds" / "value")
