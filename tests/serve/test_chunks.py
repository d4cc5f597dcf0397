"""Chunks as stores hold them: bound to their key, checked whole before anything is decoded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcomp import PRESETS, compress
from kvcomp.calibration import Calibration
from kvcomp.errors import CorruptData, InvalidInput, KVCompError, UnsupportedVersion
from kvcomp.files import pack_stores
from kvcomp.serve.chunks import ChunkShape, chunk_key, open_chunk, pack_chunk, unpack
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store import KVStore, sealed
from sealing import seal, unseal

CALIBRATION = Path(__file__).parents[2] / "examples" / "tiny-lm" / "model.kvcal"
SPEC = PRESETS["kvcomp"]
SHAPE = ChunkShape(3, 2, 256, 32, torch.bfloat16)


def values(shape: ChunkShape, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(shape.layers, 2, shape.heads, shape.tokens, shape.channels, generator=generator).to(shape.dtype)
    return [(k, v) for k, v in both]


def packed(key: str = "a", spec: CodecSpec = SPEC, shape: ChunkShape = SHAPE) -> bytes:
    return b"".join(pack_chunk(key, spec, values(shape)))


@pytest.mark.parametrize("preset", ["kvcomp", "packed"])
@pytest.mark.parametrize(
    "shape", [SHAPE, ChunkShape(1, 1, 100, 64, torch.float16), ChunkShape(2, 3, 5, 16, torch.float32)]
)
def test_a_chunk_comes_back_as_compress_has_it(preset: str, shape: ChunkShape) -> None:
    stores = open_chunk(packed("a", PRESETS[preset], shape), "a", PRESETS[preset], shape)
    for store, (k, v) in zip(stores, values(shape), strict=True):
        expected = compress(k[None], v[None], preset).decompress()
        for found, same in zip(unpack(store), expected, strict=True):
            assert torch.equal(found, same[0])
    assert len(stores) == shape.layers


def test_the_value_of_another_key_is_refused() -> None:
    with pytest.raises(CorruptData, match="another key"):
        open_chunk(packed("a"), "b", SPEC, SHAPE)


@pytest.mark.parametrize(
    "other",
    [
        replace(SHAPE, layers=2),
        replace(SHAPE, heads=4, channels=16),
        replace(SHAPE, tokens=255),
        replace(SHAPE, dtype=torch.float16),
    ],
)
def test_a_value_of_another_shape_is_refused(other: ChunkShape) -> None:
    with pytest.raises(CorruptData, match="not the chunk that was asked for"):
        open_chunk(packed(), "a", SPEC, other)


def test_a_value_whose_v_is_wider_is_refused() -> None:
    header, _ = unseal(packed("a", SPEC, replace(SHAPE, layers=1)))
    store = KVStore(SPEC.bare())
    store.append(torch.randn(1, 2, 256, 32).bfloat16(), torch.randn(1, 2, 256, 48).bfloat16())
    store.seal()
    value = b"".join(pack_stores({0: store}, store.spec, 1, header["model"]))
    with pytest.raises(CorruptData, match="not the chunk that was asked for"):
        open_chunk(value, "a", SPEC, replace(SHAPE, layers=1))


def test_a_value_of_two_rows_or_with_states_is_refused() -> None:
    header, _ = unseal(packed())

    def value(rows: int = 1, states: Any = None) -> bytes:
        kv = [[x.repeat(rows, 1, 1, 1) for x in pair] for pair in values(SHAPE)]
        stores = {layer: sealed(SPEC.bare(), k, v) for layer, (k, v) in enumerate(kv)}
        return b"".join(pack_stores(stores, SPEC.bare(), SHAPE.layers, header["model"], states=states))

    assert len(open_chunk(value(), "a", SPEC, SHAPE)) == SHAPE.layers
    for other in (value(rows=2), value(states={0: {"a": torch.ones(1, 3)}})):
        with pytest.raises(CorruptData, match="not the chunk that was asked for"):
            open_chunk(other, "a", SPEC, SHAPE)


def test_a_value_of_another_spec_is_refused() -> None:
    with pytest.raises(CorruptData, match="not the chunk that was asked for"):
        open_chunk(packed(), "a", PRESETS["packed"], SHAPE)


def test_a_layer_that_lacks_or_that_is_another_is_refused() -> None:
    header, sections = unseal(packed())
    lacking = seal(header | {"layers": header["layers"][:2]}, sections[:2])
    twice = seal(header | {"rows": 2}, sections)
    for data in (lacking, twice):
        with pytest.raises(CorruptData):
            open_chunk(data, "a", SPEC, SHAPE)


def test_every_cut_and_every_flipped_byte_is_a_typed_error() -> None:
    data = packed()
    draw = np.random.default_rng(0)
    for at in [*range(0, 4000, 7), *draw.integers(0, len(data), 500).tolist()]:
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]):
            with pytest.raises(KVCompError):
                open_chunk(damaged, "a", SPEC, SHAPE)


def test_a_newer_version_is_told_from_damage() -> None:
    header, sections = unseal(packed())
    with pytest.raises(UnsupportedVersion):
        open_chunk(seal(header, sections, version=99), "a", SPEC, SHAPE)


def test_the_key_depends_on_all_that_the_bytes_depend_on() -> None:
    about = {"model": "m", "tokens": "00", "rank": 1}
    spec = replace(SPEC, window=7, sinks=1)
    keys = {
        chunk_key(SPEC, about),
        chunk_key(PRESETS["packed"], about),
        chunk_key(SPEC, about | {"rank": 2}),
        chunk_key(SPEC, about | {"tokens": "01"}),
        chunk_key(SPEC, about | {"salt": ""}),
    }
    assert len(keys) == 5
    assert chunk_key(spec, about) == chunk_key(SPEC, about)  # chunks have neither window nor sinks


def test_keys_stay_what_they_were() -> None:
    """Those of chunks that are stored already, from before specs had windows."""
    expected = "0231ea15d0693a479ae62ad02764edcdd175eace38ef6a68bbb1c4ad4bb411cb"
    assert chunk_key(PRESETS["kvcomp:paper"], {"model": "m", "tokens": "00"}) == expected


PLAIN = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
JSON = st.recursive(PLAIN, lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(), of, max_size=3))
HEADS = st.lists(st.floats(0.01, 2), min_size=2, max_size=2).map(tuple)
STEPS = st.lists(HEADS, min_size=3, max_size=3).map(tuple)
CODED = st.builds(CodecSpec, *[st.builds(TensorSpec, st.just("head"), steps=STEPS, classes=st.just(4))] * 2)


@given(CODED | st.sampled_from(list(PRESETS.values())), st.dictionaries(st.text(), JSON, max_size=5))
def test_a_key_is_the_hash_of_the_spec_and_what_it_is_about_as_sorted_json(
    spec: CodecSpec, about: dict[str, Any]
) -> None:
    fields = {name: x for name, x in asdict(spec.bare()).items() if name != "windows" or x is not None}
    content = json.dumps({"spec": fields, "about": about}, sort_keys=True, separators=(",", ":"))
    assert chunk_key(spec, about) == hashlib.sha256(content.encode()).hexdigest()


def test_layers_of_different_tokens_are_refused() -> None:
    long, short = values(SHAPE)[0], values(replace(SHAPE, tokens=64))[1]
    with pytest.raises(InvalidInput):
        pack_chunk("a", SPEC, [long, short])


def test_a_calibrated_chunk_comes_back_as_compress_has_it_and_needs_its_calibration() -> None:
    calibration = Calibration.read(CALIBRATION)
    spec, shape = calibration.spec("balanced"), ChunkShape(4, 2, 128, 64, torch.bfloat16)
    data = b"".join(pack_chunk("a", spec, values(shape), calibration))
    stores = open_chunk(data, "a", spec, shape, calibration)
    for layer, (store, (k, v)) in enumerate(zip(stores, values(shape), strict=True)):
        expected = compress(k[None], v[None], spec, calibration=calibration, layer=layer).decompress()
        for found, same in zip(unpack(store), expected, strict=True):
            assert torch.equal(found, same[0])
    with pytest.raises(InvalidInput, match="calibration"):
        open_chunk(data, "a", spec, shape)
    with pytest.raises(InvalidInput, match="4 layers"):
        pack_chunk("a", spec, values(replace(shape, layers=5)), calibration)
