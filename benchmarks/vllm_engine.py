"""Runs a real vLLM engine, in a Python that has vLLM: reads what to do as JSON, writes what came of it.

python vllm_engine.py REQUEST.json ANSWER.json

A request has ``engine``, the arguments of ``vllm.LLM``, and ``rounds``, each a list of prompts that run together:
``ids``, ``max_tokens``, ``n``, and ``scored``, at how many of the prompt's last places the likeliest tokens are asked
for. With ``stop``, the process id of a server that is stopped while one prompt is answered and others come. An answer
has, for each round and prompt, the tokens with the log probabilities of the likeliest ones, and what the engine says of
its memory.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

TOP = 20


def main() -> None:
    request, answer = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    from vllm import LLM

    llm = LLM(**{"enforce_eager": True, "disable_log_stats": False, "block_size": 64, **request["engine"]})
    live = "kvcomp" in str(request["engine"].get("worker_cls"))
    rounds = [run(llm, prompts) for prompts in request["rounds"]]
    found = {
        "rounds": rounds,
        "gaps": gaps(llm, request["prompt"], request["stop"]) if "stop" in request else None,
        "metrics": {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")},
        "memory": llm.collective_rpc("kvcomp_memory")[0] if live else None,
    }
    answer.write_text(json.dumps(found))


def run(llm: Any, prompts: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Answer prompts together."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=float(one.get("n", 1) > 1),
            n=one.get("n", 1),
            seed=1,
            max_tokens=one["max_tokens"],
            ignore_eos=True,
            logprobs=TOP,
            prompt_logprobs=TOP if one.get("scored") else None,
            detokenize=False,
        )
        for one in prompts
    ]
    outputs = llm.generate([{"prompt_token_ids": one["ids"]} for one in prompts], parameters, use_tqdm=False)
    return [
        [
            {
                "ids": list(one.token_ids),
                "top": [likeliest(place) for place in one.logprobs],
                "scored": [likeliest(place) for place in (output.prompt_logprobs or [])[-prompt.get("scored", 0) :]],
            }
            for one in output.outputs
        ]
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def likeliest(place: Any) -> dict[str, float]:
    return {str(token): value.logprob for token, value in (place or {}).items()}


def gaps(llm: Any, prompt: list[int], server: int, tokens: int = 300) -> dict[str, list[float]]:
    """Seconds between the tokens of a request while others come, with the server at work, and with it stopped."""
    from vllm import SamplingParams

    engine, found = llm.llm_engine, {name: list[float]() for name in ("at work", "stopped")}
    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    one = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    engine.add_request("running", {"prompt_token_ids": prompt[:300]}, parameters)
    last, count = 0.0, 0
    while engine.has_unfinished_requests() and count < tokens:
        new = [output for output in engine.step() if output.request_id == "running"]
        now = time.monotonic()
        if not new:
            continue
        if count > 10:
            found["at work" if count < tokens // 2 else "stopped"].append(now - last)
        last, count = now, count + 1
        if count == tokens // 2:
            os.kill(server, signal.SIGSTOP)
        if count % 20 == 0:
            engine.add_request(f"other {count}", {"prompt_token_ids": [count, *prompt[:80]]}, one)
    os.kill(server, signal.SIGCONT)
    return found


if __name__ == "__main__":
    main()
