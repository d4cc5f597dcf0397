"""``kvcomp bench``: the time of each operation beside what the machine does without compression.

Nothing is timed that has not just been checked.
A results file of the kind "bench" (see ``results``) has a list for each part::

    attention: [{context, batch, group, head_dim, threads, from_rest, clock, rounds, error, bits_per_value,
                 milliseconds: {method: Spread}, ns_per_value: Spread of kvcomp, time_over: {method: Spread},
                 fastest_dense, load_average}]
    codec:     [{tokens, head_dim, rounds, encode_ns_per_value, encode_over_copy, seal_page_microseconds,
                 decompress_ns_per_value, decompress_over_copy: Spread, bits_per_value, load_average}]
    generate:  [{prompt_tokens, new_tokens, batch, rounds, threads, error, total_bits,
                 first_token_seconds: {cache: Spread}, milliseconds_per_token: {cache: Spread},
                 time_over: Spread of the whole call, load_average}]
    growth:    [{tokens, memory: {tokens: [..], kvcomp: [bytes], uncompressed: [bytes]}}]      while a model generates

    Spread: {median, quartile_1, quartile_3} over the rounds.

``time_over`` is kvcomp's time over the other's within a round: below 1 kvcomp is faster.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_name
from torch import Tensor
from transformers import Cache, DynamicCache

from kvcomp.bench import checks, dense
from kvcomp.bench.generation import attention_error, token_times
from kvcomp.bench.timing import REST, clock_for, fastest, in_rounds, quartiles, ratio, scaled
from kvcomp.calibration import Calibration
from kvcomp.errors import InvalidInput, UnsupportedModel
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers.models import positions, text_config
from kvcomp.spec import PAGE_TOKENS, CodecSpec
from kvcomp.store import KVStore, sealed
from kvcomp.store.attention import attend

CODEC_TOKENS = 4096
GROWTH_PROMPT, GROWTH_STEP = 64, 32
SEED = 20261121

Coding = tuple[CodecSpec, Calibration | None]


@dataclass(frozen=True)
class Grid:
    """What is measured: every combination of these."""

    contexts: tuple[int, ...] = (2048, 8192)
    batches: tuple[int, ...] = (1, 4)
    groups: tuple[int, ...] = (1, 4)
    head_dims: tuple[int, ...] = (128,)
    threads: tuple[int, ...] = (1, torch.get_num_threads())
    kv_heads: int = 8
    prompts: tuple[int, ...] = (2048,)
    new_tokens: int = 32
    growth: int = 1024
    rounds: int = 21
    """Most rounds of each combination."""
    budget: float = 1.0
    """Seconds, about, of each combination."""

    def __post_init__(self) -> None:
        for name in ("contexts", "batches", "groups", "head_dims", "threads", "prompts"):
            if any(number < 1 for number in getattr(self, name)):
                raise InvalidInput(f"{name} must be 1 or more, not {list(getattr(self, name))}")
        if any(context < checks.REFERENCE_PAGES * PAGE_TOKENS for context in self.contexts):
            raise InvalidInput(
                f"a context has at least {checks.REFERENCE_PAGES * PAGE_TOKENS} tokens, not {min(self.contexts)}: "
                "shorter ones are not compressed"
            )


QUICK = Grid()
FULL = Grid(
    contexts=(2048, 8192, 32768),
    groups=(1, 4, 8),
    head_dims=(64, 128),
    prompts=(1024, 2048, 3840),
    new_tokens=128,
    growth=4096,
    rounds=41,
    budget=6.0,
)


class Case(Protocol):
    """One thing to measure. part: the list of the results that it belongs to. cost: about how long, in any unit."""

    part: str

    @property
    def cost(self) -> float: ...

    def measure(self, grid: Grid) -> dict[str, Any]: ...


@dataclass(frozen=True)
class AttentionCase:
    """Decode attention: one new token on a cache of one layer."""

    spec: CodecSpec
    context: int
    batch: int
    group: int
    head_dim: int
    threads: int
    from_rest: bool
    part = "attention"

    @property
    def cost(self) -> float:
        return 0.5 + self.batch * self.context * self.head_dim / 2e6

    def measure(self, grid: Grid) -> dict[str, Any]:
        k, v = tensors(self.batch, grid.kv_heads, self.context, self.head_dim)
        store = sealed(self.spec.bare(), k, v)
        q = torch.randn(self.batch, grid.kv_heads * self.group, 1, self.head_dim)
        error = checks.attention_error(store, q)
        torch.set_num_threads(self.threads)
        scaling = self.head_dim**-0.5
        grouped = q.view(self.batch, grid.kv_heads, self.group, self.head_dim).to(k.dtype)
        rivals = dense.dense_methods(k, v, grouped)
        methods: dict[str, Callable[[], Any]] = {"kvcomp": lambda: attend(store, q, scaling), **rivals}
        clock = clock_for(self.threads)
        taken = in_rounds(methods, grid.rounds, grid.budget, clock, REST if self.from_rest else 0.0)
        return {
            **about(self),
            "clock": clock.__name__,
            "rounds": len(taken),
            "error": error,
            "bits_per_value": store.memory().coded_bits,
            "milliseconds": {name: scaled(taken, name, 1e3) for name in methods},
            "ns_per_value": scaled(taken, "kvcomp", 1e9 / (2 * k.numel())),
            "time_over": {name: ratio(taken, "kvcomp", name) for name in rivals},
            "fastest_dense": fastest(taken, list(rivals)),
            "load_average": os.getloadavg()[0],
        }


@dataclass(frozen=True)
class CodecCase:
    """Compressing a prompt's K and V, sealing one page, and decompressing all, on one thread."""

    spec: CodecSpec
    tokens: int
    head_dim: int
    part = "codec"

    @property
    def cost(self) -> float:
        return 2.0

    def measure(self, grid: Grid) -> dict[str, Any]:
        torch.set_num_threads(1)
        k, v = tensors(1, grid.kv_heads, self.tokens, self.head_dim)
        checks.check_codec(self.spec.bare(), k, v)
        store = sealed(self.spec.bare(), k, v)
        actions: dict[str, Callable[[], Any]] = {
            "encode": lambda: sealed(self.spec.bare(), k, v),
            "decompress": store.dense,
            "copy": lambda: (k.clone(), v.clone()),
        }
        taken = in_rounds(actions, grid.rounds, grid.budget)
        per_value = 1e9 / (2 * k.numel())
        return {
            **about(self),
            "rounds": len(taken),
            "encode_ns_per_value": scaled(taken, "encode", per_value),
            "encode_over_copy": ratio(taken, "encode", "copy"),
            "seal_page_microseconds": quartiles(list(_page_seals(store, k, v, 4 * grid.rounds))),
            "decompress_ns_per_value": scaled(taken, "decompress", per_value),
            "decompress_over_copy": ratio(taken, "decompress", "copy"),
            "bits_per_value": store.memory().coded_bits,
            "load_average": os.getloadavg()[0],
        }


@dataclass(frozen=True)
class GenerateCase:
    """The whole of ``generate``, prompt and new tokens, with this cache and with transformers' own."""

    coding: Coding
    model: Any
    prompt_tokens: int
    batch: int
    threads: int
    part = "generate"

    @property
    def cost(self) -> float:
        return 4.0 * self.batch

    def measure(self, grid: Grid) -> dict[str, Any]:
        torch.set_num_threads(self.threads)
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(
            5, text_config(self.model.config).vocab_size, (self.batch, self.prompt_tokens), generator=generator
        )
        caches: dict[str, Callable[[], Cache]] = {
            "kvcomp": lambda: KVCompCache(self.model.config, self.coding[0], calibration=self.coding[1]),
            "uncompressed": lambda: DynamicCache(config=self.model.config),
        }
        ticks: dict[str, list[list[float]]] = {name: [] for name in caches}
        last: dict[str, Any] = {}

        def run(name: str) -> Callable[[], None]:
            def generate() -> None:
                last[name] = caches[name]()
                ticks[name].append(token_times(self.model, ids, last[name], grid.new_tokens))

            return generate

        run("kvcomp")()
        error = attention_error(last["kvcomp"])
        taken = in_rounds({name: run(name) for name in caches}, grid.rounds, 4 * grid.budget, time.perf_counter)
        steps = {name: np.diff(np.array(of[-len(taken) :])) for name, of in ticks.items()}
        return {
            **about(self),
            "new_tokens": grid.new_tokens,
            "rounds": len(taken),
            "error": error,
            "total_bits": last["kvcomp"].memory().total_bits,
            "first_token_seconds": {name: quartiles(of[:, 0].tolist()) for name, of in steps.items()},
            "milliseconds_per_token": {
                name: quartiles((1e3 * of[:, 1:].mean(1)).tolist()) for name, of in steps.items()
            },
            "time_over": ratio(taken, "kvcomp", "uncompressed"),
            "load_average": os.getloadavg()[0],
        }


@dataclass(frozen=True)
class GrowthCase:
    """The memory of the cache while tokens are generated, from a short prompt on."""

    coding: Coding
    model: Any
    tokens: int
    part = "growth"

    @property
    def cost(self) -> float:
        return self.tokens / 150

    def measure(self, grid: Grid) -> dict[str, Any]:
        torch.set_num_threads(max(grid.threads))
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(5, text_config(self.model.config).vocab_size, (1, GROWTH_PROMPT), generator=generator)
        cache = KVCompCache(self.model.config, self.coding[0], calibration=self.coding[1])
        sizes: list[tuple[int, int, int]] = []

        def note(tokens: int) -> None:
            if tokens % GROWTH_STEP == 0:
                memory = cache.memory()
                sizes.append((cache.get_seq_length(), memory.total, memory.dense))

        token_times(self.model, ids, cache, self.tokens - GROWTH_PROMPT, note)
        tokens, ours, dense = (list(of) for of in zip(*sizes, strict=True))
        return {**about(self), "memory": {"tokens": tokens, "kvcomp": ours, "uncompressed": dense}}


def cases(grid: Grid, coding: Coding, parts: Sequence[str], model: Any, thorough: bool) -> list[Case]:
    """What the grid asks for; where ``thorough``, calls of several threads are also timed from rest.

    Raises InvalidInput if the spec, or the model's length, does not go with it, and UnsupportedModel if none of its
    layers is compressed.
    """
    spec = coding[0]
    if (spec.key.layers, spec.value.layers) != (None, None) and {"attention", "codec"} & set(parts):
        raise InvalidInput(
            "this spec is of one model's layers, and attention and codec are timed on drawn values: "
            "take --part generate --part growth"
        )
    modes = [
        (n, rest)
        for n in dict.fromkeys(grid.threads)
        for rest in (True, False)
        if rest == (n == 1) or (thorough and n > 1)
    ]
    found: list[Case] = []
    if "attention" in parts:
        axes = product(grid.head_dims, grid.contexts, grid.batches, modes, grid.groups)
        found += [AttentionCase(spec, context, batch, group, d, *mode) for d, context, batch, mode, group in axes]
    if "codec" in parts:
        found += [CodecCase(spec, CODEC_TOKENS, head_dim) for head_dim in grid.head_dims]
    generating = {"generate", "growth"} & set(parts)
    if generating and not KVCompCache(model.config, spec, calibration=coding[1]).compressed_layers:
        raise UnsupportedModel(
            f"no layer of this {model.config.model_type} model is compressed, so that nothing can be compared: "
            "take --part attention --part codec"
        )
    if "generate" in parts:
        room = positions(model.config) - grid.new_tokens
        prompts = [tokens for tokens in grid.prompts if tokens <= room]
        if not prompts:
            raise InvalidInput(
                f"this model has {room} positions for a prompt, fewer than {min(grid.prompts)}: give --prompt-tokens"
            )
        found += [
            GenerateCase(coding, model, tokens, batch, max(grid.threads))
            for tokens, batch in product(prompts, grid.batches)
        ]
    if "growth" in parts:
        found.append(GrowthCase(coding, model, min(grid.growth, positions(model.config))))
    return found


def about(case: Any) -> dict[str, Any]:
    """What a case is, without its spec and model, which all share."""
    return {name: value for name, value in vars(case).items() if name not in ("spec", "coding", "model")}


def key(case: Any) -> str:
    """The name of a case in a journal."""
    return " ".join([case.part, *(f"{name}={value}" for name, value in about(case).items())])


def parameters(grid: Grid, spec: CodecSpec) -> dict[str, Any]:
    """What a bench adds to its environment: the backend, what it is compared with, the spec and the grid."""
    return {
        "backend": "cpu",
        "llvm_cpu": get_host_cpu_name(),
        "dense_dtype": "bfloat16",
        "not_compared": dense.missing(),
        "spec": json.loads(spec.to_json()),
        **asdict(grid),
    }


def tensors(batch: int, heads: int, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """Heavy-tailed K with channels of different size, V with tokens of different size: bfloat16."""
    torch.manual_seed(SEED)
    shape = batch, heads, tokens, channels
    k = torch.empty(shape).exponential_().sub_(torch.empty(shape).exponential_())  # Laplace
    v = torch.randn(shape)
    k *= torch.exp(torch.randn(batch, heads, 1, channels) / 2)
    v *= torch.exp(torch.randn(batch, heads, tokens, 1) * 0.3)
    return k.to(torch.bfloat16), v.to(torch.bfloat16)


def _page_seals(store: KVStore, k: Tensor, v: Tensor, count: int) -> Iterator[float]:
    """Microseconds of compressing one page more."""
    for i in range(count):
        at = i * PAGE_TOKENS % (k.shape[2] - PAGE_TOKENS)
        store.append(k[:, :, at : at + PAGE_TOKENS], v[:, :, at : at + PAGE_TOKENS])
        begin = time.perf_counter()
        store.seal()
        yield 1e6 * (time.perf_counter() - begin)
