"""What goes wrong in the middle: memory that ends at any allocation, a kernel that cannot be launched. The store is
then what it was.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emulator import COMPILER, Emulator
from kvcomp.errors import BackendUnavailable, LimitExceeded
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store.gpu import store as gpu_store
from kvcomp.store.gpu.copies import to_main_memory
from kvcomp.store.gpu.store import GPUStore

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++"), pytest.mark.emulated]

SPEC = CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=16, sinks=4)


class Memory(TorchDispatchMode):
    """Lets so many tensors be made and refuses the next."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func._schema.is_mutable:
            given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            if any(x.untyped_storage()._cdata not in given for x in made):
                self.left -= 1
                if self.left < 0:
                    raise torch.OutOfMemoryError("CUDA out of memory")
        return out


class Launches(Emulator):
    """Lets so many kernels be launched and refuses the next."""

    left = 1 << 30

    def launch(self, *how: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise BackendUnavailable("the CUDA driver fails")
        super().launch(*how)

    def __call__(self, left: int) -> Launches:
        self.left = left
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.left = 1 << 30


def state(store: GPUStore) -> tuple[Any, ...]:
    """All that a store holds and what follows from it."""
    host = to_main_memory(store)
    pages = [
        [ctypes.string_at(page, int.from_bytes(ctypes.string_at(page + 8, 4), "little")) for page in row[:count]]
        for row, count in zip(host.rows.pages.tolist(), host.rows.count.tolist(), strict=True)
    ]
    counts = [[None if x is None else x.tolist() for x in row] for row in host.rows.pair_counts]
    books = [[None if x is None else x.lengths.tolist() for x in row] for row in host.rows.books]
    k, v = store.dense()
    q = torch.ones((store.batch, 4, 1, 64))
    return store.tokens, pages, counts, books, k.tolist(), v.tolist(), store.attend(q, 0.125).tolist()


def seal(store: GPUStore) -> None:
    store.seal()
    store.sync()


OPERATIONS: dict[str, tuple[list[int], Callable[[GPUStore, Any], None]]] = {
    # tokens that are appended and sealed before, and what is done
    "the first append": ([], lambda store, new: store.append(*new)),
    "an append that needs room": ([30], lambda store, new: store.append(*new)),
    "a prompt is sealed": ([-340], lambda store, new: seal(store)),
    "a page is sealed while books are learned": ([90, -60], lambda store, new: seal(store)),
    "a page is sealed": ([340, -66], lambda store, new: seal(store)),
    "so many pages that the table grows": ([100, -1000], lambda store, new: seal(store)),
    "rows are chosen": ([200], lambda store, new: store.select(torch.tensor([1, 1, 0]))),
}


@pytest.mark.parametrize("what", OPERATIONS)
@pytest.mark.parametrize("fault", ["memory", "launch"])
def test_the_store_is_what_it_was(what: str, fault: str) -> None:
    before, operation = OPERATIONS[what]
    on = Launches()
    random = torch.Generator().manual_seed(0)

    def values(tokens: int) -> list[torch.Tensor]:
        return [torch.randn((2, 1, tokens, 64), generator=random).to(torch.bfloat16) for _ in "KV"]

    original = GPUStore(SPEC, launcher=lambda device: on)
    for tokens in before:
        original.append(*values(abs(tokens)))
        if tokens > 0:
            seal(original)
    new = values(130)
    expected = deepcopy(original)
    operation(expected, new)
    untouched, done = state(original) if before else None, state(expected)
    for allowed in range(1000):
        store = deepcopy(original)
        try:
            with Memory(allowed) if fault == "memory" else on(allowed):
                operation(store, new)
        except (LimitExceeded, BackendUnavailable):
            pass
        else:
            break
        if before and sum(len(row.valid) for row in store.rows) == sum(
            len(row.valid) for row in original.rows
        ):  # else the first of two rows is done
            assert state(store) == untouched
        operation(store, new)
        assert state(store) == done
    else:
        raise AssertionError("it never succeeds")
    assert allowed > 0 or (
        fault == "launch" and "page" not in what and "sealed" not in what
    )  # other operations launch nothing


def test_a_model_goes_on_after_memory_ended_in_the_middle_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    cache_class = pytest.importorskip("kvcomp.integrations.transformers").KVCompCache
    on = Launches()
    monkeypatch.setattr(gpu_store, "gpu_of", lambda device: on)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation("kvcomp")
    prompt = torch.randint(1, 96, (1, 150), generator=torch.Generator().manual_seed(1))
    token = torch.tensor([[7]])
    with torch.no_grad():
        expected_cache = cache_class(config, SPEC, backend="gpu")
        model(prompt, past_key_values=expected_cache)
        expected = model(token, past_key_values=expected_cache).logits
        for left in range(0, 60, 3):
            cache = cache_class(config, SPEC, backend="gpu")
            failures = 0
            for ids in (prompt, token):
                try:
                    with on(left):
                        model(ids, past_key_values=cache)
                except BackendUnavailable:
                    failures += 1
                    model(ids, past_key_values=cache)
            assert {layer.get_seq_length() for layer in cache.layers} == {151}
            cache.crop(-1)  # a layer that could not seal the prompt before the token came has done it after
            torch.testing.assert_close(model(token, past_key_values=cache).logits, expected, rtol=1e-5, atol=1e-5)
            if not failures:
                break
        assert 6 < left < 57
