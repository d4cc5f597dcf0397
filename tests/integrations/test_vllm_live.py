"""What an engine must be like to have the compressed cache: the checks at its start, without vLLM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calibrating import calibrated
from kvcomp.errors import InvalidInput, KVCompError, UnsupportedModel, UnsupportedVersion
from kvcomp.integrations.transformers.models import fingerprint_of
from kvcomp.integrations.vllm.live import Live, check_engine, is_plain
from tiny_models import tiny_config


@dataclass(frozen=True)
class FullAttentionSpec:
    """As much of vLLM's class of this name as is read."""

    head_size: int = 64
    head_size_v: int = 64
    dtype: torch.dtype = torch.bfloat16
    state_content_bytes: int | None = None
    num_head_slots: int | None = None
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    non_causal: bool = False

    @property
    def state_content_size_bytes(self) -> int:
        return self.state_content_bytes or 2 * self.head_size * self.dtype.itemsize


def config(**other: Any) -> Any:
    """vLLM's configuration; names with a dot are fields of its parts."""
    parts = {
        "cache_config": SimpleNamespace(block_size=64, cache_dtype="auto"),
        "parallel_config": SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1, decode_context_parallel_size=1
        ),
        "model_config": SimpleNamespace(dtype=torch.bfloat16, hf_text_config=None),
        "speculative_config": None,
        "kv_transfer_config": None,
        "additional_config": {},
    }
    for name, value in other.items():
        part, _, field = name.partition("__")
        if field:
            setattr(parts[part], field, value)
        else:
            parts[part] = value
    return SimpleNamespace(**parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("version", ["0.32.0", "0.32.1rc2.dev5+g1234.cpu"])
def test_the_engine_that_it_is_made_for_is_taken(dtype: torch.dtype, version: str) -> None:
    check_engine(config(model_config__dtype=dtype), version, overridden=False)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"cache_config__block_size": 128}, "--block-size 64"),
        ({"cache_config__cache_dtype": "fp8"}, "--kv-cache-dtype"),
        ({"model_config__dtype": torch.float64}, "bfloat16"),
        ({"parallel_config__tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"parallel_config__data_parallel_size": 2}, "data_parallel_size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill_context_parallel_size"),
        ({"speculative_config": object()}, "speculative"),
        ({"kv_transfer_config": object()}, "connector"),
    ],
)
def test_other_engines_are_refused_with_what_to_do(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(KVCompError, match=says):
        check_engine(config(**wrong), "0.32.0", overridden=False)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "dev"])
def test_versions_that_nobody_tested_are_refused(version: str) -> None:
    with pytest.raises(UnsupportedVersion, match=r"0\.32"):
        check_engine(config(), version, overridden=False)


def test_another_plug_in_in_the_same_place_is_refused() -> None:
    with pytest.raises(InvalidInput, match="VLLM_PLUGINS"):
        check_engine(config(), "0.32.0", overridden=True)


@pytest.mark.parametrize(
    "other",
    [
        {"head_size_v": 32},
        {"sliding_window": 512},
        {"attention_chunk_size": 512},
        {"num_head_slots": 1},
        {"state_content_bytes": 64},
        {"non_causal": True},
    ],
)
def test_plain_full_attention_is_told_from_other_layers(other: dict[str, Any]) -> None:
    assert is_plain(FullAttentionSpec())
    assert not is_plain(replace(FullAttentionSpec(), **other))


class SlidingWindowSpec(FullAttentionSpec):
    pass


def test_other_kinds_of_layers_are_not_plain() -> None:
    assert not is_plain(SlidingWindowSpec())


def test_heads_that_no_page_holds_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"multiple of 16.*leave --worker-cls out"):
        Live.of(config()).declared(FullAttentionSpec(72, 72))


@pytest.mark.parametrize(("saving", "size"), [(None, 84), (1, 256), (3.99, 64), (8, 32)])
def test_fewer_bytes_are_declared(saving: float | None, size: int) -> None:
    options = {} if saving is None else {"saving": saving}
    declared = Live.of(config(additional_config={"kvcomp": options})).declared(FullAttentionSpec())
    assert declared.state_content_bytes == size


@pytest.mark.parametrize(
    "options",
    [
        {"spec": "none"},
        {"saving": 0.5},
        {"saving": True},
        {"saving": 100},
        {"reserve": -1},
        {"reserve": "1"},
        {"block": 1},
        [],
        {"spec": "kvcomp-klt"},
    ],
)
def test_options_are_checked(options: Any) -> None:
    with pytest.raises(InvalidInput):
        Live.of(config(additional_config={"kvcomp": options}))


def test_a_calibration_is_of_the_model_and_of_each_of_its_layers(tmp_path: Path) -> None:
    model = tiny_config()
    path = str(tmp_path / "model.kvcal")
    made = calibrated(layers=2, model=fingerprint_of(model))
    made.write(path)
    options = {"kvcomp": {"spec": "kvcomp-klt", "calibration": path}}
    live = Live.of(config(model_config__hf_text_config=model, additional_config=options))
    spec, books = live.layer(1, 2)
    assert books is not None
    assert spec.key.heads is not None
    other = tiny_config(hidden_size=128)
    with pytest.raises(InvalidInput, match="kvcomp calibrate"):
        Live.of(config(model_config__hf_text_config=other, additional_config=options))
