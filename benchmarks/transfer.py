"""What compressed caches save on their way: encoding, sending over a network of 1 and 10 Gbit/s, and the time to a
first token.

Three questions, each answered beside plain bfloat16:

- How fast is the encoder? Bytes of bfloat16 that become sealed pages each second, on one thread and on two.
- When has the receiver a cache that attention can read? From tensors in the sender's memory over a paced loopback
  connection (network.py) to a checked cache in the receiver, another process; encoding, sending and checking overlap
  layer by layer. Plain tensors need none of it. "dense" also decompresses them all, for receivers whose attention reads
  nothing else; "compressed before" sends what a
  KVCompCache holds anyway, so nothing is encoded on the way.
- When does the first token come? A prefix in a real redis-server behind a paced proxy, loaded by PrefixStore, then the
  rest of the prompt; against loading the same tokens as plain bfloat16 from the same Redis, and against computing them.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from kvcomp import files
from kvcomp.evaluate.models import held_out_ids, load_model, shipped_model
from kvcomp.files.container import Container
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.prefix import PrefixStore
from kvcomp.prefix.chain import CHUNK_TOKENS
from kvcomp.results.schema import environment
from kvcomp.serve.blobs import Blobs, open_blobs
from kvcomp.spec import PRESETS, CodecSpec
from kvcomp.store import KVStore
from kvcomp.store.tensors import as_array
from network import Bucket, connect, proxy, receive, redis_server, send

OUTPUT = Path(__file__).parent / "results" / "transfer.json"
GBIT = 1e9 / 8
LENGTH = struct.Struct("<Q")
NAMES = "kvcomp:paper", "packed:paper"  # whose bytes the committed results have

app = typer.Typer(pretty_exceptions_enable=False)
screen = Console()

Layers = list[tuple[Tensor, Tensor]]


def tensors(layers: int, heads: int, tokens: int, channels: int) -> Layers:
    """K and V of each layer, random normal values in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shape = 2, 1, heads, tokens, channels
    return [tuple(torch.randn(shape, generator=generator, dtype=torch.bfloat16)) for _ in range(layers)]


def encode(pair: tuple[Tensor, Tensor], spec: CodecSpec) -> KVStore:
    store = KVStore(spec)
    store.append(*pair)
    store.seal()
    return store


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": median(seconds), "least": min(seconds), "most": max(seconds)}


# The encoder


def encoder(layers: Layers, runs: int) -> dict[str, Any]:
    """Bytes of bfloat16 a second, by preset and number of threads; the presets and threads take turns."""
    size = sum(k.nbytes + v.nbytes for k, v in layers)
    times: dict[tuple[str, int], list[float]] = {(name, threads): [] for name in NAMES for threads in (1, 2)}
    for run in range(runs + 1):
        for (name, threads), seconds in times.items():
            specs = [PRESETS[name].layer(i, len(layers)) for i in range(len(layers))]
            with ThreadPoolExecutor(threads) as pool:
                begin = time.perf_counter()
                list(pool.map(encode, layers, specs))
                seconds.extend([time.perf_counter() - begin] if run else [])
    found: dict[str, Any] = {name: {} for name in NAMES}
    for (name, threads), seconds in times.items():
        found[name][str(threads)] = {"bytes_per_second": size / median(seconds), "best": size / min(seconds)}
    return found


# From one process to another


def receiver(pipe: Any, sizes: tuple[int, ...]) -> None:
    """Takes one transfer after the other: how many parts, what kind; answers when all of it can be read."""
    torch.set_num_threads(1)
    plain = [np.empty(size, np.uint8) for size in sizes]
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname()[1])
        connection, _ = server.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = bytearray(LENGTH.size)
        while kind := connection.recv(1):
            held: list[Any] = []
            for number in range(len(sizes)):
                receive(connection, memoryview(head))
                into = plain[number] if kind == b"p" else np.empty(LENGTH.unpack(head)[0], np.uint8)
                receive(connection, into.data)
                if kind != b"p":
                    (store,) = files.load(Container(into)).values()
                    held.append(store.dense() if kind == b"d" else store)
            connection.sendall(b"!")


def transfer(
    connection: socket.socket, layers: Layers, kind: bytes, spec: CodecSpec, rate: float, held: list[KVStore] | None
) -> tuple[float, int]:
    """Seconds until the receiver says that it has all, and the bytes sent. held: the layers as a cache holds them that
    compressed them before.
    """
    bucket, count, sent = Bucket(rate), len(layers), 0

    def packed(index: int) -> list[memoryview]:
        store = held[index] if held else encode(layers[index], spec.layer(index, count))
        return files.pack_stores({index: store}, spec, count)

    begin = time.perf_counter()
    connection.sendall(kind)
    with ThreadPoolExecutor(2) as pool:
        if kind == b"p":
            parts: Iterator[list[memoryview]] = (
                [as_array(x).reshape(-1).view(np.uint8).data for x in pair] for pair in layers
            )
        else:
            parts = pool.map(packed, range(count))
        for pieces in parts:
            size = sum(len(piece) for piece in pieces)
            send(connection, memoryview(LENGTH.pack(size)), bucket)
            for piece in pieces:
                send(connection, piece, bucket)
            sent += size
        answer = connection.recv(1)
    if answer != b"!":
        raise ConnectionError("the receiver ended early")
    return time.perf_counter() - begin, sent


def transfers(layers: Layers, rates: list[float], runs: int) -> list[dict[str, Any]]:
    sizes = tuple(k.nbytes + v.nbytes for k, v in layers)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=receiver, args=(theirs, sizes), daemon=True)
    process.start()
    methods: dict[str, tuple[bytes, CodecSpec, list[KVStore] | None]] = {"bfloat16": (b"p", PRESETS[NAMES[0]], None)}
    for name in NAMES:
        spec = PRESETS[name]
        held = [encode(pair, spec.layer(index, len(layers))) for index, pair in enumerate(layers)]
        methods |= {
            name: (b"c", spec, None),
            f"{name}, dense": (b"d", spec, None),
            f"{name}, compressed before": (b"c", spec, held),
        }
    found = []
    with connect(ours.recv()) as connection:
        for rate in rates:
            times: dict[str, list[float]] = {name: [] for name in methods}
            sent: dict[str, int] = {}
            for run in range(runs + 1):
                for name, (kind, spec, before) in methods.items():
                    seconds, sent[name] = transfer(connection, layers, kind, spec, rate * GBIT, before)
                    times[name].extend([seconds] if run else [])
            found += [
                {
                    "gbit": rate,
                    "method": name,
                    "bytes": sent[name],
                    "seconds": spread(taken),
                    "gbit_reached": sent[name] / median(taken) / GBIT,
                    "times_faster": median(times["bfloat16"]) / median(taken),
                }
                for name, taken in times.items()
            ]
    process.join(10)
    return found


# The first token


def first_token(model: Any, ids: Tensor, cache: Any) -> None:
    model.set_attn_implementation("kvcomp" if isinstance(cache, KVCompCache) else "sdpa")
    with torch.inference_mode():
        model(ids[:, cache.get_seq_length() :], past_key_values=cache, logits_to_keep=1).logits.argmax()


def plain_chunks(model: Any, ids: Tensor, tokens: int) -> list[tuple[str, list[bytes]]]:
    """The uncompressed cache of the first tokens, in values of as many tokens as a chunk has."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model.set_attn_implementation("sdpa")
        model(ids[:, :tokens], past_key_values=cache)
    layers: list[Any] = list(cache.layers)
    items = []
    for number, begin in enumerate(range(0, tokens, CHUNK_TOKENS)):
        part = slice(begin, min(begin + CHUNK_TOKENS, tokens))
        pieces = [
            as_array(x[:, :, part].contiguous()).tobytes() for layer in layers for x in (layer.keys, layer.values)
        ]
        items.append((f"plain:{number}", pieces))
    return items


def load_plain(blobs: Blobs, keys: list[str], model: Any) -> DynamicCache:
    """What a store of plain tensors would do: read, and give the layers views of what was read, joined."""
    config = model.config
    cache, parts = DynamicCache(config=config), []
    for key in keys:
        (value,) = blobs.get([key])
        flat = torch.frombuffer(bytearray(value or b""), dtype=torch.bfloat16)
        parts.append(flat.view(config.num_hidden_layers, 2, 1, config.num_key_value_heads, -1, config.head_dim))
    whole = torch.cat(parts, dim=4)
    for index in range(config.num_hidden_layers):
        cache.update(whole[index, 0], whole[index, 1], index)
    return cache


def first_tokens(name: str, model: Any, ids: Tensor, rates: list[float], runs: int) -> dict[str, Any]:
    """Seconds to the first token after a prompt, by bandwidth and by where the cache of its first tokens comes from."""
    rows: list[dict[str, Any]] = []
    specs = {preset: PRESETS[preset] for preset in NAMES}
    with redis_server("4gb") as (_, port):
        near = PrefixStore(f"redis://127.0.0.1:{port}", timeout=60)
        stored = 0
        sizes: dict[str, int] = {}
        for preset, spec in specs.items():
            cache = KVCompCache(model.config, spec)
            first_token(model, ids, cache)
            stored = near.save(ids, cache, model)
            keys = subprocess.run(
                ["redis-cli", "-p", str(port), "keys", "*"], capture_output=True, text=True, check=True
            )
            names = keys.stdout.split()
            sizes[preset] = sum(size or 0 for size in near.blobs.sizes(names)) - sum(sizes.values())
        plain = plain_chunks(model, ids, stored)
        for item in plain:
            near.blobs.put([item])
        sizes["bfloat16"] = sum(len(piece) for _, pieces in plain for piece in pieces)

        def computed() -> None:
            first_token(model, ids, DynamicCache(config=model.config))

        def with_plain(blobs: Blobs) -> None:
            first_token(model, ids, load_plain(blobs, [key for key, _ in plain], model))

        def with_store(store: PrefixStore, spec: CodecSpec) -> None:
            cache = store.load(ids, model, spec)
            if cache.get_seq_length() != stored:
                raise SystemExit("the store gave less than was stored")
            first_token(model, ids, cache)

        for rate in rates:
            with proxy(port, rate * GBIT) as slow, PrefixStore(f"redis://127.0.0.1:{slow}", timeout=60) as store:
                blobs = open_blobs(f"redis://127.0.0.1:{slow}", timeout=60)
                actions: dict[str, Callable[[], None]] = {
                    "computed": computed,
                    "bfloat16": lambda blobs=blobs: with_plain(blobs),  # type: ignore[misc]
                    **{p: (lambda store=store, spec=spec: with_store(store, spec)) for p, spec in specs.items()},  # type: ignore[misc]
                }
                times: dict[str, list[float]] = {action: [] for action in actions}
                for run in range(runs + 1):
                    for action, do in actions.items():
                        gc.collect()
                        begin = time.perf_counter()
                        do()
                        times[action].extend([time.perf_counter() - begin] if run else [])
                blobs.close()
            rows += [
                {"gbit": rate, "from": action, "bytes": sizes.get(action, 0), "seconds": spread(seconds)}
                for action, seconds in times.items()
            ]
        near.close()
    return {"model": name, "prompt": ids.shape[1], "stored_tokens": stored, "rows": rows}


def wide_model() -> Any:
    """Random weights around a cache of a usual shape; the time of its prefill says nothing of real models of that
    cache.
    """
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=16384,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@app.command()
def main(
    tokens: Annotated[int, typer.Option(help="Tokens of the caches that are sent")] = 4096,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompts whose first token is waited for")] = 2304,
    runs: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Measure, print and write benchmarks/results/transfer.json."""
    torch.set_num_threads(1)  # its workers spin, and everything here needs the other core
    shape: dict[str, Any] = {"layers": 16, "heads": 8, "tokens": tokens, "head_dim": 128}
    layers = tensors(*shape.values())
    found: dict[str, Any] = {"setting": environment(**shape, prompt=prompt, runs=runs, values="normal, bfloat16")}
    with screen.status("encoding"):
        found["encoder"] = encoder(layers, runs)
    with screen.status("sending"):
        found["transfers"] = transfers(layers, [1, 10], runs)
    del layers
    with screen.status("first tokens"):
        model, tokenizer = load_model(shipped_model())
        ids = torch.tensor([held_out_ids(tokenizer, shipped_model())[:prompt]])
        wide = wide_model()
        drawn = torch.randint(0, 512, (1, prompt), generator=torch.Generator().manual_seed(0))
        found["first_tokens"] = [
            first_tokens("tiny-lm", model, ids, [0.1, 1, 10], runs),
            first_tokens("4 layers of 8 KV heads x 128, random weights", wide, drawn, [0.1, 1, 10], runs),
        ]
    show(found)
    OUTPUT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def show(found: dict[str, Any]) -> None:
    table = Table("encoder", "threads", "MB/s of bfloat16", "best")
    for name, by_threads in found["encoder"].items():
        for threads, rate in by_threads.items():
            table.add_row(name, threads, f"{rate['bytes_per_second'] / 1e6:.0f}", f"{rate['best'] / 1e6:.0f}")
    screen.print(table)
    table = Table(
        "Gbit/s", "sent as", "MB", "ms until it can be read", "least", "of bfloat16's speed", "Gbit/s reached"
    )
    for row in found["transfers"]:
        seconds = row["seconds"]
        cells = f"{row['bytes'] / 1e6:.1f}", f"{1e3 * seconds['median']:.0f}", f"{1e3 * seconds['least']:.0f}"
        table.add_row(
            f"{row['gbit']:g}", row["method"], *cells, f"{row['times_faster']:.2f}x", f"{row['gbit_reached']:.2f}"
        )
    screen.print(table)
    for of_model in found["first_tokens"]:
        table = Table("Gbit/s", "first tokens are", "MB", "ms to the first token", "least", title=of_model["model"])
        for row in of_model["rows"]:
            seconds = row["seconds"]
            cells = f"{row['bytes'] / 1e6:.2f}", f"{1e3 * seconds['median']:.0f}", f"{1e3 * seconds['least']:.0f}"
            table.add_row(f"{row['gbit']:g}", row["from"], *cells)
        screen.print(table)


if __name__ == "__main__":
    app()
