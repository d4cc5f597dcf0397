"""Attention on K and V in other coordinates: the CPU kernel against the formula in float64, and that against attention
on K and V led back.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import attention_cases
from attention_cases import Cache, Case, relative_error
from kvcomp.codec.quantise import to_float32
from kvcomp.kernels import Folding, reference

cpu = pytest.importorskip("kvcomp.kernels.cpu.backend", exc_type=ImportError)

TOLERANCE = 1e-4  # scores of a random Folding reach tens, and their rounding in float32 is magnified by the softmax


def random_folding(case: Case, pairs: int, model: tuple[int, int]) -> Folding:
    """Of heads with so many channels of K and of V in the model."""
    rng = np.random.default_rng(case.seed + 1)
    (key, value), (held_k, held_v), heads = model, case.both_channels, case.heads

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.normal(size=(heads, rows, columns)) / np.sqrt(rows)).astype(np.float32)

    return Folding(
        queries=matrix(key, held_k),
        turning=matrix(key, 2 * pairs),
        speed=tuple(rng.uniform(1e-5, 3.0, pairs).tolist()),
        outputs=matrix(held_v, value),
        mean=rng.normal(size=(heads, value)).astype(np.float32),
    )


def built(case: Case, pairs: int, model: tuple[int, int] | None = None) -> tuple[Cache, Folding]:
    cache = attention_cases.build(case)
    folding = random_folding(case, pairs, model or case.both_channels)
    rng = np.random.default_rng(case.seed)
    q = rng.normal(size=(*cache.q.shape[:3], folding.queries.shape[1])).astype(np.float32)
    return replace(cache, q=q), folding


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("pairs", [0, 1, 7, 32])
@pytest.mark.parametrize(
    ("channels", "queries", "pages"), [(64, 3, (2, 0, 17)), (128, 8, (1,)), (80, 1, (3, 1)), (256, 16, (1,))]
)
def test_the_cpu_kernel_gives_what_the_formula_gives(
    channels: int, queries: int, pages: tuple[int, ...], pairs: int, softcap: float
) -> None:
    held = -(-channels // 16) * 16
    case = Case(held, queries, 1, pages, softcap=softcap, partial=37)
    cache, folding = built(case, pairs, (channels, channels))
    wanted, wanted_lse = reference.attend(cache.q, cache.view, cache.tail_end, cache.scaling, softcap, 1, folding)
    for threads in (1, 2):
        out, lse = cpu.attend(cache.q, cache.view, cache.tail_end, cache.scaling, softcap, threads, folding)
        assert out.shape == (*cache.q.shape[:3], channels)
        assert relative_error(out, wanted) <= TOLERANCE
        np.testing.assert_allclose(lse, wanted_lse, atol=1e-3)


def test_the_formula_is_attention_on_what_is_led_back() -> None:
    """With K = K' Q^T and V = V' O + mean, and R(t) m added to K: softmax(scaling q.K) V, token by token."""
    case = Case(64, 2, 1, (0, 0), sinks=3, tail=70)
    cache, folding = built(case, 5)
    out, _ = reference.attend(cache.q, cache.view, cache.tail_end, cache.scaling, 0.0, 1, folding)
    view, end = cache.view, int(cache.tail_end[0])
    for row in range(2):
        sinks = int(view.sink_count[row])
        held_k, held_v = (
            np.concatenate([to_float32(a[row, :, :sinks]), to_float32(b[row, :, int(view.tail_begin[row]) : end])], 1)
            for a, b in ((view.sinks_k, view.tail_k), (view.sinks_v, view.tail_v))
        )
        for head in range(case.heads):
            k = held_k[head].astype(np.float64) @ folding.queries[head].T
            for place in range(len(k)):
                for pair, speed in enumerate(folding.speed):
                    turn = speed * place
                    real, imaginary = folding.turning[head][:, pair], folding.turning[head][:, 5 + pair]
                    k[place] += real * np.cos(turn) - imaginary * np.sin(turn)
            v = held_v[head].astype(np.float64) @ folding.outputs[head] + folding.mean[head]
            score = cache.scaling * cache.q[row, head].astype(np.float64) @ k.T
            weight = np.exp(score - score.max(-1, keepdims=True))
            np.testing.assert_allclose(out[row, head], weight / weight.sum(-1, keepdims=True) @ v, rtol=1e-4, atol=1e-4)
