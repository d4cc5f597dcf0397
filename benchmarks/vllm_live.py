"""What a compressed cache gives and costs in a real vLLM engine on the CPU, with SmolLM2-135M.

Run by `make bench-vllm`, which has vLLM, the model, and needs redis-server for the last part. Tokens that fit are those
of vLLM's own log, at one size of its cache; beside them stand the bytes that are measured in pages while two prompts
of 2,048 tokens are held. KL is over the likeliest 20 tokens at the last 80 places of 1,872 tokens, which see the first
1,792 through the cache, against vLLM's own bfloat16 cache; the noise floor is that cache filled in other pieces. Times
depend on what else the machine does, so only gaps are given, of one run, with the server at work beside them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import real_models
from kvcomp.errors import InvalidInput
from kvcomp.evaluate.models import text_ids
from kvcomp.results.schema import environment, figure

OUTPUT = Path(__file__).parent / "results" / "vllm_live.json"
WORKER = "kvcomp.integrations.vllm.worker.KVCompWorker"
SPACE = 1  # GiB of vLLM's cache
FIRST, SCORED, TEXTS, HELD, SEQUENCES = 1792, 80, 2, 2048, 2
SAVING = {"kvcomp": 3.0, "kvcomp-klt": 3.9, "packed": 3.0}

Answer = dict[str, Any]


def main(
    calibration: Annotated[Path | None, typer.Option(help="Of this model, for kvcomp-klt.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o")] = OUTPUT,
) -> None:
    """Measure and write the results file, after each engine anew."""
    model, tokenizer = real_models.load("smollm2-135m", "bfloat16")
    ids = text_ids(tokenizer, "", None)[0].tolist()
    config = model.config
    dense = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    parameters = {"space": SPACE << 30, "scored": SCORED, "texts": TEXTS, "held": [HELD] * SEQUENCES}
    setting = environment(model="SmolLM2-135M", vllm="0.32.0", **parameters)
    content: Answer = {"kvcomp_results": 1, "kind": "vllm_live", "partial": True, "setting": setting, "methods": []}

    def note(**more: Any) -> None:
        content.update(more)
        output.write_text(json.dumps(content, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        texts = [ids[i * (FIRST + SCORED) :][: FIRST + SCORED] for i in range(TEXTS)]
        scored = [[{"ids": text, "max_tokens": 1, "scored": SCORED}] for text in texts]
        held = [{"ids": ids[i * HELD :][:HELD], "max_tokens": 2} for i in range(SEQUENCES)]
        own, own_tokens = engine(folder, {"rounds": scored}, max_num_batched_tokens=FIRST)
        methods = [{"name": "vLLM's own cache", "tokens": own_tokens, "bytes_a_token": dense}]
        note(methods=methods)
        for name in SAVING if calibration else [name for name in SAVING if name != "kvcomp-klt"]:
            options = {"spec": name, "saving": SAVING[name]}
            if name == "kvcomp-klt":
                options["calibration"] = str(calibration)
            more = {"worker_cls": WORKER, "additional_config": {"kvcomp": options}}
            found, tokens = engine(folder, {"rounds": [*scored, held]}, max_num_batched_tokens=FIRST, **more)
            memory = found["memory"]
            methods.append(
                {
                    "name": name,
                    "saving": SAVING[name],
                    "tokens": tokens,
                    "times": tokens / own_tokens,
                    "bytes_a_token": (memory["used"] + memory["outside"]) / memory["tokens"],
                    "outside": memory["outside"],
                    "kl": kl(own, found),
                }
            )
            note()
        other, _ = engine(folder, {"rounds": scored}, max_num_batched_tokens=FIRST // 2)
        note(noise_floor=kl(own, other))
        note(gaps=stopped(folder, ids), partial=False)


def engine(folder: str, request: Answer, **arguments: Any) -> tuple[Answer, int]:
    """What an engine answers, and how many tokens its log says its cache holds."""
    python = os.environ.get("KVCOMP_VLLM")
    if not python:
        raise InvalidInput("KVCOMP_VLLM must name a Python that has vLLM: use make bench-vllm")
    arguments = {"model": folder, "dtype": "bfloat16", "max_model_len": 4096, **arguments}
    paths = [Path(folder) / name for name in ("request.json", "answer.json")]
    paths[0].write_text(json.dumps({**request, "engine": arguments}))
    more = {
        "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
        "VLLM_CPU_KVCACHE_SPACE": str(SPACE),
        "VLLM_NO_USAGE_STATS": "1",
        "NUMBA_CACHE_DIR": str(Path(python).parents[1] / "numba"),
    }
    script = Path(__file__).parent / "vllm_engine.py"
    run = subprocess.run(
        [python, script, *paths], env={**os.environ, **more}, check=True, stdout=subprocess.PIPE, text=True
    )
    tokens = re.search(r"KV cache size: ([0-9,]+) tokens", run.stdout)
    assert tokens is not None
    return json.loads(paths[1].read_text()), int(tokens[1].replace(",", ""))


def kl(own: Answer, other: Answer) -> dict[str, Any]:
    """Mean KL over the likeliest tokens of the first, the rest as one, with its error over texts."""
    return figure([float(np.mean([_kl(*place) for place in _places(*texts)])) for texts in _texts(own, other)])


def _texts(own: Answer, other: Answer) -> list[tuple[Any, Any]]:
    answers = [[found["rounds"][i][0][0]["scored"] for i in range(TEXTS)] for found in (own, other)]
    return list(zip(*answers, strict=True))


def _places(own: Any, other: Any) -> list[tuple[dict[str, float], dict[str, float]]]:
    return list(zip(own, other, strict=True))


def _kl(own: dict[str, float], other: dict[str, float]) -> float:
    """A token that only one of both lists is taken as likely as the last of the other's list."""
    p, q = (np.exp([of.get(token, min(of.values())) for token in own]) for of in (own, other))
    rest = [max(1e-6, 1 - x.sum()) for x in (p, q)]
    p, q = (np.append(x, r) / (x.sum() + r) for x, r in zip((p, q), rest, strict=True))
    return float((p * np.log(p / q)).sum())


def stopped(folder: str, ids: list[int]) -> dict[str, Any]:
    """Gaps between tokens of a running request, in seconds, while Redis is at work and while it is stopped."""
    port = 16391
    command = ["redis-server", "--port", str(port), "--save", "", "--maxmemory", "500mb"]
    server = subprocess.Popen([*command, "--maxmemory-policy", "allkeys-lru"], stdout=subprocess.DEVNULL)
    try:
        extra = {"url": f"redis://127.0.0.1:{port}", "chunk_tokens": 64, "timeout": 5.0}
        transfer = {
            "kv_connector": "KVCompConnector",
            "kv_connector_module_path": "kvcomp.integrations.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
        request = {"rounds": [], "stop": server.pid, "prompt": ids[:400]}
        found, _ = engine(folder, request, kv_transfer_config=transfer, disable_hybrid_kv_cache_manager=True)
    finally:
        server.kill()
        server.wait()
    return {
        name: {"median": float(np.median(of)), "longest": max(of), "count": len(of)}
        for name, of in found["gaps"].items()
    }


if __name__ == "__main__":
    typer.run(main)
