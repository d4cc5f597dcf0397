"""What the K and V of a model depend on: its configuration, its modules and their weights, the adapters in use.

K and V that are stored are bound to a hash of all of it. What the hash cannot see is refused, with the way out: a name
as model_id.
"""

from __future__ import annotations

import enum
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedConfig, PreTrainedModel
from xxhash import xxh3_128

from kvcomp.errors import InvalidInput

HASH_BYTES = 1 << 24
SAMPLE = 64
NEUTRAL = {
    "architectures", "chunk_size_feed_forward", "dtype", "gradient_checkpointing", "id2label", "initializer_range",
    "label2id", "name_or_path", "output_attentions", "output_hidden_states", "output_router_logits", "problem_type",
    "return_dict", "router_aux_loss_coef", "torch_dtype", "transformers_version", "use_cache",
    "bos_token_id", "cls_token_id", "decoder_start_token_id", "eos_token_id", "mask_token_id", "pad_token_id",
    "sep_token_id",
}  # fmt: skip
"""Settings on which no K and V depend; nor do those with an underscore, such as the attention implementation."""

OF_EVERY_MODULE = {*vars(nn.Module()), "forward", "gradient_checkpointing", "training"}
KNOWN_HOOKS = ("accelerate", "torch", "transformers")  # they move weights and record outputs
Write = Callable[[str], None]

_digests: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def configuration_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Every setting but the neutral ones, in the form in which JSON gives it back.

    What is None or False is left out, as is a plain rope_type: versions of transformers that do not know the setting
    have none.
    """
    found: dict[str, Any] = json.loads(json.dumps(_settings(config.to_dict()), default=str, sort_keys=True))
    return found


def _settings(of: Mapping[Any, Any]) -> dict[str, Any]:
    found = {
        str(name): _settings(value) if isinstance(value, Mapping) else value
        for name, value in of.items()
        if not (value is None or value is False or name in NEUTRAL or str(name).startswith("_"))
        and (name, value) != ("rope_type", "default")
    }
    if any("partial_rotary_factor" in rope for rope in rope_parts(found.get("rope_parameters"))):
        found.pop("partial_rotary_factor", None)  # where older versions kept it too
    return found


def rope_parts(parameters: Any) -> list[Mapping[str, Any]]:
    """The RoPE parameters, of all layers or of each kind of layer."""
    if not isinstance(parameters, Mapping):
        return []
    return [parameters, *(part for part in parameters.values() if isinstance(part, Mapping))]


def difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str | None:
    """The first setting in which two configurations differ, in words."""
    for name in sorted({*theirs, *mine}):
        if theirs.get(name) != mine.get(name):
            return f"a model with {name} {theirs.get(name)!r}, not {mine.get(name)!r}"
    return None


def check_origin(model: Mapping[str, Any] | None, configuration: Mapping[str, Any], model_id: str | None) -> None:
    """Raise InvalidInput if a file's cache is not of the model with this configuration and id."""
    if model is None:
        raise InvalidInput("the file holds tensors without a model: read it with kvcomp.load")
    theirs = model.get("configuration")
    other = difference(theirs if isinstance(theirs, dict) else {}, configuration)
    if other:
        raise InvalidInput(f"the file is of {other}: give that model's configuration")
    if model.get("id") != model_id:
        raise InvalidInput(
            f"the file is of the model_id {model.get('id')!r}, not {model_id!r}: give the one it was saved with, "
            "or the same weights with the same adapters"
        )


def follows_length(rope_type: Any) -> bool:
    """Whether rotary frequencies of this type change with the length of the sequence."""
    return rope_type == "longrope" or "dynamic" in str(rope_type)


def rope_switch(config: PreTrainedConfig) -> int | None:
    """The length from which on rotary frequencies depend on the length of the whole; None if they never do."""
    found = []
    for part in rope_parts(getattr(config, "rope_parameters", None)):
        kind, long = part.get("rope_type"), part.get("original_max_position_embeddings")
        if follows_length(kind):
            found.append(long if kind == "longrope" else config.max_position_embeddings)
    return min((int(length) for length in found if length), default=0 if found else None)


def weights_id(model: str | nn.Module | None) -> str | None:
    """What stands for a model: a name as it is; of a module, the hash of all that it computes with.

    XXH3 of 128 bits, a second for some ten gigabytes. A tensor's hash is kept until a torch operation writes to it or
    one of 64 values of all over it is another; writing single values through ``.data`` or NumPy goes unnoticed.
    Raises InvalidInput for what cannot be hashed.
    """
    if model is None or isinstance(model, str):
        return model
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model_id must be a name or the model itself, not {type(model).__name__}")
    found = xxh3_128()
    _Walk(lambda line: found.update(f"{line}\n".encode())).module("model", _without_wrappers(model))
    return f"model-xxh3-{found.hexdigest()}"


def _without_wrappers(model: nn.Module) -> nn.Module:
    """The transformers model in a PeftModel or a compiled module, unless what is around it has tensors of its own."""
    if isinstance(model, PreTrainedModel):
        return model
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    return inner if _tensors(model) <= _tensors(inner) else model


def _tensors(model: nn.Module) -> set[int]:
    return {id(x) for module in model.modules() for x in _own_tensors(module).values()}


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in {**module._parameters, **module._buffers}.items() if x is not None}


class _Walk:
    """Writes down, line by line, all that a module computes with."""

    def __init__(self, write: Write) -> None:
        self.write = write
        self.seen: dict[int, str] = {}

    def module(self, name: str, module: nn.Module) -> None:
        if id(module) in self.seen:
            self.write(f"{name} is {self.seen[id(module)]}")
            return
        self.seen[id(module)] = name
        _check_forward(name, module)
        parts = _parts(module)
        base = next((key for key in ("base_layer", "original_module") if isinstance(parts.get(key), nn.Module)), None)
        if base is not None and hasattr(module, "disable_adapters"):
            self.adapted(name, module, parts, base)
            return
        self.write(f"{name} {_name_of(type(module))}")
        for key, value in parts.items():
            self.value(f"{name}.{key}", value)

    def adapted(self, name: str, module: Any, parts: dict[str, Any], base: str) -> None:
        """A layer under PEFT's adapters: the layer alone, and what belongs to the adapters in use, by place."""
        merged = bool(module.merged_adapters)
        self.module(name, parts.pop(base))
        if merged and module.disable_adapters:
            self.write(f"{name} will unmerge")
        used = [] if merged or module.disable_adapters else list(module.active_adapters)
        tables = {key: value for key, value in parts.items() if isinstance(value, _TABLES)}
        entries = {
            f"{key}.{place}": table[adapter]
            for key, table in tables.items()
            for place, adapter in enumerate(used)
            if adapter in table
        }
        if entries:
            self.write(f"{name} under {_name_of(type(module))}")
        for key, value in (*parts.items(), *entries.items()):
            if key not in tables and (entries or isinstance(value, nn.Module)):
                self.value(f"{name}+{key}", value)

    def value(self, name: str, value: Any) -> None:
        match value:
            case Tensor():
                self.write(f"{name} {_digest(name, value)}")
            case nn.Module():
                self.module(name, value)
            case None | False:  # as in versions of transformers that do not know it
                pass
            case True | int() | float() | complex() | str() | bytes() | torch.dtype() | enum.Enum():
                self.write(f"{name} {value!r}")
            case np.generic() | np.ndarray():
                self.value(name, value.tolist())
            case Mapping():
                for key in sorted(value, key=repr):
                    self.value(f"{name}.{key!r}", value[key])
            case list() | tuple():
                for place, item in enumerate(value):
                    self.value(f"{name}.{place}", item)
            case PreTrainedConfig():
                if id(value) not in self.seen:
                    self.seen[id(value)] = json.dumps(configuration_of(value))
                self.write(f"{name} {self.seen[id(value)]}")
            case torch.ScriptObject():
                self.value(name, _unpacked(name, value))
            case functools.partial():
                self.value(name, (value.func, value.args, value.keywords))
            case _:
                self.write(f"{name} {_name_of(value if hasattr(value, '__qualname__') else type(value))}")


_TABLES = (Mapping, nn.ModuleDict, nn.ParameterDict)
_OF_MODELS = int | float | PreTrainedConfig  # the rest of what a whole model has is about where it is from


def _parts(module: nn.Module) -> dict[str, Any]:
    """All that a module holds and K and V may depend on, by name."""
    kinds = getattr(module, "rope_type", "")
    changing = any(map(follows_length, kinds.values() if isinstance(kinds, Mapping) else [kinds]))
    found: dict[str, Any] = {**module._parameters, **module._buffers, **module._modules}
    for name, value in vars(module).items():
        if name == "padding_idx" and isinstance(module, nn.Embedding | PreTrainedModel):
            continue  # it is for gradients
        setting = not name.startswith("_") and (
            not isinstance(module, PreTrainedModel) or isinstance(value, _OF_MODELS)
        )
        if name not in OF_EVERY_MODULE and (setting or isinstance(value, Tensor | nn.Module | torch.ScriptObject)):
            found[name] = value
    return {name: found[name] for name in sorted(found) if not (changing and _is_state(name))}


def _is_state(name: str) -> bool:
    """Whether this is what such rotary embeddings keep of their last length."""
    return "max_seq_len_cached" in name or (name.endswith("inv_freq") and not name.endswith("original_inv_freq"))


def _check_forward(name: str, module: nn.Module) -> None:
    """Raise InvalidInput if not a module's class alone decides what it computes, or if it drops values."""
    if module.training and any(p > 0 for p in _dropouts(module)):
        raise InvalidInput(f"{name} drops values at random: call model.eval()")
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not str(getattr(_unwrapped(hook), "__module__", "")).startswith(KNOWN_HOOKS):
            raise InvalidInput(
                f"{name} has a forward hook, which may change K and V: remove it, or give model_id a name"
            )
    own = _unwrapped(vars(module).get("forward"))
    if (
        own is not None
        and not hasattr(module, "_hf_hook")
        and getattr(own, "__func__", own) is not type(module).forward
    ):
        raise InvalidInput(
            f"the forward of {name} was replaced, so it may compute anything: give model_id a name for this model"
        )


def _dropouts(module: nn.Module) -> Iterable[float]:
    own = [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else []
    return own + [value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]


def _unwrapped(function: Any) -> Any:
    """The function behind partial applications and torch.compile."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "_torchdynamo_orig_callable", function)


def _name_of(thing: Any) -> str:
    return f"{str(thing.__module__).split('.')[0]}.{thing.__qualname__}"


def _unpacked(name: str, packed: Any) -> Any:
    """The tensors in an object of C++, such as the packed weights of torch.ao.quantization."""
    try:
        return packed.__getstate__()
    except (AttributeError, RuntimeError, TypeError):
        raise InvalidInput(f"{name} cannot be read: give model_id a name for this model") from None


def _digest(name: str, x: Tensor) -> str:
    """The hash of a tensor's type, shape and bytes."""
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided or x.device.type == "meta":
        kind = "not in memory" if x.device.type == "meta" else f"a {type(x).__name__} of layout {x.layout}"
        raise InvalidInput(
            f"the weight {name} is {kind}, which cannot be hashed: give model_id a name for these weights"
        )
    if x.is_quantized:
        return _digest(name, x.int_repr()) + _scales(x)
    if x.is_inference():  # which does not count what is written to it
        return _hash(x)
    stamp = x.data_ptr(), x._version, x.dtype, x.shape, x.stride(), _sample(x)
    kept = _digests.get(x)
    if kept is None or kept[0] != stamp:
        kept = _digests[x] = stamp, _hash(x)
    return str(kept[1])


def _sample(x: Tensor) -> bytes:
    """Values of all over a tensor: torch counts no writes through ``.data``, by which PEFT merges adapters."""
    flat = x.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // SAMPLE)].contiguous().view(torch.uint8)
    return some.cpu().numpy().tobytes()


def _scales(x: Tensor) -> str:
    if x.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return f" {x.q_scale()} {x.q_zero_point()}"
    return f" {x.q_per_channel_axis()} {_hash(x.q_per_channel_scales())} {_hash(x.q_per_channel_zero_points())}"


def _hash(x: Tensor) -> str:
    found = xxh3_128(f"{x.dtype} {tuple(x.shape)}\n".encode())
    content = x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    for part in content.split(HASH_BYTES):
        found.update(part.cpu().numpy().data)
    return found.hexdigest()
