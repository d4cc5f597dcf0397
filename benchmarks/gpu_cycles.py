"""Modelled cycles of the attention kernel, from its machine code and the wavefronts that real pages take on the
emulator: benchmarks/results/gpu_cycles.json. No GPU is used, and nothing here is measured on one.

Pages are those of SmolLM2's cache (``make models``). Instructions are those that ``gpu_instructions.py`` finds for each
form of block that the pages have; each shared-memory access takes as many wavefronts as one of its kind took on the
emulator; ``multiprocessor.py`` says when they are issued. The launch, the filling of shared memory and raw tokens are
left out. Up to eight queries of a KV head cost the same.

    python benchmarks/gpu_cycles.py
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

import real_models
from gpu_instructions import SOURCE, Page, Turn, compiled, functions, page_of, page_of_pieces
from gpu_pipes import MEMORY, SCHEDULERS
from kvcomp.calibration import Calibration
from kvcomp.codec.dtypes import DEFAULT_BOOK, FIXED, OWN_BOOK, PATCHED, RAW
from kvcomp.codec.page import directory_of, width_of
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.kernels import Books, CacheView, reference
from kvcomp.kernels.cuda.compile import nvrtc_version, sources_hash
from kvcomp.kernels.cuda.layout import AttendBuild, attend_build, describe_book, machine
from kvcomp.results.schema import environment
from kvcomp.spec import CALIBRATED, LEVELS, PRESETS, CodecSpec
from kvcomp.store import KVStore
from multiprocessor import cycles, floors, pipe_of
from real_texts import sequences
from sass import Instruction

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu_cycles.json"
sys.path.append(str(HERE.parent / "tests" / "support"))
MODEL = "smollm2-135m"
ARCHITECTURES = (80, 90, 100)
PINNED = (80, 90)  # sm_100 has the shared memory of sm_90
UNCALIBRATED = ("packed", "kvcomp", "kvcomp:paper")
CODINGS = (CALIBRATED, "packed-klt")
LAYERS = (0, 7, 15, 22, 29)
TOKENS, SEED = 700, 20261129
QUERIES = 4
PIECES = "pieces"
SAMPLE = 24  # pages of pieces that are modelled, each as it is
# An H200: multiprocessors, its clock under such load, and what reading bfloat16 reaches of its 4.8 TB/s.
PROCESSORS, CLOCK, BANDWIDTH = 132, 1.755e9, 4.0e12
CONTEXT, HEADS = 32768, 8

SHARED_PAIR_BITS = 14  # as items.cuh has it

Histogram = npt.NDArray[np.int64]
Counts = dict[tuple[str, int], Any]


class Pages:
    """The pages of some layers, all of one spec, whose name is given."""

    def __init__(self, name: str, spec: CodecSpec, stores: tuple[KVStore, ...]) -> None:
        self.name, self.spec, self.stores = name, spec, stores
        for store in stores:
            store.seal()
        self.views = [store.view() for store in stores]
        self.channels = self.views[0].channels[0]
        self.heads = stores[0].heads

    @property
    def bits(self) -> float:
        """Coded bits a value."""
        memory = [store.memory() for store in self.stores]
        return sum(one.coded_bits for one in memory) / len(memory)


@torch.inference_mode()
def pages_of_model() -> Iterator[Pages]:
    """What each spec makes of a prompt's K and V in bfloat16. 128 channels are two of SmolLM2's heads side by side."""
    model, tokenizer = real_models.load(MODEL)
    ids = torch.from_numpy(sequences("prose", tokenizer, 1, TOKENS, SEED))[None]
    dense = DynamicCache(config=model.config)
    model(ids, past_key_values=dense, use_cache=True, logits_to_keep=1)
    kept: list[Any] = dense.layers
    layers = [(layer.keys.bfloat16(), layer.values.bfloat16()) for layer in kept]
    calibration = Calibration.read(HERE.parent / "examples" / "calibrations" / f"{MODEL}.kvcal")
    specs: list[tuple[str, Calibration | None]] = [(name, None) for name in UNCALIBRATED]
    specs += [(f"{name}:{level}", calibration) for name in CODINGS for level in LEVELS]
    for name, its_calibration in specs:
        held: Any = KVCompCache(model.config, name, calibration=its_calibration)
        for index, (k, v) in enumerate(layers):
            held.update(k, v, index)
        yield Pages(name, held.spec.layer(0, len(layers)), tuple(held.layers[index].store for index in LAYERS))
    for name in UNCALIBRATED:
        stores = tuple(KVStore(PRESETS[name].layer(0, 1)) for _ in LAYERS)
        for store, index in zip(stores, LAYERS, strict=True):
            store.append(*(torch.cat([x[:, :1], x[:, 1:2]], dim=3) for x in layers[index]))
        yield Pages(name, stores[0].spec, stores)


def directories(pages: Pages) -> Iterator[tuple[CacheView, list[tuple[bytes, list[int], list[int]]]]]:
    """The views, and of each the bytes, modes and offsets of its pages."""
    for view in pages.views:
        content = (reference.page_bytes(x, pages.heads) for x in view.pages[0, : view.count[0]].tolist())
        of_pages = ((page, *directory_of(page, 0, pages.heads)) for page in content)
        yield view, [(page, modes.tolist(), offsets.tolist()) for page, modes, offsets in of_pages]


def turns_of(page: bytes, begin: int, channels: int, at_once: int) -> list[Turn]:
    """What the loops over the pieces of a block take at once. begin: where the widths are."""
    count = channels // 8
    heads = np.frombuffer(page, np.uint8, 3 * count, begin).astype(int)
    widths, exceptions = heads[:count].reshape(-1, at_once), heads[2 * count :].reshape(-1, at_once)
    return [Turn(tuple(w), int(e)) for w, e in zip(widths.tolist(), exceptions.sum(axis=1), strict=True)]


def some_of_pieces(pages: Pages, lines: list[str | Instruction], build: AttendBuild) -> tuple[list[Page], int]:
    """The traces of some pages and heads of pieces that are staged, drawn at random, and of how many they are."""
    at_once = (1 if pages.channels // 16 % 2 else 2), 2
    stages = build.k_stage, build.v_stage
    blocks = [
        (content, [offsets[i] for i in both])
        for _, of_pages in directories(pages)
        for content, modes, offsets in of_pages
        for both in zip(range(pages.heads), range(pages.heads, 2 * pages.heads), strict=True)
        if all(
            modes[i] == PATCHED and offsets[i + 1] - offsets[i] <= stage for i, stage in zip(both, stages, strict=True)
        )
    ]
    drawn = np.random.default_rng(SEED).choice(len(blocks), min(SAMPLE, len(blocks)), replace=False)
    chosen = []
    for page, both in (blocks[i] for i in drawn.tolist()):
        of_both = (turns_of(page, at, pages.channels, count) for at, count in zip(both, at_once, strict=True))
        chosen.append(page_of_pieces(lines, build, *of_both))
    return chosen, len(blocks)


def forms_of(pages: Pages, build: AttendBuild) -> Counter[tuple[str, str]]:
    """How the kernel reads the blocks of K and V of each page and head (``read_codes`` of products.cuh)."""
    found = Counter[tuple[str, str]]()
    heads = pages.heads
    units = pages.spec.key.unit, pages.spec.value.unit
    for view, of_pages in directories(pages):
        middle = of_pages[len(of_pages) // 2][1]
        kept = [
            DEFAULT_BOOK if units[i // heads] == "head" and middle[i] == DEFAULT_BOOK else OWN_BOOK
            for i in range(2 * heads)
        ]
        for _, modes, offsets in of_pages:
            forms = [
                form_of(modes[i], offsets[i + 1] - offsets[i], kept[i], view.books[0][i // heads], i // heads, build)
                for i in range(2 * heads)
            ]
            found.update(zip(forms[:heads], forms[heads:], strict=True))
    return found


def form_of(mode: int, size: int, kept: int, books: Books, kind: int, build: AttendBuild) -> str:
    """The form of a block of K or V (0 or 1), of ``gpu_instructions.FORMS``, or ``raw``. kept: mode of the blocks whose
    table is in shared memory.
    """
    bits, copies = ((build.k_bits, build.k_copies), (build.v_bits, build.v_copies))[kind]
    stage = (build.k_stage, build.v_stage)[kind]
    if mode in (RAW, PATCHED):
        return "raw" if mode == RAW else PIECES
    if mode >= FIXED:
        width = width_of(mode)
        return (
            f"{width} bits"
            if not bits and width < 8 and turn_of(build.channels, kind) * width % 32 == 0
            else "any width"
        )
    book = books[kept == OWN_BOOK]
    if mode == kept and size <= stage and copies and book:
        described = describe_book(book, 0)
        if described.levels > 128:
            return "long"
        if not any(described.split):
            return "symbols"
        return "split" if described.bits <= SHARED_PAIR_BITS else "long"
    return "global tables"


def turn_of(channels: int, kind: int) -> int:
    """Codes of a stream that a turn of the kernel's loop over a block of K or V takes (``A_TURN`` of products.cuh)."""
    two = channels <= 192 and (kind == 0 or channels // 16 % 2 == 0)
    return (2 if two else 1) * (16 if kind else channels // 4)


@lru_cache(maxsize=1)
def counted(pages: Pages, build: AttendBuild) -> Counts:
    """Wavefronts of all pages, by access and size."""
    support: Any = importlib.import_module("emulated_wavefronts")
    of_views = [support.wavefronts(cache_of(view), build) for view in pages.views]
    return {key: sum(of_view[key] for of_view in of_views) for key in of_views[0]}


def cache_of(view: CacheView) -> Any:
    """The pages of a view, a single raw token and random queries, as the emulator takes them."""
    cases: Any = importlib.import_module("attention_cases")
    heads, _, channels = view.tail_k.shape[1:]
    q = np.random.default_rng(SEED).normal(size=(1, heads, QUERIES, channels)).astype(np.float32)
    alone = replace(
        view,
        tail_k=view.tail_k[:, :, :1],
        tail_v=view.tail_v[:, :, :1],
        tail_begin=np.zeros_like(view.tail_begin),
        sink_count=np.zeros_like(view.sink_count),
    )
    case = cases.Case(queries=QUERIES, heads=heads, channels=channels, tail=1)
    return cases.Cache(case, q, alone, np.ones(QUERIES), channels**-0.5, [])


def taken(counts: Counts) -> Callable[[Instruction], Histogram]:
    """Wavefronts of a load, store or shuffle: those of all accesses of its kind."""
    one = np.ones(1, np.int64)
    of = {key: np.repeat(np.arange(len(x)), x) if x.any() else one for key, x in counts.items()}

    def of_instruction(x: Instruction) -> Histogram:
        its_functions = {functions().get(place) for place in x.places}
        size = 16 if ".128" in x.operation else 8 if ".64" in x.operation else 4
        if "entry" in its_functions and x.name != "SHFL":
            return of["look-up" if x.name == "LDS" else "global read", size]
        if x.name in ("LDS", "LD"):
            return of["refill" if x.name == "LDS" and "shift_in" in its_functions else "read", size]
        return of["write", size] if x.name == "STS" else of["copy", 16] if x.name == "LDGSTS" else one

    return of_instruction


def modelled(pages: Pages, architecture: int) -> dict[str, Any]:
    """A row of the table: cycles of a scheduler for each code of a warp."""
    build = attend_build(pages.spec, pages.channels, "bfloat16", "bfloat16", False, machine(architecture))
    lines, registers, _ = compiled(build, architecture)
    counts, forms = counted(pages, build), forms_of(pages, build)
    wavefronts = taken(counts)
    codes = 4 * pages.channels  # of a lane and page
    rows: list[dict[str, Any]] = []
    traces = [
        (key, value, count, [page_of(lines, build, key, value)])
        for (key, value), count in sorted(forms.items())
        if not {"raw", PIECES} & {key, value}
    ]
    if forms[PIECES, PIECES]:
        sampled, count = some_of_pieces(pages, lines, build)
        traces.append((PIECES, PIECES, count, list(sampled)))
    for key, value, count, alike in traces:
        of_pages = [of_one(page, wavefronts, build.warps, architecture) for page in alike if page]
        if of_pages:
            means = {name: round(float(np.mean([x[name] for x in of_pages])) / codes, 2) for name in of_pages[0]}
            rows.append({"k": key, "v": value, "pages": count, **means})
    return {
        "spec": pages.name,
        "channels": pages.channels,
        "architecture": architecture,
        "warps": build.warps,
        "registers": registers,
        "cycles_a_code": round(sum(x["pages"] * x["cycles"] for x in rows) / sum(x["pages"] for x in rows), 2),
        "pages_left_out": forms.total() - sum(x["pages"] for x in rows),
        "forms": rows,
        "wavefronts": {
            f"{access}, {size} bytes": round(float((of * np.arange(len(of))).sum() / of.sum()), 2)
            for (access, size), of in counts.items()
            if of.any()
        },
    }


def of_one(
    page: Page, wavefronts: Callable[[Instruction], Histogram], warps: int, architecture: int
) -> dict[str, float]:
    """Cycles of a page, and their floors."""
    memory = [float(wavefronts(one).mean()) if pipe_of(one) == MEMORY else 0.0 for one in page.trace]
    found = {"cycles": cycles(page.trace, wavefronts, warps, architecture)}
    return found | floors(page.trace, memory, architecture)


def against_bfloat16(cycles_a_code: float, bits: float, channels: int) -> dict[str, float]:
    """Time of attention on an H200, the longer of decoding and of reading the bits, and reading bfloat16 over that."""
    values = 2 * CONTEXT * HEADS * channels
    dense = values * 2 / BANDWIDTH
    decoding = values * cycles_a_code / (32 * SCHEDULERS * PROCESSORS * CLOCK)
    ours = max(decoding, values * bits / 8 / BANDWIDTH)
    return {"bits": round(bits, 3), "microseconds": round(1e6 * ours, 1), "times_bfloat16": round(dense / ours, 2)}


def main() -> None:
    """Some minutes."""
    rows = []
    for pages in pages_of_model():
        for architecture in ARCHITECTURES:
            row = modelled(pages, architecture)
            if architecture == 90:
                row["h200"] = against_bfloat16(row["cycles_a_code"], pages.bits, pages.channels)
            rows.append(row)
            print({name: row[name] for name in row if name != "wavefronts"}, flush=True)
    support: Any = importlib.import_module("emulated_wavefronts")
    about = {
        "modelled": "no GPU was used: these are no measurements",
        "setting": environment(
            model=MODEL, tokens=TOKENS, layers=LAYERS, queries=QUERIES, context=CONTEXT, heads=HEADS
        ),
        "h200": {"processors": PROCESSORS, "clock": CLOCK, "bytes_per_second": BANDWIDTH},
        "sources": sources_hash(SOURCE),
        "nvrtc": nvrtc_version(),
        "pinned": {name: {str(of): support.pinned(name, of) for of in PINNED} for name in support.CASES},
    }
    RESULTS.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
