"""kvcomp compress, decompress, inspect and verify, as one types them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import kvcomp
from kvcomp import files
from kvcomp.cli import app
from kvcomp.errors import LimitExceeded
from kvcomp.spec import PRESETS
from kvcomp.store import KVStore
from sealing import seal, unseal

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-lm"


def run(*arguments: object) -> tuple[int, str]:
    """Exit code, and both outputs in one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        f"layers.{layer}.{kind}": torch.randn(2, 3, 200, 32).to(torch.float16) for layer in (0, 1) for kind in "kv"
    }
    tensors["layers.1.v"][0, 0, 5, 5] = torch.nan
    save_file(tensors, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_file({kind: torch.randn(1, 2, 500, 32).bfloat16() for kind in "kv"}, tmp_path / "kv.safetensors")
    return tmp_path / "kv.safetensors"


@pytest.mark.parametrize("spec", ["kvcomp", "packed"])
def test_there_and_back(tmp_path: Path, layers: Path, spec: str) -> None:
    out, back = tmp_path / "out.kvc", tmp_path / "back.safetensors"
    code, text = run("compress", layers, "-o", out, "--spec", spec)
    assert code == 0
    assert f"{out.stat().st_size} bytes" in text
    assert run("decompress", out, "-o", back)[0] == 0
    given, found = load_file(layers), load_file(back)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (x.shape, x.dtype) for name, x in given.items()
    }
    for layer in (0, 1):
        packed = kvcomp.compress(given[f"layers.{layer}.k"], given[f"layers.{layer}.v"], spec)
        for kind, x in zip("kv", packed.decompress(), strict=True):
            assert torch.equal(x.view(torch.int16), found[f"layers.{layer}.{kind}"].view(torch.int16))


def test_a_calibrated_cache_there_and_back(tmp_path: Path) -> None:
    torch.manual_seed(2)
    given = {f"layers.{layer}.{kind}": torch.randn(1, 2, 200, 64).bfloat16() for layer in range(4) for kind in "kv"}
    source, out, back = (tmp_path / name for name in ("in.safetensors", "out.kvc", "back.safetensors"))
    save_file(given, source)
    calibrated = "--calibration", EXAMPLE / "model.kvcal"
    assert run("compress", source, "-o", out, "--spec", "kvcomp-klt:near-lossless", *calibrated)[0] == 0
    for command in (("inspect", out), ("verify", out), ("decompress", out, "-o", back)):
        code, text = run(*command)
        assert (code, "kvcomp calibrate" in text) == (1, True)
        assert run(*command, *calibrated)[0] == 0
    assert run("verify", out, "--against", source, *calibrated)[0] == 0
    given["layers.3.v"][0, 1, 100, 7] += 100
    save_file(given, source)
    assert run("verify", out, "--against", source, *calibrated)[0] == 1
    assert "steps" in run("inspect", out, *calibrated)[1]
    found = load_file(back)
    assert all((found[name].shape, found[name].dtype) == (x.shape, x.dtype) for name, x in given.items())


def test_a_spec_of_ones_own_and_single_tensors(tmp_path: Path, single: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(PRESETS["packed"].to_json(), encoding="utf-8")
    assert run("compress", single, "-o", tmp_path / "a.kvc", "--spec", spec)[0] == 0
    assert run("compress", single, "-o", tmp_path / "b.kvc", "--spec", "packed")[0] == 0
    assert (tmp_path / "a.kvc").read_bytes() == (tmp_path / "b.kvc").read_bytes()
    assert run("decompress", tmp_path / "a.kvc", "-o", tmp_path / "back.safetensors")[0] == 0
    assert set(load_file(tmp_path / "back.safetensors")) == {"k", "v"}
    assert kvcomp.load(tmp_path / "a.kvc").decompress()[0].shape == (1, 2, 500, 32)


def test_inspect(tmp_path: Path, single: Path, layers: Path) -> None:
    out = tmp_path / "out.kvc"
    run("compress", single, "-o", out)
    code, text = run("inspect", out)
    assert code == 0
    for word in ("1 rows of 500 tokens", "relative scale 0.08", "bits by head", "codes", "books", "uncompressed"):
        assert word in text
    code, text = run("inspect", out, "--json")
    figures = json.loads(text)
    assert code == 0
    assert figures["bytes"] == out.stat().st_size == sum(figures["parts"].values())
    assert figures["dense_bytes"] == 2 * 2 * 500 * 2 * 32
    assert 2 < figures["coded_bits"] < 6
    assert figures["spec"]["key"]["relative_scale"] == 0.08
    (layer,) = figures["layers"]
    bits = (sum(layer["K"]) + sum(layer["V"])) / 4
    pages = kvcomp.load(out).memory()
    assert bits * pages.sealed_values / 8 == pytest.approx(pages.pages - pages.directories - 256 * 7)
    run("compress", layers, "-o", out)
    assert run("inspect", out, "--plot", tmp_path / "heat.svg")[0] == 0
    assert "<svg" in (tmp_path / "heat.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_a_picture_that_does_not_fit_the_disk_leaves_the_old_one(
    tmp_path: Path, single: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    out, picture = tmp_path / "out.kvc", tmp_path / f"heat.{suffix}"
    run("compress", single, "-o", out)
    assert run("inspect", out, "--plot", picture)[0] == 0
    old = picture.read_bytes()
    assert len(old) > 1000

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    code, text = run("inspect", out, "--plot", picture)
    assert (code, "No space left" in text) == (1, True)
    assert picture.read_bytes() == old


def test_inspect_a_cache_of_a_model_without_pages(tmp_path: Path) -> None:
    store = KVStore(PRESETS["kvcomp"])
    store.append(*torch.randn(2, 1, 2, 30, 16))
    files.save(
        tmp_path / "a.kvc", {1: store}, PRESETS["kvcomp"], 2, {"id": "a[b]", "configuration": {"model_type": "[/x]"}}
    )
    code, text = run("inspect", tmp_path / "a.kvc")
    assert code == 0
    assert "of a model of type [/x], model_id a[b]" in text
    code, text = run("inspect", "--json", tmp_path / "a.kvc")
    assert json.loads(text)["layers"][0]["K"] == [None, None]


@pytest.mark.parametrize("spec", ["kvcomp", "packed"])
def test_verify(tmp_path: Path, layers: Path, single: Path, spec: str) -> None:
    out = tmp_path / "out.kvc"
    run("compress", layers, "-o", out, "--spec", spec)
    assert run("verify", out) == (0, f"{out}: 2 layers with 12 pages are as they should be")
    code, text = run("verify", out, "--against", layers)
    assert code == 0
    assert "153600 values are within their bounds" in text
    tensors = load_file(layers)
    tensors["layers.0.k"][1, 2, 130, 7] += 3
    tensors["layers.0.v"][1, 2, 199, 7] += 3
    save_file(tensors, tmp_path / "other.safetensors")
    code, text = run("verify", out, "--against", tmp_path / "other.safetensors")
    assert code == 1
    assert "2 of 153600 values are not within their bound" in text
    code, text = run("verify", out, "--against", single)
    assert (code, "holds the layers [0, 1]" in text) == (1, True)


def test_verify_a_cache_of_a_model_against_its_tensors(tmp_path: Path) -> None:
    """Padding, sinks and a window; a page that was cropped has no bound to check."""
    store = KVStore(PRESETS["kvcomp"])
    k, v = torch.randn(2, 2, 2, 400, 16)
    store.append(k, v)
    store.set_starts([0, 33])
    store.seal()
    files.save(tmp_path / "a.kvc", {0: store}, store.spec, 1)
    save_file({"k": k, "v": v}, tmp_path / "kv.safetensors")
    code, text = run("verify", tmp_path / "a.kvc", "--against", tmp_path / "kv.safetensors")
    assert (code, f"{2 * 2 * 767 * 16} values are within their bounds" in text) == (0, True)
    store.crop(100)
    files.save(tmp_path / "a.kvc", {0: store}, store.spec, 1)
    save_file({"k": k[:, :, :100].contiguous(), "v": v[:, :, :100].contiguous()}, tmp_path / "kv.safetensors")
    code, text = run("verify", tmp_path / "a.kvc", "--against", tmp_path / "kv.safetensors")
    assert (code, "was cropped within a page" in text) == (1, True)


def test_a_cache_of_some_layers_is_decompressed_and_verified(tmp_path: Path) -> None:
    """Those of a hybrid: compress itself takes whole models only."""
    stores = {}
    for layer in (3, 7):
        stores[layer] = KVStore(PRESETS["kvcomp"])
        stores[layer].append(*torch.randn(2, 1, 2, 200, 16))
        stores[layer].seal()
    files.save(tmp_path / "a.kvc", stores, PRESETS["kvcomp"], 8)
    assert run("decompress", tmp_path / "a.kvc", "-o", tmp_path / "kv.safetensors")[0] == 0
    code, text = run("verify", tmp_path / "a.kvc", "--against", tmp_path / "kv.safetensors")
    assert (code, "are within their bounds" in text) == (0, True)
    assert run("compress", tmp_path / "kv.safetensors", "-o", tmp_path / "b.kvc")[0] == 1


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, single: Path) -> None:
    out = tmp_path / "out.kvc"
    run("compress", single, "-o", out)
    data = bytearray(out.read_bytes())
    data[2000] ^= 1
    for content, word in (
        (bytes(data), "the file is damaged"),
        (bytes(data[:5000]), "cut off"),
        (b"", "is empty"),
        (b"x" * 100, "this is no .kvc file"),
        (seal(*unseal(out.read_bytes()), version=2), "use a newer kvcomp"),
    ):
        (tmp_path / "bad.kvc").write_bytes(content)
        for command in (["verify"], ["inspect"], ["decompress", "-o", tmp_path / "back.safetensors"]):
            code, text = run(*command, tmp_path / "bad.kvc")
            assert code == 1
            assert text.startswith("error: ")
            assert word in text
            assert str(tmp_path / "bad.kvc") in text
    assert not (tmp_path / "back.safetensors").exists()


def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({}, "must hold the tensors"),
        (tensors(k=(1, 1, 64, 16)), "must hold the tensors"),
        (tensors(k=(1, 1, 64, 16), v=(1, 1, 64, 16), w=(1,)), "must hold the tensors"),
        (tensors(**{"layers.0.k": (1, 1, 64, 16)}), "must hold the tensors"),
        (tensors(**{f"layers.1.{kind}": (1, 1, 64, 16) for kind in "kv"}), "without gaps"),
        (tensors(k=(1, 1, 64, 16), v=(1, 1, 65, 16)), "must both be"),
        (tensors(k=(1, 1, 64, 20), v=(1, 1, 64, 20)), "multiple of 8"),
        (tensors(k=(64, 16), v=(64, 16)), "must both be"),
        ({kind: torch.zeros((1, 1, 64, 16), dtype=torch.int8) for kind in "kv"}, "float32, float16 or bfloat16"),
    ],
)
def test_tensors_that_cannot_be_compressed(tmp_path: Path, content: Any, word: str) -> None:
    save_file(content, tmp_path / "in.safetensors")
    code, text = run("compress", tmp_path / "in.safetensors", "-o", tmp_path / "out.kvc")
    assert code == 1
    assert word in text
    assert not (tmp_path / "out.kvc").exists()


def test_usage(tmp_path: Path, single: Path) -> None:
    (tmp_path / "no.safetensors").write_bytes(b"hello")
    code, text = run("compress", tmp_path / "no.safetensors", "-o", tmp_path / "out.kvc")
    assert (code, "no.safetensors is no safetensors file" in text) == (1, True)
    assert run("compress", single, "-o", tmp_path / "none" / "out.kvc")[0] == 2
    assert run("compress", single, "-o", tmp_path)[0] == 2
    assert run("compress", single, "-o", "~nobody-of-this-name/out.kvc")[0] == 2
    before = single.read_bytes()
    assert run("compress", single, "-o", single)[0] == 2
    assert single.read_bytes() == before
    assert run("compress", single)[0] == 2
    assert run("compress", tmp_path / "none", "-o", tmp_path / "out.kvc")[0] == 2
    code, text = run("compress", single, "-o", tmp_path / "out.kvc", "--spec", "zip")
    assert (code, "no preset" in text) == (2, True)
    assert run("verify")[0] == 2
    assert run("inspect", tmp_path)[0] == 2
    os.mkfifo(tmp_path / "pipe")
    code, text = run("compress", tmp_path / "pipe", "-o", tmp_path / "out.kvc")
    assert (code, "a pipe or a device" in text) == (1, True)
    code, text = run("compress", single, "-o", "/dev/stdout")
    assert (code, "device" in text) == (2, True)


def test_a_dash_names_no_file(tmp_path: Path, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (("compress", single, "-o", "-"), ("generate", "--json", "-")):
        code, text = run(*command)
        assert (code, "name a file" in text) == (2, True)
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize("channels", [8, 24, 40])
def test_heads_that_are_held_wider_come_back(tmp_path: Path, channels: int) -> None:
    save_file({kind: torch.randn(1, 2, 200, channels) for kind in "kv"}, tmp_path / "in.safetensors")
    assert run("compress", tmp_path / "in.safetensors", "-o", tmp_path / "a.kvc")[0] == 0
    code, text = run("decompress", tmp_path / "a.kvc", "-o", tmp_path / "back.safetensors")
    assert code == 0, text
    assert all(x.shape == (1, 2, 200, channels) for x in load_file(tmp_path / "back.safetensors").values())
    back = kvcomp.load(tmp_path / "a.kvc").decompress()
    assert all(x.is_contiguous() for x in back)


def test_the_home_folder_and_names_with_brackets(tmp_path: Path, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    code, text = run("compress", single, "--output=~/x[bold].kvc")
    assert code == 0, text
    assert (tmp_path / "x[bold].kvc").exists()
    code, text = run("inspect", tmp_path / "x[bold].kvc")
    assert (code, "x[bold].kvc: 1 rows" in text) == (0, True)
    code, text = run("inspect", tmp_path / "x[bold].kvc", "--plot", tmp_path / "p.xyz")
    assert (code, "end in .png" in text) == (1, True)


@pytest.mark.parametrize("kind", ["\ud800", "\x1b]0;title\x07\x1b[31m"])
def test_what_a_file_says_of_its_model_is_text_for_the_terminal(tmp_path: Path, single: Path, kind: str) -> None:
    """It comes from a stranger: it may be what no terminal can show, or what one obeys."""
    run("compress", single, "-o", tmp_path / "a.kvc")
    header, sections = unseal((tmp_path / "a.kvc").read_bytes())
    header["model"] = {"id": None, "configuration": {"model_type": kind}}
    (tmp_path / "a.kvc").write_bytes(seal(header, sections))
    code, text = run("inspect", tmp_path / "a.kvc")
    assert (code, f"of a model of type {ascii(kind)[1:-1]}," in text) == (0, True)


def test_a_name_that_is_no_text_is_shown(tmp_path: Path, single: Path) -> None:
    name = os.fsdecode(b"\xff.kvc")
    code, text = run("compress", single, "-o", tmp_path / name)
    assert (code, "\\udcff.kvc: " in text) == (0, True)
    assert run("verify", tmp_path / name)[0] == 0


def test_a_file_of_padding_is_not_decompressed(tmp_path: Path) -> None:
    store = KVStore(PRESETS["kvcomp"])
    store.append(*torch.randn(2, 1, 1, 3, 16))
    store.crop(0)
    files.save(tmp_path / "a.kvc", {0: store}, store.spec, 1)
    header, sections = unseal((tmp_path / "a.kvc").read_bytes())
    header["tokens"] = 1 << 27
    sections[0]["rows"] = (1 << 27).to_bytes(8, "little") + sections[0]["rows"][8:]
    (tmp_path / "a.kvc").write_bytes(seal(header, sections))
    assert run("verify", tmp_path / "a.kvc")[0] == 0
    code, text = run("decompress", tmp_path / "a.kvc", "-o", tmp_path / "b")
    assert (code, "claims 17179869184 bytes of values" in text) == (1, True)
    assert not (tmp_path / "b").exists()
    with pytest.raises(LimitExceeded, match="mostly padding"):
        kvcomp.load(tmp_path / "a.kvc").decompress()
