"""``kvcomp tune``: the scales of a spec, found on a model's text.

There are two searches, and both go on where they were stopped.

- *Turning points*, the paper's (arXiv 2509.00579, section 3): the largest relative scale of K with V exact, and of V
  with K exact, that keeps a share of the uncompressed score.
- *Allocation*, ours: each layer's K and V are coded alone at some scales, which gives their KL and bits. For a price of
  KL every tensor takes the scale of least bits + price * KL (Shoham & Gersho, 1988). The lowest price wins at which all
  of them together stay within a KL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.evaluate.fidelity import Sample, compare, fill, measure, predict_from, sample
from kvcomp.evaluate.methods import KVComp, Method, Pair
from kvcomp.evaluate.retrieval import Quiz, answered, quiz_sample
from kvcomp.evaluate.text import Tokens
from kvcomp.results.journal import Journal
from kvcomp.spec import KINDS, CodecSpec, TensorSpec
from kvcomp.store import Memory, sealed
from kvcomp.store.pages import bits_by_head

STEPS = (0.33, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)  # multiples of the base's relative scales
SCALES = tuple(round(0.01 * 2 ** (i / 2), 4) for i in range(13))  # 0.01 to 0.64
PRICES = (1.0, 1e5)  # bits a value for a nat
HALVINGS = 12
KNOWN = 0.5  # share of look-ups that a model must find uncompressed for them to count

Advance = Callable[[str, float], None]


@dataclass(frozen=True)
class Found:
    """A spec, and what was measured of it and on the way to it, as JSON."""

    spec: CodecSpec
    figures: dict[str, Any]


@dataclass(kw_only=True)
class Tuner:
    """Samples and look-ups of a model, and the searches on them.

    Raises InvalidInput for a calibrated base, UnsupportedModel if some layer does not attend to all tokens.
    """

    model: Any
    ids: Tokens
    """The text, int64."""
    begins: Sequence[int]
    """Where in the text the samples begin."""
    prompt: int
    """Tokens of a sample that are coded."""
    scored: int
    """Tokens of a sample that are scored."""
    quizzes: Sequence[Quiz]
    """Look-ups, which the turning points keep too."""
    base: CodecSpec
    """What the search starts from."""
    journal: Journal
    """What has been measured so far."""
    advance: Advance
    """Told what is done, and its cost."""

    def __post_init__(self) -> None:
        if not (self.base.key.scales and self.base.value.scales):
            raise InvalidInput(
                "the steps of a calibrated spec are found by kvcomp calibrate: tune a preset such as kvcomp"
            )
        if self.model.device.type != "cpu":
            raise InvalidInput(f"tuning measures on the CPU, the model is on {self.model.device}: move it there")
        self.layers: int = self.model.config.get_text_config(decoder=True).num_hidden_layers
        self._samples: dict[int, Sample] = {}
        self._records: dict[int, Sample] = {}

    def sample(self, index: int) -> Sample:
        if index not in self._samples:
            at = self.begins[index]
            ids = torch.from_numpy(self.ids[at : at + self.prompt + self.scored])[None].to(self.model.device)
            self._samples[index] = sample(self.model, ids, self.prompt)
            if not self._samples[index].cache:
                raise UnsupportedModel(
                    "tuning needs a model whose layers all attend to all tokens: use a preset as it is"
                )
        return self._samples[index]

    def records(self, index: int) -> Sample:
        if index not in self._records:
            self._records[index] = quiz_sample(self.model, self.quizzes[index])
        return self._records[index]

    def piece(self, key: str, make: Callable[[], Any]) -> Any:
        """What the journal has of this key, or what is measured now, and the progress of it."""
        found = self.journal.piece(key, make)
        self.advance(key, 1.0)
        return found

    def figures(self, key: str, method: Method) -> dict[str, Any]:
        """Mean KL, top-1 agreement and bits of a method on the samples."""

        def make(index: int) -> Callable[[], Any]:
            def run() -> Any:
                compared, memory = measure(self.model, self.sample(index), method)
                return asdict(compared) | {"memory": asdict(memory)}

            return run

        rows = [self.piece(f"{key}/{index}", make(index)) for index in range(len(self.begins))]
        memory = sum((Memory(**row["memory"]) for row in rows), Memory())
        means = {name: float(np.mean([row[name] for row in rows])) for name in ("kl", "top1", "loss")}
        return means | {"coded_bits": memory.coded_bits, "total_bits": memory.total_bits}

    # Allocation

    def allocate(self, most: float) -> Found:
        """The spec of fewest bits within a mean KL of ``most`` nats. Raises InvalidInput if no scales keep it."""
        kl, bits = self._alone()
        low, high = np.log(PRICES)
        best: tuple[CodecSpec, dict[str, Any]] | None = None
        for halving in range(HALVINGS):
            price = float(np.exp((low + high) / 2))
            spec = self._with(np.take(STEPS, np.argmin(bits + price * kl, axis=2)))
            found = self.figures(f"price/{most:.6g}/{halving}", KVComp(spec))
            if found["kl"] <= most:
                best, high = (spec, found | {"price": price}), np.log(price)
            else:
                low = np.log(price)
        if best is None:
            raise InvalidInput(
                f"no scales from {STEPS[0]} to {STEPS[-1]} times the base's keep a KL of {most:.2e}: "
                "allow more, or start from a finer --spec"
            )
        alone = [
            {"layer": layer, "kind": kind, "kl": kl[layer, part].tolist(), "bits": bits[layer, part].tolist()}
            for layer in range(self.layers)
            for part, kind in enumerate(KINDS)
        ]
        return Found(best[0], best[1] | {"steps": list(STEPS), "alone": alone})

    def _alone(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """KL and bits, (layers, K|V, steps), of each tensor coded alone, means over the samples."""
        found = np.zeros((len(self.begins), self.layers, len(STEPS), 4))
        for index, layer, step in np.ndindex(found.shape[:3]):
            key = f"alone/{index}/{layer}/{STEPS[step]}"
            found[index, layer, step] = self.piece(key, self._code_alone(index, layer, STEPS[step]))
        kl_k, kl_v, bits_k, bits_v = np.moveaxis(found.mean(0), 2, 0)
        return np.stack([kl_k, kl_v], 1), np.stack([bits_k, bits_v], 1)

    def _code_alone(self, index: int, layer: int, step: float) -> Callable[[], list[float]]:
        def run() -> list[float]:
            each = self.sample(index)
            factors = np.full((self.layers, 2), step)
            store = sealed(self._with(factors).layer(layer, self.layers), *each.cache[layer])
            coded, kls = store.dense(), []
            for part in range(2):
                values: list[Pair] = list(each.cache)
                pair = list(values[layer])
                pair[part] = coded[part]
                values[layer] = (pair[0], pair[1])
                kls.append(compare(each, predict_from(self.model, each, values)).kl)
            return [*kls, *bits_by_head(store).mean(1).tolist()]

        return run

    def _with(self, factors: np.ndarray[Any, Any]) -> CodecSpec:
        """The base with its relative scales times these, (layers, K|V)."""

        def scaled(tensor: TensorSpec, of: np.ndarray[Any, Any]) -> TensorSpec:
            own = np.broadcast_to(tensor.scales, self.layers)
            return replace(tensor, relative_scale=tuple(round(min(0.99, float(r)), 4) for r in own * of))

        key, value = (
            scaled(tensor, of) for tensor, of in zip((self.base.key, self.base.value), factors.T, strict=True)
        )
        return replace(self.base, key=key, value=value)

    # Turning points

    def turning_points(self, keep: float) -> Found:
        """The spec with the largest scale of K, and of V, that alone keep this share of the uncompressed score."""
        scales: list[float] = []
        tried: list[dict[str, Any]] = []
        for part, kind in enumerate(KINDS):
            low, high = -1, len(SCALES) - 1  # SCALES[low] keeps the score
            while low < high:
                middle = (low + high + 1) // 2
                kept = self._kept(f"keep/{kind}/{SCALES[middle]}", self._one_part(part, SCALES[middle]))
                tried.append({"kind": kind, "scale": SCALES[middle], "kept": kept})
                low, high = (middle, high) if kept >= keep else (low, middle - 1)
            if low < 0:
                raise InvalidInput(
                    f"{kind} keeps less than {keep:.3g} of the score even at a relative scale of {SCALES[0]}: "
                    f"this model's {kind} is not for this scheme"
                )
            scales.append(SCALES[low])
        key, value = (
            replace(tensor, relative_scale=scale)
            for tensor, scale in zip((self.base.key, self.base.value), scales, strict=True)
        )
        spec = replace(self.base, key=key, value=value)
        both = self._kept("keep/both", lambda each: KVComp(spec).values(fill(self.model, each, KVComp(spec))))
        return Found(spec, self.figures("keep/spec", KVComp(spec)) | {"kept": both, "tried": tried})

    def _one_part(self, part: int, scale: float) -> Callable[[Sample], list[Pair]]:
        """K and V with only K (0) or V (1) coded, at this scale."""
        key, value = (replace(tensor, relative_scale=scale) for tensor in (self.base.key, self.base.value))
        method = KVComp(replace(self.base, key=key, value=value))

        def values(each: Sample) -> list[Pair]:
            coded = method.values(fill(self.model, each, method))
            return [
                (back[0], own[1]) if part == 0 else (own[0], back[1])
                for own, back in zip(each.cache, coded, strict=True)
            ]

        return values

    def _kept(self, key: str, values: Callable[[Sample], list[Pair]]) -> float:
        """Share of the uncompressed score: of right next tokens or, if less, of look-ups that the model can do."""

        def text(index: int) -> Callable[[], Any]:
            def run() -> Any:
                each = self.sample(index)
                log_probs = predict_from(self.model, each, values(each))
                target = each.text[0, 1:]
                return [float((x[:-1].argmax(-1) == target).float().mean()) for x in (log_probs, each.log_probs)]

            return run

        def quiz(index: int) -> Callable[[], Any]:
            def run() -> Any:
                each = self.records(index)
                log_probs = predict_from(self.model, each, values(each))
                return [float(np.mean(answered(self.quizzes[index], x))) for x in (log_probs, each.log_probs)]

            return run

        texts = np.array([self.piece(f"{key}/text/{i}", text(i)) for i in range(len(self.begins))]).mean(0)
        kept = float(texts[0] / texts[1]) if texts[1] else 1.0
        if self.quizzes:
            right = np.array([self.piece(f"{key}/quiz/{i}", quiz(i)) for i in range(len(self.quizzes))]).mean(0)
            if right[1] >= KNOWN:
                kept = min(kept, float(right[0] / right[1]))
        return kept

    def cost_of_allocation(self) -> float:
        return len(self.begins) * (self.layers * len(STEPS) + HALVINGS)

    def cost_of_turning_points(self) -> float:
        searches = 2 * int(np.ceil(np.log2(len(SCALES) + 1))) + 1
        return searches * (len(self.begins) + len(self.quizzes)) + len(self.begins)
