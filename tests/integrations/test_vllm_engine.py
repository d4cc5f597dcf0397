"""A real vLLM engine whose cache is compressed, against the same engine with its own cache.

``make test-vllm`` runs it, with a Python that has vLLM in ``KVCOMP_VLLM``.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("KVCOMP_VLLM", "")
MODEL = ROOT / "examples" / "tiny-lm"
WORKER = "kvcomp.integrations.vllm.worker.KVCompWorker"
# So fine that a wrong token, page or mask is far outside what is lost.
FINE = {
    "kvcomp_spec": 1,
    "key": {"unit": "channel", "relative_scale": 0.005},
    "value": {"unit": "token", "relative_scale": 0.005},
}
CLOSE = 0.1  # nats between log probabilities: these scales and another order of float32 sums cost a tenth of that

pytestmark = pytest.mark.skipif(not PYTHON, reason="vLLM is not here: make test-vllm")


def engine(
    path: Path, rounds: list[Any], live: dict[str, Any] | None, **arguments: Any
) -> subprocess.CompletedProcess[str]:
    """Run rounds of prompts in an engine of its own; the answer lies in ``path``."""
    more = {"worker_cls": WORKER, "additional_config": {"kvcomp": live}} if live is not None else {}
    arguments = {"model": str(MODEL), "dtype": "float32", "max_model_len": 1024, **more, **arguments}
    (path / "request.json").write_text(json.dumps({"engine": arguments, "rounds": rounds}))
    return subprocess.run(
        [PYTHON, ROOT / "benchmarks/vllm_engine.py", path / "request.json", path / "answer.json"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "NUMBA_CACHE_DIR": str(Path(PYTHON).parents[1] / "numba"),  # its Numba may be another version
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def answers(path: Path, rounds: list[Any], live: dict[str, Any] | None, **arguments: Any) -> dict[str, Any]:
    done = engine(path, rounds, live, **arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((path / "answer.json").read_text())
    return found


def same(one: dict[str, Any], other: dict[str, Any], close: float = CLOSE) -> None:
    """Two answers agree: the log probabilities of the likeliest tokens, up to where they choose between near ties."""
    for ours, theirs, mine, yours in zip(one["top"], other["top"], one["ids"], other["ids"], strict=True):
        likely = sorted(theirs, key=theirs.__getitem__)[-5:]
        assert set(likely) <= set(ours)
        assert max(abs(ours[token] - theirs[token]) for token in likely) < close
        if mine != yours:
            assert abs(theirs[str(mine)] - theirs[str(yours)]) < 2 * close
            return


def prompts() -> list[dict[str, Any]]:
    """Prompts of lengths around blocks and chunks, two with a common beginning of four blocks."""
    random = np.random.default_rng(5)
    made = [{"ids": random.integers(4, 4000, n).tolist(), "max_tokens": 70} for n in (1, 63, 64, 65, 300, 700)]
    common = made[5]["ids"][:256]
    return [*made, {"ids": [*common, *random.integers(4, 4000, 30).tolist()], "max_tokens": 70}]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("spec") / "fine.json"
    path.write_text(json.dumps(FINE))
    return str(path)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each prompt alone with vLLM's own cache, in pieces of at most 256 tokens."""
    alone = [[prompt] for prompt in prompts()]
    return answers(tmp_path_factory.mktemp("dense"), alone, None, max_num_batched_tokens=256)


@pytest.mark.parametrize("caching", [True, False])
def test_prompts_together_get_what_each_gets_alone_with_vllms_own_cache(
    tmp_path: Path, spec: str, dense: dict[str, Any], caching: bool
) -> None:
    """Prefill in pieces, continuous batching, a shared prefix, and so few blocks that requests are preempted."""
    rounds = [prompts(), prompts()[::-1], [{"ids": [5], "max_tokens": 1}]]
    arguments = {"max_num_batched_tokens": 256, "enable_prefix_caching": caching, "num_gpu_blocks_override": 23}
    found = answers(tmp_path, rounds, {"spec": spec, "saving": 1.5}, **arguments)
    assert found["metrics"]["vllm:num_preemptions"] > 0
    for together in (found["rounds"][0], found["rounds"][1][::-1]):
        for [ours], [[theirs]] in zip(together, dense["rounds"], strict=True):
            same(ours, theirs)
    if caching:
        assert found["metrics"]["vllm:prefix_cache_hits"] > 0
    else:
        assert found["memory"]["tokens"] <= 1  # of the last request, which is not over for the worker
        assert found["memory"]["outside"] == 0


def test_several_answers_to_one_prompt_and_the_default_spec(tmp_path: Path) -> None:
    """n > 1 shares the prompt's pages. bfloat16, with codebooks of the default spec, is near vLLM's own cache."""
    prompt = {"ids": prompts()[4]["ids"], "max_tokens": 40, "n": 4}
    again = {"ids": prompts()[4]["ids"], "max_tokens": 40}
    live = answers(tmp_path, [[prompt], [again]], {}, dtype="bfloat16")
    assert len({tuple(one["ids"]) for one in live["rounds"][0][0]}) > 1
    own = answers(tmp_path, [[again]], None, dtype="bfloat16")
    first, reference = (x["rounds"][-1][0][0]["top"][0] for x in (live, own))
    p = {token: np.exp(value) for token, value in reference.items()}
    assert sum(p[t] * (reference[t] - first.get(t, min(first.values()))) for t in p) < 0.5
    assert live["memory"]["used"] > 0
    assert live["memory"]["outside"] == 0


def test_an_engine_that_cannot_have_it_says_why_when_it_starts(tmp_path: Path) -> None:
    done = engine(tmp_path, [], {}, block_size=128)
    assert done.returncode != 0
    assert "add --block-size 64" in done.stdout + done.stderr
