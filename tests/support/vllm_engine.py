"""Runs a real vLLM engine, in a Python that has vLLM: reads what to do as JSON, writes what came of it.

python vllm_engine.py REQUEST.json ANSWER.json

A request has ``engine``, the arguments of ``vllm.LLM``, and ``rounds``, each a list of prompts that run together:
``ids``, ``max_tokens``, ``n``. An answer has, for each round and prompt, the tokens with the log probabilities of the
likeliest ones, and what the engine says of its memory and preemptions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TOP = 20


def main() -> None:
    request, answer = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    from vllm import LLM

    llm = LLM(**{"enforce_eager": True, "disable_log_stats": False, "block_size": 64, **request["engine"]})
    live = "kvcomp" in str(request["engine"].get("worker_cls"))
    rounds = [run(llm, prompts) for prompts in request["rounds"]]
    metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    memory = llm.collective_rpc("kvcomp_memory")[0] if live else None
    answer.write_text(json.dumps({"rounds": rounds, "memory": memory, "metrics": metrics}))


def run(llm: Any, prompts: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=float(one.get("n", 1) > 1),
            n=one.get("n", 1),
            seed=1,
            max_tokens=one["max_tokens"],
            ignore_eos=True,
            logprobs=TOP,
            detokenize=False,
        )
        for one in prompts
    ]
    outputs = llm.generate([{"prompt_token_ids": one["ids"]} for one in prompts], parameters, use_tqdm=False)
    return [
        [
            {
                "ids": list(one.token_ids),
                "top": [{str(token): value.logprob for token, value in place.items()} for place in one.logprobs],
            }
            for one in output.outputs
        ]
        for output in outputs
    ]


if __name__ == "__main__":
    main()
