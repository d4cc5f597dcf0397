"""``kvcomp generate``: text from a compressed cache, and what it cost."""

from __future__ import annotations

import json
import logging
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvcomp.cli.calibrate import calibration_for
from kvcomp.cli.common import (
    SPEC_NAMES,
    CalibrationFile,
    Device,
    Dtype,
    Model,
    anywhere,
    check_spec,
    errors,
    in_times,
    plain_errors,
    quiet_loading,
    say,
    screen,
)
from kvcomp.cli.prefix import Prefixes
from kvcomp.errors import InvalidInput, KVCompError, LimitExceeded
from kvcomp.spec import CALIBRATED, CodecSpec

if TYPE_CHECKING:
    from kvcomp.calibration import Calibration
    from kvcomp.evaluate.generation import Agreement, Generation

PROMPT_FILE, PROMPT_TOKENS = "urllib/robotparser.py", 1800  # held out, and in every Python
REFRESH_SECONDS = 0.2
COLDEST = 1e-6  # a temperature: of less, logits have no quotients in float32
MIB = 1024 * 1024


def generate(
    model: Model = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue, or what to ask a chat model")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="File with the text to continue, or to put before --prompt", exists=True, dir_okay=False),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave out the model's chat template")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate")] = 96,
    spec: Annotated[
        str | None, typer.Option(help=f"{SPEC_NAMES} \\[default: kvcomp.json beside the model, else kvcomp]")
    ] = None,
    calibration: CalibrationFile = None,
    budget: Annotated[
        str | None,
        typer.Option(help=f"Bytes of the cache, such as 2GiB: {CALIBRATED} with the finest levels that fit"),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    compare: Annotated[bool, typer.Option("--compare", help="Hold every token against the uncompressed cache")] = False,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, max=1e3, help="Sample at this temperature; 0 takes the likeliest token"),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Seed of the sampling")] = 0,
    prefix_store: Annotated[
        str | None, typer.Option(help="Folder or redis:// URL: load what the prompt begins with, and store it")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file", callback=anywhere)
    ] = None,
) -> None:
    """Generate text from a compressed KV cache and say what it cost.

    Without a prompt the shipped model continues 1,800 tokens of Python's standard library that it never saw.
    """
    if model is not None and prompt is None and prompt_file is None:
        raise typer.BadParameter("a model of your own needs --prompt or --prompt-file")
    _check_text(prompt or "")
    check_spec(spec)
    if 0 < temperature < COLDEST:
        raise typer.BadParameter(f"below {COLDEST:g} give 0, the likeliest token", param_hint="--temperature")
    if budget is not None and spec not in (None, CALIBRATED):
        raise typer.BadParameter(f"it chooses the levels of {CALIBRATED}: leave out --spec", param_hint="--budget")
    with plain_errors():
        loaded = _load(model, spec if budget is None else CALIBRATED, calibration, dtype, device)
        if prompt_file is not None:
            prompt = _read_text(prompt_file) + (prompt or "")
        ids = _own_prompt(loaded.tokenizer) if prompt is None else _prompt_ids(loaded.tokenizer, prompt, raw)
        _check_positions(loaded.model.config, len(ids), max_new_tokens)
        if budget is not None:
            loaded = _within(loaded, budget, len(ids) + max_new_tokens)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
        _generate(loaded, ids, max_new_tokens, seed, sampling, compare, prefix_store, output)


class Loaded(NamedTuple):
    """A model, and how its cache is coded."""

    place: str
    model: Any
    tokenizer: Any
    spec: CodecSpec
    calibration: Calibration | None
    backend: str


def _load(
    name: str | None, spec: str | None, calibration: Path | None, dtype: str | None, device: str | None
) -> Loaded:
    with quiet_loading():
        import torch

        from kvcomp.compressed import compress
        from kvcomp.evaluate.models import backend_for, load_model, shipped_model, spec_for

        logging.getLogger("kvcomp").addHandler(_ToScreen())
        logging.getLogger("kvcomp").setLevel(logging.INFO)
        place = name if name is not None else shipped_model()
        model, tokenizer = load_model(place, dtype, device)
        tokens = torch.zeros(2, 1, 1, 65, 16, dtype=model.dtype)
        compress(*tokens).attend(tokens[0, :, :, :1])  # loads the kernels, or compiles them
    found = calibration_for(str(place), model, tokenizer, [spec], calibration)
    return Loaded(str(place), model, tokenizer, *spec_for(place, spec, found), backend_for(model))


def _within(loaded: Loaded, budget: str, tokens: int) -> Loaded:
    """The same with the levels that a budget allows, which are shown."""
    from kvcomp.integrations.transformers.budget import plan_for
    from kvcomp.integrations.transformers.models import text_config

    config = text_config(loaded.model.config)
    plan = plan_for(config, CALIBRATED, loaded.calibration, budget, tokens, loaded.backend)
    screen.print(str(plan), style="dim")
    return loaded._replace(spec=plan.spec)


def _check_positions(config: Any, prompt: int, new: int) -> None:
    """Raise LimitExceeded before any work if the model's positions end in it."""
    from kvcomp.integrations.transformers.models import position_limit, text_config

    limit = position_limit(text_config(config))
    if limit is not None and prompt + new - 1 > limit:  # the last token is not read
        raise LimitExceeded(
            f"{prompt} tokens of the prompt and {new} new ones are more than the {limit} positions of the model: "
            "give a shorter prompt, or a smaller --max-new-tokens"
        )


def _prompt_ids(tokenizer: Any, text: str, raw: bool) -> list[int]:
    """Token ids of a prompt, as the one message of a chat if the model has a template for chats."""
    if text and tokenizer.chat_template and not raw:
        chat = [{"role": "user", "content": text}]
        ids: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    if not ids:
        raise typer.BadParameter("the prompt is empty")
    return ids


def _own_prompt(tokenizer: Any) -> list[int]:
    from kvcomp.evaluate.text import held_out_text, join

    text = held_out_text([PROMPT_FILE])
    if not text:
        raise InvalidInput(f"this Python has no {PROMPT_FILE} to continue: give --prompt or --prompt-file")
    return [int(token) for token in join(tokenizer, text)[:PROMPT_TOKENS]]


def _generate(
    loaded: Loaded,
    ids: list[int],
    count: int,
    seed: int,
    sampling: dict[str, Any],
    compare: bool,
    prefix_store: str | None,
    output: Path | None,
) -> None:
    import torch

    from kvcomp import disk
    from kvcomp.evaluate import generation
    from kvcomp.integrations.transformers import KVCompCache

    model, how = loaded.model, dict[str, Any](calibration=loaded.calibration, backend=loaded.backend)
    prompt = torch.tensor([ids], device=model.device)
    with screen.status("looking into the prefix store") if prefix_store else nullcontext():
        prefixes = Prefixes(prefix_store, prompt, model, loaded.spec, how) if prefix_store else None
    cache = prefixes.cache if prefixes else KVCompCache(model.config, loaded.spec, **how)
    torch.manual_seed(seed)
    say(f"{loaded.place}: {len(ids)} prompt tokens, then {count} new ones from a compressed cache\n", style="dim")
    with Live(console=screen, auto_refresh=False, vertical_overflow="visible") as live:
        show = _Shown(live, loaded.tokenizer, cache, count)
        run = generation.generate(model, prompt, cache, count, show, **sampling)
    against = None
    if compare:
        with screen.status("the same tokens from the uncompressed cache"):
            against = generation.compare(model, prompt, run)
    failed: KVCompError | None = None
    if prefixes:
        try:
            prefixes.keep(run.tokens)
        except KVCompError as error:  # once there are results, they come first
            failed = error
    screen.print(_table(run, against, prefixes))
    if output is not None:
        disk.put(output, json.dumps(_figures(loaded.spec, run, against, prefixes), indent=2).encode() + b"\n")
    if failed is not None:
        raise failed


class _Shown:
    """The text so far, and the cache's size, refreshed a few times a second: walking the cache at every token would
    slow it down.
    """

    def __init__(self, live: Live, tokenizer: Any, cache: Any, count: int) -> None:
        self.live, self.tokenizer, self.cache, self.count = live, tokenizer, cache, count
        self.tokens: list[int] = []
        self.begin = self.last = time.perf_counter()

    def __call__(self, token: int) -> None:
        self.tokens.append(token)
        now, done = time.perf_counter(), len(self.tokens) == self.count
        if done or now - self.last >= REFRESH_SECONDS:
            self.last = now
            text = Text(self.tokenizer.decode(self.tokens), style="cyan")
            self.live.update(text if done else Group(text, self._status(now)), refresh=True)

    def _status(self, now: float) -> Text:
        memory = self.cache.memory()
        return Text(
            f"\n{len(self.tokens)} tokens in {now - self.begin:.1f} s; cache {memory.total / MIB:.2f} MiB, "
            f"{in_times(memory.ratio)} than dense\n",
            style="dim",
        )


class _ToScreen(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), errors, "dim")


def _check_text(prompt: str) -> None:
    """Refuse bytes on the command line that are no UTF-8, which Python gives as halves of characters."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"the prompt is no UTF-8 text: {error}", param_hint="--prompt") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is no UTF-8 text: {error}") from None


def _table(run: Generation, against: Agreement | None, prefixes: Prefixes | None) -> Table:
    """What the generation kept and cost, beside the uncompressed cache where that was run."""
    memory, timing = run.memory, against.timing if against else None
    table = Table(
        title=f"\n{run.prompt} prompt + {len(run.tokens)} new tokens", title_justify="left", box=box.SIMPLE_HEAD
    )
    for header in ("", "compressed", "uncompressed"):
        table.add_column(header, justify="right" if header else "left")
    if against:
        table.add_row("same likeliest token", f"{100 * against.top1:.1f} %", "100 %")
        table.add_row("mean KL, nats a token", f"{against.kl:.1e}", "0")
    dense = against.dense if against else memory.dense
    table.add_row("cache, MiB", f"{memory.total / MIB:.2f}  ({in_times(memory.ratio)})", f"{dense / MIB:.2f}")
    values = max(1, memory.values)
    table.add_row("total bits per value", f"{memory.total_bits:.2f}", f"{8 * memory.dense / values:.2f}")
    table.add_row("first token, s", f"{run.timing.first:.2f}", f"{timing.first:.2f}" if timing else "")
    speed = run.timing.tokens_per_second
    table.add_row("tokens per second", f"{speed:.0f}", f"{timing.tokens_per_second:.0f}" if timing else "")
    for label, value in prefixes.rows(run.timing.first) if prefixes else ():
        table.add_row(label, value, "")
    return table


def _figures(spec: CodecSpec, run: Generation, against: Agreement | None, prefixes: Prefixes | None) -> dict[str, Any]:
    """All figures, in bytes, seconds, bits and nats."""
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
