"""The methods that ``klt.py`` compares, and the calibrations it compares them with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from kvcomp.calibration import Calibration
from kvcomp.evaluate.methods import KVComp, Method, baseline
from kvcomp.evaluate.methods.baseline import BaselineLayer
from kvcomp.evaluate.methods.kivi import Kivi
from kvcomp.fit.calibrate import Calibrator
from kvcomp.fit.curves import Curve
from kvcomp.fit.reading import Reading, Values
from kvcomp.fit.windows import Settings
from kvcomp.results.journal import Journal
from kvcomp.spec import LEVELS, CodecSpec, Kind, TensorSpec

PROMPT, SCORED = 2048, 256
WINDOWS = 24  # of a calibration that is made here; committed results rest on so many
RATES = (-0.5, 0.5, 1.5, 2.5, 3.0)  # 0, 1, 2 are near-lossless, balanced, aggressive: steps between and beyond


def klt(calibration: Calibration, level: str) -> KVComp:
    return KVComp(calibration.spec(level), f"klt {level}", calibration)


class KiviSplit(Kivi):
    """KIVI-style with bits of their own for K and V, of each layer if ``layers`` says so."""

    def __init__(self, key: int, value: int, layers: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__(key)
        self.of = {"K": key, "V": value}
        self.layers = [KiviSplit(*bits) for bits in layers]
        self.name = f"kivi {key}/{value}" + (" by layer" if layers else "")

    def cache(self, config: PreTrainedConfig) -> Cache:
        if not self.layers:
            return super().cache(config)
        return Cache(layers=[BaselineLayer(of_layer) for of_layer in self.layers])

    def encode(self, x: torch.Tensor, kind: Kind) -> Any:
        self.bits = self.of[kind]
        return super().encode(x, kind)

    def decode(self, parts: Any, kind: Kind) -> torch.Tensor:
        self.bits = self.of[kind]
        return super().decode(parts, kind)


def kivi_alike(bits: int) -> Method:
    """KIVI-style that leaves the tokens raw that kvcomp does: its sinks and its window."""
    return renamed(baseline(f"kivi-{bits}-same-raw"), f"kivi-style {bits}, our window")


def paper(key: float, value: float) -> KVComp:
    return KVComp(CodecSpec(TensorSpec("block", key), TensorSpec("token", value)), f"paper {key}/{value}")


def with_rates(calibrator: Calibrator, calibration: Calibration) -> Calibration:
    """The same transforms with a level for each of RATES, codebooks fitted on the calibrator's windows."""
    named = [
        {
            (index, kind, head): step
            for index, (_, levels) in calibration.layers.items()
            for kind in (0, 1)
            for head, step in enumerate(levels[level].steps[kind])
        }
        for level in LEVELS
    ]
    levels: dict[str, tuple[dict[tuple[int, int, int], float], dict[str, Any]]] = {}
    for rate in RATES:
        low = min(max(int(np.floor(rate)), 0), 1)
        part = rate - low
        steps = {key: float(named[low][key] ** (1 - part) * named[low + 1][key] ** part) for key in named[0]}
        levels[f"rate{rate + 1:.1f}"] = (steps, {})
    return calibrator.build(levels, "rates between the levels")


def reader(
    model: Any, ids: np.ndarray[Any, Any], calibration: Calibration, journal: Journal, windows: int
) -> Calibrator:
    """A calibrator that has read windows of a text under the transforms of a calibration."""
    settings = Settings(windows, PROMPT, SCORED, context=PROMPT + SCORED)  # where those transforms are of
    made = Calibrator(model, ids, settings, journal)
    transforms = {
        (index, kind): affine
        for index, (transform, _) in calibration.layers.items()
        for kind, affine in enumerate((transform.key, transform.value))
    }
    made.read(transforms)
    return made


def kivi_by_layer(calibrator: Calibrator, journal: Journal) -> list[KiviSplit]:
    """KIVI-style with bits for each layer's K and V: measured and allocated as our steps are, at three prices."""

    def alone(index: int, kind: int, method: Kivi, of: Reading) -> Values:
        return {(index, kind): of.rounded(method, index, kind)}

    def points(index: int, kind: int) -> list[tuple[int, float]]:
        found = []
        for bits in (8, 6, 4, 3, 2, 1):
            quality = calibrator.quality(partial(alone, index, kind, Kivi(bits)))
            found.append((bits, (quality.text + quality.repeated) / 2))
        return found

    curves = {}
    for index, kind in calibrator.fitted.coordinates:
        bits, kl = np.array(journal.piece(f"kivi.layer.{index}.{kind}", partial(points, index, kind))).T
        # the "step" of a curve is what is chosen: here 1/bits, and no bits between those that exist
        curves[index, kind] = Curve(1 / bits, bits + 1, np.maximum.accumulate(np.maximum(kl, 1e-9)))
    found = []
    for price in (1000.0, 150.0, 20.0):
        chosen = {}
        for tensor, curve in curves.items():
            best = int(np.argmin(curve.bits / len(curves) + price * curve.kl))
            chosen[tensor] = round(1 / curve.steps[best])
        layers = sorted({index for index, _ in chosen})
        method = KiviSplit(4, 4, [(chosen[i, 0], chosen[i, 1]) for i in layers])
        method.name = f"kivi by layer, price {price:.0f}"
        found.append(method)
    return found


def renamed(method: Method, name: str) -> Method:
    method.name = name
    return method


def calibrated_on(model: Any, ids: np.ndarray[Any, Any], journal: Journal) -> Calibration:
    """A calibration on WINDOWS windows of these ids alone: more than ``kvcomp calibrate`` takes, and no sources."""
    return Calibrator(model, ids, Settings(WINDOWS, PROMPT, SCORED), journal).run("manual")
