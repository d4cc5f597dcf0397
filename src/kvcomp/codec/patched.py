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
PIECE_BYTES = PIECE_CODES // 8  # for each bit of the width
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
    fields = stored - frames[:, None]
    return (
        b"".join(x.tobytes() for x in head).ljust(head_bytes(channels), b"\0")
        + b"".join(pack_piece(*of) for of in zip(fields, widths.tolist(), strict=True))
        + exceptions.astype("<u2").tobytes()
    )


def pack_piece(fields: Signed, width: int) -> bytes:
    """Fields of a piece (512,) as 64 bytes a bit: whole words of the 32 streams, and a half one where width is odd."""
    bits = fields.reshape(PIECE, HALF, 1) >> np.arange(width) & 1
    streams = np.packbits(bits.transpose(1, 0, 2).reshape(HALF, -1).astype(np.uint8), axis=1, bitorder="little")
    whole = 4 * (width // 2)
    words, halves = np.ascontiguousarray(streams[:, :whole]), np.ascontiguousarray(streams[:, whole:])
    return words.view("<u4").T.tobytes() + halves.tobytes()


def unpack_piece(data: bytes, width: int) -> Signed:
    """Undo ``pack_piece``."""
    whole = 4 * HALF * (width // 2)
    words = np.frombuffer(data, "<u4", whole // 4).reshape(-1, HALF).T
    halves = np.frombuffer(data, "u1", PIECE_BYTES * width - whole, whole).reshape(HALF, -1)
    streams = np.concatenate([np.ascontiguousarray(words).view("u1"), halves], axis=1)
    bits = np.unpackbits(streams, axis=1, bitorder="little").reshape(HALF, PIECE, width).astype(np.int64)
    fields: Signed = (bits << np.arange(width)).sum(axis=2).T.reshape(-1)
    return fields


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
    places = begin + PIECE_BYTES * np.cumsum([0, *widths])
    if len(data) < places[-1] + 2 * int(counts.sum()):
        raise CorruptData("a block is too short for its codes and exceptions")
    fields = [unpack_piece(data[at:], width) for at, width in zip(places.tolist(), widths.tolist(), strict=False)]
    codes = np.array(fields) + frames[:, None]
    exceptions = np.frombuffer(data, "<u2", int(counts.sum()), int(places[-1])).astype(np.int64)
    piece, position = np.repeat(np.arange(pieces), counts), exceptions & (1 << POSITION_BITS) - 1
    offset = (exceptions >> POSITION_BITS) + LEAST_OFFSET
    nearer = np.where(offset > 0, ends[piece], frames[piece])
    code = nearer + offset
    if (np.diff(piece * PIECE_CODES + position) <= 0).any() or (
        (offset == 0) | (codes[piece, position] != nearer) | (code < LEAST_CODE) | (code > MOST_CODE)
    ).any():
        raise CorruptData("a block has an exception that no encoder writes")
    codes[piece, position] = code
    block = np.empty((PAGE_TOKENS, channels), np.int64)
    block[piece_order(kind, channels)] = codes
    return block
