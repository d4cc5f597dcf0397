"""States in a .kvc file, which layers of linear attention have in place of K and V."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from containers import FILES, SMALL, STATES, open_bytes, refused
from kvcomp import files
from kvcomp.codec.dtypes import DTYPES
from kvcomp.errors import CorruptData, InvalidInput, KVCompError, LimitExceeded, UnsupportedVersion
from kvcomp.spec import PRESETS
from kvcomp.store import KVStore
from kvcomp.store.tensors import TYPES, as_array
from sealing import seal, seal_text, unseal

HUGE = 1 << 63


def small(rows: int = 2) -> KVStore:
    store = KVStore(PRESETS["kvcomp"])
    store.append(*torch.randn(2, rows, 1, 5, 16))
    return store


def written(states: Any, rows: list[int] | None = None) -> bytes:
    return b"".join(files.pack_stores({1: small()}, PRESETS["kvcomp"], 4, None, rows, states))


shapes = st.lists(st.integers(1, 5), max_size=5)
tensors = st.builds(
    lambda shape, dtype: torch.randn(2, *shape).to(TYPES[dtype]), shapes, st.sampled_from(sorted(TYPES))
)
layers = st.dictionaries(st.integers(0, 3), st.dictionaries(st.text("ab.0", min_size=1), tensors, min_size=1))


@given(layers, st.lists(st.integers(0, 1), min_size=1, max_size=3))
def test_states_come_back_bit_by_bit(states: dict[int, dict[str, torch.Tensor]], rows: list[int]) -> None:
    data = written(states)
    for back, chosen in (
        (files.load_states(open_bytes(data)), [0, 1]),
        (files.load_states(open_bytes(data), rows), rows),
        (files.load_states(open_bytes(written(states, rows))), rows),
    ):
        assert {layer: set(found) for layer, found in back.items()} == {x: set(of) for x, of in states.items()}
        for layer, of_layer in states.items():
            for name, x in of_layer.items():
                found = back[layer][name]
                assert (found.dtype, found.shape) == (x.dtype, (len(chosen), *x.shape[1:]))
                assert as_array(found).tobytes() == as_array(x[chosen]).tobytes()
    assert data[10:12] == bytes([bool(states), 0])


def test_a_stranger_reads_the_golden_states() -> None:
    header, sections = unseal(STATES)
    values = b"".join(parts["state"] for parts in sections[1:])
    assert (FILES / "states.values.bin").read_bytes().endswith(values)
    assert STATES[8:12] == b"\1\0\1\0"
    found = files.load_states(open_bytes(STATES))
    for about, parts in zip(header["states"], sections[1:], strict=True):
        expected = np.frombuffer(parts["state"], DTYPES[about["dtype"]].array).reshape(about["shape"])
        assert np.array_equal(as_array(found[about["layer"]][about["name"]]), expected)
    assert unseal(SMALL)[1][0] == sections[0]


def test_what_no_file_can_hold() -> None:
    with pytest.raises(InvalidInput, match="int64: no file can hold it"):
        written({0: {"a": torch.ones(2, 3, dtype=torch.int64)}})
    with pytest.raises(CorruptData, match="the first of 2 rows"):
        written({0: {"a": torch.ones(3, 3)}})
    with pytest.raises(CorruptData, match="among 4 layers"):
        written({4: {"a": torch.ones(2, 3)}})


# Damage


def test_every_flipped_bit_is_noticed() -> None:
    for position in range(0, 8 * len(STATES), 11):
        data = bytearray(STATES)
        data[position // 8] ^= 1 << position % 8
        assert refused(bytes(data)), position


def test_every_truncation_and_extension_is_noticed() -> None:
    assert not refused(STATES)
    for length in range(0, len(STATES), 5):
        assert refused(STATES[:length]), length
    for more in (b"\0", bytes(64), STATES):
        assert refused(STATES + more)


def test_the_flag_and_the_field_go_together() -> None:
    header, sections = unseal(STATES)
    with pytest.raises(CorruptData, match="must be an object with the fields"):
        open_bytes(seal(deepcopy(header), sections, flags=0))
    with pytest.raises(CorruptData, match="must be an object with the fields"):
        open_bytes(seal(*unseal(SMALL), flags=1))
    with pytest.raises(UnsupportedVersion, match="unknown flags 0x4"):
        open_bytes(seal(deepcopy(header), sections, flags=5))


EDITS: list[tuple[str, Any, type[KVCompError], str]] = [
    ("layer", 3, CorruptData, "not in order among 3 layers"),
    ("layer", 2, CorruptData, "not in order"),
    ("layer", -1, CorruptData, "whole number"),
    ("layer", True, CorruptData, "whole number"),
    ("name", "", CorruptData, "name of 1 to 64"),
    ("name", 65 * "a", CorruptData, "name of 1 to 64"),
    ("name", "z", CorruptData, "not in order"),
    ("name", "recurrent_states.0", CorruptData, "not in order"),
    ("name", 5, CorruptData, "name of 1 to 64"),
    ("dtype", "float64", CorruptData, "unknown dtype"),
    ("dtype", [], CorruptData, "unknown dtype"),
    ("dtype", "float32", CorruptData, "another size"),
    ("shape", [], CorruptData, "1 to 8 dimensions"),
    ("shape", [1, *[1] * 8], CorruptData, "1 to 8 dimensions"),
    ("shape", [2, 12, 4], CorruptData, "the first of 1 rows"),
    ("shape", [1, 24, 5], CorruptData, "another size"),
    ("shape", [1, 24, -4], CorruptData, "whole number"),
    ("shape", [1, 0, 4], CorruptData, "whole number"),
    ("shape", [1, 24.0, 4], CorruptData, "whole number"),
    ("shape", [1, HUGE - 1, HUGE - 1], CorruptData, "another size"),
    ("shape", [1, HUGE], LimitExceeded, "claims side"),
    ("shape", {"0": 1}, CorruptData, "and a shape"),
    ("section", [0, 192, "0" * 16], CorruptData, "does not lie where"),
    ("section", [0, 192], CorruptData, "needs an offset"),
    ("more", 1, CorruptData, "a state in the header must be"),
]


@pytest.mark.parametrize(("field", "value", "error", "match"), EDITS)
def test_a_hostile_header_is_refused(field: str, value: Any, error: type[KVCompError], match: str) -> None:
    header, _ = unseal(STATES)
    body = STATES[-(-(24 + int.from_bytes(STATES[12:16], "little")) // 64) * 64 :]
    header["states"][0][field] = value
    with pytest.raises(error, match=match):
        open_bytes(seal_text(json.dumps(header).encode(), flags=1) + body)


@pytest.mark.parametrize("states", [[], {}, [1], None])
def test_a_list_of_states_that_is_none(states: Any) -> None:
    header, _ = unseal(STATES)
    header["states"] = states
    with pytest.raises(CorruptData, match=r"at least one|a state in the header must be"):
        open_bytes(seal_text(json.dumps(header).encode(), flags=1))
