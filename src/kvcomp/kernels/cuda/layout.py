"""What Python and the CUDA sources must agree on: structures passed to kernels, and constants that one is built with.

No torch and no CUDA in here: the GPU backend and the emulator (tests/emulator) share it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from kvcomp.codec.codebook import Codebook
from kvcomp.codec.dtypes import DTYPES, TOKEN, UNIT_NUMBERS, VECTOR
from kvcomp.codec.quantise import MAX_CODES
from kvcomp.errors import BackendUnavailable
from kvcomp.spec import PAGE_TOKENS, CodecSpec, TensorSpec

SOURCES: Final = Path(__file__).parent
QUERIES: Final = 8  # of a KV head that one pass takes
LANES: Final = 32
BFLOAT16_128: Final = 0x43004300
OFFSET_BYTES: Final = 1024  # a warp's room for the offsets of a piece's exceptions
COUNTED: Final = 64  # codes a side whose pairs are counted in shared memory
BOOKS: Final = 4  # of a row: of K the default and the own, of V the same

pointer = ctypes.c_uint64
i32, i64, u32, f32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_float


class Book(ctypes.Structure):
    """A codebook on the device (page.cuh)."""

    _fields_ = (("table", pointer), ("first", i32 * 4), ("split", i32 * 4), ("bits", i32), ("levels", i32))


class RawTensor(ctypes.Structure):
    """(rows, heads, tokens, channels) with its strides in values."""

    _fields_ = (("values", pointer), ("row", i64), ("head", i64), ("token", i64))


class AttendArguments(ctypes.Structure):
    """``Arguments`` of decode_attention.cu, which says what they are."""

    _fields_ = (
        *((name, pointer) for name in ("q", "out", "lse", "partial_out", "partial_peak", "partial_total")),
        *((name, pointer) for name in ("pages", "valid", "count", "books", "k_steps", "v_steps")),
        *((name, RawTensor) for name in ("sinks_k", "sinks_v", "tail_k", "tail_v")),
        *((name, pointer) for name in ("sink_count", "tail_begin", "tail_tokens", "turned")),
        *((name, i32) for name in ("rows", "heads", "queries", "new_tokens", "capacity", "slots")),
        ("scaling", f32),
        ("softcap", f32),
        ("ones", u32),
    )


class DecompressArguments(ctypes.Structure):
    """``Arguments`` of decompress.cu."""

    _fields_ = (
        *((name, pointer) for name in ("pages", "books", "k_steps", "v_steps", "out_k", "out_v")),
        *((name, i64) for name in ("k_head", "k_token", "v_head", "v_token")),
        *((name, i32) for name in ("page_count", "heads")),
        ("ones", u32),
    )


class Encoder(ctypes.Structure):
    """A codebook for encoding (encode.cuh)."""

    _fields_ = (("words", pointer), *((name, i32 * 4) for name in ("begin", "first", "levels", "split", "symbols")))


class EncodeTensor(ctypes.Structure):
    """``Tensor`` of encode.cuh."""

    _fields_ = (
        ("values", pointer),
        ("head", i64),
        ("token", i64),
        ("relative_scale", ctypes.c_double),
        *((name, pointer) for name in ("steps", "codes", "scale", "zero", "raw", "token_range", "counts", "books")),
    )


class EncodeArguments(ctypes.Structure):
    """``Arguments`` of encode.cuh."""

    _fields_ = (
        ("tensors", EncodeTensor * 2),
        *((name, pointer) for name in ("modes", "sizes", "lengths", "offsets", "cursor", "out")),
        ("pages", i32),
        ("heads", i32),
    )


def check_channels(channels: int) -> None:
    """Raise BackendUnavailable for a head_dim that no kernel is built for."""
    if channels % 16 or not 64 <= channels <= 256:
        raise BackendUnavailable(
            f"the GPU kernels take a head_dim that is a multiple of 16 from 64 to 256, not {channels}: use "
            "backend='cpu'"
        )


def table_entries(book: Codebook, index_bits: int) -> npt.NDArray[np.uint32]:
    """The decode table of a book for the GPU, (classes, 2^index_bits).

    An entry is ``length | hi_a << k << 16 | hi_b << k << 24``.
    """
    table = np.zeros((book.classes, 1 << index_bits), np.uint32)
    for of_class in range(book.classes):
        m, k = book.symbols(of_class), book.split[of_class]
        lengths, words = book.lengths_of(of_class), book.words(of_class)
        for symbol in np.flatnonzero(lengths).tolist() if lengths.size > 1 else [0]:
            hi_a, hi_b = divmod(symbol, m)
            entry = int(lengths[symbol]) | hi_a << k << 16 | hi_b << k << 24
            table[of_class, int(words[symbol]) :: 1 << int(lengths[symbol])] = entry
    return table


def encoder_words(book: Codebook) -> npt.NDArray[np.uint32]:
    """The word ``length | code << 8`` of every symbol, class after class."""
    words = np.concatenate([book.words(of_class) for of_class in range(book.classes)])
    return book.lengths.astype(np.uint32) | words.astype(np.uint32) << np.uint32(8)


def describe_encoder(book: Codebook, words: int) -> Encoder:
    """Describe a book for encoding whose words lie at this address."""
    described, begin = Encoder(words=words), 0
    for of_class in range(book.classes):
        described.begin[of_class] = begin
        described.first[of_class], described.levels[of_class] = book.first[of_class], book.levels[of_class]
        described.split[of_class], described.symbols[of_class] = book.split[of_class], book.symbols(of_class)
        begin += book.symbols(of_class) ** 2
    return described


def describe_book(book: Codebook, table: int) -> Book:
    """Describe a book for decoding whose table lies at this address."""
    described = Book(table=table, levels=max(book.levels))
    for of_class in range(book.classes):
        described.first[of_class], described.split[of_class] = book.first[of_class], book.split[of_class]
        longest = int(book.lengths_of(of_class).max()) + 2 * book.split[of_class]
        described.bits = max(described.bits, longest)
    return described


@dataclass(frozen=True)
class Machine:
    """What a build depends on."""

    architecture: int
    """Compute capability, such as 90."""
    shared: int
    """Bytes of shared memory that a CTA may have."""
    processors: int = 1
    """Multiprocessors."""

    @property
    def reserved(self) -> int:
        """Where a CTA's shared memory begins in its address space, behind what the system keeps; the kernel checks."""
        return 1024 if self.architecture >= 90 else 0


# Bytes of shared memory for one CTA, by compute capability.
SHARED: Final = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    120: 99 << 10,
}


def machine(architecture: int, processors: int = 1) -> Machine:
    """What an architecture offers. Raises BackendUnavailable for one that the kernels are not built for."""
    if architecture not in SHARED:
        known = ", ".join(f"sm_{one}" for one in SHARED)
        raise BackendUnavailable(f"the GPU kernels are built for {known}, not sm_{architecture}: use backend='cpu'")
    return Machine(architecture, SHARED[architecture], processors)


@dataclass(frozen=True)
class Build:
    """Constants of all kernels that read or write pages."""

    channels: int
    value: int
    warps: int
    k_unit: int
    v_unit: int
    k_classes: int
    v_classes: int
    k_bits: int
    v_bits: int
    k_patched: int
    v_patched: int

    sizes: ClassVar[tuple[str, ...]]
    """Properties that the sources want too."""

    @cached_property
    def defines(self) -> dict[str, int]:
        names = (*(field.name for field in fields(self)), *self.sizes)
        return {f"KVC_{name.upper()}": int(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class AttendBuild(Build):
    """Constants of decode_attention.cu."""

    query: int
    k_copies: int
    v_copies: int
    k_stage: int
    v_stage: int
    softcap: bool
    turned: bool
    reserved: int

    sizes = ("shared",)

    @property
    def warp_bytes(self) -> int:
        scales = sum(4 * PAGE_TOKENS for unit in (self.k_unit, self.v_unit) if unit == TOKEN)
        factors = 8 * PAGE_TOKENS if self.v_unit in (TOKEN, VECTOR) else 0
        offsets = 2 * OFFSET_BYTES if self.k_patched or self.v_patched else 0
        return scales + factors + self.k_stage + self.v_stage + self.channels // 8 * LANES * 8 + offsets

    @cached_property
    def shared(self) -> int:
        """Shared memory of a CTA in bytes."""
        common = 4 * QUERIES * self.channels + BOOKS * ctypes.sizeof(Book) + 16 + 2 * 4 * self.warps * QUERIES
        tables = self.k_classes * (4 * self.k_copies << self.k_bits) + self.v_classes * (
            4 * self.v_copies << self.v_bits
        )
        return -(-(common + tables) // 16) * 16 + self.warps * self.warp_bytes


@dataclass(frozen=True)
class PageBuild(Build):
    """Constants of the kernels that read or write whole pages: decompress.cu and encode.cu."""

    sizes = ("quantise_shared", "count_shared", "measure_shared", "pack_shared")

    @property
    def shared(self) -> int:
        """Shared memory of a CTA of decompress.cu in bytes: the codes of a block for each warp."""
        return self.warps * PAGE_TOKENS * self.channels

    @property
    def most_units(self) -> int:
        """Sets of a scale and a zero for which a block has room while it is encoded."""
        return max(self.channels, PAGE_TOKENS)

    @property
    def quantise_shared(self) -> int:
        return 32 * self.most_units + 8 * self.warps + 16

    @property
    def count_shared(self) -> int:
        return 4 * max(self.k_classes, self.v_classes) * COUNTED**2

    @property
    def measure_shared(self) -> int:
        """A histogram for each warp, if it chooses widths."""
        return 4 * MAX_CODES * self.warps if self.k_patched or self.v_patched else 0

    @property
    def place_shared(self) -> int:
        return 8 * LANES * self.warps

    @property
    def pack_shared(self) -> int:
        """For each warp the largest block of streams: scales, lengths, 18 bits a pair, padding."""
        scratch = 4 * self.most_units + 4 + 72 + PAGE_TOKENS * self.channels * 9 // 8 + 64 + 32
        return self.warps * (scratch & ~15)


def page_build(spec: CodecSpec, channels: int, value: str) -> PageBuild:
    """The build for a layer's spec. Raises BackendUnavailable if no kernel is built for its head_dim."""
    return PageBuild(**_constants(spec, channels, value, PAGE_WARPS))


def _constants(spec: CodecSpec, channels: int, value: str, warps: int) -> dict[str, int]:
    """Those of ``Build``."""
    check_channels(channels)
    return {
        "channels": channels,
        "value": DTYPES[value].number,
        "warps": warps,
        "k_unit": UNIT_NUMBERS[spec.key.unit],
        "v_unit": UNIT_NUMBERS[spec.value.unit],
        "k_classes": classes_of_books(spec.key),
        "v_classes": classes_of_books(spec.value),
        "k_bits": index_bits(spec.key),
        "v_bits": index_bits(spec.value),
        "k_patched": int(spec.key.coding == "patched"),
        "v_patched": int(spec.value.coding == "patched"),
    }


def index_bits(tensor: TensorSpec) -> int:
    """Index bits of a tensor's decode tables, 0 where it has no codebooks."""
    return tensor.limit if tensor.coding == "huffman" else 0


def classes_of_books(tensor: TensorSpec) -> int:
    """Classes of a tensor's codebooks, 1 where it has none."""
    return tensor.classes if tensor.coding == "huffman" else 1


PAGE_WARPS: Final = 4
# Bits a value up to which a block is copied to shared memory before it is decoded.
STAGED_BITS: Final = {"huffman": 4.5, "fixed": 5, "patched": 6}
WARPS: Final = (16, 12, 8, 6, 4, 3, 2, 1)
COPIES: Final = (8, 4, 2, 1)


def attend_build(
    spec: CodecSpec, channels: int, value: str, query: str, softcap: bool, on: Machine, turned: bool = False
) -> AttendBuild:
    """Choose the attention kernel for a machine: as many warps as fit with the decode tables in shared memory.

    Parameters
    ----------
    spec
        Of the layer.
    channels
        Of a head.
    value, query
        Dtypes of the cache and of the queries.
    softcap
        Whether scores are capped.
    on
        The machine.
    turned
        Whether scores lack what means of K that turn add.

    Raises
    ------
    BackendUnavailable
        For a head_dim that no kernel is built for, or if the tables do not fit.
    """

    def build(warps: int, copies: int) -> AttendBuild:
        return AttendBuild(
            **_constants(spec, channels, value, warps),
            query=DTYPES[query].number,
            k_copies=copies if index_bits(spec.key) else 0,
            v_copies=copies if index_bits(spec.value) else 0,
            k_stage=stage_bytes(channels, spec.key),
            v_stage=stage_bytes(channels, spec.value),
            softcap=softcap,
            turned=turned,
            reserved=on.reserved,
        )

    # More copies of the tables are not worth fewer warps, nor, beyond eight warps, what they take of a window; tables
    # in global memory are worth it where fewer than three warps are left.
    most = most_warps(spec, channels, on.architecture)
    choices = (
        [(warps, 1) for warps in WARPS if 8 < warps <= most]
        + [(8, copies) for copies in COPIES]
        + [(warps, 1) for warps in WARPS if 3 <= warps < 8]
        + [(warps, 0) for warps in WARPS if warps <= most]
    )
    for warps, copies in choices:
        chosen = build(warps, copies)
        if chosen.shared <= on.shared:
            return chosen
    raise BackendUnavailable(
        f"the tables of this spec do not fit the shared memory of sm_{on.architecture}: use backend='cpu'"
    )


def most_warps(spec: CodecSpec, channels: int, architecture: int) -> int:
    """Warps of a CTA whose registers hold everything. From sm_100 on the compiler takes more of them."""
    if channels > 128 or architecture >= 100:
        return 8
    several_tables = max(classes_of_books(spec.key), classes_of_books(spec.value)) > 1
    two_readers = any(of.coding == "patched" and of.unit != "head" for of in (spec.key, spec.value))
    if several_tables or two_readers:
        return 12 if channels < 128 else 8
    return 16 if channels == 64 else 12


def stage_bytes(channels: int, tensor: TensorSpec) -> int:
    """Bytes of a block of K or V at ``STAGED_BITS``, with its scales."""
    scales = {"channel": 4 * channels, "vector": 4 * PAGE_TOKENS}.get(tensor.unit, 0)
    return -(-(int(PAGE_TOKENS * channels * STAGED_BITS[tensor.coding] / 8) + scales) // 16) * 16
