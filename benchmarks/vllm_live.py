"""What a compressed cache gives and costs in a real vLLM engine on the CPU, with SmolLM2-135M in bfloat16.

Run by `make bench-vllm`, which has vLLM, the model, and needs redis-server for the last part. Every engine has one
thread and the same bytes for its cache: what four dense sequences of 4,096 tokens take.

- Tokens that fit are those of vLLM's own log. They are then held: as many sequences as the log allows, all at once.
  Steps of both engines are timed in turns while they do, and once more with equally many.
- Bytes of pages, raw ones included, are of sequences of 2,048 and of 8,064 tokens. vLLM's memory is resident; what lies
  outside adds to it.
- KL is over the likeliest 20 tokens at 80 places, which see the first 1,796 tokens through the cache, against vLLM's
  own; the noise floor is vLLM's own filled in other pieces. "transformers" is the same spec there, on the same texts.
- The first token is that of prompts computed and of the same prompts from Redis, in turns.
- Gaps are between tokens of a running request, with Redis at work and with it stopped.

A part that ``--resume`` adds says its own commit.

    python benchmarks/vllm_live.py [--resume]
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import real_models
import vllm_engine
from kvcomp.evaluate.fidelity import fill, predict, sample
from kvcomp.evaluate.methods import KVComp
from kvcomp.evaluate.models import text_ids
from kvcomp.results.schema import environment, figure
from kvcomp.spec import is_calibrated
from network import redis_server
from vllm_client import ROOT, Engine

OUTPUT = Path(__file__).parent / "results" / "vllm_live.json"
CALIBRATION = ROOT / "examples" / "calibrations" / "smollm2-135m.kvcal"
FIRST, SCORED, TEXTS = 1796, 80, 6  # pages and sinks: vLLM's blocks and transformers' pages leave as many tokens raw
DENSE, TOKENS, SPARE = 4, 4096, 64  # sequences of vLLM's own that fit, their tokens, a block
SHORT, LONG = 2048, 8064  # tokens of a short sequence and of a long one
GENERATED = 2 * SPARE  # of those tokens: more than are generated while others are read and all are timed
STEPS, TURNS = 6, 4
REDIS = "500mb"
PREFIX, PREFIX_CHUNK, PROMPTS, SETTLED = 1900, 256, 3, 4.0  # tokens of a stored prompt; seconds until it is stored
SAVING = {"kvcomp": 3.5, "kvcomp-klt": 4.0, "packed-klt": 3.6, "packed-klt:aggressive": 6.0, "packed": 3.3}

Found = dict[str, Any]
Ids = list[int]


def main(
    resume: Annotated[bool, typer.Option("--resume", help="Keep the parts that the output has.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o")] = OUTPUT,
) -> None:
    """Measure, and write the results file after each part."""
    torch.set_num_threads(1)
    vllm_engine.linear_in_float32()
    model, tokenizer = real_models.load("smollm2-135m", "bfloat16")
    ids = text_ids(tokenizer, "", None)[0].tolist()
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    space = (DENSE * TOKENS + SPARE) * token
    setting = environment(
        model="SmolLM2-135M",
        vllm="0.32.0",
        space=space,
        first=FIRST,
        scored=SCORED,
        texts=TEXTS,
        tokens=TOKENS,
        short=SHORT,
        long=LONG,
    )
    content: Found = {"kvcomp_results": 1, "kind": "vllm_live", "partial": True, "setting": setting}
    if resume and output.exists():
        content |= json.loads(output.read_text()) | {"partial": True}
        if "scored" not in content.get("own", {}):  # a run that ended keeps no log probabilities
            content.pop("own", None)

    def part(name: str, measure: Callable[[], Found]) -> Found:
        if name not in content:
            content[name] = measure() | {"commit": setting["commit"], "load_average": os.getloadavg()[0]}
            output.write_text(json.dumps(content, indent=2) + "\n")
        return dict(content[name])

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        same: Found = {
            "model": folder,
            "dtype": "bfloat16",
            "max_model_len": LONG + SPARE,
            "enable_prefix_caching": False,
        }
        same |= {"kv_cache_memory_bytes": space, "max_num_batched_tokens": FIRST}
        texts = [ids[i * (FIRST + SCORED + 1) :][: FIRST + SCORED + 1] for i in range(TEXTS)]
        part("first_token", partial(first_tokens, same, ids))
        part("gaps", partial(gaps, same, ids))
        with Engine(None, **same) as own:
            reference = part("own", lambda: {"tokens": own.tokens, "scored": scored(own, texts)})
            part("noise_floor", partial(noise, same, texts, reference))
            part("transformers", partial(in_transformers, model, texts))
            part("kl", partial(in_engines, same, texts, reference))
            for name, saving in SAVING.items():
                part(name, partial(method, options(name), saving, same, own, reference["tokens"], ids))
    content["own"].pop("scored")
    content["partial"] = False
    output.write_text(json.dumps(content, indent=2) + "\n")


def options(name: str) -> dict[str, str]:
    """Spec and calibration of a method."""
    return {"spec": name} | ({"calibration": str(CALIBRATION)} if is_calibrated(name) else {})


def in_engines(same: Found, texts: Sequence[Ids], reference: Found) -> Found:
    """KL of each spec in the engine, against vLLM's own cache."""
    found = {}
    for name in SAVING:
        with Engine(options(name), **same) as ours:
            found[name] = kl(reference["scored"], scored(ours, texts))
    return found


def method(given: dict[str, str], saving: float, same: Found, own: Engine, dense_tokens: int, ids: Ids) -> Found:
    """A compressed cache beside vLLM's own: bytes, and times in turns."""
    with Engine({**given, "saving": saving}, **same) as ours:
        found: Found = {"saving": saving, "tokens": ours.tokens, "times": ours.tokens / dense_tokens}
        for length, tokens in (("short", SHORT), ("long", LONG)):
            count = LONG // tokens
            found[length] = held(ours, ids, count, tokens)
            ours("drop", held=list(range(count)))
        many = (ours.tokens - SPARE) // TOKENS
        found["held"] = {"own": held(own, ids, DENSE, TOKENS), "ours": held(ours, ids, many, TOKENS)}
        found["equal_memory"] = turns(own, ours, DENSE, many)
        ours("drop", held=list(range(DENSE, many)))
        found["equal_concurrency"] = turns(own, ours, DENSE, DENSE)
        own("drop", held=list(range(DENSE)))
        ours("drop", held=list(range(DENSE)))
        found["left"] = ours.state()["memory"]
    return found


def held(engine: Engine, ids: Ids, sequences: int, tokens: int) -> Found:
    """Hold sequences of nearly so many tokens, and say what they take; they do not end while they are timed."""
    before = engine.state()["metrics"]["vllm:num_preemptions"]
    prompts = [ids[i * tokens :][: tokens - GENERATED] for i in range(sequences)]
    began = engine("hold", prompts=[{"ids": prompt, "max_tokens": GENERATED} for prompt in prompts])
    after = engine.state()
    count = sum(map(len, prompts)) if after["memory"] is None else after["memory"]["tokens"]
    found = {"sequences": began["held"], "tokens": count}
    found |= {"preempted": after["metrics"]["vllm:num_preemptions"] - before}
    found |= {"prefill_cpu_seconds": began["cpu"], "prefill_seconds": began["seconds"]}
    if memory := after["memory"]:
        found |= {"used": memory["used"], "outside": memory["outside"], "room": memory["room"]}
        found |= {"bytes_a_token": (memory["used"] + memory["outside"]) / count}
    return found


def turns(own: Engine, ours: Engine, theirs: int, many: int) -> Found:
    """Tokens a second of both, and their ratio, by CPU time and by the clock; a step gives each sequence a token."""
    clocks = "cpu", "seconds"
    rates: dict[str, dict[str, list[float]]] = {clock: {"own": [], "ours": []} for clock in clocks}
    for _ in range(TURNS):
        for name, engine, sequences in (("own", own, theirs), ("ours", ours, many)):
            steps = engine("steps", count=STEPS)
            if any(one["held"] != sequences for one in steps):
                raise RuntimeError(f"{name}: not all of {sequences} sequences got a token in each step: {steps}")
            for clock in clocks:
                rates[clock][name].append(sequences / float(np.median([one[clock] for one in steps])))
    return {
        "sequences": {"own": theirs, "ours": many},
        **{
            clock: {
                **{name: spread(of) for name, of in both.items()},
                "ratio": spread([b / a for a, b in zip(both["own"], both["ours"], strict=True)]),
            }
            for clock, both in rates.items()
        },
    }


def spread(values: Sequence[float]) -> Found:
    return {"median": float(np.median(values)), "least": min(values), "most": max(values), "count": len(values)}


def scored(engine: Engine, texts: Sequence[Ids]) -> list[Any]:
    """The likeliest tokens at the last places of each text, each alone."""
    prompts = [{"ids": text, "max_tokens": 1, "scored": SCORED} for text in texts]
    return [engine("run", prompts=[prompt])["answers"][0][0]["scored"] for prompt in prompts]


def noise(same: Found, texts: Sequence[Ids], reference: Found) -> Found:
    with Engine(None, **(same | {"max_num_batched_tokens": FIRST // 2})) as other:
        return kl(reference["scored"], scored(other, texts))


def in_transformers(model: Any, texts: Sequence[Ids]) -> Found:
    """KL of the same specs in transformers, on the same places."""
    found: dict[str, list[Any]] = {name: [] for name in ("own", *SAVING)}
    for text in texts:
        each = sample(model, torch.tensor([text[:-1]]), FIRST)
        found["own"].append(likeliest(each.log_probs))
        for name in SAVING:
            compressed = KVComp(**options(name))
            found[name].append(likeliest(predict(model, each.text, fill(model, each, compressed), compressed)))
    return {name: kl(found["own"], found[name]) for name in SAVING}


def likeliest(log_probs: Any) -> list[dict[str, float]]:
    values, tokens = log_probs.topk(vllm_engine.TOP)
    return [dict(zip(map(str, t), v, strict=True)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]


def kl(own: Sequence[Any], other: Sequence[Any]) -> Found:
    """Mean KL over the likeliest tokens of the first, the rest as one, with its error over texts."""
    texts = zip(own, other, strict=True)
    return figure([float(np.mean([_kl(*places) for places in zip(*text, strict=True)])) for text in texts])


def _kl(own: dict[str, float], other: dict[str, float]) -> float:
    """A token that only one of both lists is taken as likely as the last of the other's list."""
    p, q = (np.exp([of.get(token, min(of.values())) for token in own]) for of in (own, other))
    rest = [max(1e-6, 1 - x.sum()) for x in (p, q)]
    p, q = (np.append(x, r) / (x.sum() + r) for x, r in zip((p, q), rest, strict=True))
    return float((p * np.log(p / q)).sum())


def connected(same: Found, port: int, chunk: int, **more: Any) -> Engine:
    """An engine with vLLM's own cache and kvcomp's connector, in processes as vLLM has them by default.

    Its model is in float32: what these processes multiply with is not ours to choose (``linear_in_float32``).
    """
    transfer = {
        "kv_connector": "KVCompConnector",
        "kv_connector_module_path": "kvcomp.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": f"redis://127.0.0.1:{port}", "timeout": 5.0, "chunk_tokens": chunk},
    }
    more |= {"dtype": "float32", "max_model_len": SHORT, "disable_hybrid_kv_cache_manager": True}
    return Engine(None, apart=True, **(same | more | {"kv_transfer_config": transfer}))


def first_tokens(same: Found, ids: Ids) -> Found:
    """The first token from Redis and without it, in turns."""
    with redis_server(REDIS) as (_, port), connected(same, port, PREFIX_CHUNK) as engine:
        first_token(engine, ids[-PREFIX:])  # what is compiled on the first use
        found = [first_token(engine, ids[i * PREFIX :][:PREFIX]) for i in range(PROMPTS)]
    return {
        **{name: spread([one[name] for one in found]) for name in ("computed", "loaded")},
        "ratio": spread([one["loaded"] / one["computed"] for one in found]),
    }


def gaps(same: Found, ids: Ids) -> Found:
    """Gaps between tokens while Redis is at work and stopped, with others that ask for a chunk of 64 tokens.

    Their prompts are computed 16 tokens a step, so that a gap is not theirs.
    """
    few = {"max_num_batched_tokens": 16, "max_num_seqs": 8}
    with redis_server(REDIS) as (server, port), connected(same, port, SPARE, **few) as engine:
        found = engine("gaps", prompt=ids[:400], server=server)
    return {name: spread(of) for name, of in found.items()}


def first_token(engine: Engine, prompt: Ids) -> dict[str, float]:
    """Seconds to the first token of a prompt, computed and stored, and then from the store."""
    found = {}
    for name in ("computed", "loaded"):
        found[name] = float(engine("run", prompts=[{"ids": prompt, "max_tokens": 1}])["seconds"])
        time.sleep(SETTLED)
    return found


if __name__ == "__main__":
    typer.run(main)
