"""Bytes between LMCache and Redis, and what they cost in accuracy: kvcomp's adapter against LMCache's own ways, on the
same chunks.

Run by `make bench-lmcache`, which has LMCache and needs redis-server. Every method stores the same chunks of 256 tokens
through LMCache's
StorageManager in a real redis-server and loads them with another manager; the server itself counts the bytes. The
chunks are K and V of the shipped model (D = 64) on held-out text, and the same values taken as heads of D = 128. The
model then goes on from what was loaded:
KL is against the uncompressed cache over the text that follows, the largest error is over the largest value of the
layer's K or V.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

os.environ["LMCACHE_TRACK_USAGE"] = "false"

import redis
import torch
import typer
from lmcache.v1.distributed import config as settings
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase, L2AdaptersConfig, get_l2_adapter_config_class
from lmcache.v1.distributed.storage_manager import StorageManager
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from kvcomp.calibration import Calibration
from kvcomp.evaluate.models import held_out_ids, load_model, shipped_model
from kvcomp.results.schema import environment
from kvcomp.spec import PRESETS, CodecSpec, TensorSpec
from network import redis_server

OUTPUT = Path(__file__).parent / "results" / "lmcache_wire.json"
CHUNK, SCORED = 256, 256
WAIT = 300.0
SHAPES = {"D=64": 64, "D=128": 128}
CALIBRATION = "model.kvcal"
TURBOQUANT = "LMCache turboquant"
FINE = CodecSpec(TensorSpec("block", 0.05), TensorSpec("block", 0.05))
EXACT = CodecSpec(TensorSpec("channel", 0.036), TensorSpec("block", 0.0125))

screen = Console()


@dataclass(frozen=True)
class Prompt:
    """K and V of a prompt as LMCache holds it, (2, layers, tokens, hidden), and the text after it with what the model
    says of it.
    """

    kv: Tensor
    text: Tensor
    log_probs: Tensor

    @property
    def chunks(self) -> list[Tensor]:
        return [self.kv[:, :, begin : begin + CHUNK] for begin in range(0, self.kv.shape[2], CHUNK)]


@torch.inference_mode()
def prompts(model: Any, ids: Sequence[int], count: int, tokens: int) -> list[Prompt]:
    """Prompts spread over the text."""
    found, step = [], (len(ids) - tokens - SCORED) // count
    for begin in range(0, count * step, step):
        part = torch.tensor([ids[begin : begin + tokens + SCORED]])
        cache = DynamicCache(config=model.config)
        model(part[:, :tokens], past_key_values=cache, logits_to_keep=1)
        layers: list[Any] = list(cache.layers)
        kept = [[x[0].transpose(0, 1).flatten(1).clone() for x in (layer.keys, layer.values)] for layer in layers]
        kv = torch.stack([torch.stack([layer[kind] for layer in kept]) for kind in (0, 1)])
        said = model(part[:, tokens:], past_key_values=cache).logits[0].float().log_softmax(-1)
        found.append(Prompt(kv, part[:, tokens:], said))
    return found


@torch.inference_mode()
def scored(model: Any, prompt: Prompt, kv: Tensor) -> tuple[float, float]:
    """Mean KL and share of equal likeliest tokens when the model goes on from this cache."""
    cache, heads = DynamicCache(config=model.config), model.config.num_key_value_heads
    for layer in range(kv.shape[1]):
        k, v = (kv[kind, layer].unflatten(1, (heads, -1)).transpose(0, 1)[None] for kind in (0, 1))
        cache.update(k, v, layer)
    said = model(prompt.text, past_key_values=cache).logits[0].float().log_softmax(-1)
    kl = (prompt.log_probs.exp() * (prompt.log_probs - said)).sum(-1).mean()
    return float(kl), float((said.argmax(-1) == prompt.log_probs.argmax(-1)).float().mean())


def errors(true: Tensor, found: Tensor) -> dict[str, float]:
    """RMS error over RMS value of K and V, and the largest error over the largest value, of the worst layer."""
    x, e = true.float(), found.float() - true.float()
    rms = (e.square().mean((1, 2, 3)) / x.square().mean((1, 2, 3))).sqrt()
    largest = (e.abs().amax((2, 3)) / x.abs().amax((2, 3))).max()
    return {"rms_k": float(rms[0]), "rms_v": float(rms[1]), "largest": float(largest)}


# Through LMCache


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.005)
    raise TimeoutError("LMCache or Redis did not get on")


def moved(client: redis.Redis) -> tuple[int, int]:
    """Bytes that the server has received and sent so far."""
    about: Any = client.info("stats")
    return about["total_net_input_bytes"], about["total_net_output_bytes"]


def manager(adapter: dict[str, Any]) -> StorageManager:
    config = get_l2_adapter_config_class(adapter["type"]).from_dict(adapter)
    config.serde_config = L2AdapterConfigBase._parse_serde_config(adapter)
    memory = settings.L1MemoryManagerConfig(size_in_bytes=1 << 29, use_lazy=False, shm_name="")
    return StorageManager(
        settings.StorageManagerConfig(
            l1_manager_config=settings.L1ManagerConfig(memory_config=memory),
            eviction_config=settings.EvictionConfig(eviction_policy="LRU"),
            l2_adapter_config=L2AdaptersConfig([config]),
        )
    )


def through(
    client: redis.Redis, adapter: dict[str, Any], chunks: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, float]]:
    """The chunks as they come back, and what they took: bytes each way, seconds each way."""
    client.flushall()
    keys = [ObjectKey(number.to_bytes(16, "big"), "tiny-lm", 0x01000100) for number in range(len(chunks))]
    layout = MemoryLayoutDesc(shapes=[chunks[0].shape], dtypes=[chunks[0].dtype])
    first, before = manager(adapter), moved(client)
    for key, held in first.reserve_write(keys, layout).items():
        held.tensor.copy_(chunks[keys.index(key)])
    begin = time.perf_counter()
    first.finish_write(keys)
    until(lambda: client.dbsize() == len(keys))
    stored, sent = time.perf_counter() - begin, moved(client)[0] - before[0]
    first.close()

    second, before = manager(adapter), moved(client)
    begin = time.perf_counter()
    handle = second.submit_prefetch_task(PrefetchTaskSpec([GroupedObjectKeys(keys, 0, layout)]))
    result = until(lambda: second.query_prefetch_status(handle))
    loaded, received = time.perf_counter() - begin, moved(client)[1] - before[1]
    if result.l2_hit_cells[0].popcount() != len(keys):
        raise RuntimeError(f"{result.l2_hit_cells[0].popcount()} of {len(keys)} chunks came back")
    with second.read_prefetched_results(keys, result.l1_owners) as objects:
        found = [held.tensor.clone() for held in objects]
    second.finish_read_prefetched(keys, 1, result.l1_owners)
    second.close()
    values = sum(len(client.get(name) or b"") for name in client.scan_iter())
    took = {"sent": sent, "received": received, "values": values, "store_seconds": stored, "load_seconds": loaded}
    return found, took


def cachegen(chunks: Sequence[Tensor], model: Path, channels: int) -> tuple[list[Tensor], dict[str, float]]:
    """LMCache's CacheGen, which has no place in its StorageManager: the same chunks through its serializer and back."""
    from lmcache.v1.storage_backend.naive_serde.cachegen_decoder import CacheGenDeserializer
    from lmcache.v1.storage_backend.naive_serde.cachegen_encoder import CacheGenSerializer

    layers, hidden = chunks[0].shape[1], chunks[0].shape[3]
    about = SimpleNamespace(
        model_name=str(model), kv_shape=(layers, 2, CHUNK, hidden // channels, channels), kv_dtype=chunks[0].dtype
    )
    ways = (
        CacheGenSerializer(SimpleNamespace(chunk_size=CHUNK), about),
        CacheGenDeserializer(SimpleNamespace(chunk_size=CHUNK), about),
    )
    found, size = [], 0
    for chunk in chunks:
        raw = chunk.contiguous().flatten().view(torch.uint8)
        meta = MemoryObjMetadata(
            chunk.shape,
            chunk.dtype,
            0,
            raw.numel(),
            1,
            fmt=MemoryFormat.KV_2LTD,
            shapes=[chunk.shape],
            dtypes=[chunk.dtype],
        )
        packed = ways[0].serialize(TensorMemoryObj(raw, meta, None))
        size += len(packed.byte_array)
        found.append(ways[1].deserialize(packed).raw_data.reshape(chunk.shape).clone())
    return found, {"sent": size, "received": size, "values": size}


def adapters(port: int, channels: int, hidden: int, folder: Path) -> dict[str, dict[str, Any]]:
    """What is compared, by name: LMCache's configurations."""
    plain = {"type": "resp", "host": "127.0.0.1", "port": port}
    specs: dict[str, CodecSpec] = {
        "kvcomp:paper": PRESETS["kvcomp:paper"],
        "packed:paper": PRESETS["packed:paper"],
        "kvcomp, fine": FINE,
        "kvcomp, as exact as fp8": EXACT,
        "kvcomp, tuned": CodecSpec.resolve(shipped_model() / "kvcomp.json"),
    }
    if channels == SHAPES["D=64"]:  # the calibration is of the model as it is
        calibration = Calibration.read(shipped_model() / CALIBRATION)
        specs |= {f"kvcomp-klt, {level}": calibration.spec(level) for level in calibration.levels}
    found: dict[str, dict[str, Any]] = {
        "LMCache": plain,
        "LMCache fp8": plain | {"serde": {"type": "fp8"}},
    }
    for name, spec in specs.items():
        path = folder / f"{name.replace(' ', '')}.json"
        path.write_text(spec.to_json(), encoding="utf-8")
        params = {
            "url": f"redis://127.0.0.1:{port}",
            "heads": hidden // channels,
            "head_dim": channels,
            "spec": str(path),
        }
        if spec.calibration is not None:
            params["calibration"] = str(shipped_model() / CALIBRATION)
        found[name] = {
            "type": "plugin",
            "module_path": "kvcomp.integrations.lmcache",
            "class_name": "KVCompL2Adapter",
            "adapter_params": params,
        }
    return found


@torch.inference_mode()
def measure(
    client: redis.Redis, model: Any, path: Path, texts: Sequence[Prompt], channels: int, folder: Path
) -> dict[str, dict[str, Any]]:
    """Every method on all chunks."""
    chunks = [chunk for prompt in texts for chunk in prompt.chunks]
    raw = sum(chunk.numel() * chunk.element_size() for chunk in chunks)
    port = client.connection_pool.connection_kwargs["port"]
    ways: dict[str, Callable[[], tuple[list[Tensor], dict[str, float]]]] = {
        name: lambda adapter=adapter: through(client, adapter, chunks)  # type: ignore[misc]
        for name, adapter in adapters(port, channels, chunks[0].shape[3], folder).items()
    }
    ways["LMCache cachegen"] = lambda: cachegen(chunks, path, channels)
    results: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        screen.print(f"D={channels}: {name} ...")
        found, took = way()
        whole = torch.cat(found, dim=2).split(texts[0].kv.shape[2], dim=2)
        figures = [scored(model, prompt, kv) for prompt, kv in zip(texts, whole, strict=True)]
        kl = torch.tensor([one for one, _ in figures])
        results[name] = {
            **took,
            "bits": 8 * took["sent"] / (raw / 2),
            **errors(torch.cat([prompt.kv for prompt in texts], dim=2), torch.cat(list(whole), dim=2)),
            "kl": float(kl.mean()),
            "kl_standard_error": float(kl.std() / len(kl) ** 0.5),
            "top1": sum(top1 for _, top1 in figures) / len(figures),
        }
    for one in results.values():
        for other in ("LMCache", "LMCache fp8"):
            one[f"times_fewer_than_{other}"] = results[other]["sent"] / one["sent"]
    return results


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    count: Annotated[int, typer.Option(help="Prompts")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of each, whole chunks of 256")] = 2048,
    output: Annotated[Path, typer.Option(help="Where the results go")] = OUTPUT,
) -> None:
    """Measure and write the results."""
    path = shipped_model()
    model, tokenizer = load_model(path)
    texts = prompts(model, held_out_ids(tokenizer, path), count, tokens)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, redis_server() as (_, port):
        client = redis.Redis("127.0.0.1", port)
        for name, channels in SHAPES.items():
            found[name] = measure(client, model, path, texts, channels, Path(folder))
    left_out = {TURBOQUANT: "its kernels are Triton for CUDA: LMCache refuses it without a GPU"}
    about = environment(
        prompts=count, prompt_tokens=tokens, chunk_tokens=CHUNK, scored_tokens=SCORED, lmcache=version("lmcache")
    )
    output.write_text(
        json.dumps({"setting": about, "left_out": left_out, "shapes": found}, indent=2) + "\n", encoding="utf-8"
    )
    for name, results in found.items():
        table = Table("method", "bits", "x LMCache", "x fp8", "RMS K", "RMS V", "largest", "KL", "top-1", title=name)
        for method, r in results.items():
            ratios = [f"{r[f'times_fewer_than_{other}']:.2f}" for other in ("LMCache", "LMCache fp8")]
            error = [f"{r[which]:.4f}" for which in ("rms_k", "rms_v", "largest")]
            table.add_row(method, f"{r['bits']:.2f}", *ratios, *error, f"{r['kl']:.2e}", f"{r['top1']:.4f}")
        screen.print(table)


if __name__ == "__main__":
    app()
