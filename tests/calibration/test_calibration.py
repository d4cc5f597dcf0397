"""Calibrations: the file, what is refused, and the levels."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

import kvcomp
from calibrating import STEPS, calibrated, like_keys
from kvcomp.calibration import MAX_SHIFT, Calibration, quantise_matrix, resolve
from kvcomp.calibration.content import METADATA
from kvcomp.calibration.file import MAX_BYTES
from kvcomp.calibration.rotary import Rotation
from kvcomp.calibration.transform import Affine
from kvcomp.errors import CorruptData, InvalidInput, KVCompError, LimitExceeded, UnsupportedVersion
from kvcomp.spec import LEVELS, CodecSpec

MADE = calibrated(2, channels=16)


def rewritten(change: Callable[[dict[str, Any], dict[str, str]], None]) -> bytes:
    """The bytes of a calibration file with tensors and metadata changed."""
    tensors = {name: array.copy() for name, array in load(MADE.content).items()}
    size = int.from_bytes(MADE.content[:8], "little")
    metadata = json.loads(MADE.content[8 : 8 + size])["__metadata__"]
    change(tensors, metadata)
    return save(tensors, metadata)


def test_a_file_gives_the_calibration_back(tmp_path: Path) -> None:
    MADE.write(tmp_path / "model.kvcal")
    read = Calibration.read(tmp_path / "model.kvcal")
    assert read.fingerprint == MADE.fingerprint
    assert read.about == MADE.about
    assert read.levels == LEVELS
    assert read.spec("aggressive") == MADE.spec("aggressive")
    for index in range(2):
        assert torch.equal(read.layers[index][0].key.matrix, MADE.layers[index][0].key.matrix)
        assert read.layers[index][1] == MADE.layers[index][1]


def test_shifts_of_a_level_are_kept_and_only_there() -> None:
    shifts = np.random.default_rng(0).integers(0, MAX_SHIFT + 1, (2, 2, 16), np.uint8)

    def add(tensors: dict[str, Any], _: dict[str, str]) -> None:
        tensors["1.aggressive.shifts"] = shifts

    read = Calibration.from_bytes(rewritten(add))
    plain = MADE.layer(1, MADE.spec("aggressive"))
    for level in LEVELS:
        found = read.layer(1, read.spec(level))
        assert found is not None
        assert plain is not None
        expected = plain.transform.coarsened(shifts) if level == "aggressive" else plain.transform
        assert torch.equal(found.transform.key.matrix, expected.key.matrix)
        assert torch.equal(found.transform.value.inverse, expected.value.inverse)
    assert read.nbytes("aggressive") == MADE.nbytes("aggressive") + shifts.nbytes


@pytest.mark.parametrize(
    "shifts",
    [
        np.zeros((2, 2, 8), np.uint8), np.zeros((2, 16), np.uint8), np.zeros((2, 2, 16), np.int8),
        np.full((2, 2, 16), MAX_SHIFT + 1, np.uint8),
    ],
)  # fmt: skip
def test_wrong_shifts_are_refused(shifts: np.ndarray[Any, Any]) -> None:
    def add(tensors: dict[str, Any], _: dict[str, str]) -> None:
        tensors["1.aggressive.shifts"] = shifts

    with pytest.raises(CorruptData, match="shifts"):
        Calibration.from_bytes(rewritten(add))


def test_the_same_calibration_has_the_same_bytes() -> None:
    assert calibrated(2, channels=16).content == MADE.content
    assert calibrated(2, channels=16, model={"model_type": "other"}).fingerprint != MADE.fingerprint


def test_eight_bits_are_kept_as_they_are() -> None:
    matrix = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    once = quantise_matrix(matrix)
    assert torch.equal(quantise_matrix(once), once)
    assert (once - matrix).abs().amax() <= matrix.abs().amax() / 254 * (1 + 1e-5)
    affine = Affine.of(once, torch.zeros(2, 16))
    x = torch.randn(1, 2, 9, 16)
    assert torch.allclose(affine.undo(affine.apply(x)), x, atol=1e-3)  # rounding A costs no accuracy


def test_levels_are_specs_that_name_the_calibration() -> None:
    spec = MADE.spec("balanced")
    assert spec.calibration == MADE.fingerprint
    assert spec.key.steps is not None
    assert (len(spec.key.steps), len(spec.key.steps[0])) == (2, 2)
    coarse = MADE.spec("aggressive").key.steps
    assert coarse is not None
    assert coarse[0][0] / spec.key.steps[0][0] == pytest.approx(STEPS["aggressive"] / STEPS["balanced"], rel=1e-3)
    assert CodecSpec.from_json(spec.to_json()) == spec
    with pytest.raises(InvalidInput, match="no level 'best'"):
        MADE.spec("best")


def test_bytes_that_decoding_needs() -> None:
    matrices = sum(array.nbytes for name, array in load(MADE.content).items() if "matrix" in name)
    assert matrices < MADE.nbytes("balanced") < len(MADE.content)


def test_bytes_of_a_level_are_those_of_its_tensors() -> None:
    turn = Rotation.of(np.array([[0, 8], [1, 9]]), np.array([0.5, 0.1]), 16)
    made = calibrated(2, channels=16, rotation=turn)
    for level in LEVELS:
        needed = [x.nbytes for name, x in load(made.content).items() if name.split(".")[1] in ("key", "value", level)]
        assert made.nbytes(level) == sum(needed)
        assert made.nbytes(level, [1]) == sum(needed) // 2


def test_resolve_says_what_is_missing() -> None:
    assert resolve("kvcomp") == (CodecSpec.resolve("kvcomp"), None)
    assert resolve("kvcomp-klt", MADE) == (MADE.spec("balanced"), MADE)
    assert resolve("kvcomp-klt:aggressive", MADE)[0] == MADE.spec("aggressive")
    assert resolve(MADE.spec("aggressive"), MADE)[0] == MADE.spec("aggressive")
    assert resolve("packed-klt:aggressive", MADE) == (MADE.spec("aggressive", "patched"), MADE)
    with pytest.raises(InvalidInput, match="kvcomp calibrate MODEL"):
        resolve("kvcomp-klt")
    with pytest.raises(InvalidInput, match=MADE.fingerprint):
        resolve(MADE.spec())
    with pytest.raises(InvalidInput, match="needs no calibration"):
        resolve("kvcomp", MADE)
    with pytest.raises(InvalidInput, match="no level"):
        resolve("kvcomp-klt:fine", MADE)
    with pytest.raises(InvalidInput, match="the one given is"):
        resolve(MADE.spec(), calibrated(2, channels=16, model={"model_type": "other"}))
    with pytest.raises(InvalidInput, match="no preset"):
        resolve("kvcomp-kl", MADE)


def test_packed_klt_holds_the_same_values_in_pieces_and_no_codebooks() -> None:
    k, v = like_keys(1, 2, 400, 16, 5), like_keys(1, 2, 400, 16, 6).flip(-1)
    coded, packed = (
        kvcomp.compress(k, v, f"{name}:aggressive", calibration=MADE) for name in ("kvcomp-klt", "packed-klt")
    )
    for one, other in zip(coded.decompress(), packed.decompress(), strict=True):
        assert torch.equal(one, other)
    assert (coded.memory().books > 0, packed.memory().books) == (True, 0)
    spec = MADE.spec("aggressive", "patched")
    assert (spec.key.coding, spec.value.coding) == ("patched", "patched")
    assert CodecSpec.from_json(spec.to_json()) == spec
    assert MADE.levels_of(MADE.spec("aggressive", "patched")) == dict.fromkeys(MADE.layers, "aggressive")
    mixed = replace(MADE.spec("balanced", "patched"), value=MADE.spec("balanced").value)
    with pytest.raises(InvalidInput, match="no level"):
        MADE.levels_of(mixed)


def test_another_model_is_told_apart() -> None:
    MADE.check_model({"model_type": "none"})
    with pytest.raises(InvalidInput, match="model_type 'none', not 'llama'"):
        MADE.check_model({"model_type": "llama"})


def test_tensors_of_another_shape_are_refused() -> None:
    k = torch.randn(1, 3, 70, 16)
    with pytest.raises(InvalidInput, match="KV heads"):
        kvcomp.compress(k, k, "kvcomp-klt", calibration=MADE)
    with pytest.raises(InvalidInput, match="channels"):
        kvcomp.compress(torch.randn(1, 2, 70, 32), torch.randn(1, 2, 70, 32), "kvcomp-klt", calibration=MADE)
    with pytest.raises(InvalidInput, match="no layer 5"):
        kvcomp.compress(torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70, 16), "kvcomp-klt", calibration=MADE, layer=5)


def drop(name: str) -> Callable[[dict[str, Any], dict[str, str]], None]:
    return lambda tensors, metadata: tensors.pop(name) is None


def put(name: str, array: Any) -> Callable[[dict[str, Any], dict[str, str]], None]:
    return lambda tensors, metadata: tensors.update({name: array})


def say(**fields: Any) -> Callable[[dict[str, Any], dict[str, str]], None]:
    def change(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        metadata[METADATA] = json.dumps({**json.loads(metadata[METADATA]), **fields})

    return change


def priced(layers: Any) -> dict[str, Any]:
    """Levels of which one has these prices of layers."""
    return {**MADE.about.levels, "balanced": {"kl": 0.0, "layers": layers}}


PRICES = {"bits": 2.5, "kl": 0.01}
WRONG_PRICES = [
    [],
    None,
    5,
    {"0": []},
    {"0": {"bits": 2.5}},
    *({"0": PRICES, "1": {**PRICES, name: x}} for name in PRICES for x in (np.nan, np.inf, -0.1, "1", None)),
]


def test_prices_of_layers_are_given_back() -> None:
    layers = {"0": PRICES, "1": {"bits": 0.0, "kl": 0.0}}
    read = Calibration.from_bytes(rewritten(say(levels=priced(layers))))
    assert read.about.levels["balanced"]["layers"] == layers


MATRIX = load(MADE.content)["0.key.matrix"]
BOOKS = load(MADE.content)["1.balanced.books"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (drop("0.key.matrix"), CorruptData),
        (drop("1.value.mean"), CorruptData),
        (drop("1.balanced.books"), CorruptData),
        (put("more", np.zeros(3, np.float32)), CorruptData),
        (put("2.key.mean", np.zeros((2, 16), np.float32)), CorruptData),
        (put("0.key.more", np.zeros(3, np.float32)), CorruptData),
        (put("0.key.matrix", np.zeros_like(MATRIX)), CorruptData),  # singular
        (put("0.key.matrix", MATRIX.astype(np.float32)), CorruptData),
        (put("0.key.matrix", MATRIX[:1]), CorruptData),
        (put("0.key.matrix", MATRIX[:, :8]), CorruptData),
        (put("0.key.matrix", MATRIX[0]), CorruptData),
        (put("0.key.matrix", np.zeros((0, 16, 16), np.int8)), CorruptData),
        (put("0.key.scale", np.full((2, 16), np.inf, np.float32)), CorruptData),
        (put("0.key.scale", np.zeros((2, 16), np.float32)), CorruptData),
        (put("0.key.mean", np.full((2, 16), np.nan, np.float32)), CorruptData),
        (put("0.balanced.steps", np.zeros((2, 2), np.float32)), CorruptData),
        (put("0.balanced.steps", np.full((2, 2), -1, np.float32)), CorruptData),
        (put("0.balanced.steps", np.full((2, 2), np.nan, np.float32)), CorruptData),
        (put("0.balanced.steps", np.ones((2, 3), np.float32)), CorruptData),
        (put("1.balanced.books", BOOKS[:-1]), CorruptData),
        (put("1.balanced.books", np.append(BOOKS, BOOKS[:1])), CorruptData),
        (put("1.balanced.books", BOOKS[:0]), CorruptData),
        (put("1.balanced.books", np.full_like(BOOKS, 255)), CorruptData),
        (say(layers=1), CorruptData),
        (say(layers="2"), CorruptData),
        (say(layers=True), CorruptData),
        (say(layers=0), LimitExceeded),
        (say(layers=1 << 20), LimitExceeded),
        (say(levels={}), LimitExceeded),
        (say(levels={"Balanced!": {}}), CorruptData),
        (say(levels={"fine": {}}), CorruptData),
        *((say(levels=priced(layers)), CorruptData) for layers in WRONG_PRICES),
        (say(model=None), CorruptData),
        (say(other=1), CorruptData),
        (say(version=2), UnsupportedVersion),
        (say(version=True), UnsupportedVersion),
        (lambda tensors, metadata: metadata.update({METADATA: "[" * 100_000}), CorruptData),
        (lambda tensors, metadata: metadata.update({METADATA: "3"}), CorruptData),
        (lambda tensors, metadata: metadata.clear(), CorruptData),
        (lambda tensors, metadata: tensors.clear(), CorruptData),
    ],
)
def test_what_is_no_calibration_is_refused(change: Any, error: type[KVCompError]) -> None:
    with pytest.raises(error):
        Calibration.from_bytes(rewritten(change))


def test_many_heads_are_refused_before_they_are_inverted() -> None:
    heads = 2000
    wide = put("0.key.matrix", np.zeros((heads, 16, 16), np.int8))

    def change(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        wide(tensors, metadata)
        tensors["0.key.scale"] = tensors["0.key.mean"] = np.ones((heads, 16), np.float32)

    with pytest.raises(LimitExceeded):
        Calibration.from_bytes(rewritten(change))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.kvcal"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(LimitExceeded):
        Calibration.read(path)
    with pytest.raises(InvalidInput, match="cannot read"):
        Calibration.read(tmp_path / "none.kvcal")
    with pytest.raises(InvalidInput, match="cannot read"):
        Calibration.read(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_give_a_typed_error_or_a_calibration(data: st.DataObject) -> None:
    content = bytearray(MADE.content)
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(1, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = Calibration.from_bytes(bytes(content))
    except KVCompError:
        return
    k = torch.randn(1, 2, 70, 16)
    packed = kvcomp.compress(k, k, f"kvcomp-klt:{read.levels[0]}", calibration=read)
    assert packed.attend(k[:, :, :1]).isfinite().all()


def test_transforms_are_made_once_for_all_caches() -> None:
    """Also those whose coordinates a level makes coarser."""
    transform, levels = MADE.layers[0]
    shifts = np.ones((2, transform.heads, transform.channels), np.uint8)
    coarse = {name: replace(level, shifts=shifts) for name, level in levels.items()}
    made = Calibration.build(MADE.about, {0: transform, 1: transform}, {0: coarse, 1: coarse})
    spec = made.spec("balanced")
    asked = made.layer(0, spec), made.layer(0, spec), deepcopy(made).layer(0, spec)
    first, again, copied = (one.transform for one in asked if one is not None)
    assert first is again is copied is deepcopy(first) is not transform
    folded = first.folding
    held = {id(x): x.nbytes for affine in (transform.key, transform.value) for x in (affine.matrix, affine.inverse)}
    assert first.nbytes == sum(held.values()) + folded.outputs.nbytes
