"""A budget for the whole cache of a model: what its layers beside the compressed ones leave of it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from kvcomp.calibration import Calibration
from kvcomp.calibration.budget import Plan, held, parse_bytes, within
from kvcomp.calibration.windows import window_bits
from kvcomp.errors import InvalidInput, LimitExceeded
from kvcomp.integrations.transformers.layers import coded_windows
from kvcomp.integrations.transformers.models import position_limit
from kvcomp.spec import CALIBRATED, PAGE_TOKENS


def plan_for(
    config: PreTrainedConfig,
    spec: object,
    calibration: Calibration | None,
    budget: int | str,
    context: int | None,
    backend: str = "cpu",
) -> Plan:
    """The levels of layers for a cache of ``context`` tokens within a budget.

    Sliding windows have no price. They take the finest level that is not finer than those of most layers.

    Parameters
    ----------
    config
        Of the text model.
    spec
        What was asked for: ``kvcomp-klt``, without a level.
    calibration
        Of the model, with prices.
    budget
        Bytes, or a size such as ``2GiB``.
    context
        Tokens, prompt and new ones; by default all that the model's positions allow.
    backend
        As of ``KVCompCache``.

    Raises
    ------
    InvalidInput
        For another spec, a calibration without prices, or what is no size or number of tokens.
    LimitExceeded
        If the coarsest levels do not fit.
    """
    if spec != CALIBRATED or calibration is None:
        raise InvalidInput(f"a budget chooses the level of each layer: give the spec {CALIBRATED}, not {spec}")
    tokens = position_limit(config) if context is None else context
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise InvalidInput(f"context must be a number of tokens, not {context!r}: give how many the cache shall hold")
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    levels, size = calibration.levels, parse_bytes(budget)
    for rank, level in enumerate(levels):
        windows = sliding_bytes(config, calibration, level, tokens, dtype.itemsize, backend)
        try:
            plan = within(calibration, size, tokens, dtype.itemsize, int(windows), level)
        except LimitExceeded:
            if level == levels[-1]:
                raise
            continue
        as_fine = sum(levels.index(chosen) <= rank for chosen in plan.levels.values())
        if 2 * as_fine >= len(plan.levels):
            break
    return plan


def sliding_bytes(
    config: PreTrainedConfig, calibration: Calibration, level: str, tokens: int, itemsize: int, backend: str
) -> float:
    """Bytes of a row's sliding windows at a level after so many tokens: those in pages at the bits to expect, and raw
    ones.

    itemsize: bytes of a raw value. Their heads count as those of calibrated layers.
    """
    spec = calibration.spec(level)
    layers: list[Any] = DynamicCache(config=config).layers
    coded = coded_windows(layers, config, spec, backend)
    transform = next(iter(calibration.layers.values()))[0]
    size = 0.0
    for index, layer in enumerate(layers):
        window = getattr(layer, "sliding_window", None)
        if isinstance(window, int):
            sealed, raw = 0, min(tokens, window)
            if index in coded:  # a page leaves when the window has left all of it
                sealed, raw = held(spec, min(tokens, window + PAGE_TOKENS))
            size += sealed * window_bits(level) / 8 + raw * itemsize
    return 2 * transform.heads * transform.channels * size
