"""The command line as a user types it."""

import errno
import json
import logging.handlers
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvcomp.cli import app
from kvcomp.cli.generate import _ToScreen
from kvcomp.errors import StoreUnavailable
from kvcomp.evaluate.models import load_model, shipped_model
from kvcomp.serve.blobs.folder import FolderBlobs
from redis_server import free_port


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_help_shows_a_first_command_that_can_be_typed() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "kvcomp generate --compare" in result.output


def test_help_says_defaults_and_breaks_lines_where_the_terminal_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    result = run("bench", "--help")
    for shown in "[default: the shipped one]", "[default: all]; may be repeated", "that is wrong. The defaults take":
        assert shown in result.output


def test_generate_compares_with_the_uncompressed_cache_and_writes_the_figures(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    result = run("generate", "--compare", "-n", "12", "--json", str(output))
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert shown.index("same likeliest token") < shown.index("cache, MiB")  # what it kept comes before what it saved
    assert len(result.output.splitlines()) < 60
    assert "x smaller)" in shown
    figures = json.loads(output.read_text())
    assert figures["prompt_tokens"] == 1800
    assert len(figures["new_tokens"]) == 12
    assert figures["ratio"] > 3
    assert figures["top1_agreement"] > 0.8
    assert 0 <= figures["mean_kl"] < 0.1
    parts = {name: size for name, size in figures["memory"].items() if name not in NOT_PARTS}
    assert sum(parts.values()) == figures["memory"]["total"]
    assert figures["uncompressed"]["bytes"] > 3 * figures["memory"]["total"]


NOT_PARTS = {"total", "table_entries", "sealed_values", "values", "dense"}


def test_generate_continues_a_prompt_of_the_user_and_sampling_repeats_with_its_seed(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("def add(a, b):\n    return", encoding="utf-8")
    outputs = [tmp_path / "first.json", tmp_path / "second.json"]
    for output in outputs:
        options = ("-n", "8", "--temperature", "1.0", "--seed", "3", "--spec", "packed", "--json", str(output))
        result = run("generate", "--prompt-file", str(prompt), *options)
        assert result.exit_code == 0, result.output
        assert "x larger)" in result.output  # a few tokens cost more than they save
    first, second = (json.loads(output.read_text())["new_tokens"] for output in outputs)
    assert first == second


def test_a_chat_template_is_applied_unless_the_prompt_is_raw(tmp_path: Path) -> None:
    model, tokenizer = load_model(shipped_model())
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}answer:"
    )
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    counts = []
    for options in ((), ("--raw",)):
        output = tmp_path / "figures.json"
        result = run(
            "generate", str(tmp_path / "chat"), "--prompt", "def add", "-n", "2", "--json", str(output), *options
        )
        assert result.exit_code == 0, result.output
        counts.append(json.loads(output.read_text())["prompt_tokens"])
    assert counts == [len(tokenizer("<user> def add\nanswer:")["input_ids"]), len(tokenizer("def add")["input_ids"])]


def test_generate_skips_the_prefill_of_a_system_prompt_the_second_time(tmp_path: Path) -> None:
    """Two chats over a system prompt of some 2,000 tokens: the second loads it."""
    system = tmp_path / "system.txt"
    system.write_text(Path(logging.handlers.__file__).read_text(encoding="utf-8")[:7000], encoding="utf-8")
    found = []
    for question in ("import os\n", "class Other:\n"):
        output = tmp_path / "figures.json"
        options = ("-n", "4", "--prompt", question, "--prefix-store", str(tmp_path / "store"), "--json", str(output))
        result = run("generate", "--prompt-file", str(system), *options)
        assert result.exit_code == 0, result.output
        found.append(json.loads(output.read_text()))
    first, second = (figures["prefix_store"] for figures in found)
    assert first["loaded_tokens"] == 0
    assert first["first_token_seconds_without"] is None
    assert first["stored_tokens"] >= second["loaded_tokens"] > found[1]["prompt_tokens"] - 400 > 1400
    assert "first token without it" in result.output
    assert second["first_token_seconds"] > second["loading_seconds"] > 0
    assert second["first_token_seconds_without"] > 0  # which is shorter depends on what else the machine does


def test_figures_are_written_before_a_store_that_fails_at_the_end_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StoreUnavailable("no space left")

    monkeypatch.setattr(FolderBlobs, "put", full)
    output = tmp_path / "figures.json"
    result = run("generate", "-n", "4", "--prefix-store", str(tmp_path / "store"), "--json", str(output))
    shown = " ".join(result.output.split())
    assert result.exit_code == 1
    assert shown.index("tokens in it now") < shown.index("no space left")
    assert "Traceback" not in shown
    figures = json.loads(output.read_text())
    assert len(figures["new_tokens"]) == 4
    assert figures["prefix_store"]["stored_tokens"] == 0


@pytest.mark.parametrize(
    ("url", "message"), [("s3://bucket", "no store s3://"), ("redis://127.0.0.1:{port}", "Redis at 127.0.0.1")]
)
def test_a_prefix_store_that_is_none(url: str, message: str) -> None:
    result = run("generate", "-n", "1", "--prefix-store", url.format(port=free_port()))
    assert (result.exit_code, message in " ".join(result.output.split())) == (1, True)
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "some/model"), "needs --prompt"),
        (("generate", "--prompt", "caf\udce9"), "the prompt is no UTF-8 text"),  # as Python gives a byte of Latin-1
        (("generate", "--spec", "none-such"), "no preset"),
        (("generate", "--prompt", ""), "empty"),
        (("generate", "-n", "0"), "max-new-tokens"),
        (("generate", "--temperature", "1e-39"), "the likeliest token"),
        (("generate", "--temperature", "inf"), "temperature"),
        (("generate", "--prompt-file", "no-such-file"), "does not exist"),
    ],
)
def test_a_wrong_use_exits_with_2_and_says_why(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_failure_exits_with_1_and_a_message_without_a_traceback(tmp_path: Path) -> None:
    missing = run("generate", str(tmp_path), "--prompt", "a")
    assert missing.exit_code == 1
    assert "cannot load a model" in missing.output
    too_long = run("generate", "--prompt", "word " * 6000)
    assert too_long.exit_code == 1
    assert "LimitExceeded" in too_long.output
    for result in (missing, too_long):
        assert "Traceback" not in result.output


def test_a_warning_about_a_value_of_a_store_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Its words are the value's, and failed where they looked like the markup of a terminal."""
    message = "a stored prefix is not used: a layer in the header has the unknown dtype '[/x]'"
    _ToScreen().emit(logging.makeLogRecord({"msg": message}))
    assert capsys.readouterr().err == f"{message}\n"


def test_a_prompt_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(b"\xff\xfe\x00\x80")
    result = run("generate", "--prompt-file", str(noise))
    assert result.exit_code == 2
    assert "UTF-8" in result.output


def test_what_is_no_model_is_named_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.kvc").write_bytes(b"KVC")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("none", "the path does not exist"),
        ("folder", "no config.json and no GGUF"),
        ("a.kvc", "this file is no model"),
    ):
        result = run("generate", str(tmp_path / name), "--prompt", "a")
        assert (result.exit_code, message in " ".join(result.output.split())) == (1, True), result.output


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    counts = []
    for number, mark in enumerate((b"", b"\xef\xbb\xbf")):
        prompt, output = tmp_path / "prompt.txt", tmp_path / f"{number}.json"
        prompt.write_bytes(mark + b"def add")
        result = run("generate", "--prompt-file", str(prompt), "-n", "1", "--json", str(output))
        assert result.exit_code == 0, result.output
        counts.append(json.loads(output.read_text())["prompt_tokens"])
    assert counts[0] == counts[1]


def test_figures_that_do_not_fit_the_disk_leave_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "figures.json"
    output.write_text("old", encoding="utf-8")
    plain, limit = os.write, 100

    def full(descriptor: int, data: bytes | memoryview) -> int:
        if len(data) > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    result = run("generate", "--prompt", "def add", "-n", "1", "--json", str(output))
    assert (result.exit_code, "No space left" in result.output) == (1, True)
    assert output.read_text() == "old"


def test_an_output_that_is_full_is_an_error_without_a_traceback() -> None:
    command = [sys.executable, "-c", "from kvcomp.cli import main; main()", "--help"]
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (1, "error: OSError: [Errno 28] No space left on device\n")
