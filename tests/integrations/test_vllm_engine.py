"""A real vLLM engine whose cache is compressed, against the same engine with its own cache.

``make test-vllm`` runs all of it, ``make check`` what is not slow; a Python that has vLLM is in ``KVCOMP_VLLM``.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vllm_client
import vllm_standin
from vllm_client import CODED, CODED_CLOSE, EXACT, EXACT_CLOSE, ROOT, Engine, EngineFailed

MODEL = ROOT / "examples" / "tiny-lm"

RAW_BYTES = 4 * 2 * 2 * 64 * 4  # of a token: layers, K and V, heads, channels, float32

pytestmark = pytest.mark.skipif(not os.environ.get("KVCOMP_VLLM"), reason="vLLM is not here: make test-vllm")


INTERFACE = """
import inspect, json, sys
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1 as base
parameters = {name: list(inspect.signature(getattr(base, name)).parameters) for name in sys.argv[1:]}
print(json.dumps([sorted(base.__abstractmethods__), parameters]))
"""


def test_the_stand_in_of_the_connector_is_like_the_real_class() -> None:
    """Which test_vllm.py holds the connector against."""
    ours = vllm_standin.KVConnectorBase_V1
    names = sorted(name for name, x in vars(ours).items() if inspect.isfunction(x) and not name.startswith("__"))
    command = [os.environ["KVCOMP_VLLM"], "-c", INTERFACE, "__init__", *names]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    abstract, parameters = json.loads(found.splitlines()[-1])
    assert abstract == sorted(ours.__abstractmethods__)
    for name, of_real in parameters.items():
        assert list(inspect.signature(getattr(ours, name)).parameters) == of_real, name


def start(live: dict[str, Any] | None, **arguments: Any) -> Engine:
    """An engine as vLLM makes it by default: its core and its worker have processes of their own."""
    few = {"model": str(MODEL), "dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 1 << 30}
    return Engine(live, apart=True, **(few | arguments))


def answers(engine: Engine, prompts: list[dict[str, Any]]) -> list[Any]:
    """Of prompts together, a list of answers each."""
    found: list[Any] = engine("run", prompts=prompts)["answers"]
    return found


def same(one: dict[str, Any], other: dict[str, Any], close: float = EXACT_CLOSE) -> None:
    assert vllm_client.same(one, other, close)


def prompts() -> list[dict[str, Any]]:
    """Prompts of lengths around blocks and chunks, two with a common beginning of four blocks."""
    random = np.random.default_rng(5)
    made = [
        {"ids": random.integers(4, 4000, n).tolist(), "max_tokens": 70, "likeliest": True}
        for n in (1, 63, 64, 65, 300, 700)
    ]
    common = made[5]["ids"][:256]
    return [*made, {"ids": [*common, *random.integers(4, 4000, 30).tolist()], "max_tokens": 70, "likeliest": True}]


def file_of(spec: dict[str, Any], folder: Path) -> str:
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    return str(path)


@pytest.fixture
def spec(tmp_path: Path) -> str:
    return file_of(EXACT, tmp_path)


@pytest.fixture(scope="module")
def dense() -> list[Any]:
    """Each prompt alone with vLLM's own cache, in pieces of at most 256 tokens."""
    with start(None, max_num_batched_tokens=256) as engine:
        return [answers(engine, [prompt])[0][0] for prompt in prompts()]


FORMS = [(True, True, 1.5), (False, False, 1.5), (False, True, 8), (True, False, 8)]


@pytest.mark.parametrize(
    ("coded", "caching", "saving"), [FORMS[0], *(pytest.param(*form, marks=pytest.mark.slow) for form in FORMS[1:])]
)
def test_prompts_together_get_what_each_gets_alone_with_vllms_own_cache(
    tmp_path: Path, dense: list[Any], coded: bool, caching: bool, saving: float
) -> None:
    """Prefill in pieces, continuous batching, a shared prefix, and so few blocks that requests are preempted.

    With a declared saving of 8, pages are larger than declared: they lie outside, and no answer is another.
    """
    arguments = {"max_num_batched_tokens": 256, "enable_prefix_caching": caching, "num_gpu_blocks_override": 23}
    spec, close = (CODED, CODED_CLOSE) if coded else (EXACT, EXACT_CLOSE)
    with start({"spec": file_of(spec, tmp_path), "saving": saving}, **arguments) as engine:
        rounds = [answers(engine, prompts()), answers(engine, prompts()[::-1])[::-1]]
        answers(engine, [{"ids": [5], "max_tokens": 1}])
        state = engine.state()
    assert state["metrics"]["vllm:num_preemptions"] > 0
    for together in rounds:
        for [ours], theirs in zip(together, dense, strict=True):
            same(ours, theirs, close)
    memory = state["memory"]
    if caching:
        assert state["metrics"]["vllm:prefix_cache_hits"] > 0
        assert (memory["outside"] > 0) == (saving == 8)
        assert (memory["used"] + memory["outside"] < memory["tokens"] * RAW_BYTES / 3) == coded
    else:
        assert memory["tokens"] <= 1  # of the last request, which the worker may not know to be over
        assert memory["outside"] == 0


SCHEDULER = "kvcomp.integrations.vllm.scheduler.KVCompScheduler"


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [None, SCHEDULER])
def test_pages_that_are_larger_than_declared_make_requests_wait_if_asked_to(
    spec: str, dense: list[Any], scheduler: str | None
) -> None:
    """What lies outside stays near the reserve and one sequence, where it would be more, and no answer is another."""
    arguments = {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 64, "scheduler_cls": scheduler}
    with start({"spec": spec, "saving": 8, "reserve": 0.2}, **arguments) as engine:
        found = answers(engine, prompts())
        memory = engine.state()["memory"]
    for [ours], theirs in zip(found, dense, strict=True):
        same(ours, theirs)
    most = 0.2 * memory["room"] + memory["room"] / 64 * 8 * 16  # of 1,024 raw tokens
    assert (memory["outside"] < most) == (scheduler is not None)


@pytest.mark.slow
@pytest.mark.parametrize("live", [{}, {"spec": "kvcomp-klt", "calibration": str(MODEL / "model.kvcal")}])
def test_several_answers_to_one_prompt_with_a_coarse_spec(live: dict[str, Any]) -> None:
    """n > 1 shares the prompt's pages. In bfloat16 the answer is near that of vLLM's own cache."""
    prompt = {"ids": prompts()[4]["ids"], "max_tokens": 40, "n": 4, "likeliest": True}
    again = prompt | {"n": 1}
    with start(live, dtype="bfloat16") as engine:
        [several], [[one]] = answers(engine, [prompt]), answers(engine, [again])
        memory = engine.state()["memory"]
    with start(None, dtype="bfloat16") as engine:
        [[own]] = answers(engine, [again])
    assert len({tuple(answer["ids"]) for answer in several}) > 1
    first, reference = one["top"][0], own["top"][0]
    p = {token: np.exp(value) for token, value in reference.items()}
    assert sum(p[t] * (reference[t] - first.get(t, min(first.values()))) for t in p) < 0.5
    assert memory["used"] > 0
    assert memory["outside"] == 0


@pytest.mark.slow
def test_prompts_from_a_store_get_what_they_get_computed(tmp_path: Path, dense: list[Any]) -> None:
    """An engine with blocks of 128 tokens fills the store, one with blocks of 32 reads it."""
    transfer = {
        "kv_connector": "KVCompConnector",
        "kv_connector_module_path": "kvcomp.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "url": str(tmp_path / "store"),
            "spec": file_of(CODED, tmp_path),
            "chunk_tokens": 128,
        },
    }
    arguments = {"kv_transfer_config": transfer, "disable_hybrid_kv_cache_manager": True}
    for block in (128, 32):
        with start(None, block_size=block, enable_prefix_caching=False, **arguments) as engine:
            for [ours], theirs in zip(answers(engine, prompts()), dense, strict=True):
                same(ours, theirs, CODED_CLOSE)
            hits = engine.state()["metrics"]["vllm:external_prefix_cache_hits"]
            assert (hits > 0) == (block == 32)


LAYOUTS = """
import sys, torch
from kvcomp.integrations.vllm.layout import _cpu_kernel, find_layout
for dtype in (torch.float32, torch.bfloat16):
    for tokens in (32, 64, 128):
        for channels in (32, 64, 128):
            write = _cpu_kernel(dtype, tokens, channels)
            layout = find_layout(write, tokens, channels, dtype)
            k, v = torch.randn(2, tokens, 1, channels).to(dtype)
            cache = torch.zeros(1, 1, tokens, 2 * channels, dtype=dtype)
            write(k, v, cache)
            both = torch.cat((k, v), -1).transpose(0, 1)[None]
            assert layout.read(cache).equal(both) and layout.write(both).equal(cache), (dtype, tokens, channels)
"""


def test_the_layout_of_vllms_kernels_is_found() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [os.environ["KVCOMP_VLLM"], "-c", LAYOUTS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("window", [96, None])
def test_a_model_with_other_layers_keeps_vllms_own_cache(tmp_path: Path, window: int | None) -> None:
    """The example as a Mistral: with a window its answers are those of vLLM alone, without one it is compressed."""
    for file in MODEL.iterdir():
        (tmp_path / file.name).symlink_to(file)
    other = json.loads((MODEL / "config.json").read_text())
    other |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(other))
    found = []
    for live in ({"spec": file_of(EXACT, tmp_path)}, None):
        with start(live, model=str(tmp_path)) as engine:
            found.append([answers(engine, [prompt])[0][0] for prompt in prompts()[-3:]])
            if live:
                assert ("keeps vLLM's own cache, nothing is compressed" in engine.log) == (window is not None)
                assert ("attention on compressed pages" in engine.log) == (window is None)
    for one, other_one in zip(*found, strict=True):
        same(one, other_one)


def test_an_engine_that_cannot_have_it_says_why_when_it_starts() -> None:
    with pytest.raises(EngineFailed, match="add --block-size 64"):
        start({}, block_size=128)
