"""What a calibration needs to know of a model's K, V and queries, gathered as text passes through the model.

Of V and the queries sums are kept, not tokens. K is taken as it enters the cache, from the windows that are kept: its
mean is that before the rotary positions (``rotation``), its covariance what is left without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig
from transformers.masking_utils import sdpa_mask

from kvcomp.calibration import quantise_matrix
from kvcomp.calibration.rotary import Rotation
from kvcomp.calibration.transform import Affine, metric_klt
from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.evaluate.fidelity import attend_plainly
from kvcomp.evaluate.models import full_attention_layers
from kvcomp.fit.rotation import worth_it
from kvcomp.integrations.transformers.attention import kvcomp_attention
from kvcomp.integrations.transformers.identity import follows_length, rope_parts
from kvcomp.integrations.transformers.models import head_sizes, setting

NAME = "kvcomp_observe"
OUTPUT_PROJECTIONS = "o_proj", "out_proj", "dense", "c_proj", "wo"


@dataclass
class LayerSums:
    """Sums over tokens for each KV head, float64: (heads, D) or (heads, D, D)."""

    tokens: int
    """How many were added."""
    v: Tensor
    vv: Tensor
    """Of v v^T."""
    qq: Tensor
    """Of q q^T, over the queries of the head's group."""
    output: Tensor
    """W_o^T W_o of the head's part of the output projection, over its group."""

    def of_value(self) -> Affine:
        """The Karhunen-Loeve transform of V in the metric of the output projection."""
        mean = self.v / self.tokens
        return _transform(mean, self.vv / self.tokens - mean[:, :, None] * mean[:, None, :], self.output)

    def of_key(self, k: Tensor, places: Tensor, rotation: Rotation | None, centred: bool) -> Affine:
        """The same of K in the metric of the queries, less its mean, which turns where it is worth it.

        Parameters
        ----------
        k
            (windows, KV heads, tokens, D).
        places
            Of the tokens, int64 (windows, tokens).
        rotation
            Of the layer, all of it.
        centred
            Whether a mean that does not turn may be taken too.
        """
        x, kept = k.double(), None
        if rotation is None:
            mean = x.mean((0, 2)) * centred
        else:
            unturned = rotation.turned(x, -places)
            mean, second = unturned.mean((0, 2)), unturned.square().mean((0, 2))
            kept = worth_it(rotation, mean.square(), second - mean.square())
            turning = 0.0 if kept is None else mean - kept.still(mean)
            mean = rotation.still(mean) * centred + turning
        x = x - (mean[:, None] if kept is None else kept.turned(mean, places))
        flat = x.transpose(0, 1).flatten(1, 2)
        return _transform(mean, flat.mT @ flat / flat.shape[1], self.qq, kept)


def _transform(mean: Tensor, covariance: Tensor, metric: Tensor, rotation: Rotation | None = None) -> Affine:
    matrix = torch.stack([metric_klt(c, m) for c, m in zip(covariance.cpu(), metric.cpu(), strict=True)])
    return Affine.of(quantise_matrix(matrix), mean.cpu(), rotation)


class Statistics:
    """Sums of every full-attention layer."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerSums] = {}


def check_rope(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModel if the model's rotary frequencies change with the length of the sequence."""
    for part in rope_parts(setting(config, "rope_parameters")):
        kind = part.get("rope_type")
        if follows_length(kind):
            raise UnsupportedModel(
                f"{config.model_type} with rotary positions of the type {kind!r} cannot be calibrated: their "
                "frequencies change with the length of the sequence, and with them the keys; use the preset kvcomp"
            )


def calibrated_layers(config: PreTrainedConfig) -> list[int]:
    """Those that a calibration has transforms of. Raises UnsupportedModel for none, and for other head sizes."""
    found = full_attention_layers(config)
    if not found or setting(config, "kv_lora_rank"):
        raise UnsupportedModel(
            f"{config.model_type} has no layer of full attention with K and V of one width to calibrate: sliding "
            "windows, states and latents have no transforms; use the preset kvcomp"
        )
    unfit = [size for index in found for size in head_sizes(config, index) if size % 16]
    if unfit:
        raise UnsupportedModel(
            f"{config.model_type} has heads of {unfit[0]} channels, and a calibration is of a multiple of 16: "
            "use the preset kvcomp"
        )
    return found


@torch.no_grad()
def observe(model: Any, ids: Tensor, skip: int, statistics: Statistics, told: Mapping[str, Tensor]) -> DynamicCache:
    """Pass a text through a model and add its K, V and queries.

    Parameters
    ----------
    model
        A transformers model.
    ids
        int64 (1, tokens).
    skip
        First tokens, the sinks, that do not count.
    statistics
        What is added to.
    told
        What the model is told besides: ``position_ids`` that do not begin at 0.

    Returns
    -------
    DynamicCache
        K and V of the text.

    Raises
    ------
    UnsupportedModel
        If the model's attention cannot be observed.
    InvalidInput
        If it gives what is not finite.
    """
    wanted = set(full_attention_layers(model.config.get_text_config(decoder=True)))
    seen: set[int] = set()

    def attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        index = getattr(module, "layer_idx", None)
        if index in wanted:
            seen.add(index)
            _add(statistics, index, module, query[0, :, skip:], key[0, :, skip:], value[0, :, skip:])
        return kvcomp_attention(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    cache = DynamicCache(config=model.config)
    try:
        model(ids, past_key_values=cache, logits_to_keep=1, **told)
    finally:
        attend_plainly(model)
        AttentionInterface.register(NAME, kvcomp_attention)  # which keeps no sums alive
    if seen != wanted:
        raise UnsupportedModel(
            f"{model.config.model_type} cannot be calibrated: "
            "its attention does not go through transformers' AttentionInterface"
        )
    return cache


def _add(
    statistics: Statistics, index: int, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor
) -> None:
    """query: (heads, tokens, D). key, value: (KV heads, tokens, D)."""
    k, v = key.double(), value.double()
    q = query.double().reshape(k.shape[0], -1, k.shape[2])  # the queries of a group follow one another
    if not (k.isfinite().all() and v.isfinite().all() and q.isfinite().all()):
        raise InvalidInput(
            f"layer {index} gives keys, values or queries that are not finite: this model cannot be used"
        )
    new = LayerSums(k.shape[1], v.sum(1), v.mT @ v, q.mT @ q, torch.empty(0))
    sums = statistics.layers.get(index)
    if sums is None:
        new.output = _output_metric(module, query.shape[0], k.shape[0], k.shape[2])
        statistics.layers[index] = new
        return
    sums.tokens += new.tokens
    for name in ("v", "vv", "qq"):
        setattr(sums, name, getattr(sums, name) + getattr(new, name))


def _output_metric(module: torch.nn.Module, heads: int, kv_heads: int, channels: int) -> Tensor:
    """W_o^T W_o for each KV head. Of an unknown projection every direction is taken to count alike."""
    projection = next(
        (found for name in OUTPUT_PROJECTIONS if (found := getattr(module, name, None)) is not None), None
    )
    if projection is None:
        return torch.eye(channels, dtype=torch.float64).repeat(kv_heads, 1, 1)
    parameter = next(projection.parameters(), torch.empty(0))
    unit = torch.eye(heads * channels, dtype=parameter.dtype, device=parameter.device)
    images = projection(unit).double() - projection(torch.zeros_like(unit[:1])).double()  # whatever kind of layer it is
    parts = images.view(kv_heads, -1, channels, images.shape[1])
    metric: Tensor = (parts @ parts.mT).sum(1)
    return metric
