// What the kernels of encode.cu share: their arguments, and the pairs of codes in the order of the streams.
#pragma once
#include "page.cuh"

constexpr int CHANNELS = KVC_CHANNELS, VALUE = KVC_VALUE, WARPS = KVC_WARPS;
constexpr int K_UNIT = KVC_K_UNIT, V_UNIT = KVC_V_UNIT, K_CLASSES = KVC_K_CLASSES, V_CLASSES = KVC_V_CLASSES;
constexpr bool K_HUFFMAN = KVC_K_BITS > 0, V_HUFFMAN = KVC_V_BITS > 0;
constexpr bool K_PATCHED = KVC_K_PATCHED, V_PATCHED = KVC_V_PATCHED;
constexpr int STREAMS = 64, UNIT_BITS = CHANNELS <= 128 ? 4 : 8, PAIRS = CHANNELS / 2;
constexpr int MOST_UNITS = CHANNELS > TOKENS ? CHANNELS : TOKENS;  // sets of a scale and a zero in a block
constexpr int MAX_CODES = 256, MAX_LEVELS = 128, MAX_BASE = 127;
constexpr float MAX_ZERO = 32767.f, LARGEST_FLOAT16 = 65504.f;
constexpr int COUNTED = 64;  // codes a side whose pairs are counted in shared memory
typedef typename Value<VALUE>::Bits Bits;

// A codebook for encoding; all zero if there is none. Class c has its words from ``begin[c]`` on. The word of the
// symbol hi_a * symbols[c] + hi_b is ``length | code << 8``, the code as it goes into the stream.
struct Encoder {
    const u32* words;
    i32 begin[4], first[4], levels[4], split[4], symbols[4];
};

struct Tensor {
    const Bits* values;  // (heads, 64 x pages, CHANNELS), channels side by side
    i64 head, token;     // strides in values
    double relative_scale;
    const float* steps;  // (heads,) where the unit is ``head``
    u8* codes;           // (pages, heads, 64, CHANNELS)
    float* scale;        // (pages, heads, MOST_UNITS)
    i32* zero;           // as scale
    u8* raw;             // (pages, heads)
    float* token_range;  // (pages, 64, 2): extremes over all heads, where the unit is ``token``
    u32* counts;         // (classes, 256, 256)
    const Encoder* books;  // the default and the own
};

struct Arguments {
    Tensor tensors[2];  // K, V
    u8* modes;          // (pages, 2, heads)
    u32* sizes;         // (pages, 2, heads): bytes of the blocks, multiples of 16
    u16* lengths;       // (pages, 2, heads, 64): of the streams in units; of a patched block its pieces (choose.cuh)
    u64* offsets;       // (pages + 1): of the pages and of the end, from ``out``
    u64* cursor;        // where the first page goes, and afterwards where the next may; the host need not know
    u8* out;
    i32 pages, heads;
};

template <int KIND>
struct Of {
    static constexpr int UNIT = KIND == K ? K_UNIT : V_UNIT, CLASSES = KIND == K ? K_CLASSES : V_CLASSES;
    static constexpr bool HUFFMAN = KIND == K ? K_HUFFMAN : V_HUFFMAN, PATCHED = KIND == K ? K_PATCHED : V_PATCHED;
};

constexpr int THREADS = WARPS * LANES;

// Calls use(class, a, b) with the pairs of stream ``lane`` + 32 s, in order.
template <int KIND, class Use>
INLINE void each_pair(const u8* codes, int s, int lane, Use use) {
    constexpr int classes = Of<KIND>::CLASSES;
    int g = lane >> 2, j = lane & 3;
    if (KIND == K) {
        for (int t = 0; t < 4; t++) {
            const u8* from = codes + (8 * (t + 4 * s) + g) * CHANNELS + j * (CHANNELS / 4);
            for (int i = 0; i < CHANNELS / 8; i++) use(classes == 1 ? 0 : j, from[2 * i], from[2 * i + 1]);
        }
    } else {
        for (int i = 0; i < CHANNELS / 16; i++) {
            int tile = i + s * (CHANNELS / 16), its_class = classes == 1 ? 0 : class_of_tile<CHANNELS>(tile);
            const u8* from = codes + 2 * j * CHANNELS + 8 * tile + g;
            for (int u = 0; u < 8; u++) use(its_class, from[8 * u * CHANNELS], from[(8 * u + 1) * CHANNELS]);
        }
    }
}
