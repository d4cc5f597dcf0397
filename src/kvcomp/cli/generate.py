"""``kvcomp generate``: text from a compressed cache, and what it cost."""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvcomp.cli.common import errors, named_spec, plain_errors, screen
from kvcomp.cli.prefix import Prefixes
from kvcomp.errors import InvalidInput
from kvcomp.spec import PRESETS, CodecSpec, is_calibrated

PROMPT_FILE, PROMPT_TOKENS = "logging/handlers.py", 2304  # of the held-out files, one that every Python has
REFRESH_SECONDS = 0.2
MIB = 1024 * 1024


def generate(
    model: Annotated[str | None, typer.Argument(help="Model directory or hub name [default: the shipped one]")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="File with the text to continue, or to put before --prompt", exists=True, dir_okay=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate")] = 128,
    spec: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(PRESETS)}, kvcomp-klt:LEVEL or a spec.json [default: kvcomp.json beside the model, else kvcomp]"
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Calibration for kvcomp-klt [default: model.kvcal beside the model]", exists=True, dir_okay=False
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Hold every token against the uncompressed cache")] = False,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sample at this temperature; 0 takes the likeliest token")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling")] = 0,
    prefix_store: Annotated[
        str | None, typer.Option(help="Folder or redis:// URL: load what the prompt begins with, and store it")
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file")] = None,
) -> None:
    """Generate text from a compressed KV cache and say what it cost.

    Without a prompt the shipped model continues some 2,300 tokens of a file of Python's standard library that it never saw.
    """
    if model is not None and prompt is None and prompt_file is None:
        raise typer.BadParameter("a model of your own needs --prompt or --prompt-file")
    if spec is not None and calibration is None and not is_calibrated(spec):
        named_spec(spec)
    with plain_errors():
        _generate(
            model,
            prompt,
            prompt_file,
            max_new_tokens,
            (spec, calibration),
            compare,
            temperature,
            seed,
            prefix_store,
            output,
        )


def _generate(
    name: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    max_new_tokens: int,
    chosen: tuple[str | None, Path | None],
    compare: bool,
    temperature: float,
    seed: int,
    prefix_store: str | None,
    output: Path | None,
) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with screen.status("loading"):  # torch and transformers take seconds to import: only where they are needed
        import torch
        from transformers.utils import logging as transformers_logging

        from kvcomp.compressed import compress
        from kvcomp.evaluate import generation
        from kvcomp.evaluate.models import load_model, shipped_model, spec_for
        from kvcomp.integrations.transformers import KVCompCache

        transformers_logging.disable_progress_bar()
        logging.getLogger("kvcomp").addHandler(_ToScreen())
        logging.getLogger("kvcomp").setLevel(logging.INFO)
        place = name if name is not None else shipped_model()
        language_model, tokenizer = load_model(place)
        tokens = torch.zeros(2, 1, 1, 65, 16, dtype=language_model.dtype)
        compress(*tokens).attend(tokens[0, :, :, :1])  # loads the kernels, or compiles them
        spec, calibration = spec_for(place, *chosen)
    if prompt_file is not None:
        prompt = _read_text(prompt_file) + (prompt or "")
    ids = _own_prompt(tokenizer) if prompt is None else tokenizer(prompt)["input_ids"]
    if not ids:
        raise typer.BadParameter("the prompt is empty")
    with screen.status("looking into the prefix store") if prefix_store else nullcontext():
        prefixes = None
        if prefix_store:
            prefixes = Prefixes(prefix_store, torch.tensor([ids]), language_model, spec, calibration)
    cache = prefixes.cache if prefixes else KVCompCache(language_model.config, spec, calibration=calibration)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    screen.print(
        f"{place}: {len(ids)} prompt tokens, then {max_new_tokens} new ones from a compressed cache\n", style="dim"
    )
    new: list[int] = []
    begin = shown = time.perf_counter()
    with Live(console=screen, auto_refresh=False, vertical_overflow="visible") as live:

        def show(token: int) -> None:
            nonlocal shown
            new.append(token)
            if time.perf_counter() - shown < REFRESH_SECONDS and len(new) < max_new_tokens:
                return  # walking the cache for its size at every token would slow the generation down
            shown = time.perf_counter()
            live.update(Group(Text(tokenizer.decode(new), style="cyan"), _status(cache, len(new), begin)), refresh=True)

        run = generation.generate(language_model, torch.tensor([ids]), cache, max_new_tokens, show, **sampling)
    against = None
    if compare:
        with screen.status("the same tokens from the uncompressed cache"):
            against = generation.compare(language_model, torch.tensor([ids]), run)
    if prefixes:
        prefixes.keep(run.tokens)
    screen.print(_table(run, against, prefixes))
    if output is not None:
        output.write_text(json.dumps(_figures(spec, run, against, prefixes), indent=2) + "\n", encoding="utf-8")


def _own_prompt(tokenizer: Any) -> list[int]:
    from kvcomp.evaluate.text import held_out_text, join

    text = held_out_text([PROMPT_FILE])
    if not text:
        raise InvalidInput(f"this Python has no {PROMPT_FILE} to continue: give --prompt or --prompt-file")
    return [int(token) for token in join(tokenizer, text)[:PROMPT_TOKENS]]


class _ToScreen(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        errors.print(record.getMessage(), style="dim")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is no UTF-8 text: {error}") from None


def _status(cache: Any, tokens: int, begin: float) -> Text:
    memory = cache.memory()
    return Text(
        f"\n{tokens} tokens in {time.perf_counter() - begin:.1f} s; cache {memory.total / MIB:.2f} MiB, "
        f"dense {memory.dense / MIB:.2f} MiB: {memory.ratio:.2f}x smaller\n",
        style="dim",
    )


def _table(run: Any, against: Any, prefixes: Prefixes | None) -> Table:
    """What the generation cost, by part, beside the uncompressed cache where that was run."""
    memory = run.memory
    table = Table(title=f"{run.prompt} prompt + {len(run.tokens)} new tokens", title_justify="left")
    table.add_column("")
    table.add_column("compressed", justify="right")
    table.add_column("uncompressed", justify="right")

    def row(label: str, ours: str, theirs: str = "") -> None:
        table.add_row(label, ours, theirs)

    timing = against.timing if against else None
    row("cache, MiB", f"{memory.total / MIB:.3f}", f"{(against.dense if against else memory.dense) / MIB:.3f}")
    row("smaller by", f"{memory.ratio:.2f}x", "1x")
    row("total bits per value", f"{memory.total_bits:.2f}", f"{8 * memory.dense / max(1, memory.values):.2f}")
    parts = (
        "codes",
        "lengths",
        "scales",
        "directories",
        "raw_blocks",
        "spare",
        "table",
        "books",
        "window",
        "sinks",
        "other",
    )
    for part in parts:
        size = getattr(memory, part)
        if size:
            row(f"  {part.replace('_', ' ')}", f"{8 * size / max(1, memory.values):.2f}")
    row("coded bits per sealed value", f"{memory.coded_bits:.2f}")
    row("first token, s", f"{run.timing.first:.2f}", f"{timing.first:.2f}" if timing else "")
    row(
        "tokens per second after it",
        f"{run.timing.tokens_per_second:.1f}",
        f"{timing.tokens_per_second:.1f}" if timing else "",
    )
    for label, value in prefixes.rows(run.timing.first) if prefixes else ():
        row(label, value)
    row("peak memory of the process, MiB", f"{run.peak / MIB:.0f}")
    if against:
        row("same likeliest token", f"{100 * against.top1:.1f} %")
        row("mean KL from uncompressed, nats", f"{against.kl:.2e}")
    return table


def _figures(spec: CodecSpec, run: Any, against: Any, prefixes: Prefixes | None) -> dict[str, Any]:
    """The table's figures, in bytes, seconds, bits and nats."""
    memory = run.memory
    figures: dict[str, Any] = {
        "spec": json.loads(spec.to_json()),
        "prompt_tokens": run.prompt,
        "new_tokens": run.tokens,
        "memory": asdict(memory) | {"total": memory.total},
        "ratio": memory.ratio,
        "total_bits": memory.total_bits,
        "coded_bits": memory.coded_bits,
        "first_token_seconds": run.timing.first,
        "tokens_per_second": run.timing.tokens_per_second,
        "peak_bytes": run.peak,
    }
    if prefixes:
        figures["prefix_store"] = prefixes.figures(run.timing.first)
    if against:
        figures["uncompressed"] = {
            "bytes": against.dense,
            "first_token_seconds": against.timing.first,
            "tokens_per_second": against.timing.tokens_per_second,
        }
        figures["top1_agreement"], figures["mean_kl"] = against.top1, against.kl
    return figures
