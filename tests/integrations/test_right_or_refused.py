"""What is served is what a fresh computation gives, within the codec's bound; a model's own is always served."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig

from kvcomp import PrefixStore
from kvcomp.errors import InvalidInput
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.store import KVStore
from kvcomp.store.pages import compare
from tiny_models import LOSSY, TINY, exact, random_model

TOKENS, STORED = 340, 260
SETTINGS: dict[str, Any] = {
    "none": None,
    "rms_norm_eps": 1e-2,
    "hidden_act": "relu",
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "use_cache": False,
    "bos_token_id": 5,
}
NEUTRAL = {"use_cache": "none", "bos_token_id": "none"}
CHANGES = ["none", "weight", "frequencies", "bias", "scaling", "norm"]
ADAPTERS = ["none"]
if importlib.util.find_spec("peft"):
    ADAPTERS += ["one", "two", "both", "five times one", "one, disabled", "one, merged"]


@dataclass(frozen=True)
class State:
    """A model as someone may have it."""

    seed: int = 0
    setting: str = "none"
    change: str = "none"
    adapters: str = "none"

    def model(self) -> Any:
        config = LlamaConfig(**TINY)
        if self.setting != "none":
            setattr(config, self.setting, SETTINGS[self.setting])
        model: Any = random_model(config, self.seed)
        attention = model.model.layers[0].self_attn
        with torch.no_grad():
            match self.change:
                case "weight":
                    attention.v_proj.weight[3, 5] += 50
                case "frequencies":
                    model.model.rotary_emb.inv_freq.mul_(1.5)
                case "bias":
                    attention.k_proj.bias = nn.Parameter(torch.ones(32))
                case "scaling":
                    attention.scaling *= 3
                case "norm":
                    model.model.layers[0].input_layernorm.variance_epsilon = 0.1
        return model if self.adapters == "none" else self.adapted(model)

    def adapted(self, model: Any) -> Any:
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(9)
        for name in ("one", "two"):
            lora = LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
            model = inject_adapter_in_model(lora, model, adapter_name=name).eval()
        for layer in (module for module in model.modules() if hasattr(module, "merged_adapters")):
            layer.set_adapter({"two": ["two"], "both": ["one", "two"]}.get(self.adapters, ["one"]))
            if self.adapters == "five times one":
                layer.scaling["one"] *= 5
            elif self.adapters == "one, merged":
                layer.merge()
            layer.enable_adapters(self.adapters != "one, disabled")
        return model

    @property
    def meaning(self) -> State:
        """The state without what K and V do not depend on."""
        adapters = "none" if self.adapters == "one, disabled" else self.adapters
        return replace(self, setting=NEUTRAL.get(self.setting, self.setting), adapters=adapters)


def with_hole(model: Any, ids: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[:, 90:100] = 0
    return {"input_ids": ids, "attention_mask": mask}


def from_ids(model: Any, ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids}


OTHERWISE: dict[str, Callable[[Any, Tensor], dict[str, Tensor]]] = {
    "other ids": lambda model, ids: {"input_ids": ids.flip(1)},
    "embeddings": lambda model, ids: {"inputs_embeds": 2 * model.get_input_embeddings()(ids)},
    "positions": lambda model, ids: {"input_ids": ids, "position_ids": 2 * torch.arange(ids.shape[1])[None]},
    "a hole": with_hole,
    "both directions": lambda model, ids: {
        "input_ids": ids,
        "attention_mask": torch.ones((1, 1, ids.shape[1], ids.shape[1]), dtype=torch.bool),
    },
    "by sdpa": from_ids,
}

STATES = st.builds(
    State, st.integers(0, 1), st.sampled_from(sorted(SETTINGS)), st.sampled_from(CHANGES), st.sampled_from(ADAPTERS)
)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[State, State]:
    """Two states that differ in some of their parts, or in none."""
    saved, other = draw(STATES), draw(STATES)
    parts = draw(st.sets(st.sampled_from(["seed", "setting", "change", "adapters"]), max_size=2))
    return saved, replace(saved, **{part: getattr(other, part) for part in parts})


def ids_of(tokens: int) -> Tensor:
    return torch.randint(1, 97, (1, tokens), generator=torch.Generator().manual_seed(0))


def in_bound(cache: KVCompCache, expected: list[tuple[Tensor, Tensor]]) -> bool:
    tokens = cache.get_seq_length()
    found = []
    for layer, (k, v) in zip(cache.compressed_layers, expected, strict=True):
        assert isinstance(layer.store, KVStore)
        found.append(compare(layer.store, k[:, :, :tokens], v[:, :, :tokens]))
    return all(one.values and not one.missed for one in found)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@given(pairs(), st.sampled_from(["alone", "in a batch", "cropped", *OTHERWISE]))
def test_what_is_served_is_right_and_what_is_right_is_served(pair: tuple[State, State], fill: str) -> None:
    saved, asked = pair
    ids, model, other = ids_of(TOKENS), saved.model(), asked.model()
    all_ids = {
        "alone": ids,
        "in a batch": torch.cat([ids, ids.flip(1)]),
        "cropped": torch.cat([ids, ids[:, :50]], dim=1),
    }.get(fill, ids)
    cache = KVCompCache(model.config, LOSSY)
    model.set_attn_implementation("sdpa" if fill == "by sdpa" else "kvcomp")
    with torch.inference_mode():
        model(past_key_values=cache, **OTHERWISE.get(fill, from_ids)(model, all_ids))
    cache.batch_select_indices(torch.tensor([0]))
    cache.crop(TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        store, path = PrefixStore(folder), Path(folder, "a.kvc")
        if fill in OTHERWISE:
            with pytest.raises(InvalidInput, match=r"token ids|in layer 1 are not"):
                store.save(ids, cache, model)
            assert not store.load(ids, model, LOSSY).get_seq_length()
            return
        assert store.save(ids, cache, model) == STORED
        cache.save(path, model)
        try:
            found = [KVCompCache.load(path, other.config, other)]
        except InvalidInput:
            found = []
        loaded = store.load(ids, other, LOSSY)
        if loaded.get_seq_length():
            found.append(loaded)
        event(f"served {len(found)} times")
        assert len(found) == 2 * (saved.meaning == asked.meaning)
        assert all(in_bound(one, [(k[:1], v[:1]) for k, v in exact(other, all_ids)]) for one in found)
