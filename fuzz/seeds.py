"""Write the seed corpus: one small valid input, or a few, of each target and of each kind of block."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from fuzz_value import HYBRID, KEY, ORIGIN, PREFIX_CHUNK, SHAPE, SHAPES, SPEC, STATE_TOKENS
from kvcomp import files
from kvcomp.codec.page import size_of
from kvcomp.prefix import chain, state
from kvcomp.serve.chunks import pack_chunk
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store import KVStore
from kvcomp.store.tensors import TYPES
from layouts import LAYOUTS, filled

SEEDS = Path(__file__).parent / "seeds"


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def containers() -> dict[str, bytes]:
    """Files of one page with sinks and window, alone and beside states; of two rows that share pages and have books; of
    raw and fixed blocks; of a sliding window that has left some.
    """
    small = KVStore(CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=2, sinks=1))
    small.append(*values((2, 1, 1, 67, 16), torch.bfloat16, 1))
    rows = KVStore(CodecSpec(TensorSpec("channel", 0.3, classes=4), TensorSpec("vector", 0.3), window=0, sinks=0))
    rows.append(*values((2, 1, 1, 260, 16), torch.float16, 2))
    raw = KVStore(CodecSpec(TensorSpec("token", 0.1, "fixed"), TensorSpec("block", 0.1), window=0, sinks=2))
    x = values((2, 2, 1, 66, 16), torch.float16, 3)
    x[1, 0, 0, 20] = torch.nan
    raw.append(*x)
    raw.set_starts([0, 5])
    found = {}
    window = KVStore(replace(small.spec, key=TensorSpec("channel", 0.1, "fixed")), sliding_window=70)
    window.append(*values((2, 1, 1, 140, 16), torch.bfloat16, 8))
    for name, store in (("small", small), ("rows", rows), ("raw", raw), ("window", window)):
        store.seal()
        if name == "rows":
            store.select(torch.tensor([0, 0]))
        found[name] = b"".join(files.pack_stores({0: store}, store.spec, 1, {"id": name, "configuration": {}}))
    states = {1: {"conv_states.0": values((1, 6, 4), torch.bfloat16, 7), "recurrent_states.0": torch.ones(1, 2, 4, 4)}}
    found["states"] = b"".join(files.pack_stores({0: small}, small.spec, 2, None, None, states))
    return found


def remote_values() -> dict[str, bytes]:
    """A chunk as LMCache's tier stores it, the first chunk of a prefix, and a state behind it."""
    pairs = values((SHAPE.layers, 2, SHAPE.heads, SHAPE.tokens, SHAPE.channels), SHAPE.dtype, 4)
    store = KVStore(ORIGIN.spec)
    store.append(*values((2, 1, 1, ORIGIN.end(PREFIX_CHUNK), 16), torch.bfloat16, 6))
    store.seal()
    whole = deepcopy(store)
    more = STATE_TOKENS - ORIGIN.end(PREFIX_CHUNK)
    whole.append(*values((2, 1, 1, more, 16), torch.bfloat16, 8))
    window = files.recent_only(*values((2, 1, 1, 3, 16), torch.bfloat16, 9), STATE_TOKENS, ORIGIN.spec)
    linear = {
        layer: {name: values((1, *shape), TYPES[dtype], 10) for name, (shape, dtype) in of.items()}
        for layer, of in SHAPES.linear.items()
    }
    behind = state.state_of(HYBRID, {0: whole, 1: window}, linear, 1)
    return {
        "chunk": b"".join(pack_chunk(KEY, SPEC, [(k, v) for k, v in pairs])),
        "prefix": b"".join(chain.pack(ORIGIN, {0: store}, PREFIX_CHUNK, KEY)),
        "state": b"".join(state.pack_state(HYBRID, behind, KEY, STATE_TOKENS)),
    }


def pages() -> dict[str, bytes]:
    """The first page of each layout, with a byte before it that says which and that its size is put right."""
    found = {}
    for number, layout in enumerate(LAYOUTS):
        store = filled(layout)
        buffer = store.rows.owners[0][0]
        page = buffer[: size_of(buffer, 0, layout.heads)].tobytes()
        found[f"layout{number}"] = bytes([number]) + page
    return found


def main() -> None:
    for name, inputs in (("container", containers()), ("value", remote_values()), ("block", pages())):
        folder = SEEDS / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for key, data in inputs.items():
            (folder / key).write_bytes(data)


if __name__ == "__main__":
    main()
