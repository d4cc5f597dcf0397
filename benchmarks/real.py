"""Quality and bits of every method on real models; ``kvcomp evaluate`` on text of several kinds, with intervals.

Prompts of prose, code and conversations are cached and coded; the 256 tokens after each are scored teacher-forced, in
float32 and in bfloat16. In the first type the methods also look values up in generated lists, and passkeys in filler,
as long as the shorter prompts. The models are those of ``make models``. kvcomp-klt is measured where a calibration is
given.

    python benchmarks/real.py [--resume]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from klt import with_intervals
from kvcomp.calibration import Calibration
from kvcomp.cli.common import bar, plain_errors, resumable
from kvcomp.errors import InvalidInput, KVCompError
from kvcomp.evaluate.evaluation import FAILED, Evaluation, Plan
from kvcomp.evaluate.fidelity import Sample, sample
from kvcomp.evaluate.methods import KVComp, Method, baseline
from kvcomp.results import schema as results
from kvcomp.results.journal import Journal
from kvcomp.spec import CALIBRATED, CodecSpec, TensorSpec
from kvcomp.store import Memory
from rates import bits_at
from real_models import REAL_MODELS, load
from real_texts import KINDS, sequences

OUTPUT = Path(__file__).parent / "results" / "real.json"
CALIBRATIONS = Path(__file__).parents[1] / "examples" / "calibrations"
DTYPES = "float32", "bfloat16"
RAW_BYTES = 2
LONG, SCORED, SEED = 7000, 256, 20261129
UNLIKE = 0.2  # shares of coded values further apart are not of the same layers
LISTS, PASSKEYS = 4, 1  # look-up lists, and passkeys at each depth
# Scales of K, a channel each, and of V, beside the preset's: their KL reaches from KIVI's with 4 bits to that with 2.
# Of several proportions this one took the least bits at equal KL (docs/decisions.md, "A scale for each K channel").
CHANNEL = (0.03, 0.05), (0.05, 0.085), (0.12, 0.2), (0.2, 0.34), (0.3, 0.5), (0.4, 0.67)
KIVI = [f"kivi-{bits}{raw}" for raw in ("", "-same-raw") for bits in (4, 3, 2)]
PEERS = "fp8", "turboquant-4", "turboquant-3", "quanto-4"  # what else a user could take
CURVES = {
    "channel": "kvcomp$|channel",
    CALIBRATED: CALIBRATED,
}  # families of rates, for bits at another's KL

screen = Console()


def channel(key: float, value: float) -> KVComp:
    """The default preset at other scales."""
    return KVComp(CodecSpec(TensorSpec("channel", key), TensorSpec("token", value)), f"channel K {key:g} V {value:g}")


def methods() -> list[Method]:
    """What is measured on every model."""
    presets = [KVComp(name) for name in ("kvcomp", "kvcomp:fine", "kvcomp:paper", "packed")]
    ours = presets + [channel(*scales) for scales in CHANNEL]
    return [baseline("uncompressed"), *ours, *installed([*KIVI, *PEERS])]


def installed(names: Iterable[str]) -> Iterator[Method]:
    """Baselines by name; what lacks a package is named and left out."""
    for name in names:
        try:
            yield baseline(name)
        except InvalidInput as error:
            screen.print(f"left out: {error}", markup=False)  # which would drop [baselines]


def calibrated(config: Any, files: Sequence[Path]) -> list[Method]:
    """kvcomp-klt at each level of those calibrations that are of this model."""
    found: list[Method] = []
    for file in files:
        calibration = Calibration.read(file)
        levels = [KVComp(calibration.spec(name), f"{CALIBRATED}:{name}", calibration) for name in calibration.levels]
        try:
            levels[0].cache(config)
        except KVCompError:
            continue  # of another model
        screen.print(f"{file} is of this model")
        found += levels
    return found


def split(count: int) -> dict[str, int]:
    """So many prompts over the kinds of text."""
    return {kind: (count + len(KINDS) - 1 - index) // len(KINDS) for index, kind in enumerate(KINDS)}


def samples(model: Any, tokenizer: Any, prompts: int, tokens: int) -> Iterator[tuple[str, Sample]]:
    """(kind of text, sample) of so many prompts, with the text that is scored after each."""
    size = tokens + SCORED
    for kind, count in split(prompts).items():
        texts = sequences(kind, tokenizer, count, size, SEED) if count else np.empty(0, np.int64)
        for ids in torch.from_numpy(texts).reshape(count, 1, size):
            yield kind, sample(model, ids, tokens)


def evaluations(
    model: Any, tokenizer: Any, chosen: Sequence[Method], tokens: int, count: int, journal: Journal
) -> dict[str, Evaluation]:
    """One for each kind of text."""
    found = {}
    for kind, prompts in split(count).items():
        if prompts:
            plan = Plan(prompts=prompts, prompt=tokens, scored=SCORED, streams=0, lists=0, passkeys=0, details=False)
            ids = sequences(kind, tokenizer, prompts, tokens + SCORED, SEED)
            found[kind] = Evaluation(model, tokenizer, ids, chosen, plan, journal.part(f"{tokens}/{kind}"))
    return found


def quizzes(model: Any, tokenizer: Any, chosen: Sequence[Method], tokens: int, journal: Journal) -> Evaluation:
    """Look-up lists and passkeys of so many tokens."""
    plan = Plan(
        prompts=0, prompt=1, scored=1, streams=0, lengths=(tokens,), lists=LISTS, passkeys=PASSKEYS, details=False
    )
    return Evaluation(model, tokenizer, np.zeros(2, np.int64), chosen, plan, journal.part(f"{tokens}/quizzes"))


def answers(quiz: Evaluation) -> dict[str, dict[str, dict[str, int]]]:
    """By method and task, how many answers are right and how many were asked for."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for one in quiz.collected()[0]:
        of = found.setdefault(one["name"], {})
        for cell in one["retrieval"]:
            count = of.setdefault(cell["task"], {"right": 0, "asked": 0})
            for name in count:
                count[name] += cell[name]
    return found


def rows_of(found: Mapping[str, Evaluation], method: str) -> list[dict[str, Any]]:
    """What was measured of a method, a row a prompt, with its kind of text."""
    return [
        row | {"kind": kind}
        for kind, evaluation in found.items()
        for row in evaluation.journal.some(f"{method}/{piece.key}" for piece in evaluation.pieces)
    ]


def summary(name: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of a method over its prompts with intervals, or why it failed."""
    about: dict[str, Any] = {"name": name, "settings": settings, "samples": len(rows)}
    if failed := [row[FAILED] for row in rows if FAILED in row]:
        return about | {FAILED: failed[0]}
    memory = [Memory(**row["memory"]) for row in rows]
    kls, kinds = np.asarray([row["kls"] for row in rows]), np.asarray([row["kind"] for row in rows])
    columns = {figure: np.asarray([row[figure] for row in rows]) for figure in ("kl", "top1", "loss")}
    columns |= {"coded_bits": np.asarray([one.coded_bits for one in memory])}
    columns |= {"total_bits": np.asarray([8 * _nbytes(one) / one.values for one in memory])}

    def figures(drawn: Any) -> dict[str, float]:
        means = {figure: float(column[drawn].mean()) for figure, column in columns.items()}
        means["perplexity"] = float(np.exp(means.pop("loss")))
        return means | {"kl_99_9": float(np.quantile(kls[drawn], 0.999))}

    return {
        **about,
        **with_intervals(figures, len(rows)),
        "kl_by_kind": {kind: float(columns["kl"][kinds == kind].mean()) for kind in dict.fromkeys(kinds.tolist())},
        "bytes": float(np.mean([_nbytes(one) for one in memory])),
        "dense_bytes": float(np.mean([RAW_BYTES * one.values for one in memory])),
        "sealed_share": coded_share(memory),
    }


def coded_share(memory: Sequence[Memory]) -> float:
    """Of the values, those that are coded."""
    return float(np.mean([one.sealed_values / max(1, one.values) for one in memory]))


def _nbytes(memory: Memory) -> float:
    """All bytes, with raw values in 16 bits: quality is measured in float32, and nobody keeps a cache in it."""
    raw = memory.window + memory.sinks + memory.other + memory.raw_blocks
    return memory.total - raw * (1 - RAW_BYTES * memory.values / memory.dense)


def equal_quality(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    others: Sequence[str] = KIVI,
    curves: Mapping[str, str] = CURVES,
) -> dict[str, Any]:
    """Coded bits of each family of rates at others' KL, and their share of the others'.

    What a family does not reach is absent, and so are others that code other layers: sliding ones, say.
    """
    kls = {name: np.asarray([row["kl"] for row in of]) for name, of in rows.items()}
    bits = {name: float(np.mean([Memory(**row["memory"]).coded_bits for row in of])) for name, of in rows.items()}
    shares = {name: coded_share([Memory(**row["memory"]) for row in of]) for name, of in rows.items()}
    found: dict[str, Any] = {}
    for family, names in curves.items():
        rates = [name for name in rows if re.match(names, name)]
        for theirs in (name for name in others if rates and name in rows):
            if abs(shares[theirs] - shares[rates[0]]) > UNLIKE:
                continue

            def at(drawn: Any, theirs: str = theirs, rates: Sequence[str] = rates) -> dict[str, float]:
                curve = [float(kls[name][drawn].mean()) for name in rates]
                here = bits_at(float(kls[theirs][drawn].mean()), [bits[name] for name in rates], curve)
                return {"bits": here, "share": here / bits[theirs]}

            if np.isfinite(at(slice(None))["bits"]):
                found[f"{theirs} by {family}"] = with_intervals(at, len(kls[theirs]))
    return found


def run_of(found: Mapping[str, Evaluation], quiz: Evaluation | None, chosen: Sequence[Method]) -> dict[str, Any]:
    """What one model in one type gave at one length, of the methods that were measured."""
    answered = answers(quiz) if quiz else {}
    rows = {method.name: rows_of(found, method.name) for method in chosen}
    whole = {name: of for name, of in rows.items() if of and not any(FAILED in row for row in of)}
    most = max((len(of) for of in whole.values()), default=0)
    return {
        "methods": [
            summary(method.name, method.settings(), rows[method.name]) | {"retrieval": answered.get(method.name, {})}
            for method in chosen
            if rows[method.name]
        ],
        "equal_quality": equal_quality({name: of for name, of in whole.items() if len(of) == most}),
    }


def measure(
    name: str,
    dtype: str,
    lengths: Mapping[int, int],
    files: Sequence[Path],
    ask: bool,
    journal: Journal,
    runs: list[dict[str, Any]],
    advance: Callable[[str, float], None],
) -> None:
    """Append to ``runs`` what a model in a type gives at each length, so many prompts each; also when it is stopped.

    ask: whether there are quizzes, of the shortest length.
    advance: told what is done, and how many tokens of prompts.
    """
    model, tokenizer = load(name, dtype)
    chosen = [*methods(), *calibrated(model.config, files)]
    for size, count in lengths.items():
        found = evaluations(model, tokenizer, chosen, size, count, journal)
        quiz = quizzes(model, tokenizer, chosen, size, journal) if ask and size == min(lengths) else None

        def tell(what: str, cost: float, size: int = size) -> None:
            advance(f"{name}, {dtype}: {what}", cost * size / len(chosen))

        try:
            for evaluation in found.values():
                evaluation.run(tell)
            if quiz:
                quiz.run(lambda what, cost: advance(f"{name}, {dtype}: {what}", 0.0))
        finally:
            runs.append({"model": name, "dtype": dtype, "prompt_tokens": size, **run_of(found, quiz, chosen)})


def show(runs: Sequence[Mapping[str, Any]]) -> None:
    for run in runs:
        table = Table(title=f"{run['model']}, {run['dtype']}, {run['prompt_tokens']:,} tokens", title_justify="left")
        for header in ("method", "coded\nbits", "total\nbits", "KL, nats (95 %)", "99.9 %", "top-1", "loss\nchange"):
            table.add_column(header, overflow="fold", justify="left" if header == "method" else "right")
        exact = next((one["perplexity"]["value"] for one in run["methods"] if "perplexity" in one), 1.0)
        for one in run["methods"]:
            if FAILED in one:
                table.add_row(one["name"], one[FAILED])
                continue
            low, high = one["kl"]["interval"]
            cells = [f"{one[name]['value']:.2f}" for name in ("coded_bits", "total_bits")]
            cells += [f"{one['kl']['value']:.1e} ({low:.0e}-{high:.0e})", f"{one['kl_99_9']['value']:.1e}"]
            cells += [f"{100 * one['top1']['value']:.1f} %", f"{np.log(one['perplexity']['value'] / exact):+.3f}"]
            table.add_row(one["name"], *cells)
        screen.print(table)
        for name, one in run["equal_quality"].items():
            (low, high), share = one["share"]["interval"], one["share"]["value"]
            screen.print(f"at the KL of {name}: {one['bits']['value']:.2f} bits, {share:.2f}x [{low:.2f}, {high:.2f}]")


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"{' or '.join(REAL_MODELS)} [default: all]")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"{' or '.join(DTYPES)} [default: both]")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in all, of every kind of text")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each")] = 2048,
    long: Annotated[int, typer.Option(min=0, help=f"Prompts of {LONG:,} tokens")] = 4,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="A .kvcal file of a model [default: those in examples]"),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the results go")] = OUTPUT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run was stopped")] = False,
) -> None:
    with plain_errors():
        names, types = model or list(REAL_MODELS), dtype or list(DTYPES)
        if not {*types} <= {*DTYPES} or not {*names} <= {*REAL_MODELS}:
            raise InvalidInput(f"models are {', '.join(REAL_MODELS)} and types {', '.join(DTYPES)}")
        lengths = {prompt_tokens: prompts} | ({LONG: long} if long else {})
        files = calibration if calibration is not None else sorted(CALIBRATIONS.glob("*.kvcal"))
        chosen: dict[str, Any] = {"models": names, "dtypes": types, "lengths": lengths, "scored": SCORED, "seed": SEED}
        about = results.environment(**chosen, kinds=list(KINDS), calibrations=[file.name for file in files])
        identity = chosen | {
            "methods": {one.name: one.settings() for one in methods()},
            "calibrations": [Calibration.read(file).fingerprint for file in files],
        }
        runs: list[dict[str, Any]] = []

        def report(stopped: bool) -> None:
            if runs:
                results.write(output, "real", about, partial=stopped, runs=runs)
                show(runs)

        with resumable(output, identity, resume, report) as journal, bar() as progress:
            total = len(names) * len(types) * sum(count * size for size, count in lengths.items())
            task = progress.add_task("", total=total)

            def advance(what: str, tokens: float) -> None:
                progress.update(task, description=what, advance=tokens)

            for name in names:
                for type_ in types:
                    advance(f"{name}, {type_}: loading", 0)
                    measure(
                        name, type_, lengths, files, type_ == types[0], journal.part(f"{name}/{type_}"), runs, advance
                    )


if __name__ == "__main__":
    typer.run(main)
