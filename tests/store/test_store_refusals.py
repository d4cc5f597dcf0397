"""What a store refuses: nothing of it changes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from kvcomp.errors import BackendUnavailable, InvalidInput, KVCompError
from kvcomp.spec import CodecSpec, TensorSpec
from kvcomp.store import KVStore
from stores import fill, snapshot, spec_of, tokens

pytestmark = pytest.mark.usefixtures("poison")

K, V = tokens(3, batch=2)
BAD: dict[str, tuple[Any, Any]] = {
    "rank": (K[0], V[0]),
    "rank 5": (K[None], V[None]),
    "unlike shapes": (K, V[:, :, :2]),
    "unlike heads": (K, V[:, :1]),
    "unlike types": (K, V.half()),
    "float64": (K.double(), V.double()),
    "integers": (K.int(), V.int()),
    "no tokens": (K[:, :, :0], V[:, :, :0]),
    "no rows": (K[:0], V[:0]),
    "no heads": (K[:, :0], V[:, :0]),
    "no channels": (K[..., :0], V[..., :0]),
    "channels": (K[..., :12], V[..., :12]),
    "many channels": (K.repeat(1, 1, 1, 33), V.repeat(1, 1, 1, 33)),
    "device": (K.to("meta"), V.to("meta")),
    "one device": (K, V.to("meta")),
}
UNLIKE = {
    "batch": (K[:1], V[:1]),
    "heads": (K[:, :1], V[:, :1]),
    "head_dim": (K.repeat(1, 1, 1, 2), V.repeat(1, 1, 1, 2)),
    "dtype": (K.bfloat16(), V.bfloat16()),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_append_is_refused_and_changes_nothing(backend: str, name: str) -> None:
    for count in (0, 5, 90):
        store = KVStore(spec_of(), backend)
        if count:
            fill(store, *tokens(count, batch=2), [count])
        before = snapshot(store)
        with pytest.raises(BackendUnavailable if "device" in name else InvalidInput):
            store.append(*BAD[name])
        assert snapshot(store) == before
        store.append(K, V)


@pytest.mark.parametrize("name", UNLIKE)
def test_an_append_unlike_what_is_stored_is_refused_and_changes_nothing(backend: str, name: str) -> None:
    store = fill(KVStore(spec_of(), backend), *tokens(90, batch=2), [90])
    before = snapshot(store)
    with pytest.raises(InvalidInput, match="this cache holds"):
        store.append(*UNLIKE[name])
    assert snapshot(store) == before


def test_a_spec_of_many_layers_and_an_unknown_backend_are_refused() -> None:
    listed = TensorSpec("block", (0.1, 0.2))
    with pytest.raises(InvalidInput, match="layer"):
        KVStore(CodecSpec(listed, listed), "reference")
    with pytest.raises(BackendUnavailable, match="'cpu'"):
        KVStore(spec_of(), "gpu")
    assert issubclass(BackendUnavailable, KVCompError)


def test_a_store_is_not_pickled(backend: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be pickled"):
        pickle.dumps(KVStore(CodecSpec.resolve("kvcomp"), backend))
