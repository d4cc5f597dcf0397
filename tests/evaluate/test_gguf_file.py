"""Models in GGUF files, through the door that every command uses."""

from __future__ import annotations

import json
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from kvcomp.cli import app
from kvcomp.errors import CorruptData, InvalidInput, KVCompError, UnsupportedModel
from kvcomp.evaluate import gguf_file
from kvcomp.evaluate.methods import default_specs
from kvcomp.evaluate.models import load_model, spec_for
from tiny_gguf import Q8_0, tiny_llama, write_gguf

TEXT = "def f(x):\n    return x\n"


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def made(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama, kind=Q8_0)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made, tmp_path))


def in_parts(path: Path, names: list[str]) -> None:
    """Cut a file into pieces of these names, and remove it."""
    content = path.read_bytes()
    step = -(-len(content) // len(names))
    for index, name in enumerate(names):
        path.with_name(name).write_bytes(content[index * step : (index + 1) * step])
    path.unlink()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_a_gguf_file_gives_the_model_that_was_written_and_its_tokenizer(made: Path, llama: Any) -> None:
    model, tokenizer = load_model(made)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == TEXT
    assert "user: hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert model.dtype == torch.float32
    assert not model.training
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=0, atol=1e-5)


def test_its_folder_does_as_well_beside_a_configuration_and_its_dtype_can_be_chosen(copy: Path) -> None:
    (copy.parent / "config.json").write_text('{"model_type": "gemma3"}', encoding="utf-8")
    model, _ = load_model(copy.parent, "bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "llama"
    with pytest.raises(InvalidInput, match="use float32"):
        load_model(copy, "int8")


@pytest.mark.parametrize(
    "names",
    [
        ["tiny.gguf.part00", "tiny.gguf.part01", "tiny.gguf.part02"],
        ["tiny.gguf.part1of2", "tiny.gguf.part2of2"],
        [f"tiny.gguf.part{index}" for index in range(1, 12)],
    ],
)
def test_parts_are_joined_from_their_folder_or_from_one_of_them(copy: Path, names: list[str], llama: Any) -> None:
    in_parts(copy, names)
    for name in copy.parent, copy.with_name(names[-1]):
        model, _ = load_model(name)
        assert torch.equal(model.lm_head.weight, llama.lm_head.weight)
    assert sorted(path.name for path in copy.parent.iterdir()) == sorted(names)  # nothing is left there


@pytest.mark.parametrize(
    "names",
    [
        ["tiny.gguf.part0", "tiny.gguf.part2"],
        ["tiny.gguf.part1of3", "tiny.gguf.part2of3"],
        ["tiny.gguf.part1of999999999"],
        ["tiny.gguf.part2"],
    ],
)
def test_a_part_that_is_missing_is_named(copy: Path, names: list[str]) -> None:
    in_parts(copy, names)
    with pytest.raises(InvalidInput, match="fetch those that are missing"):
        load_model(copy.parent)


def test_the_last_part_missing_is_a_file_that_ends_early(copy: Path) -> None:
    in_parts(copy, ["tiny.gguf.part00", "tiny.gguf.part01"])
    copy.with_name("tiny.gguf.part01").unlink()
    with pytest.raises(CorruptData, match="fetch the whole file again"):
        load_model(copy.parent)


def test_of_two_files_in_a_folder_one_must_be_named(copy: Path) -> None:
    shutil.copy(copy, copy.with_name("other.gguf"))
    with pytest.raises(InvalidInput, match=r"2 GGUF files: name one, such as .*other\.gguf"):
        load_model(copy.parent)
    assert load_model(copy)[0].config.num_hidden_layers == 2


def test_a_folder_with_other_weights_is_as_before(copy: Path, llama: Any) -> None:
    assert gguf_file.find(copy.parent) == [copy]
    llama.save_pretrained(copy.parent)
    assert gguf_file.find(copy.parent) is None


def test_a_file_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no GGUF file"):
        load_model(tmp_path / "none.gguf")


@pytest.mark.parametrize("package", gguf_file.PACKAGES)
def test_a_missing_package_is_named_with_the_way_to_get_it(
    made: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(InvalidInput, match=rf"needs {package}: pip install '\.\[gguf\]'"):
        load_model(made)


def test_an_architecture_that_transformers_cannot_read_is_refused(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "rwkv.gguf", llama, architecture="rwkv7")
    with pytest.raises(UnsupportedModel, match=r"cannot read .*rwkv7.*folder of safetensors"):
        load_model(path)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, UnsupportedModel, "RoPE scaling 'yarn'"),
        ({"split.count": 2}, InvalidInput, "llama-gguf-split --merge"),
        ({"split.count": "many"}, CorruptData, "one of 'many' files"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(
    llama: Any, tmp_path: Path, more: dict[str, Any], error: type[KVCompError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_model(write_gguf(tmp_path / "tiny.gguf", llama, **more))


@pytest.mark.parametrize("count", [0, 1])
def test_a_model_that_was_split_into_one_file_is_whole(count: int) -> None:
    gguf_file.check(gguf_file.Header({"general.architecture": "llama", "split.count": count}, {}), "tiny.gguf")


def test_frequencies_of_rope_in_a_tensor_are_refused() -> None:
    header = gguf_file.Header({"general.architecture": "llama"}, {"rope_freqs.weight": 0})
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
        gguf_file.check(header, "llama-3.gguf")


def test_a_tensor_that_is_left_out_is_not_filled_at_random(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama, without="blk.1.ffn_up.weight")
    with pytest.raises(CorruptData, match=r"lacks 1 tensors, such as .*layers\.1\.mlp\.up_proj"):
        load_model(path)


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 500, -200])
def test_a_file_that_ends_early_is_refused(copy: Path, kept: int) -> None:
    copy.write_bytes(copy.read_bytes()[:kept])
    with pytest.raises(CorruptData, match=r"fetch|does not begin with GGUF"):
        load_model(copy)


def test_a_file_that_lacks_the_last_byte_of_its_last_tensor_is_refused(copy: Path) -> None:
    from gguf import GGUFReader

    content = copy.read_bytes()
    end = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in GGUFReader(copy).tensors)
    copy.write_bytes(content[:end])
    gguf_file.read_header(copy, "tiny.gguf")
    copy.write_bytes(content[: end - 1])
    with pytest.raises(CorruptData, match="fetch the whole file again"):
        gguf_file.read_header(copy, "tiny.gguf")


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (0, b"GGML", CorruptData),
        (4, struct.pack("<I", 1), UnsupportedModel),
        (4, struct.pack(">I", 3), UnsupportedModel),
        (8, struct.pack("<Q", 1 << 60), CorruptData),
        (16, struct.pack("<Q", 1 << 60), CorruptData),
        (24, struct.pack("<Q", 1 << 60), CorruptData),
        (32, b"\xff\xfe", CorruptData),
    ],
)
def test_a_damaged_header_is_refused(copy: Path, at: int, value: bytes, error: type[KVCompError]) -> None:
    content = bytearray(copy.read_bytes())
    content[at : at + len(value)] = value
    copy.write_bytes(content)
    with pytest.raises(error):
        load_model(copy)


@given(at=st.integers(4, 6000), value=st.binary(min_size=1, max_size=8))
def test_a_header_is_read_or_refused_whatever_is_in_it(made: Path, at: int, value: bytes) -> None:
    content = bytearray(made.read_bytes())
    content[at : at + len(value)] = value
    path = made.with_name("damaged")
    path.write_bytes(content)
    with suppress(CorruptData, UnsupportedModel):
        gguf_file.read_header(path, "damaged")


def test_an_unknown_type_of_tensor_is_refused(copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    at = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    assert struct.unpack_from("<I", content, at) == (Q8_0,)
    struct.pack_into("<I", content, at, 999)
    copy.write_bytes(content)
    with pytest.raises(UnsupportedModel, match="type 999"):
        load_model(copy)


def test_a_spec_and_a_calibration_lie_beside_the_only_file_of_a_folder(copy: Path) -> None:
    spec, _ = spec_for(copy, "packed")
    copy.with_name("kvcomp.json").write_text(spec.to_json(), encoding="utf-8")
    assert spec_for(copy)[0] == spec_for(copy.parent)[0] == spec
    assert [one.name for one in default_specs(copy)] == ["tuned", "kvcomp"]
    shutil.copy(copy, copy.with_name("other.gguf"))
    assert spec_for(copy)[0] == spec_for("none")[0] != spec


def test_commands_take_a_gguf_file(copy: Path, tmp_path: Path) -> None:
    store, text = tmp_path / "store", tmp_path / "text.txt"
    text.write_text(TEXT * 32, encoding="utf-8")
    for _ in range(2):
        figures = tmp_path / "figures.json"
        options = ["-n", "4", "--raw", "--prompt-file", str(text), "--prefix-store", str(store), "--json", str(figures)]
        result = run("generate", str(copy), "--dtype", "bfloat16", *options, "--prompt", "")
        assert result.exit_code == 0, result.output
    assert json.loads(figures.read_text())["prefix_store"]["loaded_tokens"] > 0
    measured = tmp_path / "evaluate.json"
    sizes = ["--prompts", "1", "--prompt-tokens", "256", "--scored-tokens", "32", "--streams", "1", "--lists", "0"]
    sizes += ["--streamed-tokens", "16", "--passkeys", "0", "--lengths", "256", "--baseline", "fp8"]
    result = run("evaluate", str(copy), "--text", str(text), *sizes, "--json", str(measured))
    assert result.exit_code == 0, result.output
    assert json.loads(measured.read_text())["setting"]["dtype"] == "torch.float32"
    result = run("evaluate", str(copy), "--text", str(text), *sizes, "--dtype", "half", "--json", str(measured))
    assert result.exit_code == 1
    assert "no dtype 'half'" in " ".join(result.output.split())
