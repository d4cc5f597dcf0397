"""Stores under a calibration whose means of K turn with the place of a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calibrating import calibrated, like_keys
from kvcomp import files
from kvcomp.calibration import Calibration
from kvcomp.calibration.rotary import FASTEST, Rotation
from kvcomp.errors import InvalidInput
from kvcomp.store import KVStore
from kvcomp.store.attention import attend, attend_tiled
from kvcomp.store.pages import error_shares

HEADS, CHANNELS, SCALING = 2, 32, 32**-0.5
PAIRS = np.array([[0, 16], [1, 17], [2, 18], [5, 9]])
ROTATION = Rotation.of(PAIRS, np.array([1.0, 0.1, 3e-4, 1e-5]), CHANNELS)
MADE = calibrated(1, HEADS, CHANNELS, rotation=ROTATION)
TOKENS = 700


def turned(x: Tensor, starts: list[int] | None = None) -> Tensor:
    """Keys as a model turns them, row by row from the start of each."""
    places = torch.arange(x.shape[2]) - torch.tensor(starts or [0] * len(x))[:, None]
    return ROTATION.turned(x, places)


def kv(batch: int, starts: list[int] | None = None) -> tuple[Tensor, Tensor]:
    k = turned(like_keys(batch, HEADS, TOKENS, CHANNELS, 7), starts)
    return k, like_keys(batch, HEADS, TOKENS, CHANNELS, 8).flip(-1)


def store(calibration: Calibration = MADE) -> KVStore:
    spec = calibration.spec("balanced")
    return KVStore(spec.layer(0, 1), "cpu", *(calibration.layer(0, spec) or ()))


def filled(k: Tensor, v: Tensor, starts: list[int] | None = None) -> KVStore:
    """A prompt, then tokens one by one."""
    made = store()
    made.append(k[:, :, : TOKENS - 20], v[:, :, : TOKENS - 20])
    made.set_starts(starts or [0] * len(k))
    made.seal()
    for token in range(TOKENS - 20, TOKENS):
        made.append(k[:, :, token : token + 1], v[:, :, token : token + 1])
        made.seal()
    return made


def expected(made: KVStore, q: Tensor, softcap: float = 0.0, logits: Tensor | None = None) -> Tensor:
    """Causal attention over what the store gives back, float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // HEADS, 1) for x in made.dense())
    score = SCALING * q.double() @ k.mT
    score = softcap * torch.tanh(score / softcap) if softcap else score
    queries, tokens = score.shape[2:]
    position = torch.arange(tokens)
    hidden = position > torch.arange(tokens - queries, tokens)[:, None]
    hidden = hidden | (position < torch.from_numpy(made.starts)[:, None, None, None])
    score = score.masked_fill(hidden, -torch.inf)
    if logits is not None:
        score = torch.cat([score, logits.double()[:, None, None].expand(*score.shape[:3], 1)], -1)
    return score.softmax(-1)[..., :tokens] @ v


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("starts", [None, [0, 37]])
def test_attention_is_that_over_what_the_store_gives_back(queries: int, starts: list[int] | None, backend: str) -> None:
    k, v = kv(2, starts)
    made = filled(k, v, starts).on(backend)
    assert made.compressed
    q = 0.1 * torch.randn(2, 2 * HEADS, queries, CHANNELS)
    same(attend(made, q, SCALING), expected(made, q))
    same(attend_tiled(made, q, SCALING), expected(made, q))


@pytest.mark.parametrize("queries", [1, 40])
def test_sink_logits_and_soft_caps_see_the_whole_score(queries: int) -> None:
    made = filled(*kv(2))
    q, logits = 0.1 * torch.randn(2, 2 * HEADS, queries, CHANNELS), torch.tensor([3.0, -3.0, 6.0, 0.0])
    for function in (attend, attend_tiled):
        same(function(made, q, SCALING, sink_logits=logits), expected(made, q, logits=logits))
    with pytest.raises(InvalidInput, match="soft cap"):
        attend(made, q, SCALING, 5.0)  # of channels that do not turn there is a mean too
    whole = Rotation.of(np.arange(CHANNELS).reshape(-1, 2), np.linspace(0, 1, CHANNELS // 2), CHANNELS)
    capped = store(calibration=calibrated(1, HEADS, CHANNELS, rotation=whole))
    capped.append(*kv(2))
    capped.seal()
    for function in (attend, attend_tiled):
        same(function(capped, q, SCALING, 5.0), expected(capped, q, 5.0))


def test_the_mean_is_gone_at_every_place() -> None:
    """K' has none left, and what comes back is as near as promised."""
    k, v = kv(2, [0, 37])
    made = filled(k, v, [0, 37])
    held = made.held()[0][1, :, 37:]
    assert float((held.mean(1) / held.std(1)).abs().max()) < 0.3
    assert max(float(np.abs(share).max()) for _, share in error_shares(made, k, v)) <= 1
    still = filled(k, v)  # as if the padding were tokens: other places, the same K within the bound
    assert max(float(np.abs(share).max()) for _, share in error_shares(still, k, v)) <= 1


CHANGES: dict[str, Callable[[KVStore, Path], KVStore]] = {
    "crop": lambda made, folder: changed(made, lambda: made.crop(333)),
    "select": lambda made, folder: changed(made, lambda: made.select([1, 1, 0])),
    "join": lambda made, folder: made.join([filled(*kv(1))]),
    "file": lambda made, folder: loaded(made, folder / "cache.kvc"),
}


def changed(made: KVStore, change: Callable[[], None]) -> KVStore:
    change()
    return made


def loaded(made: KVStore, path: Path) -> KVStore:
    files.save(path, {0: made}, MADE.spec("balanced"), 1)
    return files.load(files.open_container(path), calibration=MADE)[0]


@pytest.mark.parametrize("change", CHANGES)
def test_places_stay_with_their_tokens(change: str, tmp_path: Path) -> None:
    k, v = kv(2, [0, 37])
    made = CHANGES[change](filled(k, v, [0, 37]), tmp_path)
    more = like_keys(made.batch, HEADS, 130, CHANNELS, 9)
    places = made.tokens + torch.arange(130) - torch.from_numpy(made.starts)[:, None]
    made.append(ROTATION.turned(more, places), like_keys(made.batch, HEADS, 130, CHANNELS, 10))
    made.seal()
    q = 0.1 * torch.randn(made.batch, 2 * HEADS, 3, CHANNELS)
    same(attend(made, q, SCALING), expected(made, q))
    assert float((made.held()[0][..., -400:, :].mean(2)).abs().max()) < 1.5


@given(
    st.lists(st.floats(-FASTEST, FASTEST), min_size=1, max_size=4),
    st.integers(-(2**20), 2**20),
    st.integers(1, 150),
)
def test_turning_back_undoes_turning(speed: list[float], place: int, tokens: int) -> None:
    rotation = Rotation.of(PAIRS[: len(speed)], np.array(speed), CHANNELS)
    x = torch.randn(HEADS, 3, CHANNELS, dtype=torch.float64)
    places = torch.tensor([place, 0, -5])
    there = rotation.turned(x, places)
    assert torch.allclose(rotation.turned(there, -places), x, atol=1e-9)
    assert torch.equal(there[:, 1], x[:, 1])
    q, mean = torch.randn(1, HEADS, 2, CHANNELS), torch.randn(HEADS, CHANNELS)
    begin = abs(place)
    wanted = q @ (rotation.turned(mean, torch.arange(begin, begin + tokens)) - rotation.still(mean)[:, None]).mT
    found = q @ rotation.folded(mean) @ rotation.waves(torch.arange(begin, begin + tokens)).mT
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("pairs", "speed"),
    [
        ([[0, 0]], [0.1]),
        ([[0, 1], [1, 2]], [0.1, 0.1]),
        ([[0, CHANNELS]], [0.1]),
        ([[-1, 0]], [0.1]),
        ([[0, 1]], [np.nan]),
        ([[0, 1]], [4.0]),
        ([[0, 1]], [0.1, 0.2]),
        (np.zeros((0, 2), int), []),
    ],
)
def test_what_turns_no_pairs_is_refused(pairs: list[list[int]], speed: list[float]) -> None:
    with pytest.raises(InvalidInput, match="rotation"):
        Rotation.of(np.array(pairs), np.array(speed), CHANNELS)


def test_a_file_keeps_the_rotation() -> None:
    assert MADE.layers[0][0].key.rotation == ROTATION
    assert MADE.layers[0][0].value.rotation is None
