"""Bits at equal quality: kvcomp-klt against KIVI-style quantisation and the paper's scheme, on text it was not
calibrated on.

Prompts of 2,048 tokens, each followed by 256 scored ones: `prefix` codes the prompt and scores the text exactly;
`streaming` lets the window move over the text too. Rates between the named levels take steps between theirs. The
calibration that comes with the shipped model was made on tests of the standard library; scored are held-out sources
(code) and the second half of Python's manual (prose).

    make bench-klt                          # python benchmarks/klt.py --resume goes on after an interruption
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from klt_methods import (
    PROMPT,
    RATES,
    SCORED,
    KiviSplit,
    calibrated_on,
    kivi_alike,
    kivi_by_layer,
    klt,
    paper,
    reader,
    renamed,
    with_rates,
)
from kvcomp.calibration import Calibration
from kvcomp.evaluate import fidelity
from kvcomp.evaluate.fidelity import Sample
from kvcomp.evaluate.methods import Method
from kvcomp.evaluate.models import CALIBRATION, held_out_ids, load_model, shipped_model
from kvcomp.evaluate.retrieval import Quiz, answered, quiz_sample, quizzes
from kvcomp.evaluate.text import held_out_names, join, manual_text, training_text
from kvcomp.fit.calibrate import KIVI_BITS
from kvcomp.results import plots
from kvcomp.results import schema as results
from kvcomp.results.journal import Journal, pieces
from kvcomp.spec import LEVELS
from kvcomp.store import KVStore, Memory
from kvcomp.store.pages import bits_by_head
from rates import bits_at

OUTPUT = Path(__file__).parent / "results" / "klt.json"
LONG = 4032
SPLITS = ((4, 4), (3, 3), (2, 2), (4, 3), (4, 2), (3, 2))  # bits of K and V
PAPER = ((0.03, 0.06), (0.05, 0.1), (0.07, 0.2), (0.1, 0.3), (0.2, 0.6))
LOOKUP_LISTS, SEED = 24, 20261121
DRAWS = 1000

Scores = dict[str, Any]  # {"kl": [...], "top1": [...], "coded_bits", "total_bits"}
screen = Console()


# Measuring


def scored(model: Any, samples: Sequence[Sample], method: Method, streaming: bool) -> Scores:
    found = [fidelity.measure(model, each, method, streaming) for each in samples]
    memory = sum((one for _, one in found), Memory())
    return {
        "kl": [one.kl for one, _ in found],
        "top1": [one.top1 for one, _ in found],
        "coded_bits": memory.coded_bits,
        "total_bits": memory.total_bits,
        "parts": {
            part: 8 * getattr(memory, part) / max(1, memory.sealed_values)
            for part in ("codes", "lengths", "scales", "directories", "raw_blocks", "table_entries")
        },
    }


def envelope(kl: float, points: Mapping[str, Scores], kls: Mapping[str, float]) -> float:
    """Bits at a KL on the lower hull of a method's points: the least between any two of them, log KL interpolated."""
    return min(
        (
            bits_at(kl, [points[name]["coded_bits"] for name in pair], [kls[name] for name in pair])
            for pair in combinations(points, 2)
        ),
        default=float("inf"),
    )


def at_equal_kl(mode: Mapping[str, Scores]) -> dict[str, Any]:
    """Our bits over the others' at the KL of KIVI-style 4, 3 and 2 bits, with 95 % intervals from drawing sequences
    anew.
    """
    families = {
        "klt": {n: s for n, s in mode.items() if n.startswith("klt ")},
        "kivi": {n: s for n, s in mode.items() if n.startswith("kivi ") and "layer" not in n},
        "paper": {n: s for n, s in mode.items() if n.startswith("paper")},
        "kivi by layer": {n: s for n, s in mode.items() if n.startswith("kivi by layer")},
    }

    def ratios(rows: Any) -> dict[str, float]:
        kls, out = mean_kls(mode, rows), dict[str, float]()
        for bits in (4, 3, 2):
            target = kls[f"kivi {bits}/{bits}"]
            ours = envelope(target, families["klt"], kls)
            out[f"{bits}.bits"] = ours
            out[f"{bits}.over_kivi"] = ours / mode[f"kivi {bits}/{bits}"]["coded_bits"]
            out[f"{bits}.over_kivi_best_split"] = ours / envelope(target, families["kivi"], kls)
            out[f"{bits}.over_paper"] = ours / envelope(target, families["paper"], kls)
        for name in families["kivi by layer"]:
            out[f"{name}.over"] = envelope(kls[name], families["klt"], kls) / mode[name]["coded_bits"]
        return out

    return with_intervals(ratios, len(next(iter(mode.values()))["kl"]))


def with_intervals(figures: Callable[[Any], Mapping[str, float]], count: int) -> dict[str, Any]:
    """Figures of all sequences, a function of their numbers, with 95 % intervals from drawing sequences anew."""
    rng = np.random.default_rng(SEED)
    drawn = [figures(rng.integers(0, count, count)) for _ in range(DRAWS)]
    found: dict[str, Any] = {}
    for name, value in figures(slice(None)).items():
        values = [one[name] for one in drawn if np.isfinite(one.get(name, np.nan))]
        low, high = np.percentile(values, [2.5, 97.5]) if len(values) > DRAWS // 2 else (np.nan, np.nan)
        found[name] = {"value": value, "interval": [float(low), float(high)]}
    return found


def mean_kls(mode: Mapping[str, Scores], rows: Any) -> dict[str, float]:
    return {name: float(np.mean(np.asarray(one["kl"])[rows])) for name, one in mode.items()}


def same_window(mode: Mapping[str, Scores]) -> dict[str, Any]:
    """KL of each named level over that of the KIVI-style method it was to be as good as, both with the same
    raw tokens.
    """

    def ratios(rows: Any) -> dict[str, float]:
        kls = mean_kls(mode, rows)
        return {level: kls[f"klt {level}"] / kls[kivi_alike(bits).name] for level, bits in KIVI_BITS.items()}

    return with_intervals(ratios, len(next(iter(mode.values()))["kl"]))


def sizes(model: Any, ids: np.ndarray[Any, Any], calibration: Calibration) -> dict[str, Any]:
    """Bits of a value of one sequence of LONG tokens, everything counted: that of the cache, and with what decoding
    takes from the calibration; and at 32K tokens, where cache and calibration are what they are at LONG and the sealed
    part is longer.
    """
    each = fidelity.sample(model, torch.from_numpy(ids[: LONG + 2])[None], LONG)
    found = {}
    for level in LEVELS:
        method = klt(calibration, level)
        memory = method.memory(fidelity.fill(model, each, method))
        side, raw = calibration.nbytes(level), memory.window + memory.sinks
        values = 32768 * memory.values // LONG
        sealed = values - (memory.values - memory.sealed_values)
        found[level] = {
            "tokens": LONG,
            "coded_bits": memory.coded_bits,
            "total_bits": memory.total_bits,
            "calibration_bits": 8 * side / memory.values,
            "raw_window_and_sinks_bits": 8 * raw / memory.values,
            "at_32k": {
                "calculated": True,
                "total_bits": (memory.coded_bits * sealed + 8 * raw) / values,
                "calibration_bits": 8 * side / values,
            },
            "calibration_bytes": side,
        }
    return found


def lookups(model: Any, tokenizer: Any, methods: Mapping[str, Method], journal: Journal) -> dict[str, Any]:
    """Look-ups answered, each by every method: shares, and the difference to uncompressed with its 95 % interval over
    the lists.
    """
    drawn = quizzes(tokenizer, np.random.default_rng(SEED), LOOKUP_LISTS, PROMPT)

    def ask(quiz: Quiz) -> dict[str, list[bool]]:
        each = quiz_sample(model, quiz)
        right = {"uncompressed": answered(quiz, each.log_probs)}
        for name, method in methods.items():
            cache = fidelity.fill(model, each, method)
            right[name] = answered(quiz, fidelity.predict(model, each.text, cache, method))
        return right

    tracked = enumerate(track(drawn, "look-ups", console=screen))
    lists = [journal.piece(f"lookups.{number}", partial(ask, quiz)) for number, quiz in tracked]
    exact = [np.mean(one["uncompressed"]) for one in lists]
    found: dict[str, Any] = {"asked": sum(len(one["uncompressed"]) for one in lists)}
    for name in lists[0]:
        share = np.array([np.mean(one[name]) for one in lists])
        lost = 100 * (np.array(exact) - share)
        error = 1.96 * lost.std(ddof=1) / np.sqrt(len(lost))
        found[name] = {
            "right": float(np.mean([x for one in lists for x in one[name]])),
            "points_lost": float(lost.mean()),
            "interval": [float(lost.mean() - error), float(lost.mean() + error)],
        }
    return found


def shift(modes: Mapping[str, Mapping[str, Scores]]) -> dict[str, Any]:
    """Bits at equal KL under a calibration on other text over those under one on such text, at the KL of KIVI-style 4,
    3 and 2 bits.
    """
    found: dict[str, Any] = {}
    for text, mode in modes.items():
        other = "prose" if text == "code" else "code"
        found |= with_intervals(partial(shifted, mode, text, other), len(mode["kivi 4/4"]["kl"]))
    return found


def shifted(mode: Mapping[str, Scores], text: str, other: str, rows: Any) -> dict[str, float]:
    kls, out = mean_kls(mode, rows), dict[str, float]()
    families = [{n: s for n, s in mode.items() if n.startswith(f"{made} ")} for made in (text, other)]
    for bits in (4, 3, 2):
        own, its = (envelope(kls[f"kivi {bits}/{bits}"], family, kls) for family in families)
        if not np.isfinite(own + its):
            continue  # one of them has no rate as coarse
        name = f"{other} calibration on {text}, KL of KIVI-{bits}"
        out |= {f"{name}: bits own": own, f"{name}: bits other": its, f"{name}: over": its / own}
    return out


def main(
    prompts: Annotated[int, typer.Option(help="Sequences of each mode, at least 50 for the intervals")] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after an interruption")] = False,
    output: Annotated[Path, typer.Option(help="Where the results go")] = OUTPUT,
) -> None:
    place = shipped_model()
    model, tokenizer = load_model(place)
    calibration = Calibration.read(place / CALIBRATION)
    journal = Journal(
        pieces(output),
        {"prompts": prompts, "calibration": calibration.fingerprint, "rates": RATES, "splits": SPLITS, "paper": PAPER},
        resume,
    )
    about = results.environment(prompts=prompts, prompt_tokens=PROMPT, scored_tokens=SCORED, seed=SEED)
    content: dict[str, Any] = {"calibration": {"fingerprint": calibration.fingerprint, **vars(calibration.about)}}

    def keep(**parts: Any) -> None:
        content.update(parts)
        results.write(output, "klt", about, partial="text_shift" not in content, **content)

    wide = load_model(place)[0].float()
    train = np.asarray(join(tokenizer, training_text(held_out_names(place / "held_out.txt"))[::7]))
    code = reader(wide, train, calibration, journal, 12)
    rated = with_rates(code, calibration)
    held = np.asarray(held_out_ids(tokenizer, place))
    samples = read(model, held, prompts)
    named: list[Method] = [klt(calibration, level) for level in LEVELS]
    rates: list[Method] = [klt(rated, level) for level in rated.levels]
    plain: list[Method] = [KiviSplit(*split) for split in SPLITS]
    alike: list[Method] = [kivi_alike(bits) for bits in KIVI_BITS.values()]
    papers: list[Method] = [paper(*scales) for scales in PAPER]
    run = Runner(model, journal)

    prefix = run("prefix", samples, [*named, *plain[:3], *alike, *rates, *papers, *plain[3:]])
    keep(prefix=summary(prefix), prefix_at_equal_kl=at_equal_kl(prefix), same_window=same_window(prefix))
    streaming = run("streaming", samples, [*named, *plain[:3], *rates, *papers], streaming=True)
    keep(streaming=summary(streaming), streaming_at_equal_kl=at_equal_kl(streaming))
    methods = {method.name: method for method in [*named, *plain[:3], paper(0.05, 0.1)]}
    keep(lookups=lookups(model, tokenizer, methods, journal))
    keep(sizes=sizes(model, held, calibration), heads=heads(model, samples[0], calibration))
    prefix |= run("prefix", samples, kivi_by_layer(code, journal))
    keep(prefix=summary(prefix), prefix_at_equal_kl=at_equal_kl(prefix))
    del code
    draw(content, output)

    manual = np.asarray(join(tokenizer, manual_text()))
    half = manual.size // 2
    on_prose = calibrated_on(wide, manual[:half], journal)
    prose = with_rates(reader(wide, manual[:half], on_prose, journal, 12), on_prose)
    by_text = {
        text: [renamed(klt(each, level), f"{text} {level}") for each in made for level in each.levels]
        for text, made in (("code", (rated, calibration)), ("prose", (prose, on_prose)))
    }
    measured = {name.replace("klt ", "code "): one for name, one in prefix.items()}
    modes = {
        "code": measured | run("shift on code", samples, by_text["prose"]),
        "prose": run(
            "shift on prose", read(model, manual[half:], prompts), [*by_text["code"], *by_text["prose"], *plain[:3]]
        ),
    }
    keep(text_shift=shift(modes))
    show(content)
    journal.close()


def read(model: Any, ids: np.ndarray[Any, Any], count: int) -> list[Sample]:
    begins = np.linspace(0, ids.size - PROMPT - SCORED, count).astype(int)
    return [fidelity.sample(model, torch.from_numpy(ids[at : at + PROMPT + SCORED])[None], PROMPT) for at in begins]


class Runner:
    """Measures methods on samples; what the journal has is not measured again."""

    def __init__(self, model: Any, journal: Journal) -> None:
        self.model, self.journal = model, journal

    def __call__(
        self, mode: str, samples: Sequence[Sample], methods: Sequence[Method], streaming: bool = False
    ) -> dict[str, Scores]:
        found = {}
        for method in track(methods, mode, console=screen):
            score = partial(scored, self.model, samples, method, streaming)
            found[method.name] = self.journal.piece(f"{mode}.{method.name}", score)
        return found


def summary(mode: Mapping[str, Scores]) -> dict[str, Any]:
    return {
        name: {
            **{k: v for k, v in one.items() if k not in ("kl", "top1")},
            "kl": results.figure(one["kl"]),
            "top1": results.figure(one["top1"]),
        }
        for name, one in mode.items()
    }


def heads(model: Any, each: Sample, calibration: Calibration) -> dict[str, list[dict[str, Any]]]:
    """Coded bits of each layer and head at each level."""
    found = {}
    for level in LEVELS:
        method = klt(calibration, level)
        stores = method.stores(fidelity.fill(model, each, method))
        found[level] = [
            {"layer": layer, "kind": kind, "head": head, "bits": float(bits)}
            for layer, store in stores.items()
            if isinstance(store, KVStore)
            for kind, row in zip("KV", bits_by_head(store), strict=True)
            for head, bits in enumerate(row)
        ]
    return found


def draw(content: Mapping[str, Any], output: Path) -> None:
    for mode in ("prefix", "streaming"):
        series: dict[str, tuple[list[float], list[float]]] = {}
        for name, one in content[mode].items():
            family = {"klt": "kvcomp-klt", "paper": "paper", "kivi ": "KIVI-style, any split"}.get(
                "klt" if name.startswith("klt") else name[:5]
            )
            family = "KIVI-style, bits by layer" if "by layer" in name else family
            if family:
                x, y = series.setdefault(family, ([], []))
                x.append(one["coded_bits"])
                y.append(one["kl"]["mean"])
        figure = plots.rate_distortion(series)
        plots.write(figure, output.with_name(f"klt_{mode}.svg"))
    plots.write(plots.bits_by_head(content["heads"]["balanced"]), output.with_name("klt_heads.svg"))


def show(content: Mapping[str, Any]) -> None:
    for mode in ("prefix", "streaming"):
        table = Table("method", "coded bits", "total bits", "KL", "top-1", title=mode)
        for name, one in content[mode].items():
            table.add_row(
                name,
                f"{one['coded_bits']:.2f}",
                f"{one['total_bits']:.2f}",
                f"{one['kl']['mean']:.2e} ± {one['kl']['standard_error']:.0e}",
                f"{one['top1']['mean']:.4f}",
            )
        screen.print(table)
        for name, one in content[f"{mode}_at_equal_kl"].items():
            screen.print(f"{mode} {name}: {one['value']:.3f} [{one['interval'][0]:.3f}, {one['interval'][1]:.3f}]")
    for part in ("same_window", "text_shift", "sizes", "lookups"):
        screen.print(part, content[part])


if __name__ == "__main__":
    typer.run(main)
