// What a GPU has and C++ does not, in one place: the emulator (tests/emulator) brings its own file of this name.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef short i16;
typedef int i32;
typedef unsigned u32;
typedef long long i64;
typedef unsigned long long u64;

#define KERNEL extern "C" __global__
#define INLINE __device__ __forceinline__

extern __shared__ __align__(16) u8 shared_memory[];

// c += a b for a 16 x 16 and a 16 x 8 matrix of bfloat16, sums in float32. Lane (g, j) = (lane >> 2, lane & 3) holds
// of a: a[0], a[1] rows g and g + 8 at columns 2j, 2j + 1; a[2], a[3] the same at columns 2j + 8, 2j + 9;
// of b: b0 rows 2j, 2j + 1, b1 rows 2j + 8, 2j + 9, both of column g;
// of c: c[0], c[1] row g at columns 2j, 2j + 1; c[2], c[3] the same of row g + 8.
INLINE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats to bfloat16, ``first`` in the low half.
INLINE u32 to_bfloat16s(float first, float second) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

INLINE float from_float16(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

INLINE u16 to_float16(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

INLINE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE float log_of_two(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Where shared memory lies in its own address space: what the loads and copies below take.
INLINE u32 shared_address(u32 offset) { return (u32)__cvta_generic_to_shared(shared_memory) + offset; }

template <u32 OFFSET = 0>
INLINE u32 load_shared(u32 address) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1+%2];" : "=r"(word) : "r"(address), "n"(OFFSET));
    return word;
}

INLINE u32 load_shared_half(u32 address) {
    u16 half;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(address));
    return half;
}

INLINE u32 load_shared_byte(u32 address) {
    u32 byte;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(address));
    return byte;
}

// If ``due`` is not 0: ``high`` becomes ``low``, the word at ``next`` becomes ``high``, ``next`` goes on. In place, which the compiler would not do.
INLINE void shift_in(u32& low, u32& high, u32& next, u32 due) {
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %3, 0; @p mov.b32 %0, %1; @p ld.shared.u32 %1, [%2]; @p add.u32 %2, %2, 4;}"
        : "+r"(low), "+r"(high), "+r"(next)
        : "r"(due));
}

// Copy 16 bytes to shared memory, asynchronously, if ``left`` is more than ``TO``, which counts from ``to`` as ``FROM`` does from ``from``;
// all are multiples of 16.
template <int TO, int FROM>
INLINE void copy_async(u32 to, const void* from, i32 left) {
    asm volatile("{.reg .pred p; setp.gt.s32 p, %2, %3; @p cp.async.cg.shared.global [%0+%3], [%1+%4], 16;}" ::"r"(to), "l"(from),
                 "r"(left), "n"(TO), "n"(FROM)
                 : "memory");
}

// Add the sum of the lane ``STEP`` below, if there is one.
template <int STEP>
INLINE void add_from_below(u32& sum) {
    asm volatile("{.reg .pred p; .reg .b32 t; shfl.sync.up.b32 t|p, %0, %1, 0, -1; @p add.u32 %0, %0, t;}" : "+r"(sum) : "n"(STEP));
}

// The same number, of which the compiler knows no more that it could compute it again.
INLINE float keep(float x) {
    asm volatile("" : "+f"(x));
    return x;
}
INLINE u32 keep(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}
template <class T>
INLINE const T* keep(const T* x) {
    asm volatile("" : "+l"(x));
    return x;
}

// End a group of this thread's copies.
INLINE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most the ``LATER`` newest groups of this thread's copies are under way.
template <int LATER>
INLINE void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}
