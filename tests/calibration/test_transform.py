"""Transforms: folded exactly, invertible or refused, and what they promise."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcomp.calibration.transform import RIDGE, Affine, Transform, logit_bound, metric_klt, value_bound
from kvcomp.errors import InvalidInput

HEADS, CHANNELS = 2, 16


def random_affine(seed: int, channels: int = CHANNELS) -> Affine:
    torch.manual_seed(seed)
    matrix = torch.linalg.qr(torch.randn(HEADS, channels, channels)).Q * torch.logspace(-1, 1, channels)[:, None]
    return Affine.of(matrix, torch.randn(HEADS, channels))


def random_covariance(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    x = torch.randn(200, CHANNELS, dtype=torch.float64) * torch.logspace(-2, 1, CHANNELS, dtype=torch.float64)
    x = x @ torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, dtype=torch.float64)).Q
    return x.T @ x / len(x)


def test_undo_gives_back_what_apply_took() -> None:
    affine = random_affine(0)
    x = torch.randn(3, HEADS, 70, CHANNELS)
    assert torch.allclose(affine.undo(affine.apply(x)), x, atol=1e-4)
    assert torch.allclose(affine.undo(affine.apply(x)[1]), x[1], atol=1e-4)


@pytest.mark.parametrize("group", [1, 3])
def test_attention_in_the_other_coordinates_is_the_same(group: int) -> None:
    transform = Transform(random_affine(1), random_affine(2))
    q = torch.randn(2, HEADS * group, 5, CHANNELS)
    k, v = torch.randn(2, 2, HEADS, 40, CHANNELS)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    other = torch.nn.functional.scaled_dot_product_attention(
        transform.queries(q), transform.key.apply(k), transform.value.apply(v), enable_gqa=True
    )
    assert not torch.allclose(other, expected, atol=1e-2)
    assert torch.allclose(transform.outputs(other), expected, atol=1e-4)


@given(st.integers(0, 2**32 - 1))
def test_coarser_coordinates_change_nothing_but_their_size(seed: int) -> None:
    transform = Transform(random_affine(1), random_affine(2))
    shifts = np.random.default_rng(seed).integers(0, 17, (2, HEADS, CHANNELS), np.uint8)
    coarse = transform.coarsened(shifts)
    x, q = torch.randn(2, 1, HEADS, 9, CHANNELS)
    for before, after, of in ((transform.key, coarse.key, shifts[0]), (transform.value, coarse.value, shifts[1])):
        assert torch.equal(after.apply(x) * torch.from_numpy(2.0**of)[:, None], before.apply(x))
        assert torch.allclose(after.undo(after.apply(x)), x, atol=1e-4)
        assert torch.equal(after.inverse, before.inverse * torch.from_numpy(2.0**of)[:, None])
    scores = coarse.queries(q) @ coarse.key.apply(x).mT
    assert torch.allclose(scores, transform.queries(q) @ transform.key.apply(x).mT, rtol=1e-4, atol=1e-3)


def test_metric_klt_whitens_the_metric_and_orders_by_variance() -> None:
    covariance, metric = random_covariance(3), random_covariance(4)
    matrix = metric_klt(covariance, metric)
    coordinates = matrix @ covariance @ matrix.T
    variances = coordinates.diagonal()
    assert torch.allclose(coordinates - torch.diag(variances), torch.zeros_like(coordinates), atol=1e-9 * variances[0])
    assert (variances[:-1] >= variances[1:] - 1e-12).all()
    seen = torch.linalg.eigvalsh(metric / metric.diagonal().mean())
    assert (
        seen[-1] / seen[0] > 1e4
    )  # far from white, and yet a white error in the coordinates counts alike in all directions
    white = torch.linalg.eigvalsh(torch.linalg.inv(matrix).T @ metric @ torch.linalg.inv(matrix))
    assert torch.allclose(white / white[-1], seen / (seen + RIDGE) * (1 + RIDGE / seen[-1]), rtol=1e-6)


def test_a_metric_of_nothing_is_a_plain_transform() -> None:
    matrix = metric_klt(random_covariance(5), torch.zeros(CHANNELS, CHANNELS, dtype=torch.float64))
    square = matrix @ matrix.T
    assert torch.allclose(square, square[0, 0] * torch.eye(CHANNELS, dtype=torch.float64), atol=1e-9)


@given(st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_no_coordinate_is_larger_than_the_largest_value(seed: int, size: float) -> None:
    matrix = metric_klt(random_covariance(seed), random_covariance(seed + 1))
    x = torch.from_numpy(np.random.default_rng(seed).choice([-size, size], (100, CHANNELS)))
    assert (x @ matrix.T).abs().max() <= size * (1 + 1e-9)


def test_what_cannot_be_undone_is_refused() -> None:
    good = torch.eye(CHANNELS).repeat(HEADS, 1, 1)
    mean = torch.zeros(HEADS, CHANNELS)
    singular, skewed, infinite = good.clone(), good.clone(), good.clone()
    singular[1, 0] = 0
    skewed[0, 0] *= 1e-7
    infinite[0, 0, 0] = torch.inf
    for matrix in (singular, skewed, infinite, good[:, :8], good[0]):
        with pytest.raises(InvalidInput):
            Affine.of(matrix, mean)
    with pytest.raises(InvalidInput):
        Affine.of(good, mean[:1])
    with pytest.raises(InvalidInput):
        Affine.of(good, mean * torch.nan)


@pytest.mark.parametrize("outlier", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_stay_within_their_certificate(outlier: float, dtype: torch.dtype) -> None:
    transform = Transform(random_affine(6), random_affine(7))
    steps = torch.tensor([0.03, 0.4])
    k = torch.randn(1, HEADS, 640, CHANNELS)
    k[..., 3] *= outlier
    q = torch.randn(1, 4, 50, CHANNELS)
    exact = 0.25 * q.double() @ (k.to(dtype).double() - transform.key.mean[:, None]).repeat_interleave(2, 1).mT
    codes = (transform.key.apply(k.to(dtype)).float() / steps[:, None, None]).round()
    held = (codes * steps[:, None, None]).to(dtype)
    error = (0.25 * (transform.queries(q) @ held.float().repeat_interleave(2, 1).mT) - exact).abs()
    bound = logit_bound(q, held, steps, transform, 0.25)
    assert (error <= bound).all()
    assert (error > bound * 0.1).any()  # and it is not idle


def test_the_certificate_is_reached() -> None:
    transform = Transform(random_affine(8), random_affine(9))
    steps = torch.tensor([0.1, 0.2])
    q = torch.randn(1, HEADS, 1, CHANNELS)
    worst = transform.queries(q).sign() * steps[:, None, None] / 2
    logit = (transform.queries(q) * worst).sum(-1, keepdim=True)
    bound = logit_bound(q, torch.zeros_like(worst), steps, transform)
    assert (logit <= bound).all()
    assert torch.allclose(logit, bound, rtol=1e-3)


def test_values_stay_within_their_bound() -> None:
    affine, steps = random_affine(10), torch.tensor([0.1, 0.2])
    x = torch.randn(1, HEADS, 500, CHANNELS)
    held = (affine.apply(x) / steps[:, None, None]).round() * steps[:, None, None]
    assert ((affine.undo(held) - x).abs() <= value_bound(held, steps, affine)).all()
