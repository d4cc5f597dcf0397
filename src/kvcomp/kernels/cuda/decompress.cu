// Pages to tiles of values, (heads, 64 x pages, CHANNELS) in the dtype: (code + zero) * scale in float32, rounded once.
//
// A warp takes a block: lane (g, j) decodes its two streams, and the values go through shared memory so that they are written in rows.
#include "fragments.cuh"
#include "pieces.cuh"

constexpr int CHANNELS = KVC_CHANNELS, VALUE = KVC_VALUE, WARPS = KVC_WARPS;
constexpr int K_UNIT = KVC_K_UNIT, V_UNIT = KVC_V_UNIT, K_CLASSES = KVC_K_CLASSES, V_CLASSES = KVC_V_CLASSES;
constexpr int K_BITS = KVC_K_BITS, V_BITS = KVC_V_BITS;
constexpr bool K_PATCHED = KVC_K_PATCHED, V_PATCHED = KVC_V_PATCHED;
constexpr int KEY_PAIRS = CHANNELS / 8, VALUE_PAIRS = TOKENS / 8, VALUE_TILES = CHANNELS / 16;
constexpr int PAIR_BITS = 18;
typedef typename Value<VALUE>::Bits Bits;

struct Arguments {
    const u64* pages;  // addresses
    const Book* books;  // of K the default and the own, of V the same
    const float *k_steps, *v_steps;  // (heads,) where the unit is ``head``
    void *out_k, *out_v;
    i64 k_head, k_token, v_head, v_token;  // strides in values; channels lie side by side
    i32 page_count, heads;
    u32 ones;
};

// Code and zero of a value, and its scale.
template <int UNIT>
struct Scales {
    const u8* at;
    float scale;
    i32 zero;

    INLINE void begin(const u8* page, const u8* block, int heads, int kind, const float* steps, int head, i32 fixed_zero) {
        at = UNIT == TOKEN ? page + token_scales_at(heads, kind, K_UNIT) : block;
        if (UNIT == BLOCK) scale = __uint_as_float(load_word(block)), zero = (i32)load_word(block + 4);
        if (UNIT == HEAD) scale = steps[head], zero = fixed_zero;
    }
    INLINE float value(i32 code, int token, int channel) const {
        float its_scale = scale;
        i32 its_zero = zero;
        if (UNIT == TOKEN || UNIT == VECTOR || UNIT == CHANNEL) {
            int count = UNIT == CHANNEL ? CHANNELS : TOKENS, index = UNIT == CHANNEL ? channel : token;
            its_scale = __uint_as_float((u32) reinterpret_cast<const u16*>(at)[index] << 16);
            its_zero = reinterpret_cast<const i16*>(at)[count + index];
        }
        return (float)(code + its_zero) * its_scale;
    }
};

// Decode a block of pieces to ``codes``, (64 tokens, CHANNELS) bytes: 128 more than each code.
template <int KIND>
INLINE void decode_pieces(const u8* block, int lane, u8* codes) {
    Pieces<PlainWords> pieces;
    pieces.begin<CHANNELS>(PlainWords{block}, lane);
#pragma unroll 1
    for (int n = 0; n < CHANNELS / 8; n++) {
        Piece piece = pieces.piece(n);
        auto code = [&](int position, int of_lane) -> u8& {
            int its_g = of_lane >> 2, its_j = of_lane & 3, s = n / VALUE_TILES, u = position >> 2, e = position & 3;
            if (KIND == K) return codes[(8 * (u + 4 * s) + its_g) * CHANNELS + 16 * (n % VALUE_TILES) + 4 * its_j + e];
            return codes[(16 * u + 2 * its_j + (e & 1) + 8 * (e >> 1)) * CHANNELS + 8 * n + its_g];
        };
        u32 pairs[PIECE_PAIRS] = {};
        if (piece.width) take_fields_of<1, 2, 3, 4, 5, 6, 7, 8>(piece.width, pieces.words, 0, lane, pairs);
        pieces.words = pieces.words + 2 * LANES * piece.width;
        int frame = (int)piece.bias + (piece.width ? 256 : 128);  // 128 more
#pragma unroll
        for (int i = 0; i < PIECE_PAIRS; i++) {
            code(2 * i, lane) = (u8)((pairs[i] & 0xffff) + frame);
            code(2 * i + 1, lane) = (u8)((pairs[i] >> 16) + frame);
        }
        __syncwarp();
        for (int i = lane; i < piece.exceptions; i += LANES) {
            u32 exception = pieces.exceptions.half(2 * (i - lane));
            code(exception >> 5 & 15, exception & 31) += (exception >> 9) - 64;
        }
        pieces.exceptions = pieces.exceptions + 2 * piece.exceptions;
        __syncwarp();
    }
}

// Decode a block of codes to ``codes`` in shared memory, (64 tokens, CHANNELS) bytes less what its class's codes begin at.
template <int KIND>
INLINE void decode(u32 mode, const u8* block, const Book& book, u32 ones, int lane, u8* codes) {
    constexpr int bits = KIND == K ? K_BITS : V_BITS, classes = KIND == K ? K_CLASSES : V_CLASSES;
    constexpr int head = scale_bytes(KIND == K ? K_UNIT : V_UNIT, CHANNELS);
    int g = lane >> 2, j = lane & 3;
    // The pairs are 128 + code in bfloat16 as far as a byte goes: the code is the low byte.
    auto keys = [&](auto& reader) {
#pragma unroll 1
        for (int t = 0; t < 4; t++) {
            u32 low[KEY_PAIRS], high[KEY_PAIRS];
            reader.take(0, low, high);
            u8 *first = codes + (8 * t + g) * CHANNELS + j * (CHANNELS / 4), *second = first + TOKENS / 2 * CHANNELS;
#pragma unroll
            for (int i = 0; i < KEY_PAIRS; i++) {
                *reinterpret_cast<u16*>(first + 2 * i) = (u16)((low[i] & 255) | (low[i] >> 8 & 0xff00));
                *reinterpret_cast<u16*>(second + 2 * i) = (u16)((high[i] & 255) | (high[i] >> 8 & 0xff00));
            }
        }
    };
    auto values = [&](auto& reader) {
#pragma unroll 1
        for (int tile = 0; tile < VALUE_TILES; tile++) {
            if (V_CLASSES > 1) reader.classes(book, class_of_tile<CHANNELS>(tile), class_of_tile<CHANNELS>(tile + VALUE_TILES), lane);
            u32 low[VALUE_PAIRS], high[VALUE_PAIRS];
            reader.take(0, low, high);
            u8 *first = codes + 2 * j * CHANNELS + 8 * tile + g, *second = first + CHANNELS / 2;
#pragma unroll
            for (int i = 0; i < VALUE_PAIRS; i++) {
                int token = 8 * i;
                first[token * CHANNELS] = (u8)low[i], first[(token + 1) * CHANNELS] = (u8)(low[i] >> 16);
                second[token * CHANNELS] = (u8)high[i], second[(token + 1) * CHANNELS] = (u8)(high[i] >> 16);
            }
        }
    };
    auto read = [&](auto& reader) {
        reader.ones = ones;
        if constexpr (KIND == K)
            keys(reader);
        else
            values(reader);
    };
    if (mode >= FIXED) {
        AnyWidthPairs reader = {};
        reader.width = mode - FIXED ? mode - FIXED : 8;
        reader.begin(PlainWords{block + head}, lane, (CHANNELS * reader.width + 31) / 32);
        read(reader);
    } else if constexpr (bits > 0) {
        HuffmanPairs<PlainWords, PlainTable<bits>, PAIR_BITS, true, true> reader = {};
        u32 first, second, streams = 8 * stream_starts<KIND, CHANNELS>(PlainWords{block + head}, lane, first, second) + 8 * head;
        int quarter = KIND == K && classes > 1 ? j : 0;
        reader.classes(book, quarter, quarter, lane);
        reader.begin(PlainWords{block}, streams + first, streams + second);
        read(reader);
    }
}

template <int KIND>
INLINE void decompress_block(const Arguments& a, int page_index, int head, int lane, u8* codes) {
    constexpr int classes = KIND == K ? K_CLASSES : V_CLASSES;
    const u8* page = reinterpret_cast<const u8*>(a.pages[page_index]);
    u32 word = load_word(page + 4 * ((KIND == K ? 0 : a.heads) + head)), mode = word & 15;
    const u8* block = page + (word & ~15u);
    Bits* out = reinterpret_cast<Bits*>(KIND == K ? a.out_k : a.out_v) + head * (KIND == K ? a.k_head : a.v_head);
    i64 step = KIND == K ? a.k_token : a.v_token;
    out += (i64)page_index * TOKENS * step;
    if (mode == RAW) {
        const Bits* from = reinterpret_cast<const Bits*>(block);
        for (int i = lane; i < TOKENS * CHANNELS; i += LANES) out[i / CHANNELS * step + i % CHANNELS] = from[i];
        return;
    }
    const Book& book = a.books[2 * KIND + (mode == OWN_BOOK)];
    __syncwarp();  // all have written the block before
    if ((KIND == K ? K_PATCHED : V_PATCHED) && mode == PATCHED)
        decode_pieces<KIND>(block + scale_bytes(KIND == K ? K_UNIT : V_UNIT, CHANNELS), lane, codes);
    else
        decode<KIND>(mode, block, book, a.ones, lane, codes);
    __syncwarp();
    Scales<KIND == K ? K_UNIT : V_UNIT> scales;
    i32 fixed_zero = mode == PATCHED ? 0 : mode < FIXED ? -128 : -(1 << (mode - FIXED ? mode - FIXED - 1 : 7));
    scales.begin(page, block, a.heads, KIND, KIND == K ? a.k_steps : a.v_steps, head, fixed_zero);
    for (int i = lane; i < TOKENS * CHANNELS; i += LANES) {
        int token = i / CHANNELS, channel = i % CHANNELS;
        int its_class = classes == 1 ? 0 : KIND == K ? channel / (CHANNELS / 4) : class_of_tile<CHANNELS>(channel / 8);
        i32 first = mode == PATCHED ? -128 : mode < FIXED ? book.first[its_class] : 0;
        out[token * step + channel] = Value<VALUE>::narrow(scales.value(codes[i] + first, token, channel));
    }
}

// One warp a block. Dynamic shared memory: WARPS x 64 x CHANNELS bytes.
KERNEL void __launch_bounds__(WARPS * LANES) decompress(const __grid_constant__ Arguments a) {
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    u8* codes = shared_memory + warp * TOKENS * CHANNELS;
    int blocks = a.page_count * a.heads * 2;
    for (int i = blockIdx.x * WARPS + warp; i < blocks; i += gridDim.x * WARPS) {
        int page = i / (2 * a.heads), head = i / 2 % a.heads;
        if (i % 2 == K)
            decompress_block<K>(a, page, head, lane, codes);
        else
            decompress_block<V>(a, page, head, lane, codes);
    }
}
