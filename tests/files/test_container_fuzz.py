"""Files mutated under right checksums: what is accepted is decoded, with memory that must not be touched right behind
the file.
"""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from containers import BATCH, SMALL, STATES, packed
from kvcomp import files
from kvcomp.codec import codebook
from kvcomp.codec.block import length_unit, lengths_bytes, lengths_from, scales_from, scales_size
from kvcomp.codec.page import OWN_BOOK, PATCHED, RAW, Layout, blocks_of, token_scales_of
from kvcomp.codec.patched import decode_patched
from kvcomp.errors import CorruptData, LimitExceeded, UnsupportedVersion
from kvcomp.files.check import check_pages
from kvcomp.files.container import Container
from kvcomp.files.layers import parts_of
from kvcomp.spec import KINDS, CodecSpec, TensorSpec
from kvcomp.store import KVStore
from kvcomp.store.attention import attend
from sealing import seal, unseal

MUTATIONS = 20_000


class Guarded:
    """Bytes whose last is followed by a page of memory that kills whoever reads it."""

    def __init__(self, capacity: int) -> None:
        size = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        self.map = mmap.mmap(-1, size + mmap.PAGESIZE)
        self.memory = np.frombuffer(self.map, np.uint8)[:size]
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(self.memory.ctypes.data + size), mmap.PAGESIZE, 0) == 0

    def place(self, data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
        target = self.memory[self.memory.size - len(data) :]
        target[:] = np.frombuffer(data, np.uint8)
        return target


def mutations(data: bytes, seed: int) -> Iterator[bytes]:
    """Files with right checksums: some bytes of a section, or a number or a list of the header, are others."""
    draw = random.Random(seed)
    header, sections = unseal(data)
    names = [(index, name) for index, parts in enumerate(sections) for name in parts if parts[name]]
    weights = [20 if name == "pages" else 4 for _, name in names]
    while True:
        new_header, new_sections = deepcopy(header), [dict(parts) for parts in sections]
        lay_out = draw.random() < 0.9
        if draw.random() < 0.15:
            about = draw.choice([new_header, *new_header["layers"], *new_header.get("states", [])])
            name = draw.choice([key for key, value in about.items() if type(value) is int])
            about[name] = draw.choice(
                [0, 1, 2, 15, 16, 17, 63, 64, 65, 1 << 31, 1 << 63, about[name] + 1, about[name] - 1]
            )
        for _ in range(draw.randint(1, 3)):
            index, name = draw.choices(names, weights)[0]
            part = bytearray(new_sections[index][name])
            if not part:
                continue
            at = draw.randrange(len(part))
            match draw.randrange(6):
                case 0:
                    part[at] ^= 1 << draw.randrange(8)
                case 1:
                    part[at] = draw.choice([0, 1, 127, 128, 255])
                case 2:
                    part[at : at + 64] = draw.choice([b"\0", b"\xff"]) * len(part[at : at + 64])
                case 3:
                    at -= at % 4
                    part[at : at + 4] = draw.choice([0, 1, 16, 1 << 15, 1 << 31, (1 << 32) - 1]).to_bytes(4, "little")
                case 4 if name == "pages":
                    at = 4 * draw.randrange(3)
                    value = int.from_bytes(part[at : at + 4], "little") + draw.choice([-16, 16, 1, -1, 8, 512])
                    part[at : at + 4] = (value % (1 << 32)).to_bytes(4, "little")
                case _:
                    del part[at : at + draw.choice([1, 4, 16])]
            new_sections[index][name] = bytes(part)
        yield seal(new_header, new_sections, lay_out)


def lively() -> bytes:
    """A file with wide books, raw blocks, scales in every place and streams up to its end."""
    spec = CodecSpec(TensorSpec("channel", 0.016), TensorSpec("vector", 0.02, classes=4), window=0, sinks=0)
    store = KVStore(spec)
    x = torch.randn(2, 1, 2, 320, 16, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    x[0, 0, 1, 70] = torch.nan
    store.append(*x)
    store.seal()
    return packed({0: store}, spec, 1)


def decode_everything(container: Container) -> None:
    files.load_states(container)
    for store in files.load(container).values():
        if store.batch * store.tokens < 10_000:
            store.dense()
            if store.tokens:
                attend(store, torch.ones(store.batch, store.heads, 1, store.channels), 0.1)


@pytest.mark.parametrize(("source", "share"), [("small", 0.15), ("lively", 0.44), ("batch", 0.06), ("states", 0.1)])
def test_fuzz_under_right_checksums(source: str, share: float) -> None:
    data = {"small": SMALL, "batch": BATCH, "states": STATES}.get(source) or lively()
    guarded, accepted, many = Guarded(2 * len(data) + 4096), 0, int(MUTATIONS * share)
    for number, mutated in enumerate(mutations(data, seed=len(data))):
        if number == many:
            break
        try:
            decode_everything(Container(guarded.place(mutated)))
            accepted += 1
        except (CorruptData, LimitExceeded, UnsupportedVersion):
            pass
    assert 0.02 * many < accepted < 0.98 * many


@pytest.mark.parametrize("channels", [16, 32, 64, 128, 256, 512])
def test_streams_that_begin_where_the_last_page_ends_are_read_within_the_file(channels: int) -> None:
    """The worst that a block can do: its streams are as long as it has room, the last begins at its end and has the
    longest codes.
    """
    tensor = TensorSpec("token", 0.016)
    store = KVStore(CodecSpec(tensor, tensor, window=0, sinks=0))
    store.append(*torch.randn(2, 1, 1, 64, channels))
    store.seal()
    book = codebook.train(np.geomspace(1, 1e9, 1 << 16).astype(np.int64).reshape(1, 256, 256), tensor.limit)
    store.rows.books[0] = [None, book]
    header, sections = unseal(packed({0: store}, store.spec, 1))
    arena = np.frombuffer(bytearray(sections[0]["pages"]), np.uint8)
    begin, end = (arena[4:12].view("<u4") & ~np.uint32(15)).tolist()
    arena[4] = begin & 0xF0 | OWN_BOOK
    symbol = int(book.lengths_of(0).argmax())
    bits = int(book.lengths_of(0)[symbol]) + 2 * book.split[0]
    assert bits == 18
    room, lengths = 8 * (end - begin - 4 - 8 * 9) // length_unit(channels), [511]
    while sum(lengths) < room:
        lengths.append(min(511, room - sum(lengths)))
    stored = lengths_bytes(np.array([*lengths, *[0] * (64 - len(lengths))]), "V")
    arena[begin : begin + len(stored)] = np.frombuffer(stored, np.uint8)
    codes = sum(int(book.words(0)[symbol]) << at for at in range(0, 9 * channels, bits))
    arena[end:] = np.frombuffer(codes.to_bytes(2 * channels, "little"), np.uint8)[:channels]
    data = seal(header, [sections[0] | {"pages": arena.tobytes()}])
    decode_everything(Container(Guarded(len(data)).place(data)))


def page_is_valid(page: bytes, layout: Layout) -> tuple[bool, bool]:
    """By the readers of one page: which own books a page needs. Raises CorruptData."""
    own = [False, False]
    if np.frombuffer(page[8 * layout.heads :], "<u4", 1)[0] != len(page):
        raise CorruptData("the page ends elsewhere")
    for kind in (0, 1):
        token_scales_of(page, layout, kind)
    for index, (mode, data) in enumerate(blocks_of(page, layout)):
        kind = index // layout.heads
        own[kind] |= mode == OWN_BOOK
        count = layout.block_scales(kind)
        if count and mode != RAW:
            scales_from(data, count)
        if mode in (1, 2):
            body = data[scales_size(count) if count else 0 :]
            lengths, size = lengths_from(body, "KV"[kind])
            if lengths.sum() * length_unit(layout.channels[kind]) > 8 * (len(body) - size):
                raise CorruptData("streams")
        if mode == PATCHED:
            decode_patched(data[scales_size(count) if count else 0 :], layout.channels[kind], KINDS[kind])
    return own[0], own[1]


def test_pages_checked_together_are_judged_as_pages_checked_alone() -> None:
    draw = random.Random(3)
    judged = {True: 0, False: 0}
    for number in range(3000):
        if number % 100 == 0:
            units = (
                draw.choice(["block", "channel", "vector", "token"]),
                draw.choice(["block", "channel", "vector", "token"]),
            )
            spec = CodecSpec(
                TensorSpec(units[0], 0.1, draw.choice(["huffman", "fixed", "patched"])),
                TensorSpec(units[1], 0.2),
                window=0,
                sinks=0,
            )
            store = KVStore(spec)
            store.append(*torch.randn(2, 1, 2, 192 if number % 200 else 320, 32).to(torch.bfloat16))
            store.seal()
            arena = np.concatenate(parts_of(store, 0).arena)
            begin = np.unique(parts_of(store, 0).offsets)
        hostile = arena.copy()
        page = draw.randrange(begin.size)
        places = [begin[page] + draw.randrange(20), begin[page] + draw.randrange(700), draw.randrange(arena.size)]
        hostile[draw.choice(places)] = draw.choice([0, 1, 2, 3, 4, 8, 9, 127, 128, 255])
        ends = [*begin[1:].tolist(), arena.size - 32]
        pages = [hostile[first:last].tobytes() for first, last in zip(begin.tolist(), ends, strict=True)]
        try:
            expected: Any = [page_is_valid(one, store.layout) for one in pages]
        except CorruptData:
            expected = None
        judged[expected is None] += 1
        if expected is None:
            with pytest.raises(CorruptData):
                check_pages(hostile, begin, store.layout)
        else:
            assert check_pages(hostile, begin, store.layout).tolist() == [list(own) for own in expected]
    assert min(judged.values()) > 300
