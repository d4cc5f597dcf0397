// softmax(cap(scaling q.K)) V over compressed pages, raw first tokens and a raw tail, in one launch (KVComp, arXiv 2509.00579, "Fetch").
//
// A warp takes one page at a time for one KV head and at most eight queries: it decodes the block of K tile by tile into tensor-core
// operands, takes the softmax online (Milakov & Gimelshein, 2018), and decodes the block of V into the sums. While one block is decoded the
// next is copied to shared memory. The warps of a CTA share a sequence's decode tables; CTAs split the context, and ``merge`` joins them.
//
// Scales are folded into the queries or the scores (K) and into the weights (V), zeros into one number for each query, so that the
// products run on 128 + code. Sums lie in shared memory, where they are scaled down in passing when a higher score turns up.
#include "fragments.cuh"
#include "streams.cuh"

constexpr int CHANNELS = KVC_CHANNELS, VALUE = KVC_VALUE, QUERY_VALUE = KVC_QUERY, WARPS = KVC_WARPS;
constexpr int K_UNIT = KVC_K_UNIT, V_UNIT = KVC_V_UNIT, K_CLASSES = KVC_K_CLASSES, V_CLASSES = KVC_V_CLASSES;
constexpr int K_BITS = KVC_K_BITS, V_BITS = KVC_V_BITS;          // index bits of the tables, 0 where the coding is fixed
constexpr int K_COPIES = KVC_K_COPIES, V_COPIES = KVC_V_COPIES;  // of the own book's table in shared memory, 0 for none
constexpr int STAGE = KVC_STAGE;                                 // bytes of a block that are copied to shared memory; a larger one is read where it is
constexpr bool SOFTCAP = KVC_SOFTCAP;

constexpr int STEPS = CHANNELS / 16, KEY_PAIRS = CHANNELS / 8, VALUE_TILES = CHANNELS / 16, VALUE_PAIRS = TOKENS / 8;
constexpr int KEY_PARTS = KEY_PAIRS > 24 ? 4 : KEY_PAIRS > 16 ? 2 : 1, TAKEN_PAIRS = KEY_PAIRS / KEY_PARTS;  // a tile of many channels is taken in parts
constexpr bool EARLY = CHANNELS <= 192;  // whether registers are left to look up the next page while one is decoded
constexpr float LOWEST = -1e30f;  // what no score reaches; finite, so that differences are numbers
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr int MOST_PAIR_BITS = 18, SHARED_PAIR_BITS = 15;

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
    i32 rows, heads, queries, new_tokens, capacity;
    float scaling, softcap;
    u32 ones;  // BFLOAT16_128
};

// Shared memory, in bytes from its start.
constexpr int table_bytes(int classes, int bits, int copies) { return copies ? classes * (4 * copies << bits) : 0; }
constexpr int scale_stage(int unit) { return unit == TOKEN ? TOKEN_SCALE_BYTES : 0; }
constexpr int QUERIES_AT = 0;
constexpr int BOOKS_AT = QUERIES_AT + 4 * QUERIES * CHANNELS;
constexpr int PEAKS_AT = BOOKS_AT + 4 * sizeof(Book);
constexpr int TOTALS_AT = PEAKS_AT + 4 * WARPS * QUERIES;
constexpr int K_TABLE_AT = TOTALS_AT + 4 * WARPS * QUERIES;
constexpr int V_TABLE_AT = K_TABLE_AT + table_bytes(K_CLASSES, K_BITS, K_COPIES);
constexpr int WARPS_AT = (V_TABLE_AT + table_bytes(V_CLASSES, V_BITS, V_COPIES) + 15) & ~15;
constexpr int K_STAGE = 0;  // token scales, then the block
constexpr int V_STAGE = K_STAGE + scale_stage(K_UNIT) + STAGE;
constexpr int SUMS = V_STAGE + scale_stage(V_UNIT) + STAGE;  // [tile of 8 channels][lane] pairs of floats
constexpr int WARP_BYTES = SUMS + CHANNELS / 8 * LANES * 8;
constexpr int SHARED_BYTES = WARPS_AT + WARPS * WARP_BYTES;
static_assert(SHARED_BYTES == KVC_SHARED, "the host must reserve as much");
static_assert(STAGE % 16 == 0 && STAGE >= CHANNELS * 9 / 8 + 16, "a stream of foreign bytes may be read so far over its block");

// What a warp does next: 64 tokens of a page, or of the raw tokens beside the pages.
struct Item {
    const u8* page;              // null: raw
    u32 k, k_end, v, v_end;      // directory words of the blocks and of what follows them
    const void *raw_k, *raw_v;   // first token, where page is null
    i32 tokens;                  // that any query sees
    i32 begin;                   // number of the first token in the tail; far below for what all queries see whole
};

constexpr int SEEN_BY_ALL = -(1 << 30);

INLINE const u8* block_of(const Item& item, int kind) { return item.page + ((kind == K ? item.k : item.v) & ~15u); }
INLINE u32 block_bytes(const Item& item, int kind) {
    return kind == K ? (item.k_end & ~15u) - (item.k & ~15u) : (item.v_end & ~15u) - (item.v & ~15u);
}
INLINE u32 mode_of(const Item& item, int kind) { return (kind == K ? item.k : item.v) & 15; }
INLINE bool is_staged(const Item& item, int kind) {
    return item.page && mode_of(item, kind) != RAW && block_bytes(item, kind) <= STAGE;
}

INLINE void describe_page(Item& item, const Arguments& a, int head, u64 address, i32 tokens) {
    const u32* directory = reinterpret_cast<const u32*>(address);
    item.page = reinterpret_cast<const u8*>(address);
    item.k = directory[head], item.k_end = directory[head + 1];
    item.v = directory[a.heads + head], item.v_end = directory[a.heads + head + 1];
    item.tokens = tokens;
    item.begin = SEEN_BY_ALL;
}

INLINE const void* raw_tokens(const RawTensor& x, int row, int head, int token) {
    typedef typename Value<VALUE>::Bits Bits;
    return reinterpret_cast<const Bits*>(x.values) + row * x.row + head * x.head + token * x.token;
}

// Number ``chunk`` of the 64-token parts of the sinks, then of the tail.
INLINE void describe_raw(Item& item, const Arguments& a, int row, int head, int chunk) {
    int sinks = a.sink_count[row], sink_chunks = (sinks + TOKENS - 1) / TOKENS;
    bool in_tail = chunk >= sink_chunks;
    int begin = in_tail ? a.tail_begin[row] + (chunk - sink_chunks) * TOKENS : chunk * TOKENS;
    item.page = nullptr;
    item.raw_k = raw_tokens(in_tail ? a.tail_k : a.sinks_k, row, head, begin);
    item.raw_v = raw_tokens(in_tail ? a.tail_v : a.sinks_v, row, head, begin);
    item.tokens = min(TOKENS, (in_tail ? *a.tail_tokens : sinks) - begin);
    item.begin = in_tail ? begin : SEEN_BY_ALL;
}

INLINE int raw_chunks(const Arguments& a, int row) {
    int tail = max(0, *a.tail_tokens - a.tail_begin[row]);
    return (a.sink_count[row] + TOKENS - 1) / TOKENS + (tail + TOKENS - 1) / TOKENS;
}

// Start copying a block, and its token scales, to shared memory.
template <int KIND>
INLINE void stage(const Item& item, const Arguments& a, u32 to, int lane) {
    constexpr int unit = KIND == K ? K_UNIT : V_UNIT;
    if (item.page && mode_of(item, KIND) != RAW) {
        if (unit == TOKEN && lane < TOKEN_SCALE_BYTES / 16)
            copy_async(to + 16 * lane, item.page + token_scales_at(a.heads, KIND, K_UNIT) + 16 * lane);
        if (is_staged(item, KIND)) {
            const u8* block = block_of(item, KIND);
            for (u32 i = 16 * lane; i < block_bytes(item, KIND); i += 16 * LANES) copy_async(to + scale_stage(unit) + i, block + i);
        }
    }
    end_copies();
}

// Scale and zero of two tokens, 8 tile + 2 j and the next.
template <int UNIT>
struct TokenScales {
    const u8* at;
    float scale, zero;

    // block: a coded block; shared: the token scales' place in shared memory; zero: of the unit ``head``.
    INLINE void begin(const u8* block, u32 shared, const float* steps, int head, float fixed_zero) {
        at = UNIT == TOKEN ? shared_memory + shared : block;
        if (UNIT == BLOCK) scale = __uint_as_float(load_word(block)), zero = (float)(i32)load_word(block + 4);
        if (UNIT == HEAD) scale = steps[head], zero = fixed_zero;
    }
    INLINE void of(int tile, int j, float2& scales, float2& zeros) const {
        if (UNIT == TOKEN || UNIT == VECTOR) {
            u32 both = load_word(at + 2 * (8 * tile + 2 * j)), shifts = load_word(at + 2 * TOKENS + 2 * (8 * tile + 2 * j));
            scales = make_float2(low_bfloat16(both), high_bfloat16(both));
            zeros = make_float2((float)(i16)(shifts & 0xffff), (float)((i32)shifts >> 16));
        } else {
            scales = make_float2(scale, scale);
            zeros = make_float2(zero, zero);
        }
    }
};

// The queries of a warp as A, times what is common to a channel of K, and the sums that zeros are folded into.
struct Queries {
    u32 a[STEPS][4];
    float quarter;  // sum of row g over the channels of quarter j
    float shift;    // sum of row g times the channels' zeros, over the same, where K has a scale for each channel

    // scales: of the channels, as a block of K stores them, or null for 1.
    INLINE void begin(const u8* scales, int lane) {
        int g = lane >> 2, quarter_at = (lane & 3) * (CHANNELS / 4);
        const float* q = reinterpret_cast<const float*>(shared_memory + QUERIES_AT) + g * CHANNELS + quarter_at;
        quarter = shift = 0.f;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int channel = 4 * step + 2 * half;
                float2 two = *reinterpret_cast<const float2*>(q + channel);
                u32 zeros = 0;
                if (scales) {
                    u32 both = load_word(scales + 2 * (quarter_at + channel));
                    zeros = load_word(scales + 2 * (CHANNELS + quarter_at + channel));
                    two.x *= low_bfloat16(both), two.y *= high_bfloat16(both);
                }
                u32 &high = a[step][2 * half], &rest = a[step][2 * half + 1];
                split_rows(two.x, two.y, high, rest);
                float x = low_bfloat16(high) + low_bfloat16(rest), y = high_bfloat16(high) + high_bfloat16(rest);
                quarter += x + y;
                if (scales) shift += x * (float)(i16)(zeros & 0xffff) + y * (float)((i32)zeros >> 16);
            }
        }
    }
};

// score[e][0], [1]: row g at tokens 8 e + 2 j and the next; [2], [3]: 32 tokens later.
typedef float Scores[4][4];

// q.K of a block, tile by tile: tile(t, part, low, high) gives its pairs.
template <class Pairs, class Tile>
INLINE void multiply_keys(Tile tile, const Queries& queries, Scores& score) {
#pragma unroll 1
    for (int t = 0; t < 4; t++) {
        float c[2][4] = {};
#pragma unroll
        for (int part_of_tile = 0; part_of_tile < KEY_PARTS; part_of_tile++) {
            typename Pairs::Pair low[TAKEN_PAIRS], high[TAKEN_PAIRS];
            tile(t, part_of_tile, low, high);
#pragma unroll
            for (int i = 0; i < TAKEN_PAIRS; i += 2) {
#pragma unroll
                for (int part = 0; part < Pairs::PARTS; part++) {
                    const u32(&q)[4] = queries.a[(part_of_tile * TAKEN_PAIRS + i) / 2];
                    multiply_add(c[0], q, Pairs::operand(low[i], part), Pairs::operand(low[i + 1], part));
                    multiply_add(c[1], q, Pairs::operand(high[i], part), Pairs::operand(high[i + 1], part));
                }
            }
        }
        // A queue, as registers cannot be numbered by t.
#pragma unroll
        for (int e = 0; e < 3; e++)
#pragma unroll
            for (int i = 0; i < 4; i++) score[e][i] = score[e + 1][i];
        float2 first = both_rows(c[0]), second = both_rows(c[1]);
        score[3][0] = first.x, score[3][1] = first.y, score[3][2] = second.x, score[3][3] = second.y;
    }
}

// weights.V of a block, tile by tile: tile(i, low, high) gives the pairs of the tiles i and i + VALUE_TILES, add(tile, c) takes the products.
template <class Pairs, class Tile, class Add>
INLINE void multiply_values(Tile tile, const u32 (&weights)[4][4], Add add) {
#pragma unroll 1
    for (int i = 0; i < VALUE_TILES; i++) {
        typename Pairs::Pair low[VALUE_PAIRS], high[VALUE_PAIRS];
        tile(i, low, high);
        float c[2][4] = {};
#pragma unroll
        for (int u = 0; u < 4; u++) {
#pragma unroll
            for (int part = 0; part < Pairs::PARTS; part++) {
                multiply_add(c[0], weights[u], Pairs::operand(low[2 * u], part), Pairs::operand(low[2 * u + 1], part));
                multiply_add(c[1], weights[u], Pairs::operand(high[2 * u], part), Pairs::operand(high[2 * u + 1], part));
            }
        }
        add(i, both_rows(c[0]));
        add(i + VALUE_TILES, both_rows(c[1]));
    }
}

// Gives use(pairs, PARTS) the reader of a coded block that fits it best; ``codes`` is where its lengths or codes begin, from ``block`` on.
// staged: where the block lies in shared memory, if it does. Every reader has ``take`` and ``classes``.
template <int KIND, class Use>
INLINE void read_codes(u32 mode, const u8* block, bool is_staged, u32 staged, const Book& book, u32 ones, int lane, Use use) {
    constexpr int bits = KIND == K ? K_BITS : V_BITS, copies = KIND == K ? K_COPIES : V_COPIES;
    constexpr int classes = KIND == K ? K_CLASSES : V_CLASSES;
    constexpr int head = scale_bytes(KIND == K ? K_UNIT : V_UNIT, CHANNELS);
    constexpr int pairs = KIND == K ? TAKEN_PAIRS : VALUE_PAIRS;
    constexpr u32 table_at = KIND == K ? K_TABLE_AT : V_TABLE_AT;
    if (mode >= FIXED) {
        u32 width = mode - FIXED ? mode - FIXED : 8, words = (CHANNELS * width + 31) / 32;
        auto read = [&](auto reader) {
            reader.width = width, reader.ones = ones;
            reader.begin(PlainWords{block + head}, lane, words);
            use(reader);
        };
        if (bits == 0 && width == 4 && fills_words<4, pairs>()) {
            if constexpr (fills_words<4, pairs>()) read(FixedPairs<PlainWords, 4>{});
        } else if (bits == 0 && width == 2 && fills_words<2, pairs>()) {
            if constexpr (fills_words<2, pairs>()) read(FixedPairs<PlainWords, 2>{});
        } else {
            read(FixedPairs<PlainWords, 0>{});
        }
        return;
    }
    if constexpr (bits > 0) {
        u32 first, second;
        u32 streams = 8 * stream_starts<KIND, CHANNELS>(block + head, lane, first, second) + 8 * head;
        auto read = [&](auto reader, auto words) {
            reader.ones = ones;
            int quarter = classes == 1 ? 0 : lane & 3;
            reader.classes(book, KIND == K ? quarter : 0, KIND == K ? quarter : classes == 1 ? 0 : class_of_tile<CHANNELS>(VALUE_TILES), lane);
            reader.begin(words, streams + first, streams + second);
            use(reader);
        };
        bool fast = copies && mode == OWN_BOOK && is_staged && book.levels <= 128;
        if constexpr (copies > 0) {
            typedef SharedTable<table_at, bits, copies> Table;
            if (fast && book.bits <= bits) return read(HuffmanPairs<SharedWords, Table, bits, false, false>{}, SharedWords{staged});
            if (fast && book.bits <= SHARED_PAIR_BITS)
                return read(HuffmanPairs<SharedWords, Table, SHARED_PAIR_BITS, true, false>{}, SharedWords{staged});
        }
        read(HuffmanPairs<PlainWords, PlainTable<bits>, MOST_PAIR_BITS, true, true>{}, PlainWords{block});
    }
}

// What a warp knows of the query of row g; ``total`` and ``rest`` are sums over the tokens of lane j alone.
struct Softmax {
    float peak = LOWEST, total = 0.f;
    float rest[V_CLASSES] = {};  // what every channel of a class gets besides its products
};

// Scores of one item, log base 2.
INLINE void score_item(const Item& item, const Arguments& a, const Book* books, Queries& queries, u32 staged, int head, int lane,
                       Scores& score) {
    u32 mode = mode_of(item, K);
    if (!item.page || mode == RAW) {
        typedef RawPairs<VALUE> Raw;
        typedef const typename Raw::Bits* Values;
        const void* first = item.page ? block_of(item, K) : item.raw_k;
        Raw raw = {(Values)first, item.page ? CHANNELS : item.begin == SEEN_BY_ALL ? a.sinks_k.token : a.tail_k.token, item.tokens, lane};
        if (K_UNIT == CHANNEL) queries.begin(nullptr, lane);
        multiply_keys<Raw>([&](int t, int part, auto& low, auto& high) { raw.keys(t, part * 2 * TAKEN_PAIRS, CHANNELS / 4, low, high); }, queries, score);
        return;
    }
    bool in_shared = is_staged(item, K);
    const u8* block = in_shared ? shared_memory + staged + scale_stage(K_UNIT) : block_of(item, K);
    const Book& book = books[mode == OWN_BOOK];
    if (K_UNIT == CHANNEL) queries.begin(block, lane);
    read_codes<K>(mode, block, in_shared, staged + scale_stage(K_UNIT), book, a.ones, lane, [&](auto& reader) {
        typedef Bare<decltype(reader)> Pairs;
        multiply_keys<Pairs>([&](int, int, auto& low, auto& high) { reader.take(low, high); }, queries, score);
    });
    // The operands were 128 + code - first.
    float first = (float)(mode < FIXED ? book.first[K_CLASSES == 1 ? 0 : lane & 3] - 128 : -128);
    float shift = sum_of_row(queries.quarter * first + queries.shift), sum = K_UNIT == CHANNEL ? 0.f : sum_of_row(queries.quarter);
    TokenScales<K_UNIT> units;
    units.begin(block, staged, a.k_steps, head, mode < FIXED ? -128.f : -(float)(1 << (mode - FIXED ? mode - FIXED - 1 : 7)));
#pragma unroll
    for (int t = 0; t < 8; t++) {
        float *x = &score[t & 3][t >> 2 << 1], *y = x + 1;
        if (K_UNIT == CHANNEL) {
            *x += shift, *y += shift;
        } else {
            float2 scales, zeros;
            units.of(t, lane & 3, scales, zeros);
            *x = (*x + (shift + zeros.x * sum)) * scales.x;
            *y = (*y + (shift + zeros.y * sum)) * scales.y;
        }
    }
}

// Scores become weights relative to the highest so far; returns the factor for what was summed before. seen: tokens that row g sees.
INLINE float weigh(Scores& score, const Arguments& a, int seen, int lane, Softmax& row) {
    float peak = LOWEST;
#pragma unroll
    for (int t = 0; t < 8; t++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float& x = score[t & 3][2 * (t >> 2) + i];
            if (SOFTCAP) x = a.softcap * LOG2_E * tanhf(x / a.softcap);
            if (8 * t + 2 * (lane & 3) + i < seen) peak = fmaxf(peak, x);
        }
    }
    peak = fmaxf(row.peak, peak_of_row(peak));
    float shrink = power_of_two(row.peak - peak), total = 0.f;
    row.peak = peak;
#pragma unroll
    for (int t = 0; t < 8; t++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float& x = score[t & 3][2 * (t >> 2) + i];
            x = 8 * t + 2 * (lane & 3) + i < seen ? power_of_two(x - peak) : 0.f;
            total += x;
        }
    }
    row.total = row.total * shrink + total;
    return shrink;
}

// Add weights.V of one item to the sums; ``weight`` is what ``weigh`` left.
INLINE void add_item(const Item& item, const Arguments& a, const Book* books, const Scores& weight, float shrink, u32 staged, int head,
                     int lane, float2* sums, Softmax& row) {
    u32 mode = mode_of(item, V);
    bool raw = !item.page || mode == RAW, in_shared = is_staged(item, V);
    const u8* block = in_shared ? shared_memory + staged + scale_stage(V_UNIT) : block_of(item, V);
    TokenScales<V_UNIT> units;
    if (!raw) units.begin(block, staged, a.v_steps, head, mode < FIXED ? -128.f : -(float)(1 << (mode - FIXED ? mode - FIXED - 1 : 7)));
    u32 weights[4][4];
    float sum = 0.f, shift = 0.f;  // of the weights, and of the weights times the tokens' zeros
#pragma unroll
    for (int t = 0; t < 8; t++) {
        float2 two = make_float2(weight[t & 3][2 * (t >> 2)], weight[t & 3][2 * (t >> 2) + 1]), scales, zeros = make_float2(0.f, 0.f);
        if (V_UNIT != CHANNEL && !raw) {
            units.of(t, lane & 3, scales, zeros);
            two.x *= scales.x, two.y *= scales.y;
        }
        u32 &high = weights[t >> 1][2 * (t & 1)], &rest = weights[t >> 1][2 * (t & 1) + 1];
        split_rows(two.x, two.y, high, rest);
        float x = low_bfloat16(high) + low_bfloat16(rest), y = high_bfloat16(high) + high_bfloat16(rest);
        sum += x + y;
        shift += x * zeros.x + y * zeros.y;
    }
    const Book& book = books[2 + (mode == OWN_BOOK)];
#pragma unroll
    for (int c = 0; c < V_CLASSES; c++) {
        row.rest[c] *= shrink;
        if (V_UNIT != CHANNEL && !raw) row.rest[c] += shift + sum * (float)(mode < FIXED ? book.first[c] - 128 : -128);
    }
    auto add = [&](int tile, float2 products) {
        float2 before = sums[tile * LANES];
        sums[tile * LANES] = make_float2(before.x * shrink + products.x, before.y * shrink + products.y);
    };
    if (raw) {
        typedef RawPairs<VALUE> Raw;
        typedef const typename Raw::Bits* Values;
        const void* first = item.page ? block_of(item, V) : item.raw_v;
        Raw tokens = {(Values)first, item.page ? CHANNELS : item.begin == SEEN_BY_ALL ? a.sinks_v.token : a.tail_v.token, item.tokens, lane};
        multiply_values<Raw>([&](int i, auto& low, auto& high) { tokens.channels(i, CHANNELS / 2, low, high); }, weights, add);
        return;
    }
    float of_row = V_UNIT == CHANNEL ? sum_of_row(sum) : 0.f;
    auto add_channels = [&](int tile, float2 products) {
        u32 both = load_word(block + 2 * (8 * tile + 2 * (lane & 3)));
        u32 zeros = load_word(block + 2 * (CHANNELS + 8 * tile + 2 * (lane & 3)));
        float first = (float)(mode < FIXED ? book.first[V_CLASSES == 1 ? 0 : class_of_tile<CHANNELS>(tile)] - 128 : -128);
        products.x = (products.x + of_row * (first + (float)(i16)(zeros & 0xffff))) * low_bfloat16(both);
        products.y = (products.y + of_row * (first + (float)((i32)zeros >> 16))) * high_bfloat16(both);
        add(tile, products);
    };
    read_codes<V>(mode, block, in_shared, staged + scale_stage(V_UNIT), book, a.ones, lane, [&](auto& reader) {
        typedef Bare<decltype(reader)> Pairs;
        auto tile = [&](int i, auto& low, auto& high) {
            if (V_CLASSES > 1) reader.classes(book, class_of_tile<CHANNELS>(i), class_of_tile<CHANNELS>(i + VALUE_TILES), lane);
            reader.take(low, high);
        };
        if constexpr (V_UNIT == CHANNEL)
            multiply_values<Pairs>(tile, weights, add_channels);
        else
            multiply_values<Pairs>(tile, weights, add);
    });
}

// Load the row's books, own tables and queries to shared memory.
INLINE void fill_shared(const Arguments& a, int row, int head, int first_query) {
    int thread = threadIdx.x;
    constexpr int threads = WARPS * LANES;
    u32* books = reinterpret_cast<u32*>(shared_memory + BOOKS_AT);
    const u32* from = reinterpret_cast<const u32*>(a.books + 4 * row);
    for (int i = thread; i < 4 * (int)sizeof(Book) / 4; i += threads) books[i] = from[i];
    const u32 *k_own = a.books[4 * row + 1].table, *v_own = a.books[4 * row + 3].table;
    if (K_COPIES && k_own) {
        u32* table = reinterpret_cast<u32*>(shared_memory + K_TABLE_AT);
        for (int i = thread; i < K_CLASSES * K_COPIES << K_BITS; i += threads) table[i] = k_own[i / max(1, K_COPIES)];
    }
    if (V_COPIES && v_own) {
        u32* table = reinterpret_cast<u32*>(shared_memory + V_TABLE_AT);
        for (int i = thread; i < V_CLASSES * V_COPIES << V_BITS; i += threads) table[i] = v_own[i / max(1, V_COPIES)];
    }
    float* queries = reinterpret_cast<float*>(shared_memory + QUERIES_AT);
    typedef typename Value<QUERY_VALUE>::Bits Bits;
    const Bits* q = reinterpret_cast<const Bits*>(a.q) + ((i64)(row * a.heads + head) * a.queries + first_query) * CHANNELS;
    for (int i = thread; i < QUERIES * CHANNELS; i += threads)
        queries[i] = first_query + i / CHANNELS < a.queries ? Value<QUERY_VALUE>::widen(q[i]) * (SOFTCAP ? a.scaling : a.scaling * LOG2_E) : 0.f;
}

// Everything a warp has to do; leaves its sums, peaks and totals in shared memory.
INLINE void attend_items(const Arguments& a, int row, int head, int first_query) {
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, query = first_query + (lane >> 2);
    u32 mine = WARPS_AT + warp * WARP_BYTES;
    const Book* books = reinterpret_cast<const Book*>(shared_memory + BOOKS_AT);
    float2* sums = reinterpret_cast<float2*>(shared_memory + mine + SUMS) + lane;
    for (int tile = 0; tile < CHANNELS / 8; tile++) sums[tile * LANES] = make_float2(0.f, 0.f);

    Queries queries;
    if (K_UNIT != CHANNEL) queries.begin(nullptr, lane);
    Softmax softmax;
    // Query i is that of new token i mod new_tokens, which sees the tail up to itself.
    int tail_end = *a.tail_tokens - (a.new_tokens - 1) + query % a.new_tokens;
    int pages = a.count[row], items = pages + raw_chunks(a, row), step = gridDim.x * WARPS;
    const u64* addresses = a.pages + (i64)row * a.capacity;
    const i32* valid = a.valid + (i64)row * a.capacity;

    int index = blockIdx.x * WARPS + warp;
    u64 address = index < pages ? addresses[index] : 0;
    i32 tokens = index < pages ? valid[index] : 0;
    auto describe = [&](Item& item, int number) {
        if (number < pages)
            describe_page(item, a, head, address, tokens);
        else if (number < items)
            describe_raw(item, a, row, head, number - pages);
    };
    auto look_ahead = [&](int number) {
        if (number < pages) address = addresses[number], tokens = valid[number];
    };
    Item item = {};
    describe(item, index);
    look_ahead(index + step);
    if (index < items) stage<K>(item, a, mine + K_STAGE, lane);
    for (; index < items; index += step) {
        stage<V>(item, a, mine + V_STAGE, lane);
        Item next = {};
        auto go_on = [&] {
            describe(next, index + step);
            look_ahead(index + 2 * step);
        };
        if (EARLY) go_on();
        await_copies<1>();
        __syncwarp();
        Scores score = {};
        score_item(item, a, books, queries, mine + K_STAGE, head, lane, score);
        __syncwarp();  // all have read this K
        if (!EARLY) go_on();
        stage<K>(next, a, mine + K_STAGE, lane);
        float shrink = weigh(score, a, min(item.tokens, tail_end - item.begin), lane, softmax);
        await_copies<1>();
        __syncwarp();
        add_item(item, a, books, score, shrink, mine + V_STAGE, head, lane, sums, softmax);
        __syncwarp();  // all have read this V
        item = next;
    }
#pragma unroll
    for (int c = 0; c < V_CLASSES; c++) softmax.rest[c] = sum_of_row(softmax.rest[c]);
    for (int tile = 0; tile < CHANNELS / 8; tile++) {
        float rest = softmax.rest[0];
#pragma unroll
        for (int c = 1; c < V_CLASSES; c++)
            if (class_of_tile<CHANNELS>(tile) == c) rest = softmax.rest[c];
        sums[tile * LANES] = make_float2(sums[tile * LANES].x + rest, sums[tile * LANES].y + rest);
    }
    float total = sum_of_row(softmax.total);
    if (lane % 4 == 0) {
        reinterpret_cast<float*>(shared_memory + PEAKS_AT)[warp * QUERIES + lane / 4] = softmax.peak;
        reinterpret_cast<float*>(shared_memory + TOTALS_AT)[warp * QUERIES + lane / 4] = total;
    }
}

// Join parts of a softmax: peak(i), total(i) and value(i) of part i. Returns the unnormalised sum; a part that saw nothing may hold anything.
template <class Peak, class Total, class Sum>
INLINE float join(int parts, Peak peak_of, Total total_of, Sum sum_of, float& peak, float& total) {
    peak = LOWEST, total = 0.f;
    for (int i = 0; i < parts; i++) peak = fmaxf(peak, peak_of(i));
    float sum = 0.f;
    for (int i = 0; i < parts; i++) {
        if (total_of(i) != 0.f) {  // NaN counts as seen
            float weight = power_of_two(peak_of(i) - peak);
            total += weight * total_of(i);
            sum += weight * sum_of(i);
        }
    }
    return sum;
}

INLINE void write_result(const Arguments& a, i64 query, int channel, float sum, float peak, float total) {
    typedef typename Value<QUERY_VALUE>::Bits Bits;
    reinterpret_cast<Bits*>(a.out)[query * CHANNELS + channel] = Value<QUERY_VALUE>::narrow(total != 0.f ? sum / total : 0.f);
    if (channel == 0) a.lse[query] = total != 0.f ? (peak + log_of_two(total)) * LN_2 : __uint_as_float(0xff800000u);
}

// Grid: (splits, KV heads x passes of eight queries, rows). Dynamic shared memory: SHARED_BYTES.
KERNEL void __launch_bounds__(WARPS * LANES, 1) attend(const __grid_constant__ Arguments a) {
    int passes = (a.queries + QUERIES - 1) / QUERIES;
    int row = blockIdx.z, head = blockIdx.y / passes, first_query = blockIdx.y % passes * QUERIES;
    fill_shared(a, row, head, first_query);
    __syncthreads();
    attend_items(a, row, head, first_query);
    __syncthreads();
    const float *peaks = reinterpret_cast<const float*>(shared_memory + PEAKS_AT);
    const float *totals = reinterpret_cast<const float*>(shared_memory + TOTALS_AT);
    for (int i = threadIdx.x; i < QUERIES * CHANNELS; i += WARPS * LANES) {
        int g = i / CHANNELS, channel = i % CHANNELS;
        if (first_query + g >= a.queries) break;
        int place = SUMS + 8 * (channel / 8 * LANES + 4 * g + channel % 8 / 2) + 4 * (channel & 1);
        float peak, total;
        float sum = join(
            WARPS, [&](int w) { return peaks[w * QUERIES + g]; }, [&](int w) { return totals[w * QUERIES + g]; },
            [&](int w) { return *reinterpret_cast<const float*>(shared_memory + WARPS_AT + w * WARP_BYTES + place); }, peak, total);
        i64 query = (i64)(row * a.heads + head) * a.queries + first_query + g;
        if (gridDim.x == 1) {
            write_result(a, query, channel, sum, peak, total);
        } else {
            i64 part = blockIdx.x * (i64)a.rows * a.heads * a.queries + query;
            a.partial_out[part * CHANNELS + channel] = sum;
            if (channel == 0) a.partial_peak[part] = peak, a.partial_total[part] = total;
        }
    }
}

// Join the splits. Grid: (queries of all rows and heads); CHANNELS threads.
KERNEL void __launch_bounds__(CHANNELS) merge(const __grid_constant__ Arguments a, int splits) {
    i64 query = blockIdx.x, all = (i64)a.rows * a.heads * a.queries;
    int channel = threadIdx.x;
    float peak, total;
    float sum = join(
        splits, [&](int i) { return a.partial_peak[i * all + query]; }, [&](int i) { return a.partial_total[i * all + query]; },
        [&](int i) { return a.partial_out[(i * all + query) * CHANNELS + channel]; }, peak, total);
    write_result(a, query, channel, sum, peak, total);
}
