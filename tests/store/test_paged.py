"""The cache of a serving engine: arena, blocks and pages against plain models of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibrating import calibrated, like_keys
from kvcomp.calibration.rotary import Rotation
from kvcomp.calibration.transform import value_bound
from kvcomp.errors import InvalidInput
from kvcomp.spec import PRESETS, CodecSpec, TensorSpec
from kvcomp.store import sealed
from kvcomp.store.paged import Arena, Blocks, PagedCache, PagedLayer, Room, Shape, Step
from kvcomp.store.paged.owners import Owners

BLOCK = 64
LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@given(st.integers(0, 400), st.lists(st.tuples(st.booleans(), st.integers(1, 90), st.integers(0, 50)), max_size=60))
def test_pieces_never_overlap_and_gaps_are_joined(size: int, actions: list[tuple[bool, int, int]]) -> None:
    arena, held, taken = Arena(size), dict[int, int](), np.zeros(size // 16, np.bool_)
    for take, count, which in actions:
        if take:
            units = -(-count // 16)
            runs = "".join("x" if used else "." for used in taken).split("x")
            offset = arena.take(count)
            assert (offset is None) == (max(map(len, runs), default=0) < units)  # a gap that is there is found
            if offset is not None:
                assert offset % 16 == 0
                part = slice(offset // 16, offset // 16 + units)
                assert taken[part].size == units
                assert not taken[part].any()
                taken[part] = True
                held[offset] = units
        elif held:
            offset = sorted(held)[which % len(held)]
            arena.give(offset)
            taken[offset // 16 : offset // 16 + held.pop(offset)] = False
        assert arena.used == 16 * taken.sum()


@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=4),
    calls=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 300), st.booleans())),
)
def test_a_room_gives_pieces_of_its_memories_the_own_one_first(
    sizes: list[int], calls: list[tuple[int, int, bool]]
) -> None:
    spare = 32
    memories = [np.zeros(size, np.uint8) for size in sizes]
    room, held = Room(memories, spare), list[tuple[int, int]]()
    for index, size, give in calls:
        if give and held:
            room.give(held.pop()[0])
            continue
        own = memories[index % len(memories)]
        address = room.take(own, size)
        if address is None:
            continue
        assert address % 16 == 0
        assert any(m.ctypes.data <= address and address + size + spare <= m.ctypes.data + m.nbytes for m in memories)
        assert all(address + size <= at or at + taken <= address for at, taken in held)
        held.append((address, size))


def test_a_layer_whose_memory_is_full_takes_another_layers() -> None:
    memories = [np.zeros(64 * n + 32, np.uint8) for n in (2, 40)]
    room = Room(memories, 16)
    places = [room.take(memories[0], 64) for _ in range(4)]
    owns = [place is not None and 0 <= place - memories[0].ctypes.data < memories[0].nbytes for place in places]
    assert owns == [True, True, False, False]
    assert room.used == 4 * 64
    for place in places:
        assert place is not None
        room.give(place)
    assert room.used == 0
    assert room.take(memories[0], 64 * 41) is None


def test_a_layers_own_memory_is_asked_first_wherever_it_begins() -> None:
    size = 96
    whole = np.zeros(4 * size + 16, np.uint8)
    begin = -whole.ctypes.data % 16 + 1
    memories = [whole[begin + size * i : begin + size * (i + 1)] for i in range(4)]
    room = Room(memories, 16)
    for memory in memories:
        place = room.take(memory, 16)
        assert place is not None
        assert 0 <= place - memory.ctypes.data < size


def test_what_was_not_given_out_is_not_taken_back() -> None:
    arena = Arena(64)
    arena.take(16)
    with pytest.raises(InvalidInput):
        arena.give(16)
    with pytest.raises(InvalidInput):
        arena.take(0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 9), max_size=4)), max_size=20))
def test_a_block_is_free_when_its_last_owner_is_gone(holds: list[tuple[str, list[int]]]) -> None:
    owners, plain = Owners(), dict[str, list[int]]()
    for owner, blocks in holds:
        if blocks:
            owners.hold(owner, blocks)
            plain.setdefault(owner, []).extend(blocks)
        else:
            gone = set(plain.pop(owner, []))
            assert set(owners.release(owner).tolist()) == gone - {block for rest in plain.values() for block in rest}


SPECS = {
    "kvcomp": PRESETS["kvcomp"],
    "packed": PRESETS["packed"],
    "no window": CodecSpec(TensorSpec("channel", 0.05), TensorSpec("vector", 0.1), window=0, sinks=0),
    "wide": CodecSpec(TensorSpec("block", 0.05), TensorSpec("token", 0.1), window=130, sinks=70),
}


@dataclass
class Sequence:
    name: str
    blocks: list[int] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    """(KV heads, head_dim) of each token, as ``v``."""
    v: list[Tensor] = field(default_factory=list)
    coded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What its blocks decode to, by their place."""


class Engine:
    """As much of a serving engine as hands out blocks, and the exact K and V of each sequence beside it."""

    def __init__(
        self, spec: CodecSpec, blocks: int = 24, room: float = 0.5, heads: int = 2, group: int = 2, **other: Any
    ):
        self.spec, self.heads, self.group = spec, heads, group
        self.channels, dtype = other.get("channels", 32), other.get("dtype", torch.bfloat16)
        self.shape = Shape(heads, self.channels, dtype)
        dense = blocks * 2 * heads * BLOCK * self.channels * dtype.itemsize
        self.memory = np.full(int(dense * room), 7, np.uint8)
        self.room = Room([self.memory], self.channels)
        self.layer = PagedLayer(
            spec.layer(0, 1),
            self.shape,
            blocks,
            self.room,
            self.memory,
            other.get("calibrated"),
            other.get("backend", "cpu"),
        )
        self.shared = other.get("shared", True)
        self.blocks = Blocks(blocks, spec)
        self.cache = PagedCache(self.blocks, self.room, {"layer": self.layer}, self.shared)
        self.free = list(range(1, blocks))
        self.holders = [0] * blocks
        self.random = torch.Generator().manual_seed(other.get("seed", 0))

    def begin(self, name: str, other: Sequence | None = None, shared: int = 0) -> Sequence:
        """A sequence that begins with whole blocks of another one."""
        sequence = Sequence(name)
        if other is not None and shared:
            sequence.blocks = other.blocks[:shared]
            sequence.k, sequence.v = other.k[: shared * BLOCK], other.v[: shared * BLOCK]
            for block in sequence.blocks:
                self.holders[block] += 1
            self.cache.hold(name, sequence.blocks)
        return sequence

    def end(self, sequence: Sequence) -> None:
        for block in sequence.blocks:
            self.holders[block] -= 1
            if not self.holders[block]:
                self.free.append(block)
        self.cache.end(sequence.name)

    def missing(self, sequence: Sequence, new: int) -> int:
        return -(-(len(sequence.k) + new) // BLOCK) - len(sequence.blocks)

    def step(self, work: list[tuple[Sequence, int]]) -> tuple[Tensor, Tensor]:
        """One step: some sequences get so many tokens each. Returns the attention of the cache, and the oracle's."""
        for sequence, new in work:
            more = [self.free.pop(0) for _ in range(self.missing(sequence, new))]
            for block in more:
                self.holders[block] = 1
            self.cache.hold(sequence.name, more)
            sequence.blocks += more
            for values in (sequence.k, sequence.v):
                drawn = torch.randn(new, self.heads, self.channels, generator=self.random)
                values.extend(drawn.to(self.shape.dtype))
        table = np.zeros((len(work), max(len(s.blocks) for s, _ in work) + 1), np.int64)
        for row, (sequence, _) in enumerate(work):
            table[row, : len(sequence.blocks)] = sequence.blocks
        begins = np.cumsum([0, *(new for _, new in work)])
        plan = self.cache.begin(table, np.array([len(s.k) for s, _ in work]), begins)
        k, v = (torch.stack([x for s, new in work for x in getattr(s, kind)[-new:]]) for kind in "kv")
        q = torch.randn(k.shape[0], self.heads * self.group, self.channels, generator=self.random).to(k.dtype)
        self.layer.write(plan, k, v)
        out = torch.full_like(q, torch.nan)
        expected = torch.cat(
            [self.oracle(s, q[a:b], plan) for (s, _), a, b in zip(work, begins, begins[1:], strict=False)]
        )
        self.layer.attend(plan, q, k, v, 0.3, 0.0, out)
        self.layer.seal(plan.seals)
        return out.float(), expected

    def oracle(self, sequence: Sequence, q: Tensor, plan: Step) -> Tensor:
        """Attention in float64 over the exact values of raw blocks, and over what a sealed block decodes to."""
        exact = [torch.stack(x, 1) for x in (sequence.k, sequence.v)]  # (heads, tokens, channels)
        new = len(q)
        held = exact if new == len(sequence.k) > 1 else self.held(sequence, exact, plan)
        k, v = (x.double().repeat_interleave(self.group, 0) for x in held)
        score = 0.3 * q.double().transpose(0, 1) @ k.mT
        ahead = torch.ones(new, k.shape[1], dtype=torch.bool).triu(k.shape[1] - new + 1)
        return (score.masked_fill(ahead, -torch.inf).softmax(-1) @ v).transpose(0, 1).float()

    def held(self, sequence: Sequence, exact: list[Tensor], plan: Step) -> list[Tensor]:
        """Blocks are sealed at the end of the step."""
        k, v = (x.clone() for x in exact)
        for index, block in enumerate(sequence.blocks):
            part = slice(index * BLOCK, (index + 1) * BLOCK)
            if not self.blocks.raw[block] and block not in plan.seals.blocks:
                if index not in sequence.coded:
                    sequence.coded[index] = self.coded(k[:, part], v[:, part], 0 if index else self.spec.sinks)
                k[:, part], v[:, part] = sequence.coded[index]
        return [k, v]

    def coded(self, k: Tensor, v: Tensor, sinks: int) -> tuple[Tensor, Tensor]:
        """What a sealed block gives back: its sinks, and the others as a page codes them, the last one again behind."""
        order = torch.arange(sinks, BLOCK + sinks).clamp_max(BLOCK - 1)
        coded = sealed(self.spec.bare(), k[None, :, order], v[None, :, order]).dense()
        both = [torch.cat([x[:, :sinks], y[0, :, : BLOCK - sinks]], 1) for x, y in zip((k, v), coded, strict=True)]
        return both[0], both[1]

    def check(self, work: list[tuple[Sequence, int]]) -> None:
        (out, expected), most = self.step(work), LARGEST_ERROR[self.shape.dtype]
        torch.testing.assert_close(out, expected, atol=most, rtol=most)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("dtype", "channels"), [(torch.bfloat16, 32), (torch.float32, 64), (torch.float16, 80)])
def test_a_sequence_that_grows_by_prefill_and_decoding(spec: str, dtype: torch.dtype, channels: int) -> None:
    """Prompts around the block's size, in one and several pieces, then single tokens over a block's end."""
    for pieces in ([1], [63], [64], [65], [200, 3, 61], [130, 200]):
        engine = Engine(SPECS[spec], dtype=dtype, channels=channels)
        sequence = engine.begin("a")
        for new in [*pieces, *[1] * 66]:
            engine.check([(sequence, new)])
        sinks = SPECS[spec].sinks
        length, first = len(sequence.k), 0 if sinks < BLOCK else -(-sinks // BLOCK)
        out = max(0, length - SPECS[spec].window) // BLOCK
        raw = engine.blocks.raw[sequence.blocks]
        assert not raw[first:out].any()
        assert raw[:first].all()
        assert raw[max(first, out) :].all()


@pytest.mark.parametrize("room", [0.0, 0.15, 1.2])
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_sequences_that_share_blocks_come_and_go(room: float, data: st.DataObject) -> None:
    """Any order of beginning, growing side by side, sharing a prefix and ending gives what the oracle gives.

    Room: too little memory changes where pages lie, and nothing else.
    """
    shared = data.draw(st.booleans(), "shared")
    engine, running, number = Engine(SPECS["kvcomp"], blocks=16, room=room, shared=shared), list[Sequence](), 0
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        action = data.draw(st.sampled_from(["begin", "share", "end", "step", "step"]), "action")
        if action == "end" and running:
            engine.end(running.pop(data.draw(st.integers(0, len(running) - 1))))
        elif action in ("begin", "share") and len(running) < 4:
            of = data.draw(st.sampled_from(running)) if action == "share" and shared and running else None
            whole = 0 if of is None else len(of.k) // BLOCK
            running.append(engine.begin(str(number), of, data.draw(st.integers(0, whole))))
            number += 1
        work, free = list[tuple[Sequence, int]](), len(engine.free)
        for sequence in running:
            new = data.draw(st.sampled_from([0, 1, 1, 2, 63, 64, 65, 130]), "new")
            if new and engine.missing(sequence, new) <= free:
                free -= engine.missing(sequence, new)
                work.append((sequence, new))
        if work:
            engine.check(work)
    for sequence in running:
        engine.end(sequence)
    if not shared:
        assert not engine.layer.address.any()
        assert (engine.room.used, engine.layer.outside) == (0, 0)
    assert not engine.blocks.raw.any()
    assert room or not engine.room.used


def test_pages_lie_in_the_engines_memory_while_there_is_room() -> None:
    engine = Engine(SPECS["kvcomp"], room=0.6)
    sequence = engine.begin("a")
    engine.check([(sequence, 20 * BLOCK)])
    memory = engine.cache.memory()
    assert memory.outside == 0
    assert memory.used < 0.6 * memory.room
    assert memory.tokens == 20 * BLOCK
    low = engine.memory.ctypes.data
    pages = engine.layer.address[sequence.blocks]
    assert ((pages >= low) & (pages < low + engine.memory.nbytes)).all()


def test_a_prefix_computed_in_the_same_step_is_read() -> None:
    """An engine may let a prompt begin with blocks that another one fills in the same step."""
    engine = Engine(SPECS["kvcomp"])
    first = engine.begin("a")
    engine.check([(first, 3)])
    second = Sequence("b")
    engine.end(first)
    first = engine.begin("c")
    more = [engine.free.pop(0) for _ in range(3)]
    for values in (first.k, first.v):
        values.extend(torch.randn(130, 2, 32, generator=engine.random).to(torch.bfloat16))
    first.blocks = more
    second.blocks = [*more[:2], engine.free.pop(0)]
    for kind in "kv":
        setattr(second, kind, [*getattr(first, kind)[:128], *torch.randn(5, 2, 32).to(torch.bfloat16)])
    plan = engine.cache.begin(np.array([first.blocks, second.blocks]), np.array([130, 133]), np.array([0, 130, 135]))
    k, v = (torch.stack([*getattr(first, kind), *getattr(second, kind)[128:]]) for kind in "kv")
    q = torch.randn(135, 4, 32).to(torch.bfloat16)
    out = torch.empty_like(q)
    engine.layer.write(plan, k, v)
    expected = torch.cat([engine.oracle(first, q[:130], plan), engine.oracle(second, q[130:], plan)])
    engine.layer.attend(plan, q, k, v, 0.3, 0.0, out)
    assert torch.allclose(out.float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("offset", [0, 10, 40])
def test_a_token_that_does_not_follow_is_refused(offset: int) -> None:
    """Going on where a sequence did not end, as speculative decoding does, would lose tokens."""
    engine = Engine(SPECS["kvcomp"])
    sequence = engine.begin("a")
    engine.check([(sequence, 20)])
    with pytest.raises(InvalidInput, match="another place"):
        engine.cache.begin(np.array([[sequence.blocks[0] + (offset == 0)]]), np.array([offset + 6]), np.array([0, 1]))


@pytest.mark.parametrize("held", [0, 20])
def test_a_block_that_two_sequences_write_is_refused(held: int) -> None:
    engine = Engine(SPECS["kvcomp"])
    if held:
        engine.check([(engine.begin("a"), held)])
    with pytest.raises(InvalidInput, match="another place"):
        engine.cache.begin(np.array([[1], [1]]), np.array([held + 1, 1]), np.array([0, 1, 2]))


def test_a_block_that_is_used_again_has_none_of_the_sinks_it_had() -> None:
    engine = Engine(SPECS["kvcomp"], blocks=4, shared=False)
    one = engine.begin("one")
    engine.check([(one, 2 * BLOCK)])
    engine.check([(one, 1)])
    engine.end(one)
    other = engine.begin("other")
    engine.check([(other, 1)])
    assert other.blocks == one.blocks[:1]
    engine.check([(other, 1)])


def test_pages_come_in_when_there_is_room_again() -> None:
    engine = Engine(SPECS["kvcomp"], room=0.2, shared=False)
    one, other = engine.begin("one"), engine.begin("other")
    engine.check([(one, 500), (other, 500)])
    assert engine.layer.outside > 0
    engine.end(one)
    assert engine.layer.outside == 0
    for new in (1, 70, 1):
        engine.check([(other, new)])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_raw_pages_hold_what_was_written(backend: str) -> None:
    engine = Engine(SPECS["kvcomp"], backend=backend)
    sequence = engine.begin("a")
    engine.check([(sequence, 70)])
    k, v = engine.layer.values(np.array(sequence.blocks))
    assert torch.equal(k[:, :70], torch.stack(sequence.k, 1))
    assert torch.equal(v[:, :70], torch.stack(sequence.v, 1))


ROTATION = Rotation.of(np.array([[0, 1], [8, 20]]), np.array([0.7, 1e-3]), 32)


@pytest.mark.parametrize("rotation", [None, ROTATION])
@pytest.mark.parametrize("level", ["near-lossless", "aggressive"])
def test_calibrated_pages_hold_transformed_values(level: str, rotation: Rotation | None) -> None:
    """Attention is that over what the pages decode to, brought back, and this lies within the certificate."""
    calibration = calibrated(rotation=rotation)
    spec = calibration.spec(level).layer(0, 1)
    books = calibration.layer(0, calibration.spec(level))
    assert books is not None
    engine = Engine(spec, dtype=torch.float32, calibrated=books)
    places, keys = torch.arange(400), like_keys(1, 2, 400, 32, 8)[0]
    exact = keys if rotation is None else rotation.turned(keys, places), like_keys(1, 2, 400, 32, 9)[0].flip(-1)
    blocks, done = np.array([engine.free.pop(0) for _ in range(7)]), 0
    for new in (100, 200, 1, 63, 1):
        part = slice(done, done + new)
        done += new
        plan = engine.cache.begin(blocks[None], np.array([done]), np.array([0, new]))
        k, v = (x[:, part].transpose(0, 1) for x in exact)
        q = torch.randn(new, 4, 32, generator=engine.random)
        out = torch.empty_like(q)
        engine.layer.write(plan, k, v)
        used = blocks[: -(-done // BLOCK)]
        held = [x[:, :done] for x in engine.layer.values(used)]
        engine.layer.attend(plan, q, k, v, 0.05, 0.0, out)
        engine.layer.seal(plan.seals)
        back = []
        for x, y, affine, tensor in zip(
            held, exact, (books.transform.key, books.transform.value), (spec.key, spec.value), strict=True
        ):
            back.append(affine.undo(x, places[:done]))
            bound = value_bound(x, torch.tensor(tensor.heads), affine, places[:done])
            assert ((back[-1] - y[:, :done]).abs() <= bound).all()
        k, v = (x.double().repeat_interleave(2, 0) for x in (exact if new == done else back))
        k, v = k[:, :done], v[:, :done]
        ahead = torch.ones(new, done, dtype=torch.bool).triu(done - new + 1)
        score = (0.05 * q.double().transpose(0, 1) @ k.mT).masked_fill(ahead, -torch.inf)
        expected = (score.softmax(-1) @ v).transpose(0, 1).float()
        assert torch.allclose(out, expected, atol=1e-3, rtol=1e-3)
    assert not engine.blocks.raw[blocks[:4]].any()
    assert engine.blocks.raw[blocks[5]]
