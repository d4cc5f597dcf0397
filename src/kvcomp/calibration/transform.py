"""Transforms of one layer's K and V that decoding never pays for: they are folded into the queries and the output.

With k and v as the model makes them, the cache holds K' = A (k - a) and V' = B (v - b) for each KV head.

- q.k = (A^-T q).K' + q.a. Where a is the same for every token, softmax drops the last term. Under rotary positions it
  is not (``rotary``): a turns with the token's place, and q.a is added to the scores.
- The weights w sum to 1, so sum w v = B^-1 (sum w V') + b.

A step costs one D x D product for each query head and one for each output, whatever the length of the cache.

The useful A is the Karhunen-Loeve transform in the metric that counts (``metric_klt``). With M = E[q q^T] an error e
in k moves a logit by sqrt(e^T M e) on average, and so does a white error of equal size in K'. Few rows of A then carry
most of the information.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.calibration.product import product
from kvcomp.calibration.rotary import Rotation
from kvcomp.errors import InvalidInput
from kvcomp.kernels.folding import Folding

RIDGE = 1e-3  # added to a metric, in units of its mean diagonal: no direction may go unseen
WORST_CONDITION = 1e5  # of a transform that float32 products can undo
UNIT = 2.0**-24  # relative error of one float32 operation


@dataclass(frozen=True, eq=False)
class Affine:
    """x' = A (x - mean), for each KV head; ``of`` makes one. Under a rotation the mean is that at the place 0."""

    matrix: Tensor
    """A, float32 (KV heads, D, D)."""
    mean: Tensor
    """float32 (KV heads, D)."""
    inverse: Tensor
    """A^-1."""
    rotation: Rotation | None = None
    """How the mean turns with a token's place; None where it stays."""

    @classmethod
    def of(cls, matrix: Tensor, mean: Tensor, rotation: Rotation | None = None) -> Affine:
        """Make one from A (KV heads, D, D), the mean (KV heads, D) and how it turns.

        Raises
        ------
        InvalidInput
            If a matrix or mean has another shape, is not finite, or cannot be inverted in float32.
        """
        if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2] or mean.shape != matrix.shape[:2]:
            raise InvalidInput(f"a transform of {tuple(matrix.shape)} with a mean of {tuple(mean.shape)} fits no heads")
        if not (matrix.isfinite().all() and mean.isfinite().all()):
            raise InvalidInput("a transform has values that are not finite")
        matrix = matrix.to(torch.float32).contiguous()
        inverse, failed = torch.linalg.inv_ex(matrix.double())
        condition = matrix.double().abs().sum(-1).amax(-1) * inverse.abs().sum(-1).amax(-1)
        if failed.any() or not (condition < WORST_CONDITION).all():
            raise InvalidInput("a transform cannot be inverted: its matrix is singular or nearly so")
        return cls(matrix, mean.to(torch.float32).contiguous(), inverse.to(torch.float32).contiguous(), rotation)

    def coarsened(self, shifts: npt.NDArray[np.uint8]) -> Affine:
        """The same with row r of A divided by 2^shift, (KV heads, D), which floats hold exactly."""
        factor = torch.from_numpy(np.exp2(shifts.astype(np.float32)))
        return replace(self, matrix=self.matrix / factor[:, :, None], inverse=self.inverse * factor[:, None, :])

    def to(self, device: torch.device) -> Affine:
        return replace(self, matrix=self.matrix.to(device), mean=self.mean.to(device), inverse=self.inverse.to(device))

    @cached_property
    def still(self) -> Tensor:
        """The part of the mean that does not turn, float32 (KV heads, D)."""
        return self.mean if self.rotation is None else self.rotation.still(self.mean)

    @cached_property
    def has_still(self) -> bool:
        """Whether ``still`` is not 0. Waits for the device the first time."""
        return bool(self.still.any())

    @cached_property
    def folded(self) -> Tensor:
        """What a query is multiplied with for its products with the turning part of the mean."""
        assert self.rotation is not None
        return self.rotation.folded(self.mean)

    @cached_property
    def _waving(self) -> Tensor:
        """A F^T: what A makes of the turning part of the mean, as a product with ``Rotation.waves``."""
        return product(self.folded.mT, self.matrix.mT)

    def _known(self, places: Tensor | None) -> Tensor:
        if places is None:
            raise InvalidInput("the mean of these K turns with the place of a token: give the places")
        return places

    def means(self, places: Tensor | None) -> Tensor:
        """The mean at each token's place: (KV heads, 1, D), or (.., KV heads, tokens, D) for places (.., tokens)."""
        if self.rotation is None:
            return self.mean[:, None]
        return self.rotation.turned(self.mean, self._known(places))

    def apply(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """(batch, KV heads, tokens, D) -> the same in x's dtype; products in float32.

        places: of the tokens, int64 (tokens,) or (batch, tokens); needed where the mean turns.
        """
        turning = self.rotation
        return self.apply_waves(x, None if turning is None else turning.waves(self._known(places).to(x.device)))

    def apply_waves(self, x: Tensor, waves: Tensor | None) -> Tensor:
        """``apply`` where the ``Rotation.waves`` of the places are known; None where the mean stays."""
        found = product(_by_head(x.detach()) - self.still[:, None], self.matrix.mT)
        if waves is not None:
            every = waves.expand(*x.shape[:-3], *waves.shape[-2:]).reshape(1, -1, waves.shape[-1])
            found.baddbmm_(every.expand(len(found), -1, -1), self._waving, alpha=-1)
        return _as_before(found, x).to(x.dtype)

    def undo(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """Undo ``apply``, for (batch, KV heads, tokens, D) or (KV heads, tokens, D)."""
        return (_as_before(product(_by_head(x), self.inverse.mT), x) + self.means(places)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Transform:
    """The transforms of one layer, of K and of V."""

    key: Affine
    value: Affine
    _on: dict[torch.device, Transform] = field(default_factory=dict, init=False, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Transform:
        """Itself: it never changes."""
        return self

    @property
    def heads(self) -> int:
        return int(self.key.mean.shape[0])

    @property
    def channels(self) -> int:
        return int(self.key.mean.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices in use, all in float32: A and its inverse of K and of V, and what ``folding`` has."""
        folded = 0 if self.key.rotation is None else self.key.folded.numel()
        return 4 * (2 * self.key.matrix.numel() + 3 * self.value.matrix.numel() + 2 * folded)

    def to(self, device: torch.device) -> Transform:
        """The same on a device, made once for all caches there."""
        if device not in self._on:
            self._on[device] = Transform(self.key.to(device), self.value.to(device))
        return self._on[device]

    @cached_property
    def folding(self) -> Folding:
        """What kernels on the CPU do to queries and outputs, for themselves."""
        rotation = self.key.rotation
        nothing = np.empty((self.heads, self.channels, 0), np.float32)
        return Folding(
            queries=self.key.inverse.numpy(),
            turning=nothing if rotation is None else self.key.folded.unflatten(2, (-1, 2)).mT.flatten(2).numpy(),
            speed=() if rotation is None else rotation.speed,
            outputs=self.value.inverse.mT.contiguous().numpy(),
            mean=self.value.mean.numpy(),
        )

    def coarsened(self, shifts: npt.NDArray[np.uint8]) -> Transform:
        """With coarser coordinates of K and of V, (2, KV heads, D)."""
        return Transform(self.key.coarsened(shifts[0]), self.value.coarsened(shifts[1]))

    def queries(self, q: Tensor) -> Tensor:
        """q (batch, heads, queries, D) -> A^-T q in float32: its products with K' are those with k, less q.a."""
        return _grouped(q.detach(), self.key.inverse).reshape(q.shape)

    def outputs(self, out: Tensor) -> Tensor:
        """sum w V' (batch, heads, queries, D) -> sum w v, in float32, for weights that sum to 1."""
        return (_grouped(out, self.value.inverse.mT) + self.value.mean[:, None]).reshape(out.shape)

    def turning(self, q: Tensor) -> tuple[Tensor, Rotation] | None:
        """What scores q.K' lack of q.(k - still) because the mean turns: products of z with ``Rotation.waves``.

        q: (batch, heads, queries, D), as the model makes them.
        Returns z, float32 (batch, heads, queries, 2 pairs), and the rotation; None where the mean does not turn.
        """
        if self.key.rotation is None:
            return None
        return _grouped(q.detach(), self.key.folded).reshape(*q.shape[:3], -1), self.key.rotation


def _by_head(x: Tensor) -> Tensor:
    """x (.., KV heads, tokens, D) in float32 as (KV heads, all tokens, D): a product with the matrix of each head then
    needs no copy of it for every row of a batch.
    """
    return x.to(torch.float32).movedim(-3, 0).reshape(x.shape[-3], -1, x.shape[-1])


def _as_before(found: Tensor, x: Tensor) -> Tensor:
    """(KV heads, all tokens, n) in the order of x (.., KV heads, tokens, D)."""
    return found.view(-1, *x.shape[:-3], x.shape[-2], found.shape[-1]).movedim(0, -3).contiguous()


def _grouped(x: Tensor, matrix: Tensor) -> Tensor:
    """Products of x (batch, heads, queries, D) with the matrix of each KV head, (KV heads, D, n), in float32:
    (batch, KV heads, group * queries, n).
    """
    of_heads = x.reshape(len(x), len(matrix), -1, x.shape[-1])
    return _as_before(product(_by_head(of_heads), matrix), of_heads)


def metric_klt(covariance: Tensor, metric: Tensor) -> Tensor:
    """A of the Karhunen-Loeve transform in a metric M.

    ||A e||^2 is proportional to e^T M e, and the rows of A x are uncorrelated, largest variance first. No row has an L1
    norm above 1: no |A x| is larger than the largest |x|, so a type that holds x holds A x.

    Parameters
    ----------
    covariance, metric
        float64 (D, D), symmetric and positive semidefinite.

    Returns
    -------
    Tensor
        float64 (D, D).
    """
    size = metric.diagonal().mean()
    scaled = metric / size if size > 0 else torch.zeros_like(metric)
    ridge = RIDGE * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    weights, directions = torch.linalg.eigh(scaled + ridge)
    root = directions @ (weights.clamp_min(RIDGE).sqrt()[:, None] * directions.mT)
    _, basis = torch.linalg.eigh(root @ covariance @ root)
    matrix = basis.flip(1).mT @ root
    result: Tensor = matrix / matrix.abs().sum(1).max()
    return result


def quantise_matrix(matrix: Tensor) -> Tensor:
    """Round A (heads, D, D) as the file keeps it, float32."""
    rounded, scale = eight_bits(matrix)
    return torch.from_numpy(rounded * scale[..., None])


def eight_bits(matrix: Tensor) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """A (heads, D, D) as the file keeps it: int8, and a scale for each row, (heads, D)."""
    exact = matrix.to(torch.float32)
    scale = (exact.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (exact / scale[..., None]).round().to(torch.int8).numpy(), scale.numpy()


def logit_bound(q: Tensor, held: Tensor, steps: Tensor, transform: Transform, scaling: float = 1.0) -> Tensor:
    """How far, at most, a logit lies from the exact scaling q.(k - mean) with the uncompressed k: a certificate.

    The mean is that at the token's place. What it adds to a logit is no matter of compression.

    No coordinate of a coded K' is off by more than half of its head's step s, so the logit is off by at most
    scaling (s/2) ||A^-T q||_1 and what rounding adds: of K' to the cache's type, of A^-1 to float32, and of the float32
    products. Softmax is not covered, nor are kernels that take queries in fewer bits, as on a GPU.

    Parameters
    ----------
    q
        Queries, (batch, heads, queries, D).
    held
        K' as ``KVStore.held`` gives it, (batch, KV heads, tokens, D).
    steps
        Steps of K's heads, (KV heads,).
    transform
        Of the layer.
    scaling
        Factor of the logits.

    Returns
    -------
    Tensor
        float32 (batch, heads, queries, tokens).
    """
    size, moved = _displacement(held, steps, transform.key)
    grouped = q.detach().to(torch.float32).reshape(q.shape[0], transform.heads, -1, transform.channels)
    terms = grouped.abs() @ transform.key.inverse.abs()
    products = 4 * (transform.channels + 1) * UNIT * terms @ size.mT
    bound = transform.queries(q).view(grouped.shape).abs() @ moved.mT + products
    return abs(scaling) * bound.view(*q.shape[:3], -1)


def value_bound(held: Tensor, steps: Tensor, affine: Affine, places: Tensor | None = None) -> Tensor:
    """How far, at most, ``affine.undo(held)`` is off in the model's coordinates: a certificate.

    It is (s/2) times the L1 norm of each row of A^-1, and what rounding adds.

    Parameters
    ----------
    held
        K' or V' as ``KVStore.held`` gives it, (batch, KV heads, tokens, D).
    steps
        Steps of the heads, (KV heads,).
    affine
        The transform that ``held`` went through.
    places
        Of the tokens, as for ``Affine.apply``.

    Returns
    -------
    Tensor
        float32 of held's shape.
    """
    size, moved = _displacement(held, steps, affine)
    inverse, back = affine.inverse.abs(), affine.undo(held, places).float().abs()
    products = 2 * (held.shape[-1] + 2) * UNIT * (size @ inverse.mT + affine.means(places).abs())
    return moved @ inverse.mT + products + torch.finfo(held.dtype).eps * back


def _displacement(held: Tensor, steps: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """Bounds of each coordinate of A (x - mean), and of how far what is held of it is off, float32 of held's shape.

    K' is rounded to the cache's type before it is coded, and once more when it is read other than by a fused kernel.
    """
    half = steps.to(torch.float32)[:, None, None] / 2
    size, kind = held.to(torch.float32).abs() + half, torch.finfo(held.dtype)
    rounding = kind.eps * (size + kind.smallest_normal)
    spread = affine.matrix.abs() @ affine.inverse.abs()  # terms of the products, over what they add up to
    return size, half + rounding + 2 * (held.shape[-1] + 2) * UNIT * size @ spread.mT
