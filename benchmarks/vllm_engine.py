"""One real vLLM engine that does what it is told, in a Python that has vLLM.

python vllm_engine.py FD

Lines of JSON come in: the arguments of ``vllm.LLM``, then calls, each an object of ``call``, a function's name, and
its arguments. What it returns goes to the file descriptor FD, a line each. ``vllm_client.Engine`` speaks to it.
A prompt is an object: ``ids``, ``max_tokens``, ``n``, and ``scored``, at how many of its last places the likeliest
tokens are asked for.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

TOP = 20
Prompts = list[dict[str, Any]]


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    from vllm import LLM

    linear_in_float32()
    llm = LLM(
        **{"enforce_eager": True, "disable_log_stats": False, "block_size": 64, **json.loads(sys.stdin.readline())}
    )
    print(json.dumps("ready"), file=answers)
    calls = {call.__name__: call for call in (run, hold, steps, drop, state, gaps)}
    for line in sys.stdin:
        arguments = json.loads(line)
        print(json.dumps(calls[arguments.pop("call")](llm, **arguments)), file=answers)


def linear_in_float32() -> None:
    """Multiply in float32 where the CPU has no bfloat16: torch's own way takes 20 times as long there.

    Weights, activations, K, V and both caches stay bfloat16. vLLM calls this function where oneDNN refuses.
    """
    import torch

    plain, copies = torch.nn.functional.linear, dict[int, Any]()
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        return

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        if weight.dtype != torch.bfloat16:
            return plain(x, weight, bias)
        if weight.data_ptr() not in copies:
            copies[weight.data_ptr()] = weight.float()
        wide = plain(x.float(), copies[weight.data_ptr()], None if bias is None else bias.float())
        return wide.to(x.dtype)

    torch.nn.functional.linear = linear  # type: ignore[assignment]


def run(llm: Any, prompts: Prompts) -> dict[str, Any]:
    """Answer prompts together: the likeliest tokens of each place, and what it took, by the clock and of the CPU."""
    parameters = [_sampling(one) for one in prompts]
    begin = _clocks()
    outputs = llm.generate([{"prompt_token_ids": one["ids"]} for one in prompts], parameters, use_tqdm=False)
    took = _since(begin)
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":  # a core of its own does so by itself
        llm.llm_engine.step()  # the worker is told which are over
    answers = [
        [
            {
                "ids": list(one.token_ids),
                "top": [_likeliest(place) for place in one.logprobs or []],
                "scored": [_likeliest(place) for place in (output.prompt_logprobs or [])[-prompt.get("scored", 0) :]],
            }
            for one in output.outputs
        ]
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    return {**took, "answers": answers}


def hold(llm: Any, prompts: Prompts) -> dict[str, float]:
    """Begin to answer prompts, until all of them are generating at once."""
    begin, held, most = _clocks(), 0, 4 * sum(len(one["ids"]) for one in prompts)
    for index, one in enumerate(prompts):
        llm.llm_engine.add_request(f"held {index}", {"prompt_token_ids": one["ids"]}, _sampling(one))
    for _ in range(most):
        held = len(llm.llm_engine.step())
        if held == len(prompts):
            break
    return {**_since(begin), "held": held}


def steps(llm: Any, count: int) -> list[dict[str, float]]:
    """What each of so many steps took, and how many held prompts got a token in it."""
    found = []
    for _ in range(count):
        begin = _clocks()
        held = len(llm.llm_engine.step())
        found.append({**_since(begin), "held": held})
    return found


def drop(llm: Any, held: list[int]) -> None:
    """Forget these of the held prompts."""
    llm.llm_engine.abort_request([f"held {index}" for index in held])
    llm.llm_engine.step()


def state(llm: Any, live: bool) -> dict[str, Any]:
    """Bytes of the compressed cache and vLLM's metrics."""
    return {
        "memory": llm.collective_rpc("kvcomp_memory")[0] if live else None,
        "metrics": {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")},
    }


def gaps(llm: Any, prompt: list[int], server: int, tokens: int = 300) -> dict[str, list[float]]:
    """Seconds between the tokens of a request while others come, with the server at work, and with it stopped."""
    engine, found = llm.llm_engine, {name: list[float]() for name in ("at work", "stopped")}
    engine.add_request("running", {"prompt_token_ids": prompt[:300]}, _sampling({"max_tokens": tokens}))
    last, count = 0.0, 0
    while engine.has_unfinished_requests() and count < tokens:
        new = [output for output in engine.step() if output.request_id == "running"]
        now = time.perf_counter()
        if not new:
            continue
        if count > 10:
            found["at work" if count < tokens // 2 else "stopped"].append(now - last)
        last, count = now, count + 1
        if count == tokens // 2:
            os.kill(server, signal.SIGSTOP)
        if count % 20 == 0:
            other = {"prompt_token_ids": [count, *prompt[:80]]}
            engine.add_request(f"other {count}", other, _sampling({"max_tokens": 1}))
    os.kill(server, signal.SIGCONT)
    return found


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(begin: tuple[float, float]) -> dict[str, float]:
    return {name: now - then for name, now, then in zip(("seconds", "cpu"), _clocks(), begin, strict=True)}


def _sampling(one: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=float(one.get("n", 1) > 1),
        n=one.get("n", 1),
        seed=1,
        max_tokens=one["max_tokens"],
        ignore_eos=True,
        logprobs=TOP if one.get("likeliest") else None,
        prompt_logprobs=TOP if one.get("scored") else None,
        detokenize=False,
    )


def _likeliest(place: Any) -> dict[str, float]:
    return {str(token): value.logprob for token, value in (place or {}).items()}


if __name__ == "__main__":
    main()
