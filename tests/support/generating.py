"""Generating from tiny models, and attention over what a cache gives back as the standard that it is held to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers import attention as transformers_attention
from kvcomp.spec import PRESETS
from kvcomp.store import KVStore
from tiny_models import LOSSY

LOSSLESS = replace(PRESETS["kvcomp"], window=4096)  # everything stays in the window


def prompt(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (len(lengths), max(lengths)), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: Any, attention: str = "kvcomp", **options: Any
) -> Any:
    """Tokens and logits."""
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    settings = GenerationConfig(**options, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    return model.generate(**inputs, past_key_values=cache, generation_config=settings)


def assert_same(one: Any, two: Any, tolerance: float = 1e-4) -> None:
    assert torch.equal(one.sequences, two.sequences)
    assert one.logits
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(two.logits), atol=tolerance, rtol=0)


def forward(model: PreTrainedModel, cache: Any, attention: str = "kvcomp", **inputs: torch.Tensor) -> torch.Tensor:
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return model(**inputs, past_key_values=cache).logits


def filled(model: PreTrainedModel) -> KVCompCache:
    cache = KVCompCache(model.config, LOSSY)
    forward(model, cache, **prompt(150))
    return cache


def dense_attend(
    store: KVStore,
    q: torch.Tensor,
    scaling: float,
    softcap: float = 0.0,
    mask: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """What ``attend`` and ``attend_tiled`` stand for: softmax over the decompressed cache, in float64."""
    k, v = (x.repeat_interleave(q.shape[1] // store.heads, dim=1).double() for x in store.dense())
    position = torch.arange(store.tokens)
    if mask is None:
        query = position[-q.shape[2] :, None]
        mask = (position <= query) & (position > query - (store.sliding_window or store.tokens))
    else:
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = torch.nn.functional.pad(mask, (store.tokens - mask.shape[-1], 0), value=hidden)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e30)
    score = q.double() @ k.mT * scaling
    score = softcap * torch.tanh(score / softcap) if softcap else score
    padding = position < torch.from_numpy(store.starts)[:, None, None, None]
    score = (score + mask).masked_fill(padding, -1e30)
    if sink_logits is not None:
        score = torch.cat([score, sink_logits.double()[:, None, None].expand(*score.shape[:3], 1)], -1)
    weight = score.softmax(-1)[..., : store.tokens].masked_fill(padding, 0)
    return (weight @ v).to(q.dtype)


def attend_densely(patch: pytest.MonkeyPatch) -> None:
    """From now on compressed attention is that over the decompressed cache."""
    patch.setattr(transformers_attention, "attend", dense_attend)
    patch.setattr(transformers_attention, "attend_tiled", dense_attend)
