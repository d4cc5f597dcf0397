"""Every kernel once on small shapes, for compute-sanitizer: encode, attend with and without a merge, decompress."""

from __future__ import annotations

import os

import torch

from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store.gpu.store import GPUStore

SPECS = (
    (64, CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=16)),
    (128, CodecSpec(TensorSpec("channel", 0.05, classes=4, limit=10), TensorSpec("vector", 0.1, "fixed"), window=16)),
    (80, CodecSpec(*2 * (TensorSpec("head", None, classes=4, limit=10, steps=((0.5, 0.7),)),), window=16)),
    (64, CodecSpec(TensorSpec("channel", 0.08, "patched"), TensorSpec("token", 0.15, "patched"), window=16)),
)


def main() -> None:
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # whose pools would hide what overruns a tensor
    for channels, spec in SPECS:
        store = GPUStore(spec.layer(0, 1))
        for tokens in (64 * 9, 70):
            k, v = (torch.randn((2, 2, tokens, channels), device="cuda", dtype=torch.bfloat16) for _ in "KV")
            store.append(k, v)
            store.seal()
        q = torch.randn((2, 10, 1, channels), device="cuda", dtype=torch.bfloat16)
        assert torch.isfinite(store.attend(q, channels**-0.5)).all()
        assert torch.isfinite(store.dense()[0]).all()
    print("done")


if __name__ == "__main__":
    main()
