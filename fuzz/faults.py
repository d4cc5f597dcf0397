"""A prefix store whose values and answers go wrong, one fault a load: each must end in a miss, a shorter prefix or a
typed error.

    python fuzz/faults.py --faults 1000000              # writes benchmarks/results/faults.json as it goes on
    python fuzz/faults.py --faults 20000 --url redis://127.0.0.1:6379

Every load is compared with the undamaged cache bit by bit. Damage keeps no checksum right: whoever can write right
checksums can write other K and V (docs/serving.md). The same seed makes the same faults, whatever the number of
processes.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from kvcomp.errors import StoreUnavailable
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.prefix import PrefixStore
from kvcomp.prefix.chain import CHUNK_TOKENS
from kvcomp.results.schema import environment, write
from kvcomp.serve.blobs import Blobs, Buffer
from kvcomp.spec import PRESETS
from kvcomp.store.tensors import as_array

OUTPUT = Path(__file__).parents[1] / "benchmarks/results/faults.json"
BLOCK = 1000  # faults drawn from one seed
CHUNKS = 2
SPECS = {name: replace(PRESETS[name], window=0) for name in ("kvcomp", "packed")}
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=2048,
)


class Values(dict[str, bytes]):
    """A store of values in this process."""

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return [len(self[key]) if key in self else None for key in keys]

    def get(self, keys: Sequence[str]) -> list[Buffer | None]:  # type: ignore[override]
        return [super(Values, self).get(key) for key in keys]

    def put(self, items: Sequence[tuple[str, Sequence[Buffer]]], kept: Sequence[str] = ()) -> None:
        self.update((key, b"".join(pieces)) for key, pieces in items)

    def put_new(self, key: str, value: Sequence[Buffer]) -> bool:
        return self.setdefault(key, b"".join(value)) == b"".join(value)

    def touch(self, keys: Sequence[str]) -> None: ...

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.pop(key, None)

    def close(self) -> None: ...


class Recorded:
    """A store that keeps the order of what is asked for and deleted, and whose answers can be changed."""

    def __init__(self, inner: Blobs) -> None:
        self.inner = inner
        self.asked: list[str] = []
        self.deleted: list[str] = []
        self.change: Callable[[str, Sequence[str], list[Any]], list[Any]] | None = None

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return self._answer("sizes", keys, self.inner.sizes(keys))

    def get(self, keys: Sequence[str]) -> list[Buffer | None]:
        self.asked += keys
        return self._answer("get", keys, self.inner.get(keys))

    def put(self, items: Sequence[tuple[str, Sequence[Buffer]]], kept: Sequence[str] = ()) -> None:
        self.inner.put(items, kept)

    def put_new(self, key: str, value: Sequence[Buffer]) -> bool:
        return self.inner.put_new(key, value)

    def touch(self, keys: Sequence[str]) -> None:
        self.inner.touch(keys)

    def delete(self, keys: Sequence[str]) -> None:
        self.deleted += keys
        self.inner.delete(keys)

    def close(self) -> None:
        self.inner.close()

    def _answer(self, call: str, keys: Sequence[str], answer: list[Any]) -> list[Any]:
        return self.change(call, keys, answer) if self.change else answer


# Damage of a value: what is there instead


def flip(value: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    data = bytearray(value)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def overwrite(value: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    begin, size = draw.randrange(len(value)), draw.choice((1, 8, 64, 512))
    return value[:begin] + draw.choice((bytes(size), draw.randbytes(size))) + value[begin + size :]


def truncate(value: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    return value[: draw.randrange(len(value))]


def extend(value: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    return value + draw.choice((bytes(64), draw.randbytes(draw.randrange(1, 100)), value))


def shift(value: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    """Lose some bytes in the middle, or have them twice."""
    begin, size = draw.randrange(len(value)), draw.choice((1, 4, 64))
    again = value[begin : begin + size]
    return value[:begin] + draw.choice((b"", again + again)) + value[begin + size :]


def splice(value: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    other, at = draw.choice(others), draw.choice((64, 512, 1024, draw.randrange(len(value))))
    return value[:at] + other[at:]


def swap(value: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    return draw.choice(others)


def garbage(value: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    return draw.randbytes(draw.randrange(2000))


# Wrong answers: the values stay as they are


def wrong_sizes(draw: random.Random, key: str, call: str, keys: Sequence[str], answer: list[Any]) -> list[Any]:
    return [draw.choice((None, 1, 1 << 62, x)) for x in answer] if call == "sizes" else answer


def partial_batch(draw: random.Random, key: str, call: str, keys: Sequence[str], answer: list[Any]) -> list[Any]:
    return [None if name == key or draw.random() < 0.3 else x for name, x in zip(keys, answer, strict=True)]


def reordered(draw: random.Random, key: str, call: str, keys: Sequence[str], answer: list[Any]) -> list[Any]:
    return answer[::-1] if call == "get" else answer


def time_out(draw: random.Random, key: str, call: str, keys: Sequence[str], answer: list[Any]) -> list[Any]:
    if key in keys and (call == "get" or draw.random() < 0.5):
        raise StoreUnavailable("the store did not answer in time")
    return answer


DAMAGE = flip, overwrite, truncate, extend, shift, splice, swap, garbage
ANSWERS = wrong_sizes, partial_batch, reordered, time_out


class World:
    """A filled prefix store, and what each of its prompts gives without a fault."""

    def __init__(self, url: str | None) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.model = LlamaForCausalLM(CONFIG).eval()
        self.model.set_attn_implementation("kvcomp")
        self.store = PrefixStore(url or Path("/nowhere"))
        self.blobs = Recorded(self.store.blobs if url else Values())
        self.store.blobs = self.blobs
        shared = torch.randint(1, 97, (1, 4 + CHUNK_TOKENS))
        rest = torch.randint(1, 97, (2, 1, (CHUNKS - 1) * CHUNK_TOKENS + 64))
        prompts = [torch.cat([shared, one], dim=1) for one in rest]
        self.cases: list[tuple[Any, list[str], list[list[bytes]]]] = []
        for spec in SPECS.values():
            for ids in prompts:
                for name in "ab":
                    self._add(ids, spec, name)
        keys = dict.fromkeys(key for _, keys, _ in self.cases for key in keys)
        self.values = dict(zip(keys, (bytes(x or b"") for x in self.blobs.get(list(keys))), strict=True))

    def _add(self, ids: torch.Tensor, spec: Any, name: str) -> None:
        load = partial(self.store.load, ids, self.model, spec, model_id=name)
        held = load()
        with torch.no_grad():
            self.model(ids[:, held.get_seq_length() :], past_key_values=held)
        self.store.save(ids, held, self.model, model_id=name)
        self.blobs.asked.clear()
        whole = load()
        keys = list(self.blobs.asked)
        ends = [4 + (chunk + 1) * CHUNK_TOKENS for chunk in range(CHUNKS)]
        if len(keys) != CHUNKS or whole.get_seq_length() != ends[-1]:
            raise AssertionError(f"a load without faults gave {whole.get_seq_length()} tokens of {len(keys)} chunks")
        self.cases.append((load, keys, [content(whole, tokens) for tokens in ends]))

    def fault(self, draw: random.Random) -> tuple[str, str]:
        """One load with one fault: which, and what it came to. Raises AssertionError for wrong tensors."""
        load, keys, expected = draw.choice(self.cases)
        chunk, kind = draw.randrange(CHUNKS), draw.choice((*DAMAGE, *ANSWERS))
        key = keys[chunk]
        self.blobs.deleted.clear()
        damaged = kind in DAMAGE
        if damaged:
            value = self.values[key]
            others = [other for name, other in self.values.items() if name != key]
            wrong = kind(value, draw, others)  # type: ignore[operator]
            if wrong == value:
                return kind.__name__, "no change"
            self.blobs.inner.put([(key, [wrong])])
        else:
            self.blobs.change = partial(kind, draw, key)  # type: ignore[arg-type]
        try:
            tokens = self._check(load(), expected)
            outcome = "whole" if tokens == CHUNKS else "shorter" if tokens else "miss"
            if damaged and tokens > chunk:
                raise AssertionError(f"chunk {chunk} was damaged, and {tokens} chunks were loaded")
        except StoreUnavailable:
            outcome = "StoreUnavailable"
        finally:
            self.blobs.change = None
        if not set(self.blobs.deleted) <= {key} and kind is not reordered:
            raise AssertionError(f"{self.blobs.deleted} were deleted and are not damaged")
        self.blobs.inner.put([(name, [self.values[name]]) for name in {key, *self.blobs.deleted}])
        return kind.__name__, outcome

    def _check(self, cache: KVCompCache, expected: list[list[bytes]]) -> int:
        """How many chunks were loaded; each byte of them must be right."""
        tokens = cache.get_seq_length()
        if not tokens:
            return 0
        chunks, left = divmod(tokens - 4, CHUNK_TOKENS)
        if left or content(cache, tokens) != expected[chunks - 1]:
            raise AssertionError(f"{tokens} tokens with other K and V were loaded")
        return chunks


def content(cache: KVCompCache, tokens: int) -> list[bytes]:
    """The bytes of K and V of the first tokens, decompressed."""
    both = [x for layer in cache.compressed_layers for x in layer.store.dense()]
    return [as_array(x[:, :, :tokens].contiguous()).tobytes() for x in both]


world = cache(World)


def say_errors_only() -> None:
    """Each fault is a warning of its own: a process that injects a million keeps quiet."""
    logging.getLogger("kvcomp").setLevel(logging.ERROR)


def block(seed: int, url: str | None, number: int, faults: int = BLOCK) -> Counter[tuple[str, str]]:
    """What the faults of one seed came to."""
    draw, found = random.Random(f"{seed} {number}"), Counter[tuple[str, str]]()
    while found.total() < faults:
        kind, outcome = world(url).fault(draw)
        if outcome != "no change":
            found[kind, outcome] += 1
    return found


def main(
    faults: Annotated[int, typer.Option(help="How many, in thousands")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="What is drawn")] = 0,
    processes: Annotated[
        int, typer.Option(help="At the same time; with --url one, since values are damaged there")
    ] = 1,
    url: Annotated[str | None, typer.Option(help="A Redis or a folder to fill; a store in memory if none")] = None,
    output: Annotated[Path, typer.Option(help="Results, written after every ten thousand faults")] = OUTPUT,
) -> None:
    """Inject faults; fails at the first wrong tensor."""
    blocks, found, begin = -(-faults // BLOCK), Counter[tuple[str, str]](), time.perf_counter()
    about = environment(seed=seed, store=url.partition(":")[0] if url else "memory", processes=processes)
    with ProcessPoolExecutor(1 if url else processes, initializer=say_errors_only) as pool:
        for number, one in enumerate(pool.map(partial(block, seed, url), range(blocks)), 1):
            found += one
            if number % 10 and number < blocks:
                continue
            seconds = time.perf_counter() - begin
            by_kind: dict[str, dict[str, int]] = {}
            for (kind, outcome), count in sorted(found.items()):
                by_kind.setdefault(kind, {})[outcome] = count
            write(
                output, "faults", about, faults=found.total(), wrong_tensors=0, seconds=round(seconds), outcomes=by_kind
            )
            print(f"{found.total():,} of {blocks * BLOCK:,} faults in {seconds:.0f} s, no wrong tensor", flush=True)


if __name__ == "__main__":
    typer.run(main)
