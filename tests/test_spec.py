"""CodecSpec: what is accepted, what is refused, and that a spec survives JSON."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomp.errors import InvalidInput, KVCompError, UnsupportedVersion
from kvcomp.spec import (
    CODINGS,
    PAGE_TOKENS,
    PRESETS,
    SPEC_VERSION,
    UNITS,
    WINDOWS_VERSION,
    CodecSpec,
    TensorSpec,
    WindowSpec,
    is_calibrated,
)

BLOCK = TensorSpec("block", 0.05)

RANGED = UNITS[:-1]  # the units with a relative scale

relative_scales = st.floats(0, 1, exclude_min=True, exclude_max=True, allow_nan=False)
steps = st.floats(2.0**-100, 2.0**100)
others = {"coding": st.sampled_from(CODINGS), "limit": st.integers(10, 12), "classes": st.sampled_from([1, 4])}
ranged_specs = st.builds(
    TensorSpec,
    unit=st.sampled_from(RANGED),
    relative_scale=relative_scales | st.lists(relative_scales, min_size=1, max_size=5).map(tuple),
    **others,
)
head_specs = st.builds(
    TensorSpec,
    unit=st.just("head"),
    steps=st.lists(st.lists(steps, min_size=1, max_size=3).map(tuple), min_size=1, max_size=5).map(tuple),
    **others,
)
codec_specs = st.builds(
    CodecSpec,
    key=ranged_specs | head_specs,
    value=ranged_specs | head_specs,
    window=st.integers(0, 65536),
    sinks=st.integers(0, 65536),
    calibration=st.none() | st.text("0123456789abcdef", min_size=16, max_size=64),
)


@st.composite
def specs_with_windows(draw: st.DrawFn) -> CodecSpec:
    layers, coding = draw(st.integers(1, 20)), draw(st.sampled_from(CODINGS))
    scaled = st.builds(TensorSpec, st.sampled_from(RANGED), relative_scales, st.just(coding), others["limit"])
    some = draw(st.lists(st.integers(0, layers - 1), min_size=1, unique=True).map(sorted))
    heads = TensorSpec("head", coding=coding, steps=((1.0, 2.0),) * layers)
    windows = WindowSpec(tuple(some), draw(scaled), draw(scaled))
    return CodecSpec(heads, heads, draw(st.integers(0, 9)), draw(st.integers(0, 9)), "ab" * 8, windows)


WINDOWS = WindowSpec((0, 2), TensorSpec("channel", 0.04), TensorSpec("token", 0.1))
HEADS = TensorSpec("head", steps=((1.0,),) * 3)
WITH_WINDOWS = CodecSpec(HEADS, HEADS, calibration="ab" * 8, windows=WINDOWS)


def changed(**change: Any) -> str:
    """The JSON of the preset with some of its top fields changed; None takes a field away."""
    content = {**json.loads(PRESETS["kvcomp"].to_json()), **change}
    return json.dumps({name: value for name, value in content.items() if value is not None})


@given(codec_specs | specs_with_windows())
def test_a_spec_survives_json(spec: CodecSpec) -> None:
    again = CodecSpec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.to_json() == spec.to_json()


@given(codec_specs)
def test_json_names_the_version_and_every_field(spec: CodecSpec) -> None:
    content = json.loads(spec.to_json())
    assert set(content) - {"calibration"} == {"kvcomp_spec", "key", "value", "window", "sinks"}
    assert ("calibration" in content) == (spec.calibration is not None)
    assert content["kvcomp_spec"] == SPEC_VERSION == 1
    scale = "steps" if spec.key.unit == "head" else "relative_scale"
    assert set(content["key"]) == {"unit", scale, "coding", "limit", "classes"}


@given(specs_with_windows())
def test_windows_are_a_version_of_their_own_and_their_layers_need_no_calibration(spec: CodecSpec) -> None:
    windows, content = spec.windows, json.loads(spec.to_json())
    assert windows is not None
    assert content["kvcomp_spec"] == WINDOWS_VERSION == 2
    assert set(content["windows"]) == {"layers", "key", "value"}
    layers = spec.key.layers or 0
    for index in range(layers):
        layer = spec.layer(index, layers)
        assert layer.windows is None
        assert (layer.window, layer.sinks) == (spec.window, spec.sinks)
        plain = index in windows.layers
        assert (layer.calibration is None) == plain
        assert (layer.key == windows.key) == (layer.value == windows.value) == plain
    with pytest.raises(InvalidInput, match="layers"):
        spec.layer(windows.layers[0], layers + 1)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": ()}, {"layers": None}, {"layers": 0}, {"layers": (2, 0)}, {"layers": (0, 0)}, {"layers": (-1,)},
        {"layers": (True,)}, {"layers": ("0",)}, {"layers": (0.0,)}, {"layers": (1 << 12,)}, {"layers": range(1)},
        {"layers": tuple(range(4097))}, {"key": HEADS}, {"key": None}, {"value": "token"},
        {"value": TensorSpec("token", (0.1, 0.2, 0.3))},
    ],
)  # fmt: skip
def test_windows_refuse(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"windows"):
        replace(WINDOWS, **change)


def test_windows_must_fit_their_spec() -> None:
    patched = TensorSpec("head", coding="patched", steps=HEADS.steps)
    for change, match in (
        ({"calibration": None}, "only a spec with a calibration"),
        ({"windows": WINDOWS.key}, "must be a WindowSpec"),
        ({"key": patched}, "coding"),
        ({"value": patched}, "coding"),
        ({"windows": replace(WINDOWS, layers=(0, 3))}, "the layer 3"),
    ):
        with pytest.raises(InvalidInput, match=match):
            replace(WITH_WINDOWS, **change)


def test_json_of_windows_is_checked() -> None:
    def text(version: int = 2, **fields: Any) -> str:
        content = json.loads(WITH_WINDOWS.to_json())
        windows = {name: x for name, x in {**content["windows"], **fields}.items() if x is not None}
        return json.dumps({**content, "kvcomp_spec": version, "windows": windows})

    assert CodecSpec.from_json(text()) == WITH_WINDOWS
    for wrong in (
        text(1), text(more=1), text(layers=None), text(key=None), text(value=[]), text(layers=[2, 1]), text(layers=[9]),
        text(key={"unit": "channel", "relative_scale": 2}), json.dumps({**json.loads(text()), "windows": None}),
        json.dumps({**json.loads(text()), "windows": [1, 2]}),
    ):  # fmt: skip
        with pytest.raises(InvalidInput):
            CodecSpec.from_json(wrong)
    with pytest.raises(UnsupportedVersion, match="reads version 1, and 2 with windows"):
        CodecSpec.from_json(text(3))


@given(st.lists(steps, min_size=1, max_size=20))
def test_steps_are_rounded_to_16_significant_bits_so_that_their_multiples_are_exact(given: list[float]) -> None:
    rounded = TensorSpec("head", steps=(tuple(given),)).heads
    assert rounded is not None
    for step, found in zip(given, rounded, strict=True):
        assert abs(found - step) <= step * 2.0**-16
        assert int(found / 2.0 ** (math.frexp(found)[1] - 16)) * 2.0 ** (math.frexp(found)[1] - 16) == found
        for q in (-128, -3, 127):
            assert float(np.float32(q * found)) == q * found


@pytest.mark.parametrize(
    "bad",
    [
        None, (), [], ((),), (1.0,), ((1.0,), ()), ((0.0,),), ((-1.0,),), ((True,),), (("1",),), ((math.nan,),),
        ((math.inf,),), ((2.0**-101,),), ((2.0**101,),), 1.0, "steps", {"a": 1},
    ],
)  # fmt: skip
def test_a_head_spec_refuses_what_are_no_steps(bad: Any) -> None:
    with pytest.raises(InvalidInput, match="step"):
        TensorSpec("head", steps=bad)


def test_steps_belong_to_the_unit_head_and_a_relative_scale_to_the_others() -> None:
    with pytest.raises(InvalidInput, match="no relative_scale"):
        TensorSpec("head", 0.1, steps=((1.0,),))
    with pytest.raises(InvalidInput, match="no steps"):
        TensorSpec("block", 0.1, steps=((1.0,),))
    with pytest.raises(InvalidInput, match="needs a relative_scale"):
        TensorSpec("block")


def test_a_layer_takes_the_steps_of_its_heads() -> None:
    spec = CodecSpec(TensorSpec("head", steps=((1.0, 2.0), (3.0, 4.0))), TensorSpec("token", 0.1), calibration="ab" * 8)
    layer = spec.layer(1, 2)
    assert layer.key.steps == ((3.0, 4.0),)
    assert layer.key.scale == layer.key.heads == (3.0, 4.0)
    assert layer.value == spec.value
    assert layer.value.heads is None
    assert layer.calibration == spec.calibration
    assert layer.layer(0, 1) == layer
    for index, layers in ((0, 1), (0, 3), (2, 3)):
        with pytest.raises(InvalidInput, match="2 layers"):
            spec.layer(index, layers)


def test_json_lists_are_steps() -> None:
    text = json.dumps(
        {
            "kvcomp_spec": 1,
            "key": {"unit": "head", "steps": [[0.5], [1]]},
            "value": {"unit": "head", "steps": [[2], [3]]},
        }
    )
    assert CodecSpec.from_json(text).key == TensorSpec("head", steps=((0.5,), (1.0,)))


@pytest.mark.parametrize("bad", ["", "ab", "AB" * 8, "0" * 65, 1234567812345678, "g" * 16, "ab" * 8 + "\n", True])
def test_a_calibration_is_hexadecimal_digits(bad: Any) -> None:
    with pytest.raises(InvalidInput, match="calibration"):
        CodecSpec(BLOCK, BLOCK, calibration=bad)


def test_fields_left_out_of_the_json_take_their_defaults() -> None:
    spec = CodecSpec.from_json(
        '{"kvcomp_spec": 1, "key": {"unit": "channel", "relative_scale": [0.1, 0.2]}, '
        '"value": {"unit": "token", "relative_scale": 0.25}}'
    )
    assert spec == CodecSpec(TensorSpec("channel", (0.1, 0.2), "huffman", 12, 1), TensorSpec("token", 0.25), 64, 4)


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        PRESETS["kvcomp"].window = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("unit", bad) for bad in ("Block", "", "head", None, 1, ["block"])),
        *(("coding", bad) for bad in ("Huffman", "none", None, 8)),
        *(
            ("relative_scale", bad)
            for bad in (0, 1, 0.0, 1.0, -0.1, 1.5, float("nan"), float("inf"), "0.1", None, True)
        ),
        *(("relative_scale", bad) for bad in ((), [], (0.1, 0.0), [0.1, 2], (0.1, None), (0.1, True), ((0.1,),))),
        *(("limit", bad) for bad in (9, 13, 0, -8, 12.0, "12", None, True)),
        *(("classes", bad) for bad in (0, 2, 3, 5, -1, "1", None, True, 4.0)),
    ],
)
def test_a_tensor_spec_refuses(field: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=field):
        replace(BLOCK, **{field: value})


@pytest.mark.parametrize("value", [-1, 65537, 64.0, "64", None, True])
@pytest.mark.parametrize("field", ["window", "sinks"])
def test_a_codec_spec_refuses_a_number_of_tokens(field: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=field):
        CodecSpec(BLOCK, BLOCK, **{field: value})


@pytest.mark.parametrize("value", [None, "block", {"unit": "block", "relative_scale": 0.1}])
@pytest.mark.parametrize("field", ["key", "value"])
def test_key_and_value_must_be_tensor_specs(field: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=field):
        CodecSpec(**{"key": BLOCK, "value": BLOCK, field: value})


@pytest.mark.parametrize("tokens", [0, 1, 65536])
def test_window_and_sinks_may_be_from_0_to_65536(tokens: int) -> None:
    spec = CodecSpec(BLOCK, BLOCK, window=tokens, sinks=tokens)
    assert (spec.window, spec.sinks) == (tokens, tokens)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "null",
        "[]",
        "3",
        '"kvcomp"',
        "{}",
        '{"key": {}, "value": {}}',
        '{"kvcomp_spec": 1}',
        '{"kvcomp_spec": 1, "key": {"unit": "block", "relative_scale": 0.1}}',
        changed(key=None),
        changed(value="token"),
        changed(value=[0.1]),
        changed(key={"unit": "block"}),
        changed(key={"relative_scale": 0.1}),
        changed(key={"unit": "block", "relative_scale": 0.1, "levels": 9}),
        changed(key={"unit": "block", "relative_scale": "0.1"}),
        changed(key={"unit": "block", "relative_scale": {}}),
        changed(window="64"),
        changed(window=-1),
        changed(transform="klt"),
        changed(key={"unit": "block", "relative_scale": float("nan")}),
    ],
)
def test_json_that_is_no_spec_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        CodecSpec.from_json(text)


def test_deeply_nested_json_is_refused() -> None:
    with pytest.raises(InvalidInput):
        CodecSpec.from_json("[" * 200_000)


@given(
    st.text()
    | st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_any_other_json_or_text_gives_a_typed_error(content: Any) -> None:
    for text in (content if isinstance(content, str) else "", json.dumps(content), changed(key=content or 0)):
        with pytest.raises(KVCompError):
            CodecSpec.from_json(text)


@pytest.mark.parametrize("version", [0, 2, 99, -1, 1.5, "1", [1], {}, True, False])
def test_another_version_is_refused_as_such_even_with_fields_not_known_here(version: Any) -> None:
    with pytest.raises(UnsupportedVersion, match="reads version 1"):
        CodecSpec.from_json(changed(kvcomp_spec=version, more="fields"))


@given(st.lists(relative_scales, min_size=2, max_size=6).map(tuple), relative_scales, st.data())
def test_a_layer_takes_its_own_scale_and_nothing_else_changes(
    scales: tuple[float, ...], common: float, data: st.DataObject
) -> None:
    spec = CodecSpec(TensorSpec("channel", scales, limit=10), TensorSpec("token", common, classes=4), window=3, sinks=2)
    index = data.draw(st.integers(0, len(scales) - 1))
    layer = spec.layer(index, len(scales))
    assert layer == CodecSpec(
        TensorSpec("channel", scales[index], limit=10), TensorSpec("token", common, classes=4), window=3, sinks=2
    )
    assert (layer.key.scale, layer.value.scale) == (scales[index], common)
    assert layer.layer(0, 7) == layer


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_scales_for_another_number_of_layers_are_refused(layers: int) -> None:
    listed = TensorSpec("block", (0.1, 0.2, 0.3))
    for spec in (CodecSpec(listed, BLOCK), CodecSpec(BLOCK, listed)):
        with pytest.raises(InvalidInput, match="3 layers"):
            spec.layer(0, layers)


@pytest.mark.parametrize(("index", "layers"), [(3, 3), (-1, 3), (0, 0), (1, 1)])
def test_a_layer_that_does_not_exist_is_refused(index: int, layers: int) -> None:
    for spec in (CodecSpec(BLOCK, BLOCK), CodecSpec(TensorSpec("block", (0.1, 0.2, 0.3)), BLOCK)):
        with pytest.raises(InvalidInput):
            spec.layer(index, layers)


def test_a_spec_with_a_scale_for_each_layer_has_no_single_scale() -> None:
    with pytest.raises(InvalidInput, match="layer"):
        _ = TensorSpec("block", (0.1, 0.2)).scale


def test_a_list_of_scales_is_kept_as_a_tuple() -> None:
    assert TensorSpec("block", [0.1, 0.2]).scales == (0.1, 0.2)  # type: ignore[arg-type]


def test_the_presets_of_the_paper_are_the_published_ones() -> None:
    assert PAGE_TOKENS == 64
    assert PRESETS["kvcomp:paper"] == CodecSpec(
        TensorSpec("block", 0.05, "huffman", 12, 1), TensorSpec("token", 0.1, "huffman", 12, 1), window=64, sinks=4
    )
    packed = PRESETS["packed:paper"]
    assert (packed.key, packed.value) == (TensorSpec("block", 1 / 14, "fixed"), TensorSpec("token", 1 / 14, "fixed"))


def test_the_other_presets_have_a_scale_for_each_channel_of_k() -> None:
    """What they write is in files and stores of users: a change needs a line in the CHANGELOG."""
    assert PRESETS["kvcomp"] == CodecSpec(
        TensorSpec("channel", 0.08, "huffman", 12, 1), TensorSpec("token", 0.15, "huffman", 12, 1), window=64, sinks=4
    )
    fine = PRESETS["kvcomp:fine"]
    assert (fine.key, fine.value) == (TensorSpec("channel", 0.04), TensorSpec("token", 0.1))
    packed = PRESETS["packed"]
    assert (packed.key, packed.value) == (TensorSpec("channel", 0.08, "fixed"), TensorSpec("token", 1 / 6, "fixed"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_spec_resolves_from_itself_its_name_and_its_file(name: str, tmp_path: Path) -> None:
    spec = PRESETS[name]
    path = tmp_path / "my spec.json"
    path.write_text(spec.to_json(), encoding="utf-8")
    assert CodecSpec.resolve(spec) is spec
    assert CodecSpec.resolve(name) == CodecSpec.resolve(path) == CodecSpec.resolve(str(path)) == spec


@pytest.mark.parametrize("name", ["kvcompress", "", "spec.yaml", "KVCOMP"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InvalidInput, match="kvcomp, kvcomp:fine, packed"):
        CodecSpec.resolve(name)


def test_a_spec_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.json", binary):
        with pytest.raises(InvalidInput, match="cannot read"):
            CodecSpec.resolve(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kvcomp-klt", True),
        ("kvcomp-klt:balanced", True),
        ("packed-klt", True),
        ("packed-klt:aggressive", True),
        ("kvcomp", False),
        ("packed", False),
        ("kvcomp-klt2", False),
        (None, False),
    ],
)
def test_the_names_that_need_a_calibration(name: object, expected: bool) -> None:
    assert is_calibrated(name) is expected
