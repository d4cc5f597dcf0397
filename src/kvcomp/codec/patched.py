"""One block of pieces with widths of their own and exceptions (docs/format.md, section 5): the readable reference.

A *patched frame of reference* (Zukowski et al., "Super-Scalar RAM-CPU Cache Compression", ICDE 2006): a piece stores
its codes from the *frame* on in a few bits each. Of a code outside it stores the nearer end, and apart how far off it
is.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kvcomp.codec.block import STREAMS, Indices, stream_order
from kvcomp.errors import CorruptData
from kvcomp.spec import PAGE_TOKENS, Kind

HALF = STREAMS // 2
PIECE = 16  # positions of a piece in each of the streams of its half
PIECE_CODES = HALF * PIECE
EXCEPTION_BITS = 16
POSITION_BITS = 9  # of an exception's place in its piece; its offset has the rest
LEAST_OFFSET, MOST_OFFSET = -64, 63
MOST_EXCEPTIONS = 255  # of a piece
LEAST_CODE, MOST_CODE = -128, 127

Signed = npt.NDArray[np.int64]


@lru_cache(maxsize=64)
def piece_order(kind: Kind, channels: int) -> tuple[Indices, Indices]:
    """Token and channel of every code: two (D/8 pieces, 512 codes) arrays."""
    token, channel = (_pieces(x, channels) for x in stream_order(kind, channels))
    if kind == "K":
        piece, position, lane = np.mgrid[: channels // 8, :PIECE, :HALF]
        s, i = divmod(piece, channels // PIECE)
        token = (8 * (position // 4 + 4 * s) + lane // 4).reshape(-1, PIECE_CODES)
        channel = (PIECE * i + 4 * (lane % 4) + position % 4).reshape(-1, PIECE_CODES)
    return token, channel


def _pieces(streams: Indices, channels: int) -> Indices:
    """(64 streams, D codes) -> (D/8 pieces, 512 codes), position by position."""
    by_half = streams.reshape(2, HALF, channels // PIECE, PIECE)
    return by_half.transpose(0, 2, 3, 1).reshape(-1, PIECE_CODES)


def head_bytes(channels: int) -> int:
    """Bytes of the widths, frames and numbers of exceptions of D/8 pieces, up to a whole word."""
    return -(-3 * (channels // 8) // 4) * 4


def half_words(widths: Signed) -> int:
    """Words of each stream of a half whose pieces have these widths."""
    return -(-PIECE * int(widths.sum()) // 32)


def choose(codes: Signed) -> tuple[int, int]:
    """Width and frame of a piece: those of the fewest bits, then of the least width, then the least frame."""
    low, high = int(codes.min()), int(codes.max())
    counts = np.bincount(codes - LEAST_CODE, minlength=MOST_CODE - LEAST_CODE + 1)
    below = np.concatenate([[0], np.cumsum(counts)])  # of each code, how many are less
    best = None
    for width in range(9):
        last = MOST_CODE + 1 - (1 << width)  # the greatest frame
        frame = np.arange(min(low, last), min(high, last) + 1)
        end = frame + (1 << width)
        outside = PIECE_CODES - below[end - LEAST_CODE] + below[frame - LEAST_CODE]
        fits = (outside <= MOST_EXCEPTIONS) & (low - frame >= LEAST_OFFSET) & (high - end < MOST_OFFSET)
        if fits.any():
            at = int(np.where(fits, outside, PIECE_CODES).argmin())
            found = PIECE_CODES * width + EXCEPTION_BITS * int(outside[at]), width, int(frame[at])
            best = found if best is None else min(best, found)
    assert best is not None, "a width of 8 has room for all codes"
    return best[1:]


def encode_patched(codes: Signed, kind: Kind) -> bytes:
    """Encode a block of codes from -128 to 127, (64, D); not padded to 16 bytes."""
    channels = codes.shape[1]
    pieces = codes[piece_order(kind, channels)]
    widths, frames = np.array([choose(piece) for piece in pieces]).T
    ends = frames + (1 << widths) - 1
    stored = np.clip(pieces, frames[:, None], ends[:, None])
    offsets = pieces - stored
    piece, position = np.nonzero(offsets)
    exceptions = position | (offsets[piece, position] - LEAST_OFFSET) << POSITION_BITS
    head = (widths.astype("u1"), frames.astype("i1"), np.count_nonzero(offsets, axis=1).astype("u1"))
    halves = (slice(0, channels // PIECE), slice(channels // PIECE, None))
    fields = stored - frames[:, None]
    return (
        b"".join(x.tobytes() for x in head).ljust(head_bytes(channels), b"\0")
        + b"".join(_pack_half(fields[half], widths[half]) for half in halves)
        + exceptions.astype("<u2").tobytes()
    )


def _pack_half(fields: Signed, widths: Signed) -> bytes:
    """Words of the streams of a half: word i of stream x is word 32 i + x."""
    streams, at = [0] * HALF, 0
    for piece, width in zip(fields, widths.tolist(), strict=True):
        for row in piece.reshape(PIECE, HALF).tolist():
            for lane, field in enumerate(row):
                streams[lane] |= field << at
            at += width
    size = 4 * half_words(widths)
    words = np.array([np.frombuffer(stream.to_bytes(size, "little"), "<u4") for stream in streams])
    return np.ascontiguousarray(words.T).tobytes()


def _unpack_half(data: bytes, widths: Signed) -> Signed:
    """Undo ``_pack_half``."""
    words = np.frombuffer(data, "<u4", HALF * half_words(widths)).reshape(-1, HALF)
    streams = [int.from_bytes(np.ascontiguousarray(words[:, lane]).tobytes(), "little") for lane in range(HALF)]
    fields, at = [], 0
    for width in widths.tolist():
        for _ in range(PIECE):
            fields.append([stream >> at & ((1 << width) - 1) for stream in streams])
            at += width
    return np.array(fields, np.int64).reshape(-1, PIECE_CODES)


def decode_patched(data: bytes, channels: int, kind: Kind) -> Signed:
    """Decode a block of codes (64, D). Raises CorruptData for what no encoder writes."""
    pieces, begin = channels // 8, head_bytes(channels)
    if len(data) < begin:
        raise CorruptData("a block is too short for the widths of its pieces")
    widths, frames, counts = (
        np.frombuffer(data, of, pieces, pieces * i).astype(np.int64) for i, of in enumerate(("u1", "i1", "u1"))
    )
    ends = frames + (1 << np.minimum(widths, 8)) - 1
    if (widths > 8).any() or (ends > MOST_CODE).any():
        raise CorruptData("a block has a piece of more than 8 bits a code, or of codes beyond 127")
    halves = widths.reshape(2, -1)
    sizes = [4 * HALF * half_words(half) for half in halves]
    if len(data) < begin + sum(sizes) + 2 * int(counts.sum()):
        raise CorruptData("a block is too short for its codes and exceptions")
    places = (begin, begin + sizes[0])
    codes = np.concatenate([_unpack_half(data[at:], half) for at, half in zip(places, halves, strict=True)])
    codes += frames[:, None]
    exceptions = np.frombuffer(data, "<u2", int(counts.sum()), begin + sum(sizes)).astype(np.int64)
    piece, position = np.repeat(np.arange(pieces), counts), exceptions & (1 << POSITION_BITS) - 1
    offset = (exceptions >> POSITION_BITS) + LEAST_OFFSET
    nearer = np.where(offset > 0, ends[piece], frames[piece])
    if (
        (np.diff(piece * PIECE_CODES + position) <= 0).any()
        or (offset == 0).any()
        or (codes[piece, position] != nearer).any()
        or (nearer + offset < LEAST_CODE).any()
        or (nearer + offset > MOST_CODE).any()
    ):
        raise CorruptData("a block has an exception that no encoder writes")
    codes[piece, position] += offset
    block = np.empty((PAGE_TOKENS, channels), np.int64)
    block[piece_order(kind, channels)] = codes
    return block
