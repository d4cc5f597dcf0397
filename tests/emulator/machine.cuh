// The machine of the emulator: what src/kvcomp/kernels/cuda/machine.cuh says, in C++ on a CPU. Every thread of a CTA is a fiber; all fibers of
// a warp meet at each shuffle, product and barrier, in an order that the caller chooses.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

typedef unsigned char u8;
typedef unsigned short u16;
typedef short i16;
typedef int i32;
typedef unsigned u32;
typedef long long i64;
typedef unsigned long long u64;

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define KERNEL extern "C"
#define INLINE inline

struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct uint2 {
    u32 x, y;
};
struct uint4 {
    u32 x, y, z, w;
};
struct Dim3 {
    u32 x, y, z;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
using std::max;
using std::min;

extern u8 shared_memory[];
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr int WARP = 32;
constexpr u32 MOST_SHARED = 256 * 1024;
extern u32 launched_shared;  // bytes of shared memory of the present launch

// Wait for the other lanes of the warp, or for the whole CTA.
void meet_warp();
void meet_block();
void raise_out_of_range();
// How often lanes did something since the library was loaded.
extern unsigned long long shuffles, products, powers;
// Called when all lanes of a warp have met, if it is set.
extern void (*warp_met)(int warp);
// Whether something lies on a thread's stack: what a GPU has in registers.
bool is_local(const void* at);
// A word that each lane of the current warp shows the others.
u32* shown(int lane);
u32 (*operands(int lane))[6];
int this_lane();

// What the counter of wavefronts (wavefronts.cpp) is told beyond what it sees by itself: of reads and copies whose purpose or predicate matters.
enum Access { LOOK_UP, REFILL, READ, WRITE, COPY, GLOBAL_READ };
#ifdef KVC_WAVEFRONTS
void note(Access access, const void* at, u32 bytes, bool active);
#define UNSEEN __attribute__((no_sanitize("thread")))
#else
inline void note(Access, const void*, u32, bool) {}
#define UNSEEN
#endif

inline void __syncwarp() { meet_warp(); }
inline void __syncthreads() { meet_block(); }

inline float __uint_as_float(u32 x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
inline u32 __float_as_uint(float x) {
    u32 y;
    memcpy(&y, &x, 4);
    return y;
}

template <class T>
T from_lane(T x, int lane) {
    static_assert(sizeof(T) == 4, "registers have 32 bits");
    memcpy(shown(this_lane()), &x, 4);
    meet_warp();
    T y;
    memcpy(&y, shown(lane), 4);
    meet_warp();
    return y;
}
template <class T>
T __shfl_sync(u32, T x, int lane) {
    shuffles++;
    return from_lane(x, lane & 31);
}
template <class T>
T __shfl_xor_sync(u32, T x, int mask) {
    shuffles++;
    return from_lane(x, this_lane() ^ mask);
}
template <class T>
T __shfl_up_sync(u32, T x, int step) {
    int lane = this_lane();
    shuffles++;
    return from_lane(x, lane >= step ? lane - step : lane);
}

inline bool __all_sync(u32, bool x) {
    u32 all = x;
    for (int step = 16; step; step /= 2) all &= from_lane(all, this_lane() ^ step);
    return all;
}
inline bool __any_sync(u32, bool x) { return !__all_sync(~0u, !x); }
inline u32 __ballot_sync(u32, bool x) {
    u32 all = (u32)x << this_lane();
    for (int step = 16; step; step /= 2) all |= from_lane(all, this_lane() ^ step);
    return all;
}
inline void __trap() { raise_out_of_range(); }

inline double __longlong_as_double(i64 x) {
    double y;
    memcpy(&y, &x, 8);
    return y;
}
inline i64 __double_as_longlong(double x) {
    i64 y;
    memcpy(&y, &x, 8);
    return y;
}
inline int __clz(int x) { return x ? __builtin_clz((u32)x) : 32; }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline u32 atomicAdd(u32* at, u32 x) {
    u32 before = *at;
    *at += x;
    return before;
}
inline u32 atomicOr(u32* at, u32 x) {
    u32 before = *at;
    *at |= x;
    return before;
}

inline u32 __funnelshift_r(u32 low, u32 high, u32 shift) { return (u32)(((u64)high << 32 | low) >> (shift & 31)); }
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    u64 both = (u64)b << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        u32 nibble = selector >> 4 * i & 15;
        u32 byte = both >> 8 * (nibble & 7) & 255;
        result |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return result;
}

void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);

inline u32 bfloat16_bits(float x) {
    u32 bits = __float_as_uint(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 to_bfloat16s(float first, float second) { return bfloat16_bits(first) | bfloat16_bits(second) << 16; }
inline float from_float16(u16 bits) {
    _Float16 x;
    memcpy(&x, &bits, 2);
    return (float)x;
}
inline u16 to_float16(float x) {
    _Float16 y = (_Float16)x;
    u16 bits;
    memcpy(&bits, &y, 2);
    return bits;
}
inline float power_of_two(float x) {
    powers++;
    return x < -126.f ? 0.f : exp2f(x);
}
inline float log_of_two(float x) { return log2f(x); }

#ifndef KVC_RESERVED
#define KVC_RESERVED 0
#endif
inline u32 shared_address(u32 offset) { return KVC_RESERVED + offset; }
UNSEEN inline u32 read_shared(u32 address) {
    u32 word;
    if (address % 4 || address - KVC_RESERVED >= launched_shared) raise_out_of_range();
    memcpy(&word, shared_memory + (address - KVC_RESERVED), 4);
    return word;
}
template <u32 OFFSET = 0>
u32 load_shared(u32 address) {
    note(OFFSET ? LOOK_UP : READ, shared_memory + (address + OFFSET - KVC_RESERVED), 4, true);  // only tables have an offset
    return read_shared(address + OFFSET);
}
template <class T>
UNSEEN T read_shared_part(u32 address) {
    T part;
    if (address % sizeof(T) || address - KVC_RESERVED + sizeof(T) > launched_shared) raise_out_of_range();
    note(READ, shared_memory + (address - KVC_RESERVED), sizeof(T), true);
    memcpy(&part, shared_memory + (address - KVC_RESERVED), sizeof(T));
    return part;
}
inline u32 load_shared_half(u32 address) { return read_shared_part<u16>(address); }
inline u32 load_shared_byte(u32 address) { return read_shared_part<u8>(address); }
inline void shift_in(u32& low, u32& high, u32& next, u32 due) {
    note(REFILL, shared_memory + (next - KVC_RESERVED), 4, due);
    if (due) low = high, high = read_shared(next), next += 4;
}
template <int STEP>
void add_from_below(u32& sum) {
    u32 before = __shfl_up_sync(~0u, sum, STEP);
    if (this_lane() >= STEP) sum += before;
}
inline float keep(float x) { return x; }
inline u32 keep(u32 x) { return x; }
template <class T>
const T* keep(const T* x) {
    return x;
}

// Copies are made when they are waited for, not before.
void start_copy(u32 to, const void* from);
template <int TO, int FROM>
void copy_async(u32 to, const void* from, i32 left) {
    note(COPY, shared_memory + (to - KVC_RESERVED + TO), 16, left > TO);
    if (left > TO) start_copy(to - KVC_RESERVED + TO, (const u8*)from + FROM);
}
void end_copies();
void await_groups(int later);
template <int LATER>
void await_copies() {
    await_groups(LATER);
}
