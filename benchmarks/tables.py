"""Write the tables of README.md and docs from benchmarks/results, between their markers: no figure there is typed by
hand.

<!-- table: attention -->      everything from here
<!-- end -->                   to here is made anew
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = r"<!-- table: ([\w-]+) -->.*?<!-- end -->"


LABELS = {
    "kvcomp": "kvcomp: a scale for each K channel (K .08, V .15)",
    "kvcomp:fine": "kvcomp:fine (K .04, V .1)",
    "kvcomp:paper": "kvcomp:paper: the paper's scheme (K .05, V .1)",
    "tuned": "the paper's scheme, tuned for the model",
    "packed": "packed: fixed-width codes, a scale for each K channel",
    "packed:paper": "packed:paper: fixed-width codes, a scale for each K block",
    "fp8": "fp8 (E4M3, scale 1)",
    **{f"kivi-{bits}": f"KIVI-style {bits} bit" for bits in (4, 3, 2)},
    **{f"kivi-{bits}-same-raw": f"KIVI-style {bits} bit, raw tokens as kvcomp's" for bits in (4, 3, 2)},
    **{f"turboquant-{bits}": f"TurboQuant-style {bits} bit" for bits in (4, 3, 2)},
    **{f"hqq-{bits}": f"transformers QuantizedCache, hqq {bits} bit" for bits in (4, 2)},
    **{f"quanto-{bits}": f"transformers QuantizedCache, quanto {bits} bit" for bits in (4, 2)},
    "paper": "the paper's scheme, best split of K and V",
}


def label(name: str) -> str:
    """What a table calls a method."""
    return LABELS.get(name, name)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table, the first column left-aligned and the others right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def quality(found: Any) -> str:
    """Method x (bits in full, KL, top-1, look-ups), least KL first."""
    measured = [one for one in found["methods"] if "teacher_forced" in one["fidelity"]]
    rows = []
    for one in sorted(measured, key=lambda one: float(one["fidelity"]["teacher_forced"]["kl"]["mean"])):
        memory, fidelity = one["memory"]["teacher_forced"], one["fidelity"]["teacher_forced"]
        kl, streaming = fidelity["kl"], one["fidelity"]["streaming"]["kl"]
        rows.append(
            [
                label(one["name"]),
                f"{memory['coded_bits']:.2f}" if memory["sealed_values"] else "",
                f"{memory['total_bits']:.2f}",
                f"{kl['mean']:.1e} ± {kl['standard_error']:.0e}" if kl["mean"] else "0",
                f"{100 * fidelity['top1']['mean']:.1f} %",
                f"{streaming['mean']:.1e}" if kl["mean"] else "0",
                *(_right(one["retrieval"], task) for task in ("key-value", "passkey")),
            ]
        )
    header = ["method", "coded bits", "total bits", "KL, nats", "top-1", "KL, streaming", "look-ups right"]
    return markdown([*header, "passkeys right"], rows)


FRONT = "kivi-4", "kivi-4-same-raw", "kvcomp", "kvcomp:fine", "kvcomp-klt:near-lossless", "kvcomp-klt:balanced"
SHORT = {"smollm2-135m": "SmolLM2", "gemma3-270m": "Gemma 3", "qwen2.5-coder-0.5b": "Qwen2.5"}


def front(found: Any) -> str:
    """The README's table: few methods on the real models, in float32."""
    measured = {
        (run["model"], run["prompt_tokens"]): {one["name"]: one for one in run["methods"]}
        for run in found["runs"]
        if run["dtype"] == "float32"
    }
    shortest, longest = (choose(tokens for _, tokens in measured) for choose in (min, max))

    def cells(model: str, name: str) -> tuple[str, str, str]:
        short, long = (measured[model, tokens][name] for tokens in (shortest, longest))
        bits = " / ".join(f"{short[figure]['value']:.2f}" for figure in ("coded_bits", "total_bits"))
        kl = " / ".join(f"{one['kl']['value']:.1e}" for one in (short, long))
        return bits, kl, _answers(short["retrieval"]["key-value"])

    rows = [[label(name), *chain.from_iterable(cells(model, name) for model in SHORT)] for name in FRONT]
    header = [f"{SHORT[model]}: {what}" for model in SHORT for what in ("bits", "KL", "look-ups")]
    return markdown(["method", *header], rows)


def _right(cells: list[Any], task: str) -> str:
    right, asked = (sum(cell[name] for cell in cells if cell["task"] == task) for name in ("right", "asked"))
    return f"{100 * right / asked:.1f} %" if asked else ""


def equal_quality(found: Any) -> str:
    """Coded and total bits at the KL of others: the paper's scheme with its best split between K and V, and what is
    tuned or calibrated.
    """
    families = sorted({_family(name) for row in found["equal_quality"] for name in row["curves"]}, reverse=True)
    rows = []
    for row in found["equal_quality"]:
        own = [label(row["at"]), f"{row['kl']:.1e}", f"{row['coded_bits']:.2f} / {row['total_bits']:.2f}"]
        rows.append([*own, *(_beside(row, best_of(row, family)) for family in families)])
    return markdown(["at the KL of", "KL", "its bits, coded / total", *map(label, families)], rows)


def _family(curve: str) -> str:
    return curve.partition(",")[0]


def best_of(row: Any, family: str) -> Any:
    """The curve of a family with the fewest coded bits; None if none of them reaches that KL."""
    curves = [bits for name, bits in row["curves"].items() if _family(name) == family]
    return min(curves, key=lambda bits: float(bits["coded_bits"]), default=None)


def _beside(row: Any, bits: Any) -> str:
    """Bits, and as a share of the row's."""
    if bits is None:
        return ""
    kinds = "coded_bits", "total_bits"
    here = " / ".join(f"{bits[kind]:.2f}" for kind in kinds)
    share = " / ".join(f"{bits[kind] / row[kind]:.2f}x" for kind in kinds)
    return f"{here} ({share})"


def klt(found: Any) -> str:
    """kvcomp-klt's coded bits at the KL of KIVI-style 4, 3 and 2 bits, and their share of the others', with 95 %
    intervals.
    """

    def share(of_mode: Any, name: str) -> str:
        low, high = of_mode[name]["interval"]
        return f"{of_mode[name]['value']:.2f} ({low:.2f} to {high:.2f})"

    rows = []
    for mode, said in (("prefix", "prompt compressed"), ("streaming", "streaming")):
        of_mode = found[f"{mode}_at_equal_kl"]
        for bits in (4, 3, 2):
            kl = found[mode][f"kivi {bits}/{bits}"]["kl"]["mean"]
            shares = [share(of_mode, f"{bits}.{name}") for name in ("bits", "over_kivi_best_split", "over_paper")]
            rows.append([f"KIVI-style {bits} bit, {said}", f"{kl:.1e}", *shares])
    header = ["at the KL of", "KL", "kvcomp-klt, coded bits", "of KIVI-style's", "of the paper's scheme's"]
    return markdown(header, rows)


def klt_levels(found: Any, timings: Any) -> str:
    """Level x (KL at equal raw tokens, look-ups, times over the paper preset's)."""

    def over(part: str, level: str) -> str:
        return " / ".join(f"{timings[part][n]['all'][level]['over_paper']['median']:.2f}x" for n in ("8192", "32768"))

    rows = []
    for level, bits in (("near-lossless", 4), ("balanced", 3), ("aggressive", 2)):
        kl, (low, high) = (found["same_window"][level][name] for name in ("value", "interval"))
        lost = (found["lookups"][name]["points_lost"] for name in (f"klt {level}", f"kivi {bits}/{bits}"))
        rows.append(
            [f"`{level}`, beside KIVI-style {bits} bit", f"{kl:.2f} ({low:.2f} to {high:.2f})"]
            + [f"{points:.2f}" for points in lost]
            + [over("attend", level), over("encode", level)]
        )
    header = ["level", "KL over KIVI's", "points lost", "KIVI's", "attention, 8K / 32K", "compressing, 8K / 32K"]
    return markdown(header, rows)


def klt_shift(found: Any) -> str:
    """Coded bits with a calibration on the other kind of text, over those with one on the same kind."""
    rows = []
    for kind in ("prose calibration on code", "code calibration on prose"):
        cells = []
        for bits in (4, 3, 2):
            of = found["text_shift"][f"{kind}, KL of KIVI-{bits}: over"]
            low, high = (100 * (x - 1) for x in of["interval"])
            cells.append(f"{100 * (of['value'] - 1):+.0f} % ({low:+.0f} to {high:+.0f})")
        rows.append([kind, *cells])
    return markdown(["calibration", *(f"at the KL of KIVI-style {bits} bit" for bits in (4, 3, 2))], rows)


def memory(found: Any) -> str:
    """What a cache occupies."""
    mib = 1024 * 1024
    return markdown(
        ["cache", "occupied, MiB", "counted by the cache, MiB", "smaller by (occupied)", "peak of the process, MiB"],
        [
            [
                name,
                f"{row['occupied'] / mib:.1f}",
                f"{row['counted'] / mib:.1f}",
                f"{row['occupied_ratio']:.2f}x",
                f"{row['peak'] / mib:.0f}",
            ]
            for name, row in found["caches"].items()
        ],
    )


def attention(found: Any) -> str:
    """Time of the fused kernel over that of each dense method; with two threads back to back with them."""
    rows = []
    for row in found["attention"]:
        if row["threads"] > 1 and row["from_rest"]:
            continue
        fastest = row["time_over"][row["fastest_dense"]]
        ratios = (row["time_over"].get(name) for name in ("sdpa_gqa", "sdpa_folded", "sdpa_repeated", "matmul"))
        rows.append(
            [
                f"{row['context']:,}",
                str(row["group"]),
                str(row["threads"]),
                f"{row['ns_per_value']['median']:.3f}",
                *("" if ratio is None else f"{ratio['median']:.2f}x" for ratio in ratios),
                f"{fastest['quartile_1']:.2f} to {fastest['quartile_3']:.2f}",
            ]
        )
    header = ["context", "queries a KV head", "threads", "ns a value", "SDPA enable_gqa", "SDPA, group in q_len"]
    return markdown([*header, "SDPA, K and V repeated", "grouped matmul", "quartiles, fastest"], rows)


def attention_avx512(*found: Any) -> str:
    """The same of several specs at one context, over the fastest dense method."""
    rows = []
    for one in found:
        for row in one["attention"]:
            over = row["time_over"][row["fastest_dense"]]
            rows.append(
                [label(one["setting"]["named_spec"]), str(row["group"]), f"{row['ns_per_value']['median']:.3f}"]
            )
            rows[-1] += [f"{over['median']:.2f}x ({over['quartile_1']:.2f} to {over['quartile_3']:.2f})"]
            rows[-1] += [row["fastest_dense"].replace("_", " ")]
    return markdown(["spec", "queries a KV head", "ns a value", "over the fastest dense (quartiles)", "which is"], rows)


def codec(found: Any) -> str:
    """Encoding and decompression on one thread."""
    rows = [
        [
            f"{row['tokens']:,} x {row['head_dim']}",
            f"{row['bits_per_value']:.2f}",
            f"{row['encode_ns_per_value']['median']:.2f}",
            f"{2 / row['encode_ns_per_value']['median']:.2f}",
            f"{row['seal_page_microseconds']['median']:.0f}",
            f"{row['decompress_ns_per_value']['median']:.2f}",
            f"{row['decompress_over_copy']['median']:.1f}x",
        ]
        for row in found["codec"]
    ]
    header = ["tokens x head size", "coded bits", "encode, ns a value", "encode, GB/s of bfloat16", "seal a page, us"]
    return markdown([*header, "decompress, ns a value", "over a copy"], rows)


def generate(found: Any) -> str:
    """The whole of generate beside transformers' own cache."""
    rows = []
    for row in found["generate"]:
        first, step, over = row["first_token_seconds"], row["milliseconds_per_token"], row["time_over"]
        rows.append(
            [
                f"{row['prompt_tokens']:,} + {row['new_tokens']}",
                str(row["batch"]),
                f"{row['total_bits']:.2f}",
                *(f"{first[name]['median']:.2f}" for name in ("kvcomp", "uncompressed")),
                *(f"{step[name]['median']:.2f}" for name in ("kvcomp", "uncompressed")),
                f"{over['median']:.2f} ({over['quartile_1']:.2f} to {over['quartile_3']:.2f})",
            ]
        )
    header = ["tokens", "batch", "total bits", "first token, s", "uncompressed", "ms a token", "uncompressed"]
    return markdown([*header, "time over (quartiles)"], rows)


def files(found: Any) -> str:
    """Saving and loading a cache against the same bytes."""
    rows = [
        [
            name,
            f"{row['file_bytes'] / 1e6:.1f}",
            *(f"{1e3 * row[kind]['median']:.1f}" for kind in ("load", "cat")),
            f"{row['load_over_cat']:.2f}x",
            *(f"{1e3 * row[kind]['median']:.1f}" for kind in ("save", "write")),
            f"{row['save_over_write']:.2f}x",
        ]
        for name, row in found["presets"].items()
    ]
    return markdown(["preset", "file, MB", "load, ms", "cat, ms", "ratio", "save, ms", "write, ms", "ratio"], rows)


def claims(quality: Any, attention: Any) -> str:
    """The paper's claims beside what was measured here. Memory reduction is bits of 16 over bits; higher by so much
    than another's.
    """
    known = [row for row in quality["equal_quality"] if row["at"].startswith("kivi")]
    gains = []
    for family in sorted({_family(name) for row in known for name in row["curves"]}, reverse=True):
        reached = [(row, bits) for row in known if (bits := best_of(row, family)) is not None]
        ratios = {
            kind: [100 * (row[kind] / bits[kind] - 1) for row, bits in reached] for kind in ("coded_bits", "total_bits")
        }
        coded, total = ratios.values()
        gains.append(
            f"{label(family)}: {sum(coded) / len(coded):+.0f} % on average, up to {max(coded):+.0f} % in coded bits "
            f"({sum(total) / len(total):+.0f} % and {max(total):+.0f} % in total bits)"
        )
    names = ", ".join(row["at"] for row in known)
    at_equal = f"against KIVI-style quantisation at its own KL ({names}), shipped model: {'; '.join(gains)}"
    over = [row["time_over"]["matmul"]["median"] for row in attention["attention"] if row["threads"] == 1]
    faster = sum(ratio < 1 for ratio in over)
    rows = [
        [
            "memory reduction higher than that of existing methods, 47 % on average and up to 83 %",
            at_equal,
            "its models and tasks (Llama-2-7B and 13B, Phi-4, Ministral-8B; CoQA, GSM8K)",
        ],
        [
            "in some cases faster than cuBLAS in attention's products",
            (
                f"on a CPU, {faster} of {len(over)} cases faster than two grouped matrix products on one thread "
                f"({min(over):.2f} to {max(over):.2f} times their time)"
            ),
            "anything on a GPU",
        ],
    ]
    return markdown(["the paper", "measured here", "not measured"], rows).replace("---:", "---")


def about(found: Any) -> str:
    """The setting of a result in one line."""
    given = found["setting"]
    versions = ", ".join(f"{name} {given[name]}" for name in ("python", "torch", "numba", "transformers"))
    load = f"load average {given['load_average']:.1f}" if "load_average" in given else "load not recorded"
    vectors = f", {given['torch_capability']}" if "torch_capability" in given else ""
    machine = f"{given['device']}, {given['cores']} cores{vectors}, {versions}"
    return f"{machine}, commit {given['commit']}, {given['date'][:10]}, {load}."


def real(name: str, found: Any) -> str:
    """A real model's methods on the short prompts in float32, and their KL in bfloat16 and on long ones."""
    runs = [run for run in found["runs"] if run["model"] == name]
    shortest, longest = (choose(run["prompt_tokens"] for run in runs) for choose in (min, max))

    def of(dtype: str, tokens: int) -> dict[str, Any]:
        chosen = [run for run in runs if (run["dtype"], run["prompt_tokens"]) == (dtype, tokens)]
        return {one["name"]: one for run in chosen for one in run["methods"] if "kl" in one}

    half = of("bfloat16", shortest)
    exact = of("float32", shortest) or half
    others = {"KL, bfloat16": half, f"KL, {longest:,} tokens": of("float32", longest)}
    others = {column: run for column, run in others.items() if run and run != exact}
    rows = []
    for method, one in sorted(exact.items(), key=lambda each: float(each[1]["kl"]["value"])):
        kl = one["kl"]["value"]
        rows.append(
            [
                label(method),
                f"{one['coded_bits']['value']:.2f}" if one["coded_bits"]["value"] else "",
                f"{one['total_bits']['value']:.2f}",
                f"{one['bytes'] / 2**20:.2f}",
                _with_interval(one["kl"], ".1e") if kl else "0",
                f"{one['kl_99_9']['value']:.1e}" if kl else "0",
                f"{100 * one['top1']['value']:.1f} %",
                f"{one['perplexity']['value']:.2f}",
                *(f"{run[method]['kl']['value']:.1e}" if method in run else "" for run in others.values()),
                *map(_answers, one.get("retrieval", {}).values()),
            ]
        )
    header = ["method", "coded bits", "total bits", "MiB", "KL, nats (95 %)", "99.9 % of tokens", "top-1", "perplexity"]
    asked = {"key-value": "look-ups", "passkey": "passkeys"}
    tasks = next(iter(exact.values())).get("retrieval", {})
    return markdown([*header, *others, *(asked[task] for task in tasks)], rows)


def _answers(of: Any) -> str:
    return f"{of['right']}/{of['asked']}"


def real_equal(found: Any) -> str:
    """Coded bits at the KL of KIVI-style quantisation, as published and with the same raw tokens, float32."""
    rows = []
    for run in found["runs"]:
        if run["dtype"] == "float32":
            for name, one in run["equal_quality"].items():
                theirs, ours = name.split(" by ")
                rows.append([f"{run['model']}, {run['prompt_tokens']:,} tokens", label(theirs), ours])
                rows[-1] += [_with_interval(one["bits"], ".2f"), _with_interval(one["share"], ".2f", "x")]
    return markdown(["model", "at the KL of", "by", "coded bits (95 %)", "of its bits"], rows)


def real_tasks(found: Any) -> str:
    """Method x share of right answers of each task, with standard errors."""
    (run,) = found["runs"]
    rows = [
        [
            label(one["name"]),
            *(
                f"{100 * of['acc']['mean']:.1f} ± {100 * of['acc']['standard_error']:.1f} %"
                for of in one["tasks"].values()
            ),
        ]
        for one in run["methods"]
    ]
    return markdown([f"{run['model']}, right", *run["methods"][0]["tasks"]], rows)


def _with_interval(one: Any, form: str, unit: str = "") -> str:
    low, high = one["interval"]
    return f"{one['value']:{form}}{unit} ({low:{form}} to {high:{form}})"


def transfer(found: Any) -> str:
    """Sent as x bandwidth: bytes, and the time until the receiver can read the cache."""
    rows = [
        [
            f"{row['gbit']:g} Gbit/s",
            row["method"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{1e3 * row['seconds']['median']:.0f}",
            f"{row['times_faster']:.2f}x",
            f"{row['gbit_reached']:.2f}",
        ]
        for row in found["transfers"]
    ]
    return markdown(["bandwidth", "sent as", "MB sent", "ms until it can be read", "times faster", "Gbit/s used"], rows)


def encoder(found: Any) -> str:
    """Bytes of bfloat16 that the encoder takes, by threads."""
    rows = [
        [name, *(f"{by_threads[threads]['bytes_per_second'] / 1e6:.0f}" for threads in ("1", "2"))]
        for name, by_threads in found["encoder"].items()
    ]
    return markdown(["preset", "MB/s, one thread", "MB/s, two threads"], rows)


def first_token(found: Any) -> str:
    """Model x where the cache of the first tokens comes from: bytes, and the time to the first token by bandwidth."""
    rows = []
    for of_model in found["first_tokens"]:
        rates = sorted({row["gbit"] for row in of_model["rows"]})
        for source in dict.fromkeys(row["from"] for row in of_model["rows"]):
            of_source = [row for row in of_model["rows"] if row["from"] == source]
            times = [
                next(f"{1e3 * x['seconds']['median']:.0f}" for x in of_source if x["gbit"] == rate) for rate in rates
            ]
            size = f"{of_source[0]['bytes'] / 1e6:.2f}" if of_source[0]["bytes"] else ""
            rows.append([f"{of_model['model']}, {of_model['prompt']:,} tokens", source, size, *times])
    header = ["prompt", f"its first {found['first_tokens'][0]['stored_tokens']:,} tokens are", "MB"]
    return markdown([*header, *(f"ms at {rate:g} Gbit/s" for rate in rates)], rows)


def vllm(found: Any) -> str:
    """A compressed cache in vLLM beside vLLM's own: rows are figures, columns the specs that were measured."""
    specs = [name for name in found["transformers"] if name in found]

    def spread(of: Any) -> str:
        return f"{of['median']:.2f} ({of['least']:.2f} to {of['most']:.2f})"

    def fewer(held: Any) -> str:
        return f"{_dense(found) / held['bytes_a_token']:.2f}x"

    rows: dict[str, Callable[[str], str]] = {
        "tokens that fit, by vLLM's log": lambda name: f"{found[name]['tokens']:,} ({found[name]['times']:.2f}x)",
        "held at once, of 4K": lambda name: str(found[name]["held"]["ours"]["sequences"]),
        "pages outside vLLM's memory": lambda name: f"{_outside(found[name]['held']['ours']):.1f} %",
        "fewer bytes a token, 2K": lambda name: fewer(found[name]["short"]),
        "fewer bytes a token, 4K": lambda name: fewer(found[name]["held"]["ours"]),
        "fewer bytes a token, 8K": lambda name: fewer(found[name]["long"]),
        "tokens/s over vLLM's own, equal memory": lambda name: spread(found[name]["equal_memory"]["cpu"]["ratio"]),
        "tokens/s over vLLM's own, equal concurrency": lambda name: spread(
            found[name]["equal_concurrency"]["cpu"]["ratio"]
        ),
        "KL": lambda name: f"{found['kl'][name]['mean']:.1e}",
        "KL of the spec in transformers": lambda name: f"{found['transformers'][name]['mean']:.1e}",
    }
    body = [[title, *(_or_blank(figure, name) for name in specs)] for title, figure in rows.items()]
    first, gaps = found["first_token"], found["gaps"]
    more = [
        f"First token, 1,900 tokens, seconds: {spread(first['computed'])} computed, {spread(first['loaded'])} loaded.",
        (
            f"Their ratio: {spread(first['ratio'])}, {first['ratio']['count']} prompts, load average "
            f"{first['load_average']:.0f}, commit {first['commit']}."
        ),
        *(
            f"Gaps between tokens with Redis {name}: median {gaps[name]['median']:.2f} s, longest "
            f"{gaps[name]['most']:.2f} s, load average {gaps['load_average']:.0f}, commit {gaps['commit']}."
            for name in ("at work", "stopped")
        ),
    ]
    if noise := found.get("noise_floor"):
        more.insert(0, f"KL's noise floor: {noise['mean']:.1e}.")
    return "\n".join([markdown(["", *specs], body), "", *(f"- {line}" for line in more)])


def _or_blank(figure: Callable[[str], str], name: str) -> str:
    """A figure; nothing where it was not measured."""
    try:
        return figure(name)
    except KeyError:
        return ""


def _outside(held: Any) -> float:
    """Pages outside vLLM's memory, in per cent of all."""
    return float(100 * held["outside"] / (held["used"] + held["outside"]))


def _dense(found: Any) -> float:
    """Bytes of a token in vLLM's own cache: what it is given over the tokens that it says to hold."""
    return float(found["setting"]["space"] / found["own"]["tokens"])


def gpu_cycles(found: Any) -> str:
    """Modelled cycles a code by architecture, what bounds them on sm_90, and the ratio to bfloat16 on an H200."""
    rows = []
    for of_h200 in (row for row in found["rows"] if "h200" in row):
        name, channels = of_h200["spec"], of_h200["channels"]
        cycles = {x["architecture"]: x for x in found["rows"] if (x["spec"], x["channels"]) == (name, channels)}
        pages = sum(form["pages"] for form in of_h200["forms"])
        bounds = [
            sum(form["pages"] * form[bound] for form in of_h200["forms"]) / pages
            for bound in ("issue", "ALU", "MMA", "memory")
        ]
        rows.append(
            [
                name,
                str(channels),
                f"{_slow_blocks(of_h200):.0f} %",
                *(f"{bound:.1f}" for bound in bounds),
                *(f"{cycles[of]['cycles_a_code']:.1f}" for of in (80, 90, 100)),
                f"{of_h200['h200']['bits']:.2f}",
                f"{of_h200['h200']['times_bfloat16']:.2f}x",
            ]
        )
    bounds_of = ["issue", "ALU", "MMA", "loads"]
    cycles_of = [f"sm_{of}, modelled" for of in (80, 90, 100)]
    return markdown(["spec", "D", "slow", *bounds_of, *cycles_of, "bits", "over bf16 on H200, modelled"], rows)


def _slow_blocks(row: Any) -> float:
    """Blocks, in per cent, that a reader for any width or any book takes."""
    slow = sum(form["pages"] * (form[kind] in ("any width", "global tables")) for form in row["forms"] for kind in "kv")
    return float(50 * slow / sum(form["pages"] for form in row["forms"]))


def vllm_soak(found: Any) -> str:
    """What a soak came to, in a sentence."""
    given, raw, coded = found["setting"], found["raw"], found["coded"]
    left = sum(one["left"]["used"] + one["left"]["outside"] for one in (raw, coded))
    return (
        f"**Soak**: {given['clients']} clients for {given['minutes']:g} minutes on {given['model']}, requests of "
        f"random lengths, {raw['preempted'] + coded['preempted']:,.0f} preemptions. Of {raw['requests']:,} answers "
        f"over raw blocks {raw['off']} differ from those of the same requests alone by {raw['close']:g} nats or more; "
        f"of {coded['requests']:,} over coded blocks {coded['off']} by {coded['close']:g}. {left} bytes were left at "
        f"the end (commit {given['commit']})."
    )


TABLES: dict[str, tuple[str, Callable[..., str]]] = {  # results files, several with a comma between
    "front": ("real.json", front),
    "quality": ("quality.json", quality),
    "equal-quality": ("quality.json", equal_quality),
    "klt": ("klt.json", klt),
    "klt-levels": ("klt.json,klt_timings.json", klt_levels),
    "klt-shift": ("klt.json", klt_shift),
    "real-smollm2": ("real.json", partial(real, "smollm2-135m")),
    "real-gemma3": ("real.json", partial(real, "gemma3-270m")),
    "real-qwen2": ("real.json", partial(real, "qwen2.5-coder-0.5b")),
    "real-equal": ("real.json", real_equal),
    "real-rates": ("real_rates.json", real_equal),
    "real-tasks": ("real_tasks.json", real_tasks),
    "llama-cpp": ("llama_cpp.json", partial(real, "smollm2-135m")),
    "llama-cpp-equal": ("llama_cpp.json", real_equal),
    "memory": ("memory.json", memory),
    "attention": ("attention_cpu.json", attention),
    "attention-avx512": ("attention_avx512_packed.json,attention_avx512_kvcomp.json", attention_avx512),
    "codec": ("codec.json", codec),
    "generate": ("generate.json", generate),
    "files": ("files.json", files),
    "transfer": ("transfer.json", transfer),
    "encoder": ("transfer.json", encoder),
    "first-token": ("transfer.json", first_token),
    "vllm": ("vllm_live.json", vllm),
    "vllm-soak": ("vllm_soak.json", vllm_soak),
    "gpu-cycles": ("gpu_cycles.json", gpu_cycles),
    "claims": ("quality.json,attention_cpu.json", claims),
    **{
        f"setting-{name}": (f"{name}.json", about)
        for name in (
            "quality",
            "klt",
            "klt_timings",
            "real",
            "real_rates",
            "real_tasks",
            "llama_cpp",
            "memory",
            "attention_cpu",
            "attention_avx512_kvcomp",
            "attention_avx512_packed",
            "codec",
            "generate",
            "files",
            "transfer",
            "vllm_live",
            "gpu_cycles",
        )
    },
}


def filled(text: str) -> str:
    """The text with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        sources, make = TABLES[match[1]]
        files = [RESULTS / name for name in sources.split(",")]
        if not all(file.is_file() for file in files):
            return f"<!-- table: {match[1]} -->\nNot measured yet.\n<!-- end -->"
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return f"<!-- table: {match[1]} -->\n{make(*found)}\n<!-- end -->"

    return re.sub(MARKED, table, text, flags=re.DOTALL)


def main(check: Annotated[bool, typer.Option("--check", help="Fail if a table is not up to date")] = False) -> None:
    """Fill the tables of README.md and of the pages in docs."""
    for document in DOCUMENTS:
        old = document.read_text(encoding="utf-8")
        new = filled(old)
        if check and new != old:
            raise SystemExit(f"{document.name} has tables that differ from benchmarks/results: run make tables")
        document.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
