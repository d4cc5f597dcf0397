// Tensor-core operands: queries and weights as A, blocks of keys and values as B, scores and sums as C.
//
// A has sixteen rows and a KV head at most eight queries at a time, so rows 0 to 7 are the bfloat16 of each number and rows 8 to 15 what
// that rounding left: sums over both rows carry sixteen bits of significand. Codes are exact in bfloat16.
#pragma once
#include "page.cuh"

constexpr int QUERIES = 8;            // of one pass
constexpr u32 ONES = 0x3f803f80u;  // two bfloat16

// Two numbers for row g and what bfloat16 leaves of them, for row g + 8.
INLINE void split_rows(float first, float second, u32& high, u32& rest) {
    high = to_bfloat16s(first, second);
    rest = to_bfloat16s(first - low_bfloat16(high), second - high_bfloat16(high));
}

// What the tensor cores will see of two numbers.
INLINE float sum_of(u32 both) { return low_bfloat16(both) + high_bfloat16(both); }

// Rows g and g + 8 of C together: the products with what the query is.
INLINE float2 both_rows(const float (&c)[4]) { return make_float2(c[0] + c[2], c[1] + c[3]); }

// Sum and largest over the four lanes that share row g.
INLINE float sum_of_row(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

INLINE float peak_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Raw tokens read in the order of the streams (section 4), in pairs. ``tokens`` of them count; behind them lies anything, which is taken as 0.
// An operand is part 0 of a pair, rounded to bfloat16, or part 1, what that left; of bfloat16 itself nothing.
template <int VALUE>
struct RawPairs {
    typedef typename Value<VALUE>::Bits Bits;
    struct Pair {
        Bits a, b;
    };
    static constexpr int PARTS = VALUE == BFLOAT16 ? 1 : 2;
    static constexpr bool SHORT = false;
    const Bits* values;
    i64 step;  // values from a token to the next
    int tokens, lane;

    static INLINE u32 operand(Pair pair, int part) {
        if constexpr (VALUE == BFLOAT16) {
            return (u32)pair.a | (u32)pair.b << 16;
        } else {
            u32 high, rest;
            split_rows(Value<VALUE>::widen(pair.a), Value<VALUE>::widen(pair.b), high, rest);
            return part ? rest : high;
        }
    }

    INLINE Bits at(int token, int channel) const { return token < tokens ? values[token * step + channel] : 0; }

    // Keys of tokens 8 t + g and 8 (t + 4) + g: 2 N channels, ``from`` on, of quarter j.
    template <int N>
    INLINE void keys(int t, int from, int quarter, Pair (&low)[N], Pair (&high)[N]) const {
        int token = 8 * t + (lane >> 2);
#pragma unroll
        for (int i = 0; i < N; i++) {
            int channel = (lane & 3) * quarter + from + 2 * i, later = token + TOKENS / 2;
            low[i] = {at(token, channel), at(token, channel + 1)};
            high[i] = {at(later, channel), at(later, channel + 1)};
        }
    }

    // Values of channel 8 tile + g, and of the channel ``across`` further on, at the tokens of lane j.
    template <int N>
    INLINE void channels(int tile, int across, Pair (&low)[N], Pair (&high)[N]) const {
        int channel = 8 * tile + (lane >> 2);
#pragma unroll
        for (int i = 0; i < N; i++) {
            int token = 8 * i + 2 * (lane & 3);
            low[i] = {at(token, channel), at(token + 1, channel)};
            high[i] = {at(token, channel + across), at(token + 1, channel + across)};
        }
    }
};
