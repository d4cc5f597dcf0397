"""The cache layers of a model: compressed ones, and transformers' own where those stay."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvcomp.calibration import Calibration
from kvcomp.errors import InvalidInput
from kvcomp.integrations.transformers.layer import CompressedLayer
from kvcomp.integrations.transformers.models import check_layer, setting
from kvcomp.integrations.transformers.session import Session
from kvcomp.integrations.transformers.sliding import SlidingLayer
from kvcomp.integrations.transformers.stock import check_stock, stock_rows
from kvcomp.spec import PAGE_TOKENS, CodecSpec

LEAST_WINDOW = 512
"""Smaller sliding windows stay raw: little of them would lie in pages."""


def cache_layers(
    config: PreTrainedConfig, spec: CodecSpec, calibration: Calibration | None, backend: str, session: Session
) -> list[Any]:
    """A layer for each of the model's. spec: of the whole model. Raises UnsupportedModel for what cannot be held."""
    layers: list[Any] = DynamicCache(config=config).layers
    coded = coded_windows(layers, config, spec, backend)
    for index, layer in enumerate(layers):
        of_layer = spec.layer(index, len(layers))
        if type(layer) is DynamicLayer:
            check_layer(config, index)
            calibrated = calibration.layer(index, spec) if calibration else None
            layers[index] = CompressedLayer(of_layer, backend, session, calibrated)
        elif index in coded:
            check_layer(config, index)
            layers[index] = SlidingLayer(of_layer, backend, session, coded[index])
        else:
            check_stock(layer, index)
    return layers


def coded_windows(layers: list[Any], config: PreTrainedConfig, spec: CodecSpec, backend: str) -> dict[int, int]:
    """Those of transformers' layers whose sliding windows are compressed, and the tokens of each window.

    There is no kernel for them on a GPU. A calibration has none of these layers: its spec says how they are coded. One
    that later layers read too stays raw: they read it after it has compressed and dropped what they still see.
    """
    shared, of_layer = shared_window(config, layers), [spec.layer(index, len(layers)) for index in range(len(layers))]
    return {
        index: layer.sliding_window
        for index, (layer, own) in enumerate(zip(layers, of_layer, strict=True))
        if backend != "gpu" and own.calibration is None and index != shared and is_compressed_window(layer, config, own)
    }


def shared_window(config: PreTrainedConfig, layers: list[Any]) -> int | None:
    """The layer with a sliding window whose K and V the last layers share (Gemma 3n and 4), the last before them."""
    shared = setting(config, "num_kv_shared_layers")
    own = layers[: config.num_hidden_layers - shared] if shared else []
    return max((index for index, layer in enumerate(own) if type(layer) is DynamicSlidingWindowLayer), default=None)


def keep_first_windows_raw(layers: list[Any]) -> None:
    """Give the empty windows before the first layer that keeps all tokens the layers that transformers gives them.

    So K and V of that one are those of the token ids, whatever passes a prompt came in, and can be computed again.
    """
    for index, layer in enumerate(layers):
        if type(layer) is CompressedLayer:
            return
        if isinstance(layer, SlidingLayer):
            layers[index] = DynamicSlidingWindowLayer(layer.sliding_window)


def is_compressed_window(layer: Any, config: PreTrainedConfig, spec: CodecSpec) -> bool:
    """Whether one of transformers' own layers is a sliding window to compress under the layer's spec.

    One that has no room for pages beside the raw tokens is not, and no chunk, whose tokens see fewer.
    """
    least = max(LEAST_WINDOW, spec.sinks + spec.window + 2 * PAGE_TOKENS)
    sliding = type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= least
    return sliding and layer.sliding_window != setting(config, "attention_chunk_size")


def rows_of(layer: Any) -> int:
    """The batch of a cache layer; 0 if it is empty."""
    return layer.store.batch if isinstance(layer, CompressedLayer) else stock_rows(layer)


def check_rows(layer: Any, rows: int) -> None:
    """Raise InvalidInput if a layer holds another batch than comes."""
    held = rows_of(layer)
    if held not in (0, rows):
        more = f"batch_repeat_interleave({rows // held})" if rows > held else "batch_select_indices"
        raise InvalidInput(f"the cache holds {held} rows, and {rows} come: call {more}, or use a cache for each batch")
