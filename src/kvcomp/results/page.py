"""``kvcomp report``: one HTML page from results files. It needs no network and no other file.

The template stands beside this module; ``sections`` has what it shows of each kind of results.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kvcomp.errors import InvalidInput
from kvcomp.results import schema as results
from kvcomp.results.sections import Section, bench, evaluation, tuning

TEMPLATE = "page.html.jinja"
KINDS = "evaluate", "tune", "bench"
BUSY = 1.0  # load average, above which times are doubtful
SHOWN = (
    "device",
    "cores",
    "threads",
    "load_average",
    "python",
    "kvcomp",
    "torch",
    "transformers",
    "commit",
    "date",
    "model",
)
LIMITS = (
    "Times are of one machine and its load; ratios within a round carry over better than milliseconds.",
    "KL and top-1 compare a compressed cache with the uncompressed one of the same model and text, not models.",
    "What is found on one text or task need not hold on another. Standard errors are over the samples of this text.",
    "Coded bits leave out the raw window and first tokens; total bits count all that is allocated at these lengths.",
)


def render(paths: Sequence[Path]) -> str:
    """The page of these results files, as HTML.

    Raises InvalidInput if there is none, or one that cannot be shown, and CorruptData or UnsupportedVersion.
    """
    if not paths:
        raise InvalidInput(
            "there are no results to show: run kvcomp evaluate, tune or bench first, or name their files"
        )
    found = [(path, results.read(path)) for path in paths]
    for path, content in found:
        if content.get("kind") not in KINDS:
            raise InvalidInput(
                f"{path} holds results of kind {content.get('kind')!r}: a report shows {', '.join(KINDS)}"
            )
    contents = [content for _, content in found]
    makers = {"evaluate": evaluation, "tune": tuning, "bench": bench}
    try:
        sections = [
            section
            for kind in KINDS
            for content in contents
            if content["kind"] == kind
            for section in makers[kind](content)
        ]
        summary = _summary(contents)
        settings = [(path.name, content["kind"], _setting(content["setting"])) for path, content in found]
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise InvalidInput(
            f"these results lack what a report needs ({error!r}): measure again with this kvcomp"
        ) from error
    _number_identifiers(sections)
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    models = dict.fromkeys(
        Path(str(content["setting"]["model"])).name for content in contents if "model" in content["setting"]
    )
    return environment.get_template(TEMPLATE).render(
        title=", ".join(models) or "kvcomp",
        summary=summary,
        partial=[path.name for path, content in found if content.get("partial")],
        sections=sections,
        settings=settings,
        limits=LIMITS,
    )


def _summary(found: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The few figures that a reader wants first: (number, what it is)."""
    figures: list[tuple[str, str]] = []
    for content in found:
        if content["kind"] == "evaluate":
            ours = [
                one for one in content["methods"] if "teacher_forced" in one["fidelity"] and "spec" in one["settings"]
            ]
            for one in ours[:1]:
                memory, fidelity = one["memory"]["teacher_forced"], one["fidelity"]["teacher_forced"]
                figures += [
                    (
                        f"{memory['ratio']:.2f}x",
                        f"smaller, everything counted ({one['name']}, {fidelity['prompt_tokens']:,} tokens)",
                    ),
                    (f"{memory['coded_bits']:.2f}", "bits for each compressed value, with its metadata"),
                    (f"{100 * fidelity['top1']['mean']:.1f} %", "of the likeliest tokens unchanged"),
                ]
        if content["kind"] == "bench" and content.get("attention"):
            row = max(
                content["attention"],
                key=lambda row: (row["context"], -row["threads"], row["group"]),
            )
            shape = f"{row['context']:,} tokens, {row['group']} queries a KV head"
            over = row["time_over"][row["fastest_dense"]]["median"]
            figures.append(
                (
                    f"{over:.2f}x",
                    f"the time of the fastest dense attention ({shape}, threads: {row['threads']})",
                )
            )
    return figures


def _setting(setting: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a setting, and the load average if it says that the machine was busy."""
    load = float(setting.get("load_average", 0.0))
    shown = [
        (name.replace("_", " "), f"{load:.1f}" if name == "load_average" else str(setting[name]))
        for name in SHOWN
        if name in setting
    ]
    return {"shown": shown, "busy": f"{load:.1f}" if load > BUSY else ""}


def _number_identifiers(sections: Sequence[Section]) -> None:
    """Make the identifiers within the pictures, which only the pictures refer to, unique in the page."""
    pictures = [(section, i) for section in sections for i in range(len(section.pictures))]
    for number, (section, i) in enumerate(pictures):
        caption, picture = section.pictures[i]
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', picture))

        def once(match: re.Match[str], used: set[str] = used, number: int = number) -> str:
            wanted = match[1] in used
            used.discard(match[1])  # the same shape may be defined again
            return f' id="p{number}-{match[1]}"' if wanted else ""

        named = re.sub(r'\sid="([^"]+)"', once, picture)
        section.pictures[i] = caption, re.sub(r'(href="#|url\(#)', rf"\g<1>p{number}-", named)
