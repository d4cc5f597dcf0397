// Pages and blocks as docs/format.md lays them out (sections 2 to 4).
#pragma once
#include <machine.cuh>  // in angle brackets, as the emulator has its own

constexpr int TOKENS = 64;  // of a page
constexpr int LANES = 32;
constexpr u32 RAW = 0, DEFAULT_BOOK = 1, OWN_BOOK = 2, PATCHED = 4, FIXED = 8;  // modes of a block
constexpr int BLOCK = 0, CHANNEL = 1, VECTOR = 2, TOKEN = 3, HEAD = 4;     // units
constexpr int FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2;                     // dtypes
constexpr int K = 0, V = 1;
constexpr int TOKEN_SCALE_BYTES = 4 * TOKENS;

// A codebook as the kernels see it; all zero if there is none. By class: the code that its symbols begin at, and the low bits k.
struct Book {
    const u32* table;  // [classes][1 << index bits] of ``length | hi_a << k << 16 | hi_b << k << 24``
    i32 first[4];
    i32 split[4];
    i32 bits;    // the longest of a pair, low bits included
    i32 levels;  // of the class with the most
};

template <int VALUE>
struct Value;

template <>
struct Value<FLOAT32> {
    typedef u32 Bits;
    static INLINE float widen(u32 bits) { return __uint_as_float(bits); }
    static INLINE u32 narrow(float x) { return __float_as_uint(x); }
};

template <>
struct Value<FLOAT16> {
    typedef u16 Bits;
    static INLINE float widen(u16 bits) { return from_float16(bits); }
    static INLINE u16 narrow(float x) { return to_float16(x); }
};

template <>
struct Value<BFLOAT16> {
    typedef u16 Bits;
    static INLINE float widen(u16 bits) { return __uint_as_float((u32)bits << 16); }
    static INLINE u16 narrow(float x) { return (u16)to_bfloat16s(x, 0.f); }
};

constexpr int directory_bytes(int heads) { return (4 * (2 * heads + 1) + 15) & ~15; }

// Where the token scales of K or V begin in a page, if their unit is ``token``.
INLINE u32 token_scales_at(int heads, int kind, int k_unit) {
    return ((4 * (2 * heads + 1) + 15) & ~15) + (kind == V && k_unit == TOKEN ? TOKEN_SCALE_BYTES : 0);
}

// Class of a pair: by the quarter of the channels, of K the lane's, of V the tile's.
template <int CHANNELS>
INLINE int class_of_tile(int tile) { return 4 * tile / (CHANNELS / 8); }

// Widths, frames and numbers of exceptions of a patched block's pieces.
constexpr int piece_heads(int channels) { return (3 * (channels / 8) + 3) & ~3; }

// Bytes of the scales at the head of a block that is not raw.
constexpr int scale_bytes(int unit, int channels) {
    return unit == BLOCK ? 8 : unit == CHANNEL ? 4 * channels : unit == VECTOR ? 4 * TOKENS : 0;
}

INLINE u32 load_word(const u8* at) { return *reinterpret_cast<const u32*>(at); }
INLINE float low_bfloat16(u32 both) { return __uint_as_float(both << 16); }
INLINE float high_bfloat16(u32 both) { return __uint_as_float(both & 0xffff0000u); }
INLINE float low_i16(u32 both) { return (float)(i16)(both & 0xffff); }
INLINE float high_i16(u32 both) { return (float)((i32)both >> 16); }
