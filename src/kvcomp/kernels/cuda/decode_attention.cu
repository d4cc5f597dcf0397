// softmax(cap(scaling q.K)) V over compressed pages, raw first tokens and a raw tail, in one launch (KVComp, arXiv 2509.00579, "Fetch").
//
// A warp takes one page at a time for one KV head and at most eight queries: it decodes the block of K tile by tile into tensor-core
// operands, takes the softmax online (Milakov & Gimelshein, 2018), and decodes the block of V into the sums. While one block is decoded the
// next is copied to shared memory. The warps of a CTA share a sequence's decode tables; CTAs split the context, and ``merge`` joins them.
//
// Scales are folded into the queries or the scores (K) and into the weights (V), zeros into one number for each query, so that the
// products run on 128 + code. Sums lie in shared memory; they are scaled down only when a score is higher by far than the one that weights
// are relative to, so that a weight is at most 2^SLACK.
#include "fragments.cuh"
#include "streams.cuh"

constexpr int CHANNELS = KVC_CHANNELS, VALUE = KVC_VALUE, QUERY_VALUE = KVC_QUERY, WARPS = KVC_WARPS;
constexpr int K_UNIT = KVC_K_UNIT, V_UNIT = KVC_V_UNIT, K_CLASSES = KVC_K_CLASSES, V_CLASSES = KVC_V_CLASSES;
constexpr int K_BITS = KVC_K_BITS, V_BITS = KVC_V_BITS;          // index bits of the tables, 0 where the coding is fixed
constexpr int K_COPIES = KVC_K_COPIES, V_COPIES = KVC_V_COPIES;  // of the own book's table in shared memory, 0 for none
constexpr int STAGE = KVC_STAGE;                                 // bytes of a block that are copied to shared memory; a larger one is read where it is
constexpr u32 RESERVED = KVC_RESERVED;                           // where shared memory begins in its address space
constexpr bool SOFTCAP = KVC_SOFTCAP;

constexpr int STEPS = CHANNELS / 16, KEY_PAIRS = CHANNELS / 8, VALUE_TILES = CHANNELS / 16, VALUE_PAIRS = TOKENS / 8;
constexpr int KEY_PARTS = KEY_PAIRS > 24 ? 4 : KEY_PAIRS > 16 ? 2 : 1, TAKEN_PAIRS = KEY_PAIRS / KEY_PARTS;  // a tile of many channels is taken in parts
constexpr bool EARLY = CHANNELS <= 192;  // whether registers are left to look up the next page while one is decoded
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
    i32 rows, heads, queries, new_tokens, capacity;
    float scaling, softcap;
    u32 ones;  // BFLOAT16_128
};

// Shared memory, in bytes from its start.
constexpr int table_bytes(int classes, int bits, int copies) { return copies ? classes * (4 * copies << bits) : 0; }
constexpr int scale_stage(int unit) { return unit == TOKEN ? TOKEN_SCALE_BYTES : 0; }
constexpr bool BY_TOKEN = V_UNIT == TOKEN || V_UNIT == VECTOR;
constexpr int QUERIES_AT = 0;
constexpr int BOOKS_AT = QUERIES_AT + 4 * QUERIES * CHANNELS;
constexpr int ONES_AT = BOOKS_AT + 4 * sizeof(Book);
constexpr int PEAKS_AT = ONES_AT + 16;
constexpr int TOTALS_AT = PEAKS_AT + 4 * WARPS * QUERIES;
constexpr int K_TABLE_AT = TOTALS_AT + 4 * WARPS * QUERIES;
constexpr int V_TABLE_AT = K_TABLE_AT + table_bytes(K_CLASSES, K_BITS, K_COPIES);
constexpr int WARPS_AT = (V_TABLE_AT + table_bytes(V_CLASSES, V_BITS, V_COPIES) + 15) & ~15;
constexpr int K_STAGE = 0;  // token scales, then the block
constexpr int V_STAGE = K_STAGE + scale_stage(K_UNIT) + STAGE;
constexpr int FACTORS = V_STAGE + scale_stage(V_UNIT) + STAGE;  // of V, where they differ from token to token
constexpr int SUMS = FACTORS + (BY_TOKEN ? TOKENS * 8 : 0);     // [tile of 8 channels][lane] pairs of floats
constexpr int WARP_BYTES = SUMS + CHANNELS / 8 * LANES * 8;
constexpr int SHARED_BYTES = WARPS_AT + WARPS * WARP_BYTES;
static_assert(SHARED_BYTES == KVC_SHARED, "the host must reserve as much");
static_assert(STAGE % 16 == 0 && STAGE >= CHANNELS * 9 / 8 + 16, "a stream of foreign bytes may be read so far over its block");

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

INLINE i32 staged_bytes(u32 word, u32 end) {
    u32 bytes = (end & ~15u) - (word & ~15u);
    return (word & 15) != RAW && bytes <= STAGE ? (i32)bytes : 0;
}

INLINE void describe_page(Item& item, const Arguments& a, int head, u64 address, i32 tokens) {
    const u32 *of_k = reinterpret_cast<const u32*>(address) + head, *of_v = of_k + a.heads;
    item.page = reinterpret_cast<const u8*>(address);
    item.k = of_k[0], item.k_staged = staged_bytes(item.k, of_k[1]);
    item.v = of_v[0], item.v_staged = staged_bytes(item.v, of_v[1]);
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

template <int FROM>
INLINE void copy_more(u32 to, const u8* from, i32 left) {
    if constexpr (FROM < STAGE) {
        if (left > FROM) copy_lane<0, STAGE - FROM < 2 * AHEAD ? STAGE - FROM : 2 * AHEAD>(to + FROM, from + FROM, left - FROM);
        copy_more<FROM + 2 * AHEAD>(to, from, left);
    }
}

// Start copying a block, and its token scales, to an address in shared memory.
template <int KIND>
INLINE void stage(const Item& item, const Arguments& a, u32 to, int lane) {
    constexpr int unit = KIND == K ? K_UNIT : V_UNIT;
    if (item.chunk == IN_PAGE) {
        int mine = 16 * lane;
        const u8* page = item.page + mine;
        if (unit == TOKEN && mine < TOKEN_SCALE_BYTES) copy_async<0, 0>(to + mine, page + token_scales_at(a.heads, KIND, K_UNIT), 16);
        to += mine + scale_stage(unit), page += AHEAD + ((KIND == K ? item.k : item.v) & ~15u);
        i32 left = (KIND == K ? item.k_staged : item.v_staged) - mine;
        copy_lane<0, STAGE < 2 * AHEAD ? STAGE : 2 * AHEAD>(to, page, left);
        copy_more<2 * AHEAD>(to, page, left);
    }
    end_copies();
}

// Scales and zeros of the tokens 2 pair and 2 pair + 1.
struct TwoTokens {
    float2 scales, zeros;
    INLINE TwoTokens(const u8* of_tokens, int pair) {
        u32 both = load_word(of_tokens + 4 * pair), shifts = load_word(of_tokens + 2 * TOKENS + 4 * pair);
        scales = make_float2(low_bfloat16(both), high_bfloat16(both));
        zeros = make_float2((float)(i16)(shifts & 0xffff), (float)((i32)shifts >> 16));
    }
};

// The queries of a warp as A, times what is common to a channel of K, and the sums that zeros are folded into.
struct Queries {
    u32 a[STEPS][4];
    float quarter;  // sum of row g over the channels of quarter j
    float sum;      // of row g over all channels
    float shift;    // sum of row g times the channels' zeros, over quarter j, where K has a scale for each channel

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
        quarter = keep(quarter);
        sum = sum_of_row(quarter);
    }
};

// Scores are of[..] times ``scale`` plus ``shift``. of[e][0], [1]: row g at tokens 8 e + 2 j and the next; [2], [3]: 32 tokens later.
struct Scores {
    float of[4][4], scale, shift;
    INLINE float& at(int token_pair, int i) { return of[token_pair & 3][2 * (token_pair >> 2) + i]; }  // of token 8 token_pair + 2 j + i
};

// q.K of a block, tile by tile: tile(t, part, low, high) gives its pairs.
template <class Pairs, class Tile>
INLINE void multiply_keys(Tile tile, const Queries& queries, Scores& score) {
    constexpr int at_once = Pairs::SHORT ? 2 : 1;
#pragma unroll 1
    for (int t = 0; t < 4; t += at_once) {
        // A queue, as registers cannot be numbered by t.
#pragma unroll
        for (int e = 0; e < 4 - at_once; e++)
#pragma unroll
            for (int i = 0; i < 4; i++) score.of[e][i] = score.of[e + at_once][i];
#pragma unroll
        for (int next = 0; next < at_once; next++) {
            float c[2][4] = {};
#pragma unroll
            for (int part_of_tile = 0; part_of_tile < KEY_PARTS; part_of_tile++) {
                typename Pairs::Pair low[TAKEN_PAIRS], high[TAKEN_PAIRS];
                tile(t + next, part_of_tile, low, high);
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
            float2 first = both_rows(c[0]), second = both_rows(c[1]);
            float(&x)[4] = score.of[4 - at_once + next];
            x[0] = first.x, x[1] = first.y, x[2] = second.x, x[3] = second.y;
        }
    }
}

// weights.V of a block, tile by tile: tile(i, low, high) gives the pairs of the tiles i and i + VALUE_TILES, add(tile, products) takes the products.
template <class Pairs, class Tile, class Add>
INLINE void multiply_values(Tile tile, const u32 (&weights)[4][4], Add add) {
    constexpr int at_once = Pairs::SHORT && VALUE_TILES % 2 == 0 ? 2 : 1;
#pragma unroll at_once
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

// How the blocks of a book are read: out of shared memory, by symbols that are the codes or with low bits behind them; or where they are.
enum Form { SYMBOLS, SPLIT, ANY };

template <int KIND>
INLINE Form form_of(const Book& own) {
    constexpr int bits = KIND == K ? K_BITS : V_BITS, copies = KIND == K ? K_COPIES : V_COPIES;
    if (!copies || own.levels > 128 || own.bits > max(bits, SHARED_PAIR_BITS)) return ANY;
    return own.bits <= bits ? SYMBOLS : SPLIT;
}

// Gives use(pairs) the reader of a coded block that fits it best. staged: address of its copy in shared memory, or 0. own: form of the row's
// own book. Every reader has ``take`` and ``classes``.
template <int KIND, class Use>
INLINE void read_codes(u32 mode, const u8* block, u32 staged, const Book& book, Form own, u32 ones, int lane, Use use) {
    constexpr int bits = KIND == K ? K_BITS : V_BITS, copies = KIND == K ? K_COPIES : V_COPIES;
    constexpr int classes = KIND == K ? K_CLASSES : V_CLASSES;
    constexpr int head = scale_bytes(KIND == K ? K_UNIT : V_UNIT, CHANNELS);
    constexpr int pairs = KIND == K ? TAKEN_PAIRS : VALUE_PAIRS;
    constexpr u32 place = RESERVED + (KIND == K ? K_TABLE_AT : V_TABLE_AT);
    if (mode >= FIXED) {
        u32 width = mode - FIXED ? mode - FIXED : 8, words = (CHANNELS * width + 31) / 32;
        auto read = [&](auto reader) {
            reader.width = width, reader.ones = ones;
            reader.begin(PlainWords{block + head}, lane, words);
            use(reader);
        };
        if (bits == 0 && width == 4 && fills_words<4, pairs>()) {
            if constexpr (fills_words<4, pairs>()) read(FixedPairs<4>{});
        } else if (bits == 0 && width == 2 && fills_words<2, pairs>()) {
            if constexpr (fills_words<2, pairs>()) read(FixedPairs<2>{});
        } else {
            read(FixedPairs<0>{});
        }
        return;
    }
    if constexpr (bits > 0) {
        auto read = [&](auto reader, auto words) {
            u32 first, second;
            u32 streams = 8 * stream_starts<KIND, CHANNELS>(words + head, lane, first, second) + 8 * head;
            reader.ones = ones;
            int quarter = classes == 1 ? 0 : lane & 3;
            reader.classes(book, KIND == K ? quarter : 0, KIND == K ? quarter : classes == 1 ? 0 : class_of_tile<CHANNELS>(VALUE_TILES), lane);
            reader.begin(words, streams + first, streams + second);
            use(reader);
        };
        if constexpr (copies > 0) {
            typedef SharedTable<place, bits, copies> Table;
            Form form = mode == OWN_BOOK && staged ? own : ANY;
            if (form == SYMBOLS) return read(HuffmanPairs<SharedWords, Table, bits, false, false>{}, SharedWords{staged});
            if (form == SPLIT)
                return read(HuffmanPairs<SharedWords, Table, SHARED_PAIR_BITS, true, false>{}, SharedWords{staged});
        }
        read(HuffmanPairs<PlainWords, PlainTable<bits>, MOST_PAIR_BITS, true, true>{}, PlainWords{block});
    }
}

// The forms of a row's own books, and BFLOAT16_128, in registers.
struct Own {
    Form k, v;
    u32 ones;
};

// What a warp knows of the query of row g; ``total`` is a sum over the tokens of lane j alone.
struct Softmax {
    float peak = LOWEST, total = 0.f;  // peak: what weights are relative to, at most SLACK below the highest score
    float rest[V_CLASSES] = {};        // what every channel of a class gets besides its products
};

// The zero of the unit ``head``; of no other.
INLINE float zero_of_steps(u32 mode) { return mode < FIXED ? -128.f : -(float)(1 << (mode - FIXED ? mode - FIXED - 1 : 7)); }

// The raw values of an item, of a page or beside the pages.
INLINE RawPairs<VALUE> raw_values(const Item& item, int kind, const RawTensor& sinks, const RawTensor& tail, const Arguments& a, int row,
                                  int head, int lane) {
    typedef const typename RawPairs<VALUE>::Bits* Values;
    if (item.chunk == IN_PAGE) return {reinterpret_cast<Values>(block_of(item, kind)), CHANNELS, item.tokens, lane};
    return RawChunk(a, row, item.chunk).of(sinks, tail, row, head, lane);
}

// Scores of one item, log base 2. staged: the address of what is copied of K.
INLINE void score_item(const Item& item, const Arguments& a, const Book* books, Queries& queries, const Own& own, u32 staged, int row, int head,
                       int lane, Scores& score) {
    u32 mode = mode_of(item, K);
    score.scale = 1.f, score.shift = 0.f;
    if (item.chunk >= 0 || mode == RAW) {
        RawPairs<VALUE> raw = raw_values(item, K, a.sinks_k, a.tail_k, a, row, head, lane);
        if (K_UNIT == CHANNEL) queries.begin(nullptr, lane);
        multiply_keys<RawPairs<VALUE>>([&](int t, int part, auto& low, auto& high) { raw.keys(t, part * 2 * TAKEN_PAIRS, CHANNELS / 4, low, high); }, queries, score);
        return;
    }
    u32 at = item.k_staged ? staged + scale_stage(K_UNIT) : 0;
    const u8* block = at ? shared_memory + at - RESERVED : block_of(item, K);
    const Book& book = books[mode == OWN_BOOK];
    if (K_UNIT == CHANNEL) queries.begin(block, lane);
    read_codes<K>(mode, block, at, book, own.k, own.ones, lane, [&](auto& reader) {
        typedef Bare<decltype(reader)> Pairs;
        multiply_keys<Pairs>([&](int, int, auto& low, auto& high) { reader.take(low, high); }, queries, score);
    });
    // The operands were 128 + code - first.
    float first = (float)(mode < FIXED ? book.first[K_CLASSES == 1 ? 0 : lane & 3] - 128 : -128);
    score.shift = K_CLASSES == 1 && K_UNIT != CHANNEL ? queries.sum * first : sum_of_row(queries.quarter * first + queries.shift);
    if (K_UNIT == BLOCK) {
        score.scale = __uint_as_float(load_word(block));
        score.shift = (score.shift + (float)(i32)load_word(block + 4) * queries.sum) * score.scale;
    } else if (K_UNIT == HEAD) {
        score.scale = a.k_steps[head];
        score.shift = (score.shift + zero_of_steps(mode) * queries.sum) * score.scale;
    } else if (K_UNIT == TOKEN || K_UNIT == VECTOR) {
        const u8* scales = K_UNIT == TOKEN ? shared_memory + staged - RESERVED : block;
#pragma unroll
        for (int t = 0; t < 8; t++) {
            TwoTokens two(scales, 4 * t + (lane & 3));
            score.at(t, 0) = (score.at(t, 0) + (score.shift + two.zeros.x * queries.sum)) * two.scales.x;
            score.at(t, 1) = (score.at(t, 1) + (score.shift + two.zeros.y * queries.sum)) * two.scales.y;
        }
        score.shift = 0.f;
    }
}

// Scores become weights relative to ``row.peak``; returns the factor for what was summed before. seen: tokens that row g sees.
template <bool ALL>
INLINE float weigh(Scores& score, const Arguments& a, int seen, int lane, Softmax& row) {
    auto sees = [&](int t, int i) { return ALL || 8 * t + 2 * (lane & 3) + i < seen; };
    if (SOFTCAP) {
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int i = 0; i < 2; i++) score.at(t, i) = a.softcap * LOG2_E * tanhf((score.at(t, i) * score.scale + score.shift) / a.softcap);
        score.scale = 1.f, score.shift = 0.f;
    }
    float highest = LOWEST;
#pragma unroll
    for (int t = 0; t < 8; t++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (sees(t, i)) highest = fmaxf(highest, score.at(t, i));
    highest = peak_of_row(highest);
    highest = ALL || highest > LOWEST ? highest * score.scale + score.shift : LOWEST;  // scales are positive
    float peak = highest > row.peak + SLACK ? highest : row.peak, total = 0.f, shift = score.shift - peak;
#pragma unroll
    for (int t = 0; t < 8; t++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float& x = score.at(t, i);
            x = sees(t, i) ? power_of_two(x * score.scale + shift) : 0.f;
            total += x;
        }
    }
    float shrink = power_of_two(row.peak - peak);
    row.peak = peak;
    row.total = row.total * shrink + total;
    return shrink;
}

// The same where queries do not see all 64 tokens.
INLINE float weigh_some(Scores& score, const Arguments& a, const Item& item, int of_row, int tail_end, int lane, Softmax& row) {
    if (item.chunk == IN_PAGE) return weigh<false>(score, a, item.tokens, lane, row);
    RawChunk chunk(a, of_row, item.chunk);
    return weigh<false>(score, a, chunk.in_tail ? min(chunk.tokens, tail_end - chunk.begin) : chunk.tokens, lane, row);
}

// Scale down what was summed so far.
INLINE void scale_down(float shrink, float2* sums, Softmax& row) {
    for (int tile = 0; tile < CHANNELS / 8; tile++) {
        float2& sum = sums[tile * LANES];
        sum = make_float2(sum.x * shrink, sum.y * shrink);
    }
#pragma unroll
    for (int c = 0; c < V_CLASSES; c++) row.rest[c] *= shrink;
}

// Each lane prepares the factors of two tokens of V: [two tokens] multiples of 256 in their zeros and the rest, in bfloat16, which holds
// either exactly, then the scales.
INLINE void spread_factors(u32 scales, u32 zeros, u32 to, int lane) {
    i32 first = (i16)(zeros & 0xffff), second = (i32)zeros >> 16;
    uint4 factors = {to_bfloat16s((float)(first >> 8), (float)(second >> 8)), to_bfloat16s((float)(first & 255), (float)(second & 255)),
                     scales << 16, scales & 0xffff0000u};
    reinterpret_cast<uint4*>(shared_memory + to)[lane] = factors;
}

// Add weights.V of one item to the sums; ``weight`` is what ``weigh`` left. at: the warp's part of shared memory.
INLINE void add_item(const Item& item, const Arguments& a, const Book* books, Scores& weight, const Own& own, u32 at, int of_row, int head,
                     int lane, float2* sums, Softmax& row) {
    constexpr u32 ONES = 0x3f803f80u;  // of bfloat16
    u32 mode = mode_of(item, V), staged = item.v_staged ? RESERVED + at + V_STAGE + scale_stage(V_UNIT) : 0;
    bool raw = item.chunk >= 0 || mode == RAW;
    const u8* block = staged ? shared_memory + staged - RESERVED : block_of(item, V);
    float scale = 1.f, zero = 0.f;
    if (V_UNIT == BLOCK && !raw) scale = __uint_as_float(load_word(block)), zero = (float)(i32)load_word(block + 4);
    if (V_UNIT == HEAD && !raw) scale = a.v_steps[head], zero = zero_of_steps(mode);
    if (BY_TOKEN) {
        const u8* scales = V_UNIT == TOKEN ? shared_memory + at + V_STAGE : block;
        spread_factors(raw ? ONES : load_word(scales + 4 * lane), raw ? 0 : load_word(scales + 2 * TOKENS + 4 * lane), at + FACTORS, lane);
        __syncwarp();
    }
    u32 weights[4][4];
#pragma unroll
    for (int t = 0; t < 8; t++) {
        float2 two = make_float2(weight.at(t, 0), weight.at(t, 1)), scales = make_float2(scale, scale);
        if (BY_TOKEN) scales = *reinterpret_cast<const float2*>(shared_memory + at + FACTORS + 16 * (4 * t + (lane & 3)) + 8);
        split_rows(two.x * scales.x, two.y * scales.y, weights[t >> 1][2 * (t & 1)], weights[t >> 1][2 * (t & 1) + 1]);
    }
    auto add = [&](int tile, float2 products) {
        float2& sum = *reinterpret_cast<float2*>(reinterpret_cast<u8*>(sums) + tile * (int)(LANES * sizeof(float2)));
        sum = make_float2(sum.x + products.x, sum.y + products.y);
    };
    if (raw) {
        RawPairs<VALUE> tokens = raw_values(item, V, a.sinks_v, a.tail_v, a, of_row, head, lane);
        multiply_values<RawPairs<VALUE>>([&](int i, auto& low, auto& high) { tokens.channels(i, CHANNELS / 2, low, high); }, weights, add);
        return;
    }
    // The sums of the weights, and of the weights times the zeros: of what the tensor cores see.
    float of_weights[4] = {}, of_zeros[4] = {};
#pragma unroll
    for (int u = 0; u < 4; u++) {
        multiply_add(of_weights, weights[u], ONES, ONES);
        if (BY_TOKEN) {
            u32 factors = RESERVED + at + FACTORS + 16 * (8 * u + (lane & 3)) + (lane & 4);  // even columns take the multiples of 256
            multiply_add(of_zeros, weights[u], load_shared(factors), load_shared(factors + 64));
        }
    }
    float2 parts = both_rows(of_zeros);
    float sum = both_rows(of_weights).x, shift = BY_TOKEN ? 256.f * parts.x + parts.y : zero * sum;
    const Book& book = books[2 + (mode == OWN_BOOK)];
    auto first_of = [&](int its_class) { return (float)(mode < FIXED ? book.first[its_class] - 128 : -128); };
    if (V_UNIT != CHANNEL) {
#pragma unroll
        for (int c = 0; c < V_CLASSES; c++) row.rest[c] += shift + sum * first_of(c);
    }
    auto add_channels = [&](int tile, float2 products) {
        u32 both = load_word(block + 2 * (8 * tile + 2 * (lane & 3)));
        u32 zeros = load_word(block + 2 * (CHANNELS + 8 * tile + 2 * (lane & 3)));
        float first = first_of(V_CLASSES == 1 ? 0 : class_of_tile<CHANNELS>(tile));
        products.x = (products.x + sum * (first + (float)(i16)(zeros & 0xffff))) * low_bfloat16(both);
        products.y = (products.y + sum * (first + (float)((i32)zeros >> 16))) * high_bfloat16(both);
        add(tile, products);
    };
    read_codes<V>(mode, block, staged, book, own.v, own.ones, lane, [&](auto& reader) {
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
    if (thread == 0) *reinterpret_cast<u32*>(shared_memory + ONES_AT) = a.ones;
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
    int lane = keep(threadIdx.x % (u32)LANES), warp = threadIdx.x / LANES, query = first_query + (lane >> 2);
    u32 mine = keep((u32)(WARPS_AT + warp * WARP_BYTES));
    const Book* books = reinterpret_cast<const Book*>(shared_memory + BOOKS_AT);
    float2* sums = reinterpret_cast<float2*>(shared_memory + mine + SUMS) + lane;
    for (int tile = 0; tile < CHANNELS / 8; tile++) sums[tile * LANES] = make_float2(0.f, 0.f);

    Queries queries;
    if (K_UNIT != CHANNEL) queries.begin(nullptr, lane);
    Softmax softmax;
    Own own = {form_of<K>(books[1]), form_of<V>(books[3]), load_shared(RESERVED + ONES_AT)};
    // Query i is that of new token i mod new_tokens, which sees the tail up to itself.
    int tail_end = *a.tail_tokens - (a.new_tokens - 1) + query % a.new_tokens;
    int pages = a.count[row], items = pages + raw_chunks(a, row), step = gridDim.x * WARPS;
    const u64* addresses = keep(a.pages + (i64)row * a.capacity);
    const i32* valid = keep(a.valid + (i64)row * a.capacity);

    int index = blockIdx.x * WARPS + warp;
    u64 address = index < pages ? addresses[index] : 0;
    i32 tokens = index < pages ? valid[index] : 0;
    auto describe = [&](Item& item, int number) {
        item.chunk = number < items ? number - pages : NONE;
        if (number < pages) describe_page(item, a, head, address, tokens);
    };
    auto look_ahead = [&](int number) {
        if (number < pages) address = addresses[number], tokens = valid[number];
    };
    Item item = {};
    describe(item, index);
    look_ahead(index + step);
    stage<K>(item, a, RESERVED + mine + K_STAGE, lane);
    for (; index < items; index += step) {
        stage<V>(item, a, RESERVED + mine + V_STAGE, lane);
        Item next = item;
        auto go_on = [&] {
            describe(next, index + step);
            look_ahead(index + 2 * step);
        };
        if (EARLY) go_on();
        await_copies<1>();
        __syncwarp();
        Scores score;
        score_item(item, a, books, queries, own, RESERVED + mine + K_STAGE, row, head, lane, score);
        __syncwarp();  // all have read this K
        if (!EARLY) go_on();
        stage<K>(next, a, RESERVED + mine + K_STAGE, lane);
        float shrink = item.chunk == IN_PAGE && item.tokens == TOKENS ? weigh<true>(score, a, TOKENS, lane, softmax)
                                                                      : weigh_some(score, a, item, row, tail_end, lane, softmax);
        if (__any_sync(~0u, shrink != 1.f)) scale_down(shrink, sums, softmax);
        await_copies<1>();
        __syncwarp();
        add_item(item, a, books, score, own, mine, row, head, lane, sums, softmax);
        __syncwarp();  // all have read this V
        item = next;
    }
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
    if (shared_address(0) != RESERVED) __trap();
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
