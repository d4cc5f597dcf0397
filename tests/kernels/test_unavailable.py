"""The GPU backend on machines that lack something: each refusal says what to do about it."""

from __future__ import annotations

import sys

import pytest
import torch

from kvcomp.errors import BackendUnavailable
from kvcomp.kernels.cuda import compile as gpu_compile
from kvcomp.kernels.cuda import device as gpu
from kvcomp.kernels.cuda.layout import check_channels, machine
from kvcomp.spec import CodecSpec
from kvcomp.store.gpu.store import GPUStore, gpu_of


def test_tensors_elsewhere_than_on_a_gpu() -> None:
    store = GPUStore(CodecSpec.resolve("kvcomp").layer(0, 1))
    with pytest.raises(BackendUnavailable, match="move the model to one, or use backend='cpu'"):
        store.append(*torch.zeros(2, 1, 1, 3, 64))
    assert store.tokens == store.batch == 0


def test_no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    gpu._driver.cache_clear()
    gpu_compile._nvrtc.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"pip install '\.\[cuda\]'"):
        gpu.Gpu(0, lambda: 0)
    with pytest.raises(BackendUnavailable, match=r"NVRTC, which is not there .* pip install '\.\[cuda\]'"):
        gpu_compile.nvrtc_version()
    gpu._driver.cache_clear()
    gpu_compile._nvrtc.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_driver() -> None:
    pytest.importorskip("cuda.bindings")
    with pytest.raises(BackendUnavailable, match="use backend='cpu'"):
        gpu_of(torch.device("cuda", 0))


def test_an_architecture_and_a_head_size_that_no_kernel_is_built_for() -> None:
    with pytest.raises(BackendUnavailable, match=r"built for sm_80.*not sm_75: use backend='cpu'"):
        machine(75)
    for channels in (32, 72, 272):
        with pytest.raises(BackendUnavailable, match=f"not {channels}: use backend='cpu'"):
            check_channels(channels)
