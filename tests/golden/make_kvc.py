"""Write the golden .kvc files of version 1: ``python tests/golden/make_kvc.py [folder]``.

A test runs this and compares every byte. For each case there are NAME.kvc; NAME.values.bin, K and then V of each layer,
(rows, heads, tokens, channels), in the dtype, little-endian, as they decode, then the states; NAME.json, what the file
holds, in words.
The input is made of integers over powers of two, so that every machine makes the same.

These bytes are an interface: if a change of the source changes them, what was written before can no longer be read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvcomp import files
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store import KVStore
from kvcomp.store.tensors import as_array

FOLDER = Path(__file__).parent / "container-v1"
SMALL = CodecSpec(TensorSpec("block", 0.4), TensorSpec("token", 0.4), window=0, sinks=1)
BATCH = CodecSpec(
    TensorSpec("channel", (0.3, 0.25, 0.2), classes=4), TensorSpec("vector", 0.4, "fixed"), window=8, sinks=2
)


def values(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    """Integers from -32 to 31 over 16, the small ones more often."""
    number = np.arange(seed * 1_000_003, seed * 1_000_003 + int(np.prod(shape)), dtype=np.uint64)
    mixed = (number * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    a, b = mixed & np.uint64(63), mixed >> np.uint64(6) & np.uint64(63)
    return ((a.astype(np.int64) - 32) * (b.astype(np.int64) - 32) // 32).reshape(shape) / 16


def filled(
    spec: CodecSpec,
    layer: int,
    layers: int,
    starts: list[int],
    heads: int,
    tokens: int,
    dtype: torch.dtype,
    backend: str,
) -> KVStore:
    store = KVStore(spec.layer(layer, layers), backend)
    k, v = torch.from_numpy(values(layer + 1, 2, len(starts), heads, tokens, 16)).to(dtype)
    store.append(k, v)
    store.set_starts(starts)
    store.seal()
    return store


States = dict[int, dict[str, torch.Tensor]]


def cases(backend: str) -> dict[str, tuple[str, CodecSpec, int, dict[str, Any] | None, dict[int, KVStore], States]]:
    small = filled(SMALL, 0, 1, [0], 1, 68, torch.bfloat16, backend)
    batch = {layer: filled(BATCH, layer, 3, [0, 3], 1, 285, torch.float16, backend) for layer in (0, 2)}
    for store in batch.values():
        store.select(torch.tensor([1, 0, 1]))
        store.crop(255)
        store.append(*torch.from_numpy(values(9, 2, 3, 1, 5, 16)).to(torch.float16))
    return {
        "small": (
            "one page with the default book, a sink and three recent tokens; no model",
            SMALL,
            1,
            None,
            {0: small},
            {},
        ),
        "batch": (
            (
                "layers 0 and 2 of 3, three rows of which two share their pages, left padding, own books, fixed "
                "width, cropped in a page"
            ),
            BATCH,
            3,
            {"id": "golden", "configuration": {"model_type": "none"}},
            batch,
            {},
        ),
        "states": (
            "layer 1 of 3 as in small; states of layers 0 and 2, of three dtypes and of 2 to 4 dimensions",
            SMALL,
            3,
            None,
            {1: small},
            {
                0: {
                    "conv_states.0": torch.from_numpy(values(5, 1, 24, 4)).to(torch.bfloat16),
                    "recurrent_states.0": torch.from_numpy(values(6, 1, 2, 8, 8)).to(torch.float32),
                },
                2: {"conv_states.0": torch.from_numpy(values(7, 1, 5)).to(torch.float16)},
            },
        ),
    }


def main(folder: Path = FOLDER, backend: str = "reference") -> None:
    """Write all files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (why, spec, layers, model, stores, states) in cases(backend).items():
        files.save(folder / f"{name}.kvc", stores, spec, layers, model, states=states)
        dense = [as_array(x).tobytes() for store in stores.values() for x in store.dense()]
        dense += [as_array(x).tobytes() for of_layer in states.values() for x in of_layer.values()]
        (folder / f"{name}.values.bin").write_bytes(b"".join(dense))
        about = {
            "why": why,
            "spec": json.loads(spec.to_json()),
            "layers": list(stores),
            "rows": [s.batch for s in stores.values()],
        }
        (folder / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
