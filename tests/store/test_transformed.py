"""Stores with a calibration: what they promise, on ordinary and on hostile values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import kvcomp
from calibrating import calibrated, like_keys
from kvcomp import files
from kvcomp.calibration import Calibration
from kvcomp.calibration.transform import Transform, logit_bound, value_bound
from kvcomp.codec.page import RAW, directory_of
from kvcomp.errors import InvalidInput
from kvcomp.store import KVStore
from kvcomp.store.attention import attend, attend_tiled

HEADS, CHANNELS = 2, 32
MADE = calibrated(1, HEADS, CHANNELS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of one value, relative


def kv(batch: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    k = like_keys(batch, HEADS, tokens, CHANNELS, 2 * seed)
    return k.to(dtype), like_keys(batch, HEADS, tokens, CHANNELS, 2 * seed + 1).flip(-1).to(dtype)


def store(level: str = "balanced", calibration: Calibration = MADE, backend: str = "cpu") -> KVStore:
    spec = calibration.spec(level)
    return KVStore(spec.layer(0, 1), backend, *(calibration.layer(0, spec) or ()))


def filled(k: Tensor, v: Tensor, level: str = "balanced", calibration: Calibration = MADE) -> KVStore:
    made = store(level, calibration)
    made.append(k, v)
    made.seal()
    return made


def exact(k: Tensor, v: Tensor, q: Tensor, scaling: float = CHANNELS**-0.5) -> Tensor:
    """Causal attention of the last queries, float64."""
    tokens, queries = k.shape[2], q.shape[2]
    mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    return torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, scale=scaling, enable_gqa=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_attention_is_that_over_what_the_store_gives_back(dtype: torch.dtype, queries: int) -> None:
    made = filled(*kv(2, 400, dtype=dtype))
    q = (0.1 * torch.randn(2, 2 * HEADS, queries, CHANNELS)).to(dtype)
    inner = made.transform
    assert inner is not None
    expected = inner.outputs(exact(*made.held(), inner.queries(q)).float())
    # the fused kernel takes coded values before they are rounded to the dtype
    tolerance = {"atol": max(1e-4, 8 * ROUNDING[dtype]), "rtol": 2 * ROUNDING[dtype]}
    assert torch.allclose(attend(made, q, CHANNELS**-0.5).float(), expected, **tolerance)
    assert torch.allclose(attend_tiled(made, q, CHANNELS**-0.5).float(), expected, **tolerance)


@pytest.mark.parametrize("queries", [1, 40])
def test_a_sink_logit_is_held_against_scores_with_the_mean_that_k_lost(queries: int) -> None:
    made, scaling = filled(*kv(2, 400)), CHANNELS**-0.5
    q = 0.1 * torch.randn(2, 2 * HEADS, queries, CHANNELS)
    logits = torch.tensor([3.0, -3.0, 6.0, 0.0])
    k, v = (torch.nn.functional.pad(x, (0, 0, 1, 0)) for x in made.dense())  # the sink as a token in front, without V
    score = q.double() @ k.repeat_interleave(2, 1).double().mT * scaling
    score[..., 0] = logits[:, None]
    ahead = torch.ones(queries, 401, dtype=torch.bool).triu(401 - queries + 1)
    expected = score.masked_fill(ahead, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1).double()
    for found in (attend(made, q, scaling, 0.0, logits), attend_tiled(made, q, scaling, sink_logits=logits)):
        torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-4)


def test_dense_undoes_the_transform() -> None:
    k, v = kv(1, 200)
    made = store()
    made.append(k, v)
    assert torch.allclose(made.dense()[0], k, atol=1e-4)  # nothing is coded yet
    made.seal()
    assert made.compressed
    assert 0.01 < (made.dense()[0] - k).abs().max() < 20
    assert torch.allclose(made.dense()[0][:, :, :4], k[:, :, :4], atol=1e-4)  # sinks
    assert torch.allclose(made.dense()[1][:, :, 140:], v[:, :, 140:], atol=1e-4)  # the window


@pytest.mark.parametrize("level", MADE.levels)
def test_coded_values_keep_their_bounds(level: str) -> None:
    k, v = kv(1, 64 * 9)
    made = filled(k, v, level)
    steps = MADE.layers[0][1][level].steps
    for index, (x, back) in enumerate(zip((k, v), made.dense(), strict=True)):
        affine = (MADE.layers[0][0].key, MADE.layers[0][0].value)[index]
        step = torch.tensor(steps[index])
        change = affine.apply(back) - affine.apply(x)
        assert (change.abs().amax((0, 2, 3)) <= step / 2 * 1.001).all()  # within rounding to float32
        assert (change.norm(dim=-1).amax((0, 2)) <= step / 2 * CHANNELS**0.5).all()
        assert ((back - x).abs() <= value_bound(made.held()[index], step, affine)).all()
        assert change.abs().max() > step.min() / 4


HOSTILE = ["outlier channel", "sink token", "far outside", "one huge value"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ordinary", *HOSTILE])
@pytest.mark.parametrize("level", ["near-lossless", "aggressive"])
def test_logits_keep_their_certificate_whatever_comes(kind: str, level: str, dtype: torch.dtype) -> None:
    """Against the logits of the uncompressed K in exact arithmetic: coded and raw tokens, sinks and window."""
    k, v = hostile(kind, dtype)
    held = filled(k, v, level).held()[0]
    transform, steps = MADE.layers[0][0], torch.tensor(MADE.layers[0][1][level].steps[0])
    q = torch.randn(1, 2 * HEADS, 30, CHANNELS).to(dtype)
    error = (logits(held, q, transform, 0.3) - exact_logits(k, q, transform, 0.3)).abs()
    bound = logit_bound(q, held, steps, transform, 0.3)
    assert (error <= bound).all()
    if kind == "ordinary":
        assert (error.amax(-1) > bound.amax(-1) / 20).all()


def logits(held: Tensor, q: Tensor, transform: Transform, scaling: float) -> Tensor:
    """As a store's attention computes them, in float32."""
    return scaling * (transform.queries(q) @ held.float().repeat_interleave(2, 1).mT).double()


def exact_logits(k: Tensor, q: Tensor, transform: Transform, scaling: float) -> Tensor:
    """Those of the keys less their mean, float64."""
    moved = k.double() - transform.key.mean.double()[:, None]
    return scaling * (q.double() @ moved.repeat_interleave(2, 1).mT)


def test_half_a_step_alone_is_no_certificate_in_bfloat16() -> None:
    k, v = hostile("one huge value", torch.bfloat16)
    held = filled(k, v, "near-lossless").held()[0]
    transform, q = MADE.layers[0][0], torch.randn(1, 2 * HEADS, 30, CHANNELS).bfloat16()
    steps = torch.tensor(MADE.layers[0][1]["near-lossless"].steps[0]).repeat_interleave(2)
    error = (logits(held, q, transform, 1.0) - exact_logits(k, q, transform, 1.0)).abs()
    assert (error.amax(-1) > steps[:, None] / 2 * transform.queries(q).abs().sum(-1)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ordinary", *HOSTILE])
def test_values_keep_their_bound_whatever_comes(kind: str, dtype: torch.dtype) -> None:
    k, v = hostile(kind, dtype)
    made = filled(k, v, "near-lossless")
    affine, steps = MADE.layers[0][0].value, torch.tensor(MADE.layers[0][1]["near-lossless"].steps[1])
    error = (made.dense()[1].double() - v.double()).abs()
    assert (error <= value_bound(made.held()[1], steps, affine)).all()


def hostile(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    k, v = kv(1, 64 * 6 + 100, 3)
    for x in (k, v):
        if kind == "outlier channel":
            x[..., 5] *= 30
        elif kind == "sink token":
            x[:, :, 70] *= 30
        elif kind == "far outside":
            x += 500
        elif kind == "one huge value":
            x[0, 1, 200, 7] = 6e4
    return k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_is_ever_clipped(kind: str, dtype: torch.dtype) -> None:
    k, v = hostile(kind, dtype)
    for level in MADE.levels:
        made = filled(k, v, level)
        held, steps = made.held(), MADE.layers[0][1][level].steps
        for index, x in enumerate((k, v)):
            affine = (MADE.layers[0][0].key, MADE.layers[0][0].value)[index]
            wanted = affine.apply(x).double()
            assert wanted.isfinite().all()
            step = torch.tensor(steps[index], dtype=torch.float64)[:, None, None]
            slack = held[index].double().abs() * ROUNDING[dtype]  # the codes' values are rounded to the dtype
            assert ((held[index].double() - wanted).abs() <= step / 2 * (1 + 1e-6) + slack).all()


def test_a_block_that_no_book_can_hold_is_raw_and_exact() -> None:
    k, v = hostile("one huge value", torch.float32)
    made = filled(k, v)
    pages = zip(made.rows.owners[0], made.rows.pages[0].tolist(), strict=False)
    begins = [(owner, address - owner.ctypes.data) for owner, address in pages]
    modes = [directory_of(owner, at, 2)[0].tolist() for owner, at in begins]
    raw = [(page, block) for page, of_page in enumerate(modes) for block, mode in enumerate(of_page[:4]) if mode == RAW]
    assert raw == [(3, 1), (3, 3)]  # K and V of the second head, and only those
    assert made.memory().raw_blocks > 0
    assert torch.allclose(made.held()[0][0, 1, 200], MADE.layers[0][0].key.apply(k)[0, 1, 200])


def test_both_calibrated_books_are_used() -> None:
    k, v = kv(1, 64 * 30)
    k[:, :, ::64] *= 3  # beyond the narrow book in every block
    wide = filled(k, v)
    narrow = filled(*kv(1, 64 * 30))
    found = [
        {int(word) & 15 for owner in made.rows.owners[0] for word in owner[:20].view("<u4")[:4]}
        for made in (wide, narrow)
    ]
    assert 1 in found[0]
    assert 2 in found[1]
    assert wide.memory().coded_bits < 1.5 * narrow.memory().coded_bits
    assert wide.rows.books[0][0] is narrow.rows.books[0][0]  # the calibration's, never a sequence's own


def test_soft_caps_need_keys_without_a_mean() -> None:
    k, v = kv(1, 300)
    q = torch.randn(1, 2 * HEADS, 3, CHANNELS)
    with pytest.raises(InvalidInput, match="soft cap"):
        attend(filled(k, v), q, 0.3, 5.0)
    with pytest.raises(InvalidInput, match="soft cap"):
        attend_tiled(filled(k, v), q, 0.3, 5.0)
    made = filled(k, v, "near-lossless", calibrated(1, HEADS, CHANNELS, centred=False))
    kk, vv = (x.repeat_interleave(2, 1).double() for x in made.dense())
    score = 5.0 * torch.tanh(0.3 * q.double() @ kk.mT / 5.0)
    score = score.masked_fill(~torch.ones(3, 300, dtype=torch.bool).tril(297), -torch.inf)
    assert torch.allclose(attend(made, q, 0.3, 5.0).double(), score.softmax(-1) @ vv, atol=1e-3)


def test_rows_padding_crops_and_beams() -> None:
    k, v = kv(2, 400)
    made = store()
    made.append(k, v)
    made.set_starts([0, 37])
    made.seal()
    dense = made.dense()
    assert not dense[0][1, :, :37].any()
    alone = filled(k[1:, :, 37:], v[1:, :, 37:])
    assert torch.equal(alone.dense()[0][0], dense[0][1, :, 37:])
    made.crop(333)
    assert torch.equal(made.dense()[1], dense[1][:, :, :333])
    made.select(torch.tensor([1, 1, 0]))
    assert torch.equal(made.dense()[0][0], dense[0][1, :, :333])
    made.append(*kv(3, 200, 9))
    made.seal()
    assert torch.equal(made.dense()[0][2, :, :250], dense[0][0, :, :250])


def test_backends_agree_to_the_byte() -> None:
    k, v = kv(1, 64 * 4 + 100, 5)
    stores = [store("near-lossless", backend=backend) for backend in ("cpu", "reference")]
    for made in stores:
        made.append(k, v)
        made.seal()
    assert all(torch.equal(a, b) for a, b in zip(stores[0].dense(), stores[1].dense(), strict=True))
    assert stores[0].memory().pages == stores[1].memory().pages


def test_files_need_the_calibration_and_give_everything_back(tmp_path: Path) -> None:
    k, v = kv(2, 300)
    packed = kvcomp.compress(k, v, "kvcomp-klt:aggressive", calibration=MADE)
    packed.save(tmp_path / "one.kvc")
    with pytest.raises(InvalidInput, match=MADE.fingerprint):
        kvcomp.load(tmp_path / "one.kvc")
    with pytest.raises(InvalidInput, match="the one given is"):
        kvcomp.load(tmp_path / "one.kvc", calibration=calibrated(1, HEADS, CHANNELS, model={"model_type": "other"}))
    MADE.write(tmp_path / "model.kvcal")
    back = kvcomp.load(tmp_path / "one.kvc", calibration=tmp_path / "model.kvcal")
    assert all(torch.equal(a, b) for a, b in zip(back.decompress(), packed.decompress(), strict=True))
    q = torch.randn(2, HEADS, 1, CHANNELS)
    assert torch.equal(back.attend(q), packed.attend(q))
    books = files.open_container(tmp_path / "one.kvc").header.layers[0]
    assert books.books == 0  # they come with the calibration
    back.save(tmp_path / "again.kvc")
    assert (tmp_path / "again.kvc").read_bytes() == (tmp_path / "one.kvc").read_bytes()
    with pytest.raises(InvalidInput, match="kvcomp calibrate MODEL"):
        kvcomp.compress(k, v, "kvcomp-klt")


def test_it_beats_the_paper_at_the_same_error() -> None:
    k, v = kv(1, 64 * 20)
    made = filled(k, v)
    error = [float((back - x).square().mean()) for x, back in zip((k, v), made.dense(), strict=True)]
    paper = min(
        (
            packed.memory().coded_bits
            for r in (0.02, 0.04, 0.08, 0.16)
            if (packed := kvcomp.compress(k, v, kvcomp.CodecSpec(*(kvcomp.TensorSpec("block", r),) * 2)))
            and all(
                float((back - x).square().mean()) <= limit
                for x, back, limit in zip((k, v), packed.decompress(), error, strict=True)
            )
        ),
        default=float("inf"),
    )
    assert made.memory().coded_bits < 0.8 * paper
