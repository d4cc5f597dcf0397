"""Pieces with widths of their own and exceptions, against loops written from docs/format.md, section 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvcomp.codec import patched
from kvcomp.errors import CorruptData
from kvcomp.spec import KINDS, Kind

CHANNELS = [16, 48, 64, 80, 128, 256, 512]
Block = npt.NDArray[np.int64]


def literal_order(kind: Kind, channels: int) -> list[list[tuple[int, int]]]:
    """(token, channel) of the 512 codes of each piece, as the format says it."""
    pieces = []
    for s in range(2):
        for i in range(channels // 16):
            codes = []
            for position in range(16):
                for lane in range(32):
                    g, j = lane >> 2, lane & 3
                    if kind == "K":
                        codes.append((8 * (position // 4 + 4 * s) + g, 16 * i + 4 * j + position % 4))
                    else:
                        token = 16 * (position // 4) + 2 * j + (0, 1, 8, 9)[position % 4]
                        codes.append((token, 8 * (i + s * (channels // 16)) + g))
            pieces.append(codes)
    return pieces


def literal_decode(data: bytes, channels: int, kind: Kind) -> Block:
    """Section 5, code by code."""
    count = channels // 8
    widths, counts = data[:count], data[2 * count : 3 * count]
    frames = [frame - 256 if frame > 127 else frame for frame in data[count : 2 * count]]
    at = -(-3 * count // 4) * 4
    block = np.full((64, channels), 999)
    order = literal_order(kind, channels)
    for piece, width in enumerate(widths):
        streams = [0] * 32
        for i in range(width // 2):
            for lane in range(32):
                streams[lane] |= int.from_bytes(data[at : at + 4], "little") << (32 * i)
                at += 4
        for lane in range(32 if width % 2 else 0):
            streams[lane] |= int.from_bytes(data[at : at + 2], "little") << (16 * (width - 1))
            at += 2
        for place, where in enumerate(order[piece]):
            position, lane = divmod(place, 32)
            block[where] = frames[piece] + (streams[lane] >> (position * width) & ((1 << width) - 1))
    for piece in range(count):
        for _ in range(counts[piece]):
            entry = int.from_bytes(data[at : at + 2], "little")
            block[order[piece][entry & 511]] += (entry >> 9) - 64
            at += 2
    assert at == len(data)
    return block


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_hold_every_code_once(kind: Kind, channels: int) -> None:
    token, channel = patched.piece_order(kind, channels)
    assert [list(zip(*of, strict=True)) for of in zip(token.tolist(), channel.tolist(), strict=True)] == literal_order(
        kind, channels
    )
    assert sorted((token * channels + channel).ravel().tolist()) == list(range(64 * channels))
    across = {"K": 16, "V": 8}[kind]
    assert all(len(set(of_piece)) == across for of_piece in channel.tolist())


def block_of(seed: int, channels: int, spread: float, tails: int, shift: int) -> Block:
    """Codes with heavy tails whose spread falls along the channels, so that widths differ."""
    rng = np.random.default_rng(seed)
    falling = spread * np.exp(-np.arange(channels) / channels * 6)
    codes = np.rint(rng.standard_t(tails, size=(64, channels)) * falling + shift)
    return np.clip(codes, -128, 127).astype(np.int64)


@given(
    st.integers(0, 99), st.sampled_from([16, 32, 48, 80]), st.sampled_from([0.3, 3.0, 40.0, 500.0]),
    st.sampled_from([1, 2, 30]), st.sampled_from([0, 5, -128, 127, 90]), st.sampled_from(KINDS),
)  # fmt: skip
@example(0, 16, 0.0, 1, -128, "K")
@example(0, 16, 0.0, 1, 127, "V")
@example(1, 64, 1000.0, 1, 0, "K")
def test_codes_come_back(seed: int, channels: int, spread: float, tails: int, shift: int, kind: Kind) -> None:
    codes = block_of(seed, channels, spread, tails, shift)
    data = patched.encode_patched(codes, kind)
    np.testing.assert_array_equal(patched.decode_patched(data, channels, kind), codes)
    np.testing.assert_array_equal(literal_decode(data, channels, kind), codes)


def bits_by_trial(codes: list[int]) -> tuple[int, int, int]:
    """Least bits of a piece over all widths and frames, and these."""
    found = []
    for width in range(9):
        for frame in range(-128, 129 - (1 << width)):
            end = frame + (1 << width) - 1
            offsets = [max(code - end, 0) + min(code - frame, 0) for code in codes]
            exceptions = sum(map(bool, offsets))
            if exceptions < 256 and min(offsets) >= -64 and max(offsets) <= 63:
                found.append((512 * width + 16 * exceptions, width, frame))
    return min(found)


@pytest.mark.parametrize("seed", range(12))
def test_a_piece_takes_the_fewest_bits_that_any_width_and_frame_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = np.clip(np.rint(rng.standard_t(1 + seed % 3, 512) * 1.7**seed), -128, 127).astype(np.int64)
    if seed == 3:
        codes[:300], codes[300:] = -60, 60  # too many for exceptions on either side
    bits, width, _ = bits_by_trial(codes.tolist())
    chosen = patched.choose(codes)
    assert chosen[0] == width
    inside = (codes >= chosen[1]) & (codes < chosen[1] + (1 << width))
    assert 512 * width + 16 * int((~inside).sum()) == bits


def test_a_piece_of_zeros_takes_three_bytes() -> None:
    assert patched.encode_patched(np.zeros((64, 32), np.int64), "K") == bytes(12)


PLAIN = np.tile(np.arange(8), (64, 4))
PLAIN[0, :3], PLAIN[5, 20] = 30, -20


def hostile(change: Callable[[bytearray], Any]) -> bytes:
    data = bytearray(patched.encode_patched(PLAIN, "V"))
    change(data)
    return bytes(data)


def entry(position: int, offset: int) -> bytes:
    return (position | (offset + 64) << 9).to_bytes(2, "little")


def put(at: int, value: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at : at + len(value) if at + len(value) else None] = value

    return change


# Of ``PLAIN``: four pieces of width 3 and frame 0; pieces 0, 2 have three and one exception.
@pytest.mark.parametrize(
    ("why", "data"),
    [
        ("too short for the widths", hostile(lambda data: data.__delitem__(slice(11, None)))),
        ("too short for its codes and exceptions", hostile(lambda data: data.pop())),
        ("too short for its codes and exceptions", hostile(put(9, b"\1"))),
        ("too short for its codes and exceptions", hostile(put(0, b"\4"))),
        ("more than 8 bits", hostile(put(0, b"\x09"))),
        ("more than 8 bits", hostile(put(3, b"\xff"))),
        ("of codes beyond 127", hostile(put(4, b"\x79"))),
        ("no encoder writes", hostile(put(-2, entry(511, 0)))),
        ("no encoder writes", hostile(put(-8, entry(500, 5)))),
        ("no encoder writes", hostile(lambda data: data.__setitem__(slice(-8, -6), data[-6:-4]))),
        ("no encoder writes", hostile(lambda data: data.__setitem__(slice(12, 16), b"\0" * 4))),
        ("no encoder writes", hostile(lambda data: data.__setitem__(-1, data[-1] ^ 0x80))),
    ],
)
def test_what_no_encoder_writes_is_refused(why: str, data: bytes) -> None:
    with pytest.raises(CorruptData, match=why):
        patched.decode_patched(data, 32, "V")


def test_a_code_beyond_eight_bits_is_refused() -> None:
    """The frame is within range, and the exception's offset is not."""
    block = np.full((64, 16), 100)
    block[0, 0] = 120
    data = bytearray(patched.encode_patched(block, "V"))
    assert data[:6] == bytes([0, 0, 100, 100, 1, 0])
    data[-2:] = entry(0, 28)
    with pytest.raises(CorruptData, match="no encoder writes"):
        patched.decode_patched(bytes(data), 16, "V")
    data[-2:] = entry(0, 27)
    assert patched.decode_patched(bytes(data), 16, "V")[0, 0] == 127
