"""Adapters and wrapped weights: a cache is bound to the adapters in use. `make test-adapters` has PEFT and torchao."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from kvcomp import PrefixStore
from kvcomp.errors import InvalidInput
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers.identity import weights_id
from tiny_models import LOSSY, TINY, exact, random_model, run

REASON = "PEFT or torchao is not installed here: make test-adapters installs them beside and runs this"
if not os.environ.get("KVCOMP_REQUIRE_ADAPTERS"):
    pytest.importorskip("peft", reason=REASON)
    pytest.importorskip("torchao", reason=REASON)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what they import
    import peft
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

LLAMA = LlamaConfig(**TINY)
LORA: dict[str, Any] = {"target_modules": ["k_proj", "v_proj"], "init_lora_weights": False}
STORED = 516


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{**LORA, **options})


def with_peft() -> tuple[Any, Any]:
    """A model with the adapters one and two, one in use: what the user calls, and what is the model to the store."""
    torch.manual_seed(7)
    model = peft.get_peft_model(random_model(LLAMA), lora(), adapter_name="one")
    torch.manual_seed(8)
    model.add_adapter("two", lora())
    return model.eval(), model


def inner_of_peft() -> tuple[Any, Any]:
    model, _ = with_peft()
    return model, model.base_model.model


def with_transformers() -> tuple[Any, Any]:
    model = random_model(LLAMA)
    torch.manual_seed(7)
    model.add_adapter(lora(), adapter_name="one")
    torch.manual_seed(8)
    model.add_adapter(lora(), adapter_name="two")
    model.set_adapter("one")
    return model.eval(), model.eval()


WAYS = {"PeftModel": with_peft, "inner model": inner_of_peft, "add_adapter": with_transformers}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return WAYS[request.param]()


def layers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "merged_adapters") and hasattr(module, "scaling")]


def to_two(model: Any) -> None:
    model.set_adapter("two")


def five_times(model: Any) -> None:
    for layer in layers_of(model):
        layer.scaling["one"] *= 5


def disabled(model: Any) -> None:
    for layer in layers_of(model):
        layer.enable_adapters(False)


def merged(model: Any) -> None:
    for layer in layers_of(model):
        layer.merge()


def written(model: Any) -> None:
    layers_of(model)[0].lora_A["one"].weight.data.mul_(2)


def both(model: Any) -> None:
    for layer in layers_of(model):
        layer.set_adapter(["one", "two"])


def ids_of(tokens: int) -> torch.Tensor:
    return torch.randint(1, 97, (1, tokens), generator=torch.Generator().manual_seed(0))


def filled(model: Any, ids: torch.Tensor) -> KVCompCache:
    cache = KVCompCache(model.config, LOSSY)
    run(model, cache, ids)
    return cache


@pytest.mark.parametrize("change", [to_two, five_times, disabled, merged, written, both])
def test_another_state_of_adapters_is_another_model(
    tmp_path: Path, way: tuple[Any, Any], change: Callable[[Any], None]
) -> None:
    model, of_store = way
    store, ids = PrefixStore(tmp_path / "store"), ids_of(600)
    inner = model.base_model.model if isinstance(model, peft.PeftModel) else model
    cache, before = filled(inner, ids), exact(inner, ids)
    assert store.save(ids, cache, of_store) == store.load(ids, of_store, LOSSY).get_seq_length() == STORED
    cache.save(tmp_path / "a.kvc", of_store)
    change(model)
    assert store.load(ids, of_store, LOSSY).get_seq_length() == 0
    with pytest.raises(InvalidInput, match="model_id"):
        KVCompCache.load(tmp_path / "a.kvc", model.config, of_store)
    if change is not merged:  # the same but for rounding
        assert not torch.allclose(exact(inner, ids)[0][0], before[0][0], atol=0.1)


def test_three_ways_to_the_same_adapters_are_one_model() -> None:
    (outer, _), (_, inner), (model, _) = (make() for make in WAYS.values())
    model.load_state_dict(inner.state_dict())
    assert weights_id(outer) == weights_id(inner) == weights_id(model)


def test_adapters_that_are_not_in_use_do_not_matter() -> None:
    model, _ = with_peft()
    plain = weights_id(random_model(LLAMA))
    with_one = weights_id(model)
    with model.disable_adapter():
        assert weights_id(model) == plain
    assert weights_id(model) == with_one
    model.set_adapter("two")
    with_two = weights_id(model)
    model.set_adapter("one")
    assert weights_id(model) == with_one != with_two
    model.delete_adapter("two")
    assert weights_id(model) == with_one
    model.requires_grad_(False)
    assert weights_id(model) == with_one
    merged = model.merge_and_unload()
    assert weights_id(merged) not in (with_one, plain)


def test_adapters_read_from_disk_are_the_same(tmp_path: Path) -> None:
    model, _ = with_peft()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(random_model(LLAMA), tmp_path / "one", adapter_name="another name")
    assert weights_id(again.eval()) == weights_id(model)


def test_merged_adapters_that_are_disabled_are_neither() -> None:
    """The next forward pass takes them out, so what the weights are now says nothing."""
    model, _ = with_peft()
    plain = weights_id(random_model(LLAMA))
    model.merge_adapter()
    merged = weights_id(model)
    with model.disable_adapter():
        assert weights_id(model) not in (merged, plain)


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(target_modules=["k_proj"], init_weights=False),
        lora(modules_to_save=["embed_tokens"]),
        lora(trainable_token_indices=[3, 4]),
    ],
    ids=["dora", "ia3", "loha", "modules_to_save", "trainable_tokens"],
)
def test_other_kinds_of_adapters(config: Any) -> None:
    model = peft.get_peft_model(random_model(LLAMA), config).eval()
    before = weights_id(model)
    assert before != weights_id(random_model(LLAMA))
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter += 1
            after = weights_id(model)
            assert after != before
            before = after


def test_virtual_tokens_are_part_of_the_model() -> None:
    """A prompt encoder is around the model: with it, it is another one."""
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(random_model(LLAMA), config).eval()
    assert weights_id(model) not in (weights_id(random_model(LLAMA)), weights_id(model.base_model))


def test_quantised_weights_need_a_name(tmp_path: Path) -> None:
    model = random_model(LLAMA)
    quantize_(model, Int8WeightOnlyConfig())
    store, ids = PrefixStore(tmp_path / "store"), ids_of(600)
    cache = filled(model, ids)
    with pytest.raises(InvalidInput, match=r"lm_head\.weight is a Int8Tensor .*give model_id a name"):
        store.save(ids, cache, model)
    assert store.save(ids, cache, model, model_id="int8") == STORED
