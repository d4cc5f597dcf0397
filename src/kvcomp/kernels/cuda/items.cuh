// What the attention kernel is built with and given, where it keeps what in shared memory, and what its warps take: 64 tokens at a time.
#pragma once
#include "fragments.cuh"
#include "pieces.cuh"

constexpr int CHANNELS = KVC_CHANNELS, VALUE = KVC_VALUE, QUERY_VALUE = KVC_QUERY, WARPS = KVC_WARPS;
constexpr int K_UNIT = KVC_K_UNIT, V_UNIT = KVC_V_UNIT, K_CLASSES = KVC_K_CLASSES, V_CLASSES = KVC_V_CLASSES;
constexpr int K_BITS = KVC_K_BITS, V_BITS = KVC_V_BITS;          // index bits of the tables, 0 where the coding is fixed
constexpr bool K_PATCHED = KVC_K_PATCHED, V_PATCHED = KVC_V_PATCHED;
constexpr int K_COPIES = KVC_K_COPIES, V_COPIES = KVC_V_COPIES;  // of the own book's table in shared memory, 0 for none
constexpr int K_STAGE = KVC_K_STAGE, V_STAGE = KVC_V_STAGE;      // bytes of a block that are copied to shared memory; a larger one is read where it is
constexpr u32 RESERVED = KVC_RESERVED;                           // where shared memory begins in its address space
constexpr bool SOFTCAP = KVC_SOFTCAP;
constexpr bool TURNED = KVC_TURNED;  // whether scores lack what means of K that turn add

constexpr int STEPS = CHANNELS / 16, KEY_PAIRS = CHANNELS / 8, VALUE_TILES = CHANNELS / 16, VALUE_PAIRS = TOKENS / 8;
// The parts in which a tile of many channels is taken: the fewest of whole steps that registers hold.
constexpr int key_parts(int parts = 1) {
    int most = KEY_PAIRS > 24 ? 8 : KEY_PAIRS > 16 ? 12 : 16;
    return STEPS % parts == 0 && KEY_PAIRS / parts <= most ? parts : key_parts(parts + 1);
}
constexpr int KEY_PARTS = key_parts(), TAKEN_PAIRS = KEY_PAIRS / KEY_PARTS;
constexpr bool ROOMY = CHANNELS <= 192;  // whether registers are left to look up the next page while one is decoded, and for two tiles to a turn
constexpr float SLACK = 8.f;
constexpr float LOWEST = -1e30f;  // what no score reaches; finite, so that differences are numbers
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr int MOST_PAIR_BITS = 18, SHARED_PAIR_BITS = 14;

struct RawTensor {
    const void* values;
    i64 row, head, token;  // strides in values
};

struct Arguments {
    const void* q;        // (rows, heads, queries, CHANNELS), queries = group x new tokens, the new tokens innermost
    void* out;            // as q
    float* lse;           // (rows, heads, queries), the natural log of the softmax denominators
    float* partial_out;   // (splits, rows, heads, queries, CHANNELS); used if there are several splits
    float* partial_peak;  // (splits, rows, heads, queries)
    float* partial_total;
    const u64* pages;     // (rows, capacity): addresses
    const i32* valid;     // (rows, capacity): how many of their tokens count
    const i32* count;     // (rows,)
    const Book* books;    // (rows, 4): of K the default and the own, of V the same
    const float* k_steps;  // (heads,) where the unit is ``head``
    const float* v_steps;
    RawTensor sinks_k, sinks_v, tail_k, tail_v;
    const i32* sink_count;  // (rows,)
    const i32* tail_begin;  // (rows,): the first token of the tail that a row sees
    const i32* tail_tokens;  // one number: the tokens in the tail, new ones included
    const float* turned;     // (rows, heads, queries, slots, 64): what scores lack; slots are pages, then from ``capacity`` on raw chunks
    i32 rows, heads, queries, new_tokens, capacity, slots;
    float scaling, softcap;
    u32 ones;  // BFLOAT16_128
};

// Shared memory, in bytes from its start.
constexpr int table_bytes(int classes, int bits, int copies) { return copies ? classes * (4 * copies << bits) : 0; }
constexpr int scale_stage(int unit) { return unit == TOKEN ? TOKEN_SCALE_BYTES : 0; }
constexpr bool BY_TOKEN = V_UNIT == TOKEN || V_UNIT == VECTOR;
constexpr int QUERIES_AT = 0;
constexpr int BOOKS_AT = QUERIES_AT + 4 * QUERIES * CHANNELS;
constexpr int CONSTANTS_AT = BOOKS_AT + 4 * sizeof(Book);  // BFLOAT16_128, and the modes of the blocks whose tables follow
constexpr int PEAKS_AT = CONSTANTS_AT + 16;
constexpr int TOTALS_AT = PEAKS_AT + 4 * WARPS * QUERIES;
constexpr int K_TABLE_AT = TOTALS_AT + 4 * WARPS * QUERIES;
constexpr int V_TABLE_AT = K_TABLE_AT + table_bytes(K_CLASSES, K_BITS, K_COPIES);
constexpr int WARPS_AT = (V_TABLE_AT + table_bytes(V_CLASSES, V_BITS, V_COPIES) + 15) & ~15;
constexpr int K_STAGED = 0;  // token scales, then the block
constexpr int V_STAGED = K_STAGED + scale_stage(K_UNIT) + K_STAGE;
constexpr int FACTORS = V_STAGED + scale_stage(V_UNIT) + V_STAGE;  // of V, where they differ from token to token
constexpr int SUMS = FACTORS + (BY_TOKEN ? TOKENS * 8 : 0);     // [tile of 8 channels][lane] pairs of floats
constexpr int OFFSETS = SUMS + CHANNELS / 8 * LANES * 8;        // of the exceptions of two pieces
constexpr int WARP_BYTES = OFFSETS + (K_PATCHED || V_PATCHED ? 2 * OFFSET_BYTES : 0);
constexpr int SHARED_BYTES = WARPS_AT + WARPS * WARP_BYTES;
static_assert(SHARED_BYTES == KVC_SHARED, "the host must reserve as much");
constexpr bool holds_stream(int stage) { return stage % 16 == 0 && stage >= CHANNELS * 9 / 8 + 16; }
static_assert(holds_stream(K_STAGE) && holds_stream(V_STAGE), "a stream of foreign bytes may be read so far over its block");

// What a warp does next: 64 tokens of a page, or of the raw tokens beside the pages.
struct Item {
    const u8* page;
    u32 k, v;                // directory words of the blocks
    i32 k_staged, v_staged;  // bytes of a block that is copied to shared memory, else 0
    i32 tokens;              // of the page that count
    i32 chunk;               // of the raw tokens: 64 each, those of the sinks first; IN_PAGE, or NONE
};

constexpr i32 IN_PAGE = -1, NONE = -2;

// Raw tokens of one chunk. begin: number of the first in the tail; far below for the sinks, which all queries see whole.
struct RawChunk {
    i32 begin, tokens;
    bool in_tail;

    INLINE RawChunk(const Arguments& a, int row, int chunk) {
        int sinks = a.sink_count[row], sink_chunks = (sinks + TOKENS - 1) / TOKENS;
        in_tail = chunk >= sink_chunks;
        begin = in_tail ? a.tail_begin[row] + (chunk - sink_chunks) * TOKENS : chunk * TOKENS;
        tokens = min(TOKENS, (in_tail ? *a.tail_tokens : sinks) - begin);
    }

    INLINE RawPairs<VALUE> of(const RawTensor& sinks, const RawTensor& tail, int row, int head, int lane) const {
        typedef const typename RawPairs<VALUE>::Bits* Values;
        const RawTensor& x = in_tail ? tail : sinks;
        return {reinterpret_cast<Values>(x.values) + row * x.row + head * x.head + begin * x.token, x.token, tokens, lane};
    }
};

INLINE int raw_chunks(const Arguments& a, int row) {
    int tail = max(0, *a.tail_tokens - a.tail_begin[row]);
    return (a.sink_count[row] + TOKENS - 1) / TOKENS + (tail + TOKENS - 1) / TOKENS;
}

INLINE const u8* block_of(const Item& item, int kind) { return item.page + ((kind == K ? item.k : item.v) & ~15u); }
INLINE u32 mode_of(const Item& item, int kind) { return (kind == K ? item.k : item.v) & 15; }

INLINE i32 staged_bytes(u32 word, u32 end, u32 most) {
    u32 bytes = (end & ~15u) - (word & ~15u);
    return (word & 15) != RAW && bytes <= most ? (i32)bytes : 0;
}

INLINE void describe_page(Item& item, const Arguments& a, int head, u64 address, i32 tokens) {
    const u32 *of_k = reinterpret_cast<const u32*>(address) + head, *of_v = of_k + a.heads;
    item.page = reinterpret_cast<const u8*>(address);
    item.k = of_k[0], item.k_staged = staged_bytes(item.k, of_k[1], K_STAGE);
    item.v = of_v[0], item.v_staged = staged_bytes(item.v, of_v[1], V_STAGE);
    item.tokens = tokens;
    item.chunk = IN_PAGE;
}

// Copy what a lane does of a block, 16 bytes of every 512, from AT on up to END. An instruction reaches 2048 bytes either way, so ``from``
// points so far ahead.
constexpr int AHEAD = 2048;

template <int AT, int END>
INLINE void copy_lane(u32 to, const u8* from, i32 left) {
    if constexpr (AT < END) {
        copy_async<AT, AT - AHEAD>(to, from, left);
        copy_lane<AT + 16 * LANES, END>(to, from, left);
    }
}

template <int FROM, int END>
INLINE void copy_more(u32 to, const u8* from, i32 left) {
    if constexpr (FROM < END) {
        if (left > FROM) copy_lane<0, END - FROM < 2 * AHEAD ? END - FROM : 2 * AHEAD>(to + FROM, from + FROM, left - FROM);
        copy_more<FROM + 2 * AHEAD, END>(to, from, left);
    }
}

// Start copying a block, and its token scales, to an address in shared memory.
template <int KIND>
INLINE void stage(const Item& item, const Arguments& a, u32 to, int lane) {
    constexpr int unit = KIND == K ? K_UNIT : V_UNIT, most = KIND == K ? K_STAGE : V_STAGE;
    if (item.chunk == IN_PAGE) {
        int mine = 16 * lane;
        const u8* page = item.page + mine;
        if (unit == TOKEN && mine < TOKEN_SCALE_BYTES) copy_async<0, 0>(to + mine, page + token_scales_at(a.heads, KIND, K_UNIT), 16);
        to += mine + scale_stage(unit), page += AHEAD + ((KIND == K ? item.k : item.v) & ~15u);
        i32 left = (KIND == K ? item.k_staged : item.v_staged) - mine;
        copy_lane<0, most < 2 * AHEAD ? most : 2 * AHEAD>(to, page, left);
        copy_more<2 * AHEAD, most>(to, page, left);
    }
    end_copies();
}
