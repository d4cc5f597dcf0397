"""What a stored cache is bound to: another model's K and V are never served, and the same model's always."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from kvcomp import PrefixStore
from kvcomp.errors import InvalidInput
from kvcomp.integrations.transformers import KVCompCache, identity
from kvcomp.integrations.transformers.identity import configuration_of, weights_id
from kvcomp.prefix.chain import CHUNK_TOKENS
from tiny_models import LOSSY, TINY, exact, random_model, run

STORED = LOSSY.sinks + 2 * CHUNK_TOKENS
LLAMA = LlamaConfig(**TINY)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
BY_LENGTH: dict[str, PreTrainedConfig] = {
    "dynamic": LlamaConfig(
        **{**TINY, "max_position_embeddings": 700},
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    ),
    "longrope": Phi3Config(
        **TINY,
        original_max_position_embeddings=700,
        rope_parameters={**LONGROPE, "rope_theta": 10000.0, "original_max_position_embeddings": 700},
    ),
}


def ids_of(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (1, tokens), generator=torch.Generator().manual_seed(seed))


def filled(model: Any, ids: Tensor) -> KVCompCache:
    cache = KVCompCache(model.config, LOSSY)
    run(model, cache, ids)
    return cache


def saved(folder: Path, model: Any, tokens: int = 600) -> tuple[PrefixStore, Tensor]:
    """A store that holds the beginning of a prompt, as a model computed it."""
    store, ids = PrefixStore(folder), ids_of(tokens)
    assert store.save(ids, filled(model, ids), model) > 0
    return store, ids


def served(store: PrefixStore, ids: Tensor, model: Any, **options: Any) -> int:
    return store.load(ids, model, LOSSY, **options).get_seq_length()


@pytest.mark.parametrize(
    ("config", "setting", "value"),
    [
        (LLAMA, "rms_norm_eps", 1e-2),
        (LLAMA, "hidden_act", "gelu"),
        (LLAMA, "rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        (GraniteConfig(**TINY), "embedding_multiplier", 3.0),
        (GraniteConfig(**TINY), "residual_multiplier", 0.5),
        (GraniteConfig(**TINY), "attention_multiplier", 0.01),
        (Qwen3MoeConfig(**TINY, **EXPERTS), "num_experts_per_tok", 1),
        (Qwen3MoeConfig(**TINY, **EXPERTS), "norm_topk_prob", True),
    ],
)
@pytest.mark.parametrize("model_id", [None, "a name"])
def test_the_same_weights_under_another_setting_are_another_model(
    tmp_path: Path, config: PreTrainedConfig, setting: str, value: Any, model_id: str | None
) -> None:
    model = random_model(config)
    changed = deepcopy(config)
    setattr(changed, setting, value)
    other = random_model(changed)
    store, ids = PrefixStore(tmp_path / "store"), ids_of(600)
    cache = filled(model, ids)
    assert not torch.allclose(exact(model, ids)[1][0], exact(other, ids)[1][0], atol=0.01)
    assert store.save(ids, cache, model, model_id=model_id) == STORED
    assert served(store, ids, other, model_id=model_id) == 0
    assert served(store, ids, random_model(deepcopy(config)), model_id=model_id) == STORED
    cache.save(tmp_path / "a.kvc", model_id or model)
    with pytest.raises(InvalidInput, match=setting):
        KVCompCache.load(tmp_path / "a.kvc", changed, model_id or other)
    with pytest.raises(InvalidInput, match=setting):
        store.save(ids, cache, other, model_id=model_id)
    assert KVCompCache.load(tmp_path / "a.kvc", deepcopy(config), model_id or model).get_seq_length() == 600


def scaled(layer: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.model.layers[layer].self_attn.scaling *= 2

    return change


def with_data(model: Any) -> None:
    model.model.layers[1].self_attn.k_proj.weight.data.mul_(2)


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] += 1


def in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model.model.layers[0].self_attn.k_proj.weight = nn.Parameter(torch.ones(32, 64), requires_grad=False)


def replaced(model: Any) -> None:
    projection = model.model.layers[0].self_attn.k_proj
    new = 2 * projection.weight.detach()
    del projection.weight
    projection.weight = nn.Parameter(new)


def rotated(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 2


def activated(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


def biased(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.bias = nn.Parameter(torch.ones(32))


def normalised(model: Any) -> None:
    model.model.norm.variance_epsilon = 1e-2


def tensor_attribute(model: Any) -> None:
    model.model.layers[0].self_attn.shift = torch.ones(3)


@pytest.mark.parametrize(
    "change",
    [
        scaled(0),
        with_data,
        in_place,
        in_inference_mode,
        replaced,
        rotated,
        activated,
        biased,
        normalised,
        tensor_attribute,
    ],
    ids=lambda change: change.__qualname__.split(".")[0],
)
def test_a_model_that_was_changed_is_another(change: Callable[[Any], None]) -> None:
    model = random_model(LLAMA)
    before = weights_id(model)
    change(model)
    after = weights_id(model)
    assert before != after == weights_id(model)
    if change is in_inference_mode:  # whose writes torch does not count
        with torch.inference_mode():
            model.model.layers[0].self_attn.k_proj.weight[0, 0] = 3
        assert weights_id(model) != after


def test_numbers_of_numpy_are_numbers() -> None:
    model, found = random_model(LLAMA), []
    for scaling in (0.5, np.float32(0.5), np.array([0.5, 0.25]), np.array([0.5, 0.125])):
        model.model.layers[1].self_attn.scaling = scaling
        found.append(weights_id(model))
    assert found[0] == found[1]
    assert len({*found}) == 3


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
def test_packed_weights_are_weights() -> None:
    def packed(seed: int, dtype: torch.dtype) -> Any:
        model = random_model(LLAMA, seed)
        model.model.embed_tokens = random_model(LLAMA, 0).model.embed_tokens
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=dtype)

    for dtype in (torch.qint8, torch.float16):
        first = packed(1, dtype)
        assert weights_id(first) == weights_id(packed(1, dtype)) != weights_id(packed(2, dtype))
    first.unknown = torch.classes.profiling._ScriptProfile()
    with pytest.raises(InvalidInput, match=r"model\.unknown cannot be read: give model_id a name"):
        weights_id(first)


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_rotary_frequencies_that_depend_on_the_length(tmp_path: Path, kind: str) -> None:
    """A prefix of a short prompt is served to short prompts, whatever came between; one of a long prompt to none."""
    model, short, long = random_model(BY_LENGTH[kind]), ids_of(600), ids_of(900)
    store = PrefixStore(tmp_path / "store")
    apart = [exact(model, ids)[0][0][:, :, :400] for ids in (short, long)]
    assert not torch.allclose(*apart, atol=0.5)
    assert store.save(long, filled(model, long), model) == 0
    assert store.save(short, filled(model, short), model) == STORED
    cropped = filled(model, long)
    cropped.crop(-300)
    assert store.save(short, cropped, model) == 0
    with pytest.raises(InvalidInput, match="rotary frequencies depend on the length from 700 tokens"):
        cropped.save(tmp_path / "cropped.kvc", model)
    filled(model, long)  # the model's rotary embedding keeps something of it
    assert served(store, long, model) == 0
    loaded = store.load(short, model, LOSSY)
    assert loaded.get_seq_length() == STORED
    fresh = filled(random_model(BY_LENGTH[kind]), short)
    for mine, theirs in zip(loaded.compressed_layers, fresh.compressed_layers, strict=True):
        assert torch.equal(mine.store.dense()[0], theirs.store.dense()[0][:, :, :STORED])
    whole = filled(model, long)
    whole.save(tmp_path / "long.kvc", model)
    assert KVCompCache.load(tmp_path / "long.kvc", model.config, model).session.longest == 900
    fresh.save(tmp_path / "short.kvc", model)
    assert KVCompCache.load(tmp_path / "short.kvc", model.config, model, tokens=400).get_seq_length() == 400
    for path, tokens in (("long.kvc", 400), (["short.kvc", "long.kvc"], None)):
        paths = [tmp_path / one for one in ([path] if isinstance(path, str) else path)]
        with pytest.raises(InvalidInput, match="rotary frequencies depend on the length"):
            KVCompCache.load(paths, model.config, model, tokens=tokens)
    with pytest.raises(InvalidInput, match="rotary frequencies depend on the length"):
        whole.join(fresh)


def test_a_cache_that_a_crop_has_emptied_is_as_new(tmp_path: Path) -> None:
    model, short = random_model(BY_LENGTH["dynamic"]), ids_of(600)
    cache = filled(model, ids_of(900))
    cache.crop(-900)
    run(model, cache, short)
    cache.save(tmp_path / "short.kvc", model)
    assert PrefixStore(tmp_path / "store").save(short, cache, model) == STORED


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_frequencies_that_the_others_follow_from_are_part_of_a_model(kind: str) -> None:
    model: Any = random_model(BY_LENGTH[kind])
    before = weights_id(model)
    model.model.rotary_emb.original_inv_freq.mul_(1.01)
    assert weights_id(model) != before


class Wrapped(Tensor):
    """Stands for tensors whose bytes are elsewhere."""


@pytest.mark.parametrize("kind", ["meta", "sparse", "subclass", "distributed"])
def test_weights_that_cannot_be_hashed_need_a_name(tmp_path: Path, kind: str) -> None:
    model = random_model(LLAMA)
    weight = model.model.layers[0].self_attn.k_proj.weight.detach()
    if kind == "distributed":
        from torch import distributed

        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            mesh = distributed.init_device_mesh("cpu", (1,))
            other: Tensor = distributed.tensor.DTensor.from_local(weight, mesh)
        finally:
            distributed.destroy_process_group()
    else:
        other = {"meta": weight.to("meta"), "sparse": weight.to_sparse(), "subclass": weight.as_subclass(Wrapped)}[kind]
    cache = filled(model, ids_of(400))
    model.model.layers[0].self_attn.k_proj.weight = nn.Parameter(other)
    store = PrefixStore(tmp_path / "store")
    for call in (
        lambda: store.save(ids_of(400), cache, model),
        lambda: store.load(ids_of(400), model, LOSSY),
        lambda: cache.save(tmp_path / "a.kvc", model),
    ):
        with pytest.raises(InvalidInput, match=r"k_proj\.weight .*give model_id a name"):
            call()
    if kind in ("meta", "distributed"):  # which cannot run here
        with pytest.raises(InvalidInput, match=r"in layer 0|does not run"):
            store.save(ids_of(400), cache, model, model_id="mine")
        model.model.layers[0].self_attn.k_proj.weight = nn.Parameter(weight)
    assert (
        store.save(ids_of(400), cache, model, model_id="mine") == served(store, ids_of(401), model, model_id="mine") > 0
    )


def doubled(*arguments: Any) -> Any:
    return 2 * arguments[-1]


def test_what_may_change_the_forward_pass_is_refused() -> None:
    model = random_model(LLAMA)
    before = weights_id(model)
    projection = model.model.layers[0].self_attn.k_proj
    for register in (projection.register_forward_hook, projection.register_forward_pre_hook):
        hook = register(doubled)
        with pytest.raises(InvalidInput, match=r"layers\.0\.self_attn\.k_proj has a forward hook"):
            weights_id(model)
        hook.remove()
    projection.forward = doubled
    with pytest.raises(InvalidInput, match=r"the forward of .*k_proj was replaced"):
        weights_id(model)
    del projection.forward
    assert weights_id(model) == before
    projection.noise = nn.Dropout(0.1).eval()
    weights_id(model)
    model.train()
    with pytest.raises(InvalidInput, match=r"call model\.eval"):
        weights_id(model)


def moved(model: PreTrainedModel, folder: Path) -> Any:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def used(model: Any, _: Path) -> Any:
    model.set_attn_implementation("eager")
    model(ids_of(4), output_hidden_states=True, output_attentions=True)
    model.generate(ids_of(4), max_new_tokens=3, do_sample=False)
    return model


def configured(model: Any, _: Path) -> Any:
    model.config.use_cache = False
    model.config.pad_token_id = 7
    model.config.name_or_path = "elsewhere"
    return model


def compiled_forward(model: Any, _: Path) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


SAME: dict[str, Callable[[Any, Path], Any]] = {
    "read from disk": moved,
    "training mode without dropout": lambda model, _: model.train(),
    "used with other attention": used,
    "settings that do not matter": configured,
    "read from disk with other settings that do not matter": lambda model, path: moved(configured(model, path), path),
    "compiled": lambda model, _: torch.compile(model, backend="eager"),
    "compiled forward": compiled_forward,
    "under accelerate": lambda model, _: dispatch_model(model, device_map={"": "cpu"}, force_hooks=True),
    "copied": lambda model, _: deepcopy(model),
    "without gradients": lambda model, _: model.requires_grad_(False),
}


@pytest.mark.parametrize("way", SAME)
@pytest.mark.parametrize("config", [LLAMA, *BY_LENGTH.values()], ids=lambda config: config.model_type)
def test_the_same_model_is_always_served(tmp_path: Path, config: PreTrainedConfig, way: str) -> None:
    store, ids = saved(tmp_path / "store", random_model(config))
    same = SAME[way](random_model(config), tmp_path / "model")
    assert served(store, ids, same) == STORED
    assert configuration_of(same.config) == configuration_of(config)


def test_a_model_is_the_same_in_another_process() -> None:
    script = (
        "from tiny_models import TINY, random_model; from transformers import LlamaConfig;"
        "from kvcomp.integrations.transformers.identity import weights_id;"
        "print(weights_id(random_model(LlamaConfig(**TINY))))"
    )
    path = ":".join(sys.path)
    there = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == weights_id(random_model(LLAMA))


def test_weights_that_did_not_change_are_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(LLAMA)
    before = weights_id(model)
    monkeypatch.setattr(identity, "_hash", lambda x: pytest.fail("hashed again"))
    assert weights_id(model) == before


def test_what_other_versions_do_not_know_counts_as_off() -> None:
    settings = {
        "rope_parameters": {"a": {"rope_theta": 1.0}, "rope_type": "default"},
        "new": None,
        "off": False,
        "zero": 0,
    }
    assert identity._settings(settings) == {"rope_parameters": {"a": {"rope_theta": 1.0}}, "zero": 0}
    moved = {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.5}}
    assert identity._settings(moved) == {"rope_parameters": {"partial_rotary_factor": 0.5}}
    assert identity._settings({"partial_rotary_factor": 0.5}) == {"partial_rotary_factor": 0.5}
