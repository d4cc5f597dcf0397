"""Making a calibration: transforms from statistics, and steps from what each head's K and V cost in quality.

Each tensor, the K or V of one head, has a curve: bits and KL for each step. One backward pass a window gives the shape
of all curves (``gradients``). Coding the K and the V of each layer alone once gives their size, as the heads of a layer
are off by about the same factor. For a price of KL every tensor then takes the step of least bits + price * KL
(Shoham & Gersho, 1988). A level is the lowest price at which the model, with all of them coded, is as good as with
KIVI-style quantisation at 4, 3 or 2 bits: on the text, and on sources that nobody made for it if there are some.

Quality is measured on two kinds of windows: text that goes on, and text that repeats a part of the prompt word for
word. Most text can be predicted without looking far back. The second kind shows whether things are found again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import gcd
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache
from xxhash import xxh3_64

from kvcomp.calibration import About, Calibration, LevelOfLayer
from kvcomp.calibration.rotary import Rotation
from kvcomp.calibration.transform import Affine, Transform
from kvcomp.evaluate.fidelity import attend_plainly
from kvcomp.evaluate.gradients import label_gradients
from kvcomp.evaluate.methods.kivi import GROUP, Kivi
from kvcomp.fit.codebooks import books_of, page_bits
from kvcomp.fit.curves import (
    NEAR,
    UNSEEN_KL,
    Curve,
    Tensors,
    allocate,
    entropy_bits,
    next_price,
    predicted,
    price_of,
    shifts_of,
)
from kvcomp.fit.quality import Quality, quality_of
from kvcomp.fit.reading import Reading, Values, values_of
from kvcomp.fit.rotation import rotations
from kvcomp.fit.statistics import Statistics, calibrated_layers, check_rope
from kvcomp.fit.windows import (
    EVERY,
    Drawn,
    Settings,
    Tell,
    context_of,
    draw_windows,
    is_rotary,
    long_enough,
    spread,
    write,
)
from kvcomp.integrations.transformers.models import check_layer, fingerprint_of, setting, text_config
from kvcomp.results.journal import Journal
from kvcomp.spec import LEVELS

METHOD = "turning"  # in the names of cached files: another way makes others
# Steps of a curve, over the root mean square of a tensor in its coordinates.
FACTORS = (0.015625, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0, 1.5, 2.2, 3.3, 5.0)
LABELS = 1  # backward passes a window
MEASURED = 16  # tokens after a prompt that are predicted with one layer coded alone
TRUST = 0.75  # power of what that gives over what gradients say: it is noisy, and too little is worse than too much
WITHIN = 100.0  # a measured KL this many times the predicted one, or less than that part of it, is taken for noise
PIECES = 8  # the model writes a window in so many pieces, side by side
KIVI_BITS = dict(zip(LEVELS, (4, 3, 2), strict=True))
MEASUREMENTS = 6  # most for a level
CLOSE = 1.03  # a price that is lower by less is not worth a measurement
MARGIN = 1.25  # other text reaches farther than the windows do

Levels = Mapping[str, tuple[Mapping[Tensors, float], Mapping[str, Any]]]  # steps, and what was measured
Layers = Mapping[int, Mapping[str, LevelOfLayer]]


class Calibrator:
    """The steps of a calibration, each of which goes on where it was interrupted.

    Parameters
    ----------
    model
        In float32, as the noise of narrower types hides what small errors do.
    ids
        The text, int64 (tokens,); None for text that the model writes itself.
    settings
        Windows of text, and tokens of each.
    journal
        What has been measured so far.
    tell
        Told what is being done, how much of it is done, and how much there is.
    sources
        Windows of other text that the levels must hold for too, int64 (1, length) each (``sources``).

    Raises
    ------
    UnsupportedModel
        If a calibration cannot hold the model.
    InvalidInput
        If the text or the windows are too short.
    """

    def __init__(
        self,
        model: Any,
        ids: npt.NDArray[np.int64] | None,
        settings: Settings,
        journal: Journal,
        tell: Tell | None = None,
        sources: Sequence[Tensor] = (),
    ) -> None:
        self.model, self.settings, self.journal = model, settings, journal
        self.tell: Tell = tell or (lambda what, done, total: None)
        self.config = text_config(model.config)
        check_rope(self.config)
        self.layers = calibrated_layers(self.config)
        for index in self.layers:
            check_layer(self.config, index)
        self.context = context_of(self.config, settings)
        self.fitted = Reading(model, settings, is_rotary(self.config))
        self.sources = Reading(model, settings, is_rotary(self.config))
        self.given = [Drawn(ids, "sources") for ids in sources]
        self.text = ids
        self.drawn = [] if ids is None else draw_windows(long_enough(ids, settings), settings.windows, settings)
        self.affines: dict[tuple[int, int], Affine] = {}
        self.rotations: dict[int, Rotation] = {}
        self.reach: dict[tuple[int, int], Tensor] = {}  # of each coordinate, (KV heads, D)
        self.over = 1.0  # measured KL over what curves predict, at the last level

    def run(self, text: str) -> Calibration:
        """Take all steps. text: what to call the text."""
        self.write()
        self.read()
        curves = self.curves()
        levels = {level: self.level(curves, bits) for level, bits in KIVI_BITS.items()}
        return self.priced(levels, curves, text)

    def write(self) -> None:
        """Let the model write some windows more, or all of them."""
        rows = self.settings.written + (self.settings.windows if self.text is None else 0)
        attend_plainly(self.model)
        length = -(-self.settings.length // PIECES)
        written = self.journal.piece(
            "written", lambda: write(self.model, self.text, rows * PIECES, length, self.tell).tolist()
        )
        whole = np.array(written, np.int64).reshape(rows, -1)[:, : self.settings.length].reshape(-1)
        self.drawn += draw_windows(whole, rows, self.settings)

    @torch.no_grad()
    def read(self, transforms: Mapping[tuple[int, int], Affine] | None = None) -> None:
        """Read the windows into caches, and make the transforms unless they are given."""
        statistics, count = Statistics(), len(self.drawn)
        if is_rotary(self.config):
            self.rotations = rotations(self.model, self.drawn[0].ids, self.layers, self.context)
            if not self.rotations:  # then what varies with the place would cost more than it is worth
                self.context = self.settings.length
        places = spread(count + len(self.given), self.settings, self.context, self.model.device)
        self.fitted.read(self.drawn, places[:count], statistics, self.tell)
        self.sources.read(self.given, places[count:], None, self.tell)
        for (index, kind), affine in (self._transforms(statistics) if transforms is None else transforms).items():
            self.affines[index, kind] = affine.to(values_of(self.fitted.windows[0].layers[index], kind).device)
            for reading in (self.fitted, self.sources):
                reading.transform(index, kind, self.affines[index, kind])
            self.reach[index, kind] = MARGIN * self.fitted.coordinates[index, kind].abs().amax((0, 2))

    def _transforms(self, statistics: Statistics) -> dict[tuple[int, int], Affine]:
        centred = not setting(self.config, "attn_logit_softcapping")  # a soft cap would notice q.mean
        of = {(index, 1): sums.of_value() for index, sums in statistics.layers.items()}
        for index, sums in statistics.layers.items():
            k = self.fitted.values(index, 0)
            of[index, 0] = sums.of_key(k, self.fitted.places, self.rotations.get(index), centred)
        return of

    @torch.no_grad()
    def quality(self, coded: Callable[[Reading], Values]) -> Quality:
        """Quality with these values of a reading in place of its own."""
        return quality_of([kl for one in (self.fitted, self.sources) for kl in one.kls(coded(one))])

    # Steps

    def curves(self) -> dict[Tensors, Curve]:
        """The curve of every tensor, which never falls as steps grow: the gradients' shape, the measured size."""
        weights = self.journal.piece("gradients", self._gradients)
        tensors = [(*at, head) for at, affine in self.affines.items() for head in range(len(affine.mean))]
        found = {}
        for done, (index, kind, head) in enumerate(tensors):
            self.tell("bits of each head", done, len(tensors))
            shape = partial(self._curve, index, kind, head, weights[f"{index}.{kind}"][head])
            steps, bits, kl = np.array(self.journal.piece(f"{index}.{kind}.{head}", shape)).T
            found[index, kind, head] = Curve(steps, bits, np.maximum.accumulate(np.maximum(kl, UNSEEN_KL)))
        steps = allocate(found, price_of(found, self.kivi(KIVI_BITS["balanced"]).mean))
        for done, (index, kind) in enumerate(self.affines):
            self.tell("each layer alone", done, len(self.affines))
            heads = {tensor: curve for tensor, curve in found.items() if tensor[:2] == (index, kind)}
            alone = partial(self._alone, index, kind, [steps[tensor] for tensor in heads])
            share = self.journal.piece(f"alone.{index}.{kind}", alone) / predicted(heads, steps)
            for tensor, curve in heads.items():
                kl = np.maximum(curve.kl * np.clip(share, 1 / WITHIN, WITHIN) ** TRUST, UNSEEN_KL)
                found[tensor] = Curve(curve.steps, curve.bits, kl)
        return found

    def _gradients(self) -> dict[str, list[list[float]]]:
        """For each tensor and coordinate the KL in nats a token of a mean squared error of 1, by layer and kind."""
        total: dict[tuple[int, int], Tensor] = {}
        windows = self.fitted.windows
        for done, window in enumerate(windows):
            self.tell("gradients", done, len(windows))
            share = 2 * LABELS * self.settings.scored * len(windows)
            told = self.fitted.told(window.positions)
            for gradients in label_gradients(self.model, window.layers, window.text, self.layers, LABELS, done, told):
                for key, gradient in gradients.items():
                    g = gradient[0, :, self.fitted.coded].double()
                    total[key] = total.get(key, 0) + g.mT @ g / share
        found = {}
        for (index, kind), matrix in total.items():
            back = self.affines[index, kind].inverse.double()
            found[f"{index}.{kind}"] = (back.mT @ matrix @ back).diagonal(dim1=1, dim2=2).tolist()
        return found

    def _curve(self, index: int, kind: int, head: int, weights: list[float]) -> list[tuple[float, float, float]]:
        x = self.fitted.coordinates[index, kind][::EVERY, head]
        size = float(x.square().mean().sqrt()) or 1.0
        weight = x.new_tensor(weights, dtype=torch.float64)
        points = []
        for step in (factor * size for factor in FACTORS):
            steps = step * shifts_of(self.reach[index, kind][head], step).exp2()
            codes = (x / steps).round()
            error = (codes * steps - x).double().square().mean((0, 1))
            points.append((step, entropy_bits(codes, kind), float(weight @ error)))
        return points

    @torch.no_grad()
    def _alone(self, index: int, kind: int, steps: Sequence[float]) -> float:
        """KL with the K or V of one layer coded alone, of few tokens a window: windows differ more than tokens do."""
        step = self.steps_of(index, kind, steps)
        coded = self._back(self.fitted, index, kind, step)
        return float(np.mean(self.fitted.kls_together(index, kind, coded, MEASURED)))

    def steps_of(self, index: int, kind: int, steps: Sequence[float]) -> Tensor:
        """The step of each coordinate, (KV heads, 1, D), from those of the heads."""
        step = self.reach[index, kind].new_tensor(steps)[:, None]
        return (step * shifts_of(self.reach[index, kind], step).exp2())[:, None]

    def _back(self, reading: Reading, index: int, kind: int, step: Tensor) -> Tensor:
        """K or V of a layer as they come back with the steps of its coordinates."""
        codes = (reading.coordinates[index, kind] / step).round()
        return self.affines[index, kind].undo(codes * step, reading.places)

    def coded_values(self, steps: Mapping[Tensors, float], reading: Reading) -> dict[tuple[int, int], Tensor]:
        """All K and V of a reading as they come back with these steps."""
        found = {}
        for (index, kind), x in reading.coordinates.items():
            step = self.steps_of(index, kind, [steps[index, kind, head] for head in range(x.shape[1])])
            found[index, kind] = self._back(reading, index, kind, step)
        return found

    def kivi(self, bits: int) -> Quality:
        """Quality of KIVI-style quantisation of the same tokens."""

        def coded(reading: Reading) -> Values:
            return {
                (index, kind): reading.rounded(Kivi(bits, gcd(GROUP, x.shape[3])), index, kind)
                for (index, kind), x in reading.coordinates.items()
            }

        def run() -> dict[str, float]:
            return asdict(self.quality(coded))

        return Quality(**self.journal.piece(f"kivi.{bits}", run))

    def at_price(self, curves: Mapping[Tensors, Curve], price: float) -> tuple[dict[Tensors, float], Quality]:
        """The steps at a price, and their quality together."""
        steps = allocate(curves, price)
        coded = partial(self.coded_values, steps)
        together = self.journal.piece(f"price.{price:.6g}", lambda: asdict(self.quality(coded)))
        return steps, Quality(**together)

    def level(self, curves: Mapping[Tensors, Curve], bits: int) -> tuple[dict[Tensors, float], dict[str, Any]]:
        """Steps as good as KIVI-style quantisation of so many bits, at the lowest price, and what was measured."""
        wanted = self.kivi(bits)
        price = price_of(curves, wanted.mean / self.over)
        tried: list[tuple[float, dict[Tensors, float], Quality]] = []
        found: dict[float, float] = {}  # prices, and how much worse than wanted the model was
        for done in range(MEASUREMENTS):
            self.tell(f"as good as {bits} bits", done, MEASUREMENTS)
            tried.append((price, *self.at_price(curves, price)))
            found[price] = tried[-1][2].over(wanted)
            if NEAR <= found[price] <= 1:
                break
            price = next_price(found)
            if any(price < so_far < CLOSE * price and worse <= 1 for so_far, worse in found.items()):
                break
        reached = [one for one in tried if one[2].over(wanted) <= 1]
        by_price = itemgetter(0)  # steps have no order
        price, steps, quality = min(reached, key=by_price) if reached else max(tried, key=by_price)
        self.over = quality.over(wanted) * wanted.mean / predicted(curves, steps)
        kls = {"kl": asdict(quality), "kl_of": asdict(wanted)}
        return steps, {"price": price, **kls, "as_good_as": f"KIVI-style, {bits} bits", "reached": bool(reached)}

    # The calibration

    def level_of_layer(self, index: int, steps: Mapping[Tensors, float]) -> LevelOfLayer:
        """Steps and codebooks of a layer."""
        heads = len(self.affines[index, 0].mean)
        chosen = [tuple(steps[index, kind, head] for head in range(heads)) for kind in (0, 1)]
        reach = [self.reach[index, kind].cpu() for kind in (0, 1)]
        shifts = [shifts_of(reach[kind], torch.tensor(chosen[kind])[:, None]) for kind in (0, 1)]
        books = [
            books_of(self.fitted.coordinates[index, kind].cpu(), chosen[kind], shifts[kind], kind) for kind in (0, 1)
        ]
        packed = torch.stack(shifts).to(torch.uint8).numpy()
        return LevelOfLayer((chosen[0], chosen[1]), (books[0], books[1]), packed if packed.any() else None)

    def priced(self, levels: Levels, curves: Mapping[Tensors, Curve], text: str) -> Calibration:
        """The calibration with the bits and the KL of each layer at each level, which a budget is spent by.

        Bits are counted in pages. The KL of layers are shares of what all of them cost together.
        """
        of_layers = self._of_layers(levels)
        made, found = self.build(levels, text, of_layers), {}
        for level, (steps, about) in levels.items():
            shares = dict.fromkeys(self.layers, 0.0)
            for tensor, step in steps.items():
                shares[tensor[0]] += curves[tensor].kl_at(step)
            whole = Quality(**about["kl"]).mean / sum(shares.values())
            prices = {
                str(index): {"bits": page_bits(made, level, index, self._kv(index)), "kl": whole * share}
                for index, share in shares.items()
            }
            found[level] = {**about, "layers": prices}
        transforms = {index: transform for index, (transform, _) in made.layers.items()}
        return Calibration.build(replace(made.about, levels=found), transforms, of_layers)

    def _kv(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A layer's coded K and V, of the windows that bits are counted on, K as it is at the first places."""
        coded, turn = self.fitted.coded, self.rotations.get(index)
        for window in self.fitted.windows[::EVERY]:
            k, v = (values_of(window.layers[index], kind)[:, :, coded] for kind in (0, 1))
            first = window.positions[0, 0] - self.settings.prompt + coded.start
            yield (k if turn is None else turn.turned(k, -first.expand(k.shape[2]))).cpu(), v.cpu()

    def _of_layers(self, levels: Levels) -> Layers:
        """Steps and codebooks of every layer."""
        return {
            index: {name: self.level_of_layer(index, steps) for name, (steps, _) in levels.items()}
            for index in self.layers
        }

    def build(self, levels: Levels, text: str, of_layers: Layers | None = None) -> Calibration:
        """The calibration with these levels, without prices. text: what to call the text."""
        of_layers = self._of_layers(levels) if of_layers is None else of_layers
        digest = xxh3_64(b"".join(ids.numpy().tobytes() for ids, _ in (*self.drawn, *self.given))).hexdigest()
        about = About(
            fingerprint_of(self.config),
            len(DynamicCache(config=self.config).layers),
            {name: dict(measured) for name, (_, measured) in levels.items()},
            {
                "text": text,
                "tokens_digest": digest,
                "sources": len(self.given),
                "written": len(self.drawn) - (0 if self.text is None else self.settings.windows),
                **asdict(replace(self.settings, context=self.context)),
            },
        )
        held = {at: affine.to(torch.device("cpu")) for at, affine in self.affines.items()}
        transforms = {index: Transform(held[index, 0], held[index, 1]) for index in self.layers}
        return Calibration.build(about, transforms, of_layers)
