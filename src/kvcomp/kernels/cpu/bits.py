# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""What Numba lacks for the CPU kernels: memory at an address, vectors of 16 floats, an atomic counter.

Addresses are plain int64; who passes one keeps the memory alive. Loads and stores need no alignment.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import Parameter, Signature
from pickle import UnpicklingError
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, config, njit, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from kvcomp.codec.dtypes import BFLOAT16, FLOAT16, FLOAT32

LANES = 16  # floats of a vector: a register of AVX-512; LLVM splits it where registers are smaller
# What Numba compiles for: this processor, or what NUMBA_CPU_FEATURES says.
FEATURES = {*(get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES).split(",")}
OF_VECTOR = 1 if "+avx512f" in FEATURES else 2  # registers of a vector; of all other processors we take AVX2's

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
POINTER = ir.PointerType()

# What a sum may be rearranged to, but not that it is finite: raw blocks may hold NaN and infinity.
FAST = {"contract", "reassoc", "nsz", "arcp"}

_cacheable = True


def compiled(
    function: Callable[..., Any] | None = None,
    *,
    entry: bool = False,
    inline: bool = False,
    fastmath: set[str] | bool = False,
) -> Any:
    """Compile with Numba, without the GIL, and cache on disk.

    Where no directory for the cache is writable, or its disk is full, it warns and goes without.

    Parameters
    ----------
    function
        What to compile; without it, a decorator is returned.
    entry
        Whether Python calls it. Others are called from compiled code only and get no wrapper, which saves compile time.
    inline
        Whether it is compiled as a part of its caller only: LLVM compiles all that a function calls with it, so a chain
        of calls would be compiled anew at each link.
    fastmath
        What LLVM may rearrange, as Numba takes it.
    """
    global _cacheable
    if function is None:
        return lambda f: compiled(f, entry=entry, inline=inline, fastmath=fastmath)
    options: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "fastmath": fastmath}
    options |= {"no_cfunc_wrapper": True, "no_cpython_wrapper": not entry, "inline": "always" if inline else "never"}
    if _cacheable:
        try:
            return _going_on(njit(cache=True, **options)(function))
        except RuntimeError:  # "cannot cache function ...: no locator available"
            _cacheable = False
            warnings.warn(
                "Numba finds no writable cache directory: the CPU kernels compile anew in each process", stacklevel=2
            )
    return njit(**options)(function)


def _going_on(dispatcher: Any) -> Any:
    """A function of Numba's that also works where its cache is cut off, or what it compiled cannot be written there."""
    cache = dispatcher._cache
    load, save = cache.load_overload, cache.save_overload

    def load_if_possible(*args: Any) -> Any:
        try:
            return load(*args)
        except (EOFError, UnpicklingError):  # a machine that went off left an empty file, or zeros
            with suppress(OSError):
                cache.flush()
            return None

    def save_if_possible(*args: Any) -> None:
        try:
            save(*args)
        except OSError as error:
            warnings.warn(f"the CPU kernels compile anew in each process: {error}", stacklevel=2)

    cache.load_overload, cache.save_overload = load_if_possible, save_if_possible
    return dispatcher


Emit = Callable[[Any, ir.IRBuilder, Sequence[ir.Value]], ir.Value | None]


def emitted(result: types.Type, arguments: Sequence[types.Type], emit: Emit) -> Any:
    """Make a function for compiled code whose body is the LLVM IR that ``emit(context, builder, arguments)`` writes."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        value = emit(context, builder, args)
        return context.get_dummy_value() if value is None else value

    def typing(*_: Any) -> Any:
        return result(*arguments), codegen

    names = ["context", *(f"argument_{index}" for index in range(len(arguments)))]  # Numba looks at the parameters
    typing.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    return intrinsic(typing)


def alone(name: str, emit: Emit, result: ir.Type | None = None) -> Emit:
    """The same as a function of its own that is not inlined; its result has this type.

    Where it is called in a loop, LLVM would load the constants of all its cases before each turn, or keep what its
    caller needs in registers.
    """

    def call(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        kind = ir.FunctionType(result or ir.VoidType(), [arg.type for arg in args])
        if name not in builder.module.globals:
            function = ir.Function(builder.module, kind, name)
            function.linkage = "internal"
            function.attributes.add("noinline")
            body = ir.IRBuilder(function.append_basic_block("entry"))
            value = emit(context, body, function.args)
            body.ret_void() if value is None else body.ret(value)
        return builder.call(builder.module.globals[name], args)

    return call


@compiled
def address_of(array):
    """Address of an array's first element.

    Take it where the array is a parameter: Numba frees a local after its last mention.
    """
    return np.int64(array.ctypes.data)


@compiled
def row_address(array, index):
    """Address of ``array[index]``."""
    return np.int64(array.ctypes.data) + index * np.int64(array.strides[0])


def _viewer(element: types.Type) -> Any:
    pointer = emitted(types.CPointer(element), [types.int64], lambda context, builder, args: at(builder, args[0]))

    @compiled
    def view(address, shape):
        return carray(pointer(address), shape)

    return view


def at(builder: ir.IRBuilder, address: ir.Value, offset: int = 0) -> ir.Value:
    """The pointer ``address + offset`` bytes."""
    return builder.inttoptr(builder.add(address, I64(offset)) if offset else address, POINTER)


def _loader(result: types.Type, stored: ir.Type) -> Any:
    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        return builder.load(at(builder, args[0]), align=1, typ=stored)

    return emitted(result, [types.int64], emit)


def _storer(given: types.Type) -> Any:
    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        builder.store(args[1], at(builder, args[0]), align=1)

    return emitted(types.void, [types.int64, given], emit)


# Arrays on memory that somebody else keeps alive: (address, shape).
# They cost no reference counting, an array argument does.
floats_at, integers_at, halves_at = (_viewer(element) for element in (types.float32, types.int64, types.uint16))

load_u8, load_u16, load_u32 = _loader(types.uint8, I8), _loader(types.uint16, I16), _loader(types.uint32, I32)
load_i8, load_i16, load_i32, load_f32 = (
    _loader(*of) for of in ((types.int8, I8), (types.int16, I16), (types.int32, I32), (types.float32, F32))
)
load_u64 = _loader(types.uint64, I64)
store_u8, store_u16, store_u32 = _storer(types.uint8), _storer(types.uint16), _storer(types.uint32)
store_u64 = _storer(types.uint64)


def _copy_bytes(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    source, target, count = args
    cgutils.raw_memcpy(builder, at(builder, target), at(builder, source), count, 1)


def _move_bytes(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    source, target, count = args
    cgutils.raw_memmove(builder, at(builder, target), at(builder, source), count, 1)


def _clear_bytes(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    cgutils.memset(builder, at(builder, args[0]), args[1], 0)


copy_bytes = emitted(types.void, [types.int64] * 3, _copy_bytes)  # (source, target, count)
move_bytes = emitted(types.void, [types.int64] * 3, _move_bytes)  # the same, where both may overlap
clear_bytes = emitted(types.void, [types.int64] * 2, _clear_bytes)  # (target, count)


def _fill(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    address, value, count = args
    values = splat(builder, value)
    with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (i, _):
        builder.store(values, at(builder, builder.add(address, builder.shl(i, I64(2)))), align=4)


fill = emitted(types.void, [types.int64, types.float32, types.int64], _fill)  # so many floats, a multiple of 16

# Reinterpretation of a float64 as its bits, and back.
bits_of = emitted(types.int64, [types.float64], lambda context, builder, args: builder.bitcast(args[0], I64))
float_of = emitted(
    types.float64, [types.int64], lambda context, builder, args: builder.bitcast(args[0], ir.DoubleType())
)


def _prefetch(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    kind = ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(prefetch, [at(builder, args[0]), I32(0), I32(2), I32(1)])  # to read, in the second cache, data


# prefetch(address): ask for a cache line. A block at once has more of them than the first cache can wait for.
prefetch = emitted(types.void, [types.int64], _prefetch)


def _fetch_add(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
    return builder.atomic_rmw("add", at(builder, args[0]), I64(1), "monotonic")


# take_next(address): the int64 at an address, which grows by one, atomically.
take_next = emitted(types.int64, [types.int64], _fetch_add)


def vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def splat(builder: ir.IRBuilder, value: ir.Value, lanes: int = LANES) -> ir.Value:
    """A vector with one value in all lanes."""
    of = vector(value.type, lanes)
    first = builder.insert_element(ir.Constant(of, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(first, ir.Constant(of, ir.Undefined), ir.Constant(vector(I32, lanes), [0] * lanes))


def fold_lanes(builder: ir.IRBuilder, x: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """One value from the lanes of a vector, halves onto halves."""
    lanes = x.type.count
    while lanes > 1:
        lanes //= 2
        low, high = (builder.shuffle_vector(x, x, integers(I32, range(first, first + lanes))) for first in (0, lanes))
        x = combine(low, high)
    return builder.extract_element(x, I32(0))


def sum_of_lanes(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return fold_lanes(builder, x, builder.fadd)


def integers(element: ir.IntType, values: Sequence[int]) -> ir.Constant:
    """A constant vector."""
    return ir.Constant(vector(element, len(values)), list(values))


# LLVM finds this instruction in plain IR only where nothing is shared, so it is named, by the bits of a register.
_MULTIPLY_PAIRS = {512: "llvm.x86.avx512.pmaddw.d.512", 256: "llvm.x86.avx2.pmadd.wd"}
REGISTER_BITS = 512 if "+avx512bw" in FEATURES else 256 if "+avx2" in FEATURES else None


def products_of_pairs(
    builder: ir.IRBuilder, x: ir.Value, y: ir.Value, register_bits: int | None = REGISTER_BITS
) -> ir.Value:
    """Vectors of two int16 in each lane -> int32 sums of the two products; by plain IR where registers have no bits."""
    if register_bits is None:
        half = integers(I32, [16] * LANES)
        low = builder.mul(*(builder.ashr(builder.shl(of, half), half) for of in (x, y)))
        return builder.add(low, builder.mul(*(builder.ashr(of, half) for of in (x, y))))
    lanes = register_bits // 32
    shorts = vector(I16, 2 * lanes)
    kind = ir.FunctionType(vector(I32, lanes), [shorts, shorts])
    multiply = cgutils.get_or_insert_function(builder.module, kind, _MULTIPLY_PAIRS[register_bits])
    sums = []
    for first in range(0, LANES, lanes):
        parts = [builder.shuffle_vector(of, of, integers(I32, range(first, first + lanes))) for of in (x, y)]
        sums.append(builder.call(multiply, [builder.bitcast(part, shorts) for part in parts]))
    return sums[0] if len(sums) == 1 else builder.shuffle_vector(*sums, integers(I32, range(LANES)))


def round_bfloat16(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Vector of float32 -> vector of i32 whose upper halves are the nearest bfloat16, ties to even; not for NaN."""
    bits = builder.bitcast(x, vector(I32))
    odd = builder.and_(builder.lshr(bits, integers(I32, [16] * LANES)), integers(I32, [1] * LANES))
    return builder.add(bits, builder.add(odd, integers(I32, [0x7FFF] * LANES)))


def _widen(stored: int) -> Emit:
    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        source, target, count = args
        size = 4 if stored == FLOAT32 else 2
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (i, _):
            pointer = at(builder, builder.add(source, builder.mul(i, I64(size))))
            if stored == FLOAT32:
                x = builder.load(pointer, align=1, typ=vector(F32))
            elif stored == FLOAT16:
                x = builder.fpext(builder.load(pointer, align=1, typ=vector(F16)), vector(F32))
            else:
                bits = builder.zext(builder.load(pointer, align=1, typ=vector(I16)), vector(I32))
                x = builder.bitcast(builder.shl(bits, integers(I32, [16] * LANES)), vector(F32))
            builder.store(x, at(builder, builder.add(target, builder.mul(i, I64(4)))), align=1)

    return emit


def _narrow(stored: int) -> Emit:
    def emit(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        source, target, count = args
        size = 4 if stored == FLOAT32 else 2
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (i, _):
            x = builder.load(at(builder, builder.add(source, builder.mul(i, I64(4)))), align=1, typ=vector(F32))
            if stored == FLOAT16:
                x = builder.fptrunc(x, vector(F16))
            elif stored == BFLOAT16:
                x = builder.trunc(builder.lshr(round_bfloat16(builder, x), integers(I32, [16] * LANES)), vector(I16))
            builder.store(x, at(builder, builder.add(target, builder.mul(i, I64(size)))), align=1)

    return emit


_copy = [types.int64, types.int64, types.int64]
_widen_float32, _widen_float16, _widen_bfloat16 = (emitted(types.void, _copy, _widen(dtype)) for dtype in range(3))
_narrow_float32, _narrow_float16, _narrow_bfloat16 = (emitted(types.void, _copy, _narrow(dtype)) for dtype in range(3))


@compiled
def widen(dtype, source, target, count):
    """Write ``count`` values of a dtype, a multiple of 16, as float32; ``source`` and ``target`` are addresses."""
    if dtype == FLOAT32:
        _widen_float32(source, target, count)
    elif dtype == FLOAT16:
        _widen_float16(source, target, count)
    else:
        _widen_bfloat16(source, target, count)


def _widen_integers(context: Any, builder: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
    source, target, count = args
    with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (i, _):
        place = at(builder, builder.add(source, builder.shl(i, I64(1))))
        x = builder.sitofp(builder.load(place, align=1, typ=vector(I16)), vector(F32))
        builder.store(x, at(builder, builder.add(target, builder.shl(i, I64(2)))), align=1)


widen_integers = emitted(types.void, _copy, _widen_integers)  # (source, target, count): int16 to float32, as ``widen``


@compiled
def narrow(dtype, source, target, count):
    """Undo ``widen``, rounding to nearest, ties to even; not for NaN."""
    if dtype == FLOAT32:
        _narrow_float32(source, target, count)
    elif dtype == FLOAT16:
        _narrow_float16(source, target, count)
    else:
        _narrow_bfloat16(source, target, count)
