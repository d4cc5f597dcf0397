// Products of queries and keys and of weights and values, tile by tile, whatever the blocks hold; and which reader a block takes.
#pragma once
#include "items.cuh"
#include "streams.cuh"

// Scales and zeros of the tokens 2 pair and 2 pair + 1.
struct TwoTokens {
    float2 scales, zeros;
    INLINE TwoTokens(const u8* of_tokens, int pair) {
        u32 both = load_word(of_tokens + 4 * pair), shifts = load_word(of_tokens + 2 * TOKENS + 4 * pair);
        scales = make_float2(low_bfloat16(both), high_bfloat16(both));
        zeros = make_float2(low_i16(shifts), high_i16(shifts));
    }
};

// Where a query's channel lies in shared memory, in floats: step by step the four that each lane takes.
INLINE int place_of_query(int query, int channel) {
    if (K_PATCHED) return 4 * (channel / 16 * LANES + 4 * query + channel % 16 / 4) + channel % 4;
    int quarter = channel / (CHANNELS / 4), of_quarter = channel % (CHANNELS / 4);
    return 4 * (of_quarter / 4 * LANES + 4 * query + quarter) + of_quarter % 4;
}

// Whether queries lie in shared memory as A of the tensor cores has them.
constexpr bool SPLIT_QUERIES = K_PATCHED && K_UNIT != CHANNEL;

// The queries of a warp as A, times what is common to a channel of K, and the sums that zeros are folded into.
struct Queries {
    u32 a[STEPS][4];
    float quarter;  // sum of row g over the channels of quarter j, as the tensor cores see them
    float sum;      // of row g over all channels
    float shift;    // sum of row g times the channels' zeros, over quarter j, where K has a scale for each channel

    // A of the four channels of a query that lie at ``at``, and what they add to ``shift``. scales: of these channels, as a block of K stores them, or
    // null for 1.
    INLINE void take(int at, const u8* scales, u32 (&of_four)[4]) {
        if constexpr (SPLIT_QUERIES) {
            uint4 x = reinterpret_cast<const uint4*>(shared_memory + QUERIES_AT)[at];
            of_four[0] = x.x, of_four[1] = x.y, of_four[2] = x.z, of_four[3] = x.w;
        } else {
            float4 x = reinterpret_cast<const float4*>(shared_memory + QUERIES_AT)[at];
            if (scales) {
                const uint2* channels = reinterpret_cast<const uint2*>(scales);
                uint2 of_channels = channels[0], zeros = channels[CHANNELS / 4];
                x.x *= low_bfloat16(of_channels.x), x.y *= high_bfloat16(of_channels.x);
                x.z *= low_bfloat16(of_channels.y), x.w *= high_bfloat16(of_channels.y);
                shift += x.x * low_i16(zeros.x) + x.y * high_i16(zeros.x) + x.z * low_i16(zeros.y) + x.w * high_i16(zeros.y);
            }
            split_rows(x.x, x.y, of_four[0], of_four[1]);
            split_rows(x.z, x.w, of_four[2], of_four[3]);
        }
    }

    // scales: of the channels, as a block of K stores them, or null for 1.
    INLINE void begin(const u8* scales, int lane) {
        u32 own_quarter = lane >> 3 == (lane & 3) ? ONES : 0;  // of B: both columns that lane j has of C
        float sums[4] = {};
        shift = 0.f;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            int channel = (lane & 3) * (CHANNELS / 4) + 4 * step, at = K_PATCHED ? place_of_query(lane >> 2, channel) / 4 : step * LANES + lane;
            take(at, scales ? scales + 2 * channel : nullptr, a[step]);
            multiply_add(sums, a[step], own_quarter, own_quarter);
        }
        quarter = keep(both_rows(sums).x);
        sum = sum_of_row(quarter);
    }
};

// Scores are of[..] times ``scale`` plus ``shift``. of[e][0], [1]: row g at tokens 8 e + 2 j and the next; [2], [3]: 32 tokens later.
struct Scores {
    float of[4][4], scale, shift;
    INLINE float& at(int token_pair, int i) { return of[token_pair & 3][2 * (token_pair >> 2) + i]; }  // of token 8 token_pair + 2 j + i
};

// Tiles to a turn of the loops below, where the code for one is short.
constexpr int KEY_TILES_A_TURN = ROOMY ? 2 : 1, VALUE_TILES_A_TURN = ROOMY && VALUE_TILES % 2 == 0 ? 2 : 1;

// q.K of a block, tile by tile: tile(t, part, taken, low, high) gives its pairs, of which ``taken`` were before in this turn.
template <class Pairs, class Tile>
INLINE void multiply_keys(Tile tile, const Queries& queries, Scores& score) {
    constexpr int at_once = Pairs::SHORT ? KEY_TILES_A_TURN : 1;
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
                tile(t + next, part_of_tile, next * KEY_PAIRS + part_of_tile * TAKEN_PAIRS, low, high);
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

// weights.V of a block, tile by tile: tile(i, taken, low, high) gives the pairs of the tiles i and i + VALUE_TILES, add(tile, products) takes the
// products.
template <class Pairs, class Tile, class Add>
INLINE void multiply_values(Tile tile, const u32 (&weights)[4][4], Add add) {
    constexpr int at_once = Pairs::SHORT ? VALUE_TILES_A_TURN : 1;
#pragma unroll at_once
    for (int i = 0; i < VALUE_TILES; i++) {
        typename Pairs::Pair low[VALUE_PAIRS], high[VALUE_PAIRS];
        tile(i, i % at_once * VALUE_PAIRS, low, high);
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

constexpr int STEPS_AT_ONCE = STEPS % 2 ? 1 : 2, VALUE_PIECES_AT_ONCE = 2;

// q.K of a block of pieces. scales: of its channels, or null. room: for offsets.
template <class Words>
INLINE void multiply_keys_of_pieces(Words block, const u8* scales, Queries& queries, u8* room, u32 ones, int lane, Scores& score) {
    Pieces<Words> pieces;
    pieces.template begin<CHANNELS>(block, lane);
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        float c[4][4] = {}, shift = 0.f;
        queries.shift = 0.f;
#pragma unroll 1
        for (int step = 0; step < STEPS; step += STEPS_AT_ONCE) {
            u32 q[STEPS_AT_ONCE][4];
            Piece next[STEPS_AT_ONCE];
#pragma unroll
            for (int e = 0; e < STEPS_AT_ONCE; e++) {
                float sums[4] = {};
                queries.take((step + e) * LANES + lane, scales ? scales + 2 * (16 * (step + e) + 4 * (lane & 3)) : nullptr, q[e]);
                multiply_add(sums, q[e], ONES, ONES);
                next[e] = pieces.piece(half * STEPS + step + e);
                shift += both_rows(sums).x * next[e].bias;
            }
            take_pieces(pieces, next, room, ones, lane, [&](int e, u32(&pairs)[PIECE_PAIRS]) {
#pragma unroll
                for (int t = 0; t < 4; t++) multiply_add(c[t], q[e], pairs[2 * t], pairs[2 * t + 1]);
            });
        }
#pragma unroll
        for (int t = 0; t < 4; t++) {
            float2 products = both_rows(c[t]);
            score.of[t][0] = score.of[t][2], score.of[t][1] = score.of[t][3];  // as registers cannot be numbered by ``half``
            score.of[t][2] = products.x + shift, score.of[t][3] = products.y + shift;
        }
    }
}

// weights.V of a block of pieces; ``sum`` is that of the weights of row g. add(tile, products) takes the products.
template <class Words, class Add>
INLINE void multiply_values_of_pieces(Words block, const u32 (&weights)[4][4], float sum, u8* room, u32 ones, int lane, Add add) {
    constexpr int at_once = VALUE_PIECES_AT_ONCE;
    Pieces<Words> pieces;
    pieces.template begin<CHANNELS>(block, lane);
#pragma unroll 1
    for (int tile = 0; tile < CHANNELS / 8; tile += at_once) {
        Piece next[at_once];
        float c[at_once][2][4] = {};  // two sums, as each waits for its last product
#pragma unroll
        for (int e = 0; e < at_once; e++) next[e] = pieces.piece(tile + e);
        take_pieces(pieces, next, room, ones, lane, [&](int e, u32(&pairs)[PIECE_PAIRS]) {
#pragma unroll
            for (int u = 0; u < 4; u++) multiply_add(c[e][u & 1], weights[u], pairs[2 * u], pairs[2 * u + 1]);
        });
#pragma unroll
        for (int e = 0; e < at_once; e++) {
            float2 even = both_rows(c[e][0]), odd = both_rows(c[e][1]);
            float shift = sum * next[e].bias;
            add(tile + e, make_float2(even.x + odd.x + shift, even.y + odd.y + shift));
        }
    }
}

// Gives use(words) a block of pieces where it is.
template <class Use>
INLINE void read_pieces(const u8* block, u32 staged, int head, Use use) {
    if (staged)
        use(SharedWords{staged + head});
    else
        use(PlainWords{block + head});
}

constexpr int MOST_OWN_WIDTH = 7;  // of the widths that may have a reader of their own

// How blocks are read whose book has its table in shared memory: by symbols that are the codes, with low bits behind them, or with so many that one
// pair fits a window; ANY for all other blocks, which are read where they are.
enum Form { SYMBOLS, SPLIT, LONG, ANY };

template <int KIND>
INLINE Form form_of(const Book& book) {
    constexpr int copies = KIND == K ? K_COPIES : V_COPIES;
    if (!copies) return ANY;
    if (book.levels > 128) return LONG;
    if (!(book.split[0] | book.split[1] | book.split[2] | book.split[3])) return SYMBOLS;
    return book.bits <= SHARED_PAIR_BITS ? SPLIT : LONG;
}

// Gives use(pairs) the reader of a block of WIDTH bits or more: one of its own for each width of which the codes of a turn fill whole words.
template <int WIDTH, int TURN, class Use>
INLINE void read_fixed(u32 width, PlainWords codes, u32 ones, int lane, Use use) {
    auto read = [&](auto reader) {
        reader.ones = ones;
        reader.begin(codes, lane, (CHANNELS * width + 31) / 32);
        use(reader);
    };
    if constexpr (WIDTH > MOST_OWN_WIDTH) {
        AnyWidthPairs reader;
        reader.width = width;
        read(reader);
    } else {
        if constexpr (2 * WIDTH * TURN % 32 == 0)
            if (width == WIDTH) return read(FixedPairs<WIDTH>());
        read_fixed<WIDTH + 1, TURN>(width, codes, ones, lane, use);
    }
}

// The book whose table a CTA keeps in shared memory: the mode of its blocks and how they are read.
struct Kept {
    u32 mode;
    Form form;
};

// Gives use(pairs) the reader of a coded block that fits it best. staged: address of its copy in shared memory, or 0. Every reader has ``take``
// and ``classes``.
template <int KIND, class Use>
INLINE void read_codes(u32 mode, const u8* block, u32 staged, const Book& book, Kept kept, u32 ones, int lane, Use use) {
    constexpr int bits = KIND == K ? K_BITS : V_BITS, copies = KIND == K ? K_COPIES : V_COPIES;
    constexpr int classes = KIND == K ? K_CLASSES : V_CLASSES;
    constexpr int head = scale_bytes(KIND == K ? K_UNIT : V_UNIT, CHANNELS);
    constexpr int turn = KIND == K ? KEY_TILES_A_TURN * KEY_PAIRS : VALUE_TILES_A_TURN * VALUE_PAIRS;
    constexpr u32 place = RESERVED + (KIND == K ? K_TABLE_AT : V_TABLE_AT);
    if (mode >= FIXED) {
        // With a book, or with pieces and steps of heads, few blocks have a fixed width.
        constexpr bool pieces = (KIND == K ? K_PATCHED && K_UNIT == HEAD : V_PATCHED && V_UNIT == HEAD);
        constexpr int least = bits || pieces ? MOST_OWN_WIDTH + 1 : 1;
        return read_fixed<least, turn>(mode - FIXED ? mode - FIXED : 8, PlainWords{block + head}, ones, lane, use);
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
            SharedWords words = {staged};
            Form form = mode == kept.mode && staged ? kept.form : ANY;
            if (form == SYMBOLS) return read(HuffmanPairs<SharedWords, Table, bits, false, false>{}, words);
            if (form == SPLIT) return read(HuffmanPairs<SharedWords, Table, SHARED_PAIR_BITS, true, false>{}, words);
            if (form == LONG) return read(HuffmanPairs<SharedWords, Table, MOST_PAIR_BITS, true, true>{}, words);
        }
        read(HuffmanPairs<PlainWords, PlainTable<bits>, MOST_PAIR_BITS, true, true>{}, PlainWords{block});
    }
}
