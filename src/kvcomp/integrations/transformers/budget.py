"""A budget for the whole cache of a model: what its layers beside the compressed ones leave of it."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedConfig

from kvcomp.calibration import Calibration
from kvcomp.calibration.budget import Plan, parse_bytes, within
from kvcomp.errors import InvalidInput
from kvcomp.integrations.transformers.models import position_limit
from kvcomp.spec import CALIBRATED


def plan_for(
    config: PreTrainedConfig,
    spec: object,
    calibration: Calibration | None,
    budget: int | str,
    context: int | None,
    rows: int = 1,
) -> Plan:
    """The levels of layers for a cache of ``context`` tokens within a budget.

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
    rows
        Sequences at once.

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
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    transform = next(iter(calibration.layers.values()))[0]
    values = 2 * rows * transform.heads * transform.channels  # of a sliding layer's token, if its heads are alike
    other = sum(min(tokens, window) * values * dtype.itemsize for window in windows if isinstance(window, int))
    return within(calibration, parse_bytes(budget), tokens, dtype.itemsize, rows, other)
