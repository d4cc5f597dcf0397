// softmax(cap(scaling q.K)) V over compressed pages, raw first tokens and a raw tail, in one launch (KVComp, arXiv 2509.00579, "Fetch").
//
// A warp takes one page at a time for one KV head and at most eight queries: it decodes the block of K tile by tile into tensor-core
// operands, takes the softmax online (Milakov & Gimelshein, 2018), and decodes the block of V into the sums. While one block is decoded the
// next is copied to shared memory. The warps of a CTA share a sequence's decode tables; CTAs split the context, and ``merge`` joins them.
//
// Scales are folded into the queries or the scores (K) and into the weights (V), zeros into one number for each query, so that the
// products run on 128 + code. Sums lie in shared memory; they are scaled down only when a score is higher by far than the one that weights
// are relative to, so that a weight is at most 2^SLACK.
#include "products.cuh"

// What readers need, in registers: the books of K and V whose tables are kept, and BFLOAT16_128.
struct Reading {
    Kept k, v;
    u32 ones;
};

// What a warp knows of the query of row g; ``total`` is a sum over the tokens of lane j alone.
struct Softmax {
    float peak = LOWEST, total = 0.f;  // peak: what weights are relative to, at most SLACK below the highest score
    float rest[V_CLASSES] = {};        // what every channel of a class gets besides its products
};

template <int KIND>
INLINE bool is_patched(u32 mode) { return (KIND == K ? K_PATCHED : V_PATCHED) && mode == PATCHED; }

// The zero of the unit ``head``; of no other.
template <int KIND>
INLINE float zero_of_steps(u32 mode) { return is_patched<KIND>(mode) ? 0.f : mode < FIXED ? -128.f : -(float)(1 << (mode - FIXED ? mode - FIXED - 1 : 7)); }

// What the operands of a coded block are less than its codes; of a block of pieces each piece adds that.
template <int KIND>
INLINE float first_code(u32 mode, const Book& book, int its_class) {
    return is_patched<KIND>(mode) ? 0.f : mode < FIXED ? (float)(book.first[its_class] - 128) : -128.f;
}

// The raw values of an item, of a page or beside the pages.
INLINE RawPairs<VALUE> raw_values(const Item& item, int kind, const RawTensor& sinks, const RawTensor& tail, const Arguments& a, int row,
                                  int head, int lane) {
    typedef const typename RawPairs<VALUE>::Bits* Values;
    if (item.chunk == IN_PAGE) return {reinterpret_cast<Values>(block_of(item, kind)), CHANNELS, item.tokens, lane};
    return RawChunk(a, row, item.chunk).of(sinks, tail, row, head, lane);
}

// Scores of one item, log base 2. at_warp: the warp's part of shared memory.
INLINE void score_item(const Item& item, const Arguments& a, const Book* books, Queries& queries, const Reading& reading, u32 at_warp, int row, int head,
                       int lane, Scores& score) {
    u32 mode = mode_of(item, K), staged = RESERVED + at_warp + K_STAGED;
    score.scale = 1.f, score.shift = 0.f;
    if (item.chunk >= 0 || mode == RAW) {
        RawPairs<VALUE> raw = raw_values(item, K, a.sinks_k, a.tail_k, a, row, head, lane);
        if (K_UNIT == CHANNEL || K_PATCHED) queries.begin(nullptr, lane);
        multiply_keys<RawPairs<VALUE>>([&](int t, int part, int, auto& low, auto& high) { raw.keys(t, part * 2 * TAKEN_PAIRS, CHANNELS / 4, low, high); }, queries, score);
        return;
    }
    u32 at = item.k_staged ? staged + scale_stage(K_UNIT) : 0;
    const u8* block = at ? shared_memory + at - RESERVED : block_of(item, K);
    const Book& book = books[mode == OWN_BOOK];
    const u8* of_channels = K_UNIT == CHANNEL ? block : nullptr;
    if (is_patched<K>(mode)) {
        read_pieces(block, at, scale_bytes(K_UNIT, CHANNELS), [&](auto words) {
            multiply_keys_of_pieces(words, of_channels, queries, shared_memory + at_warp + OFFSETS, reading.ones, lane, score);
        });
    } else {
        if (K_UNIT == CHANNEL || K_PATCHED) queries.begin(of_channels, lane);
        read_codes<K>(mode, block, at, book, reading.k, reading.ones, lane, [&](auto& reader) {
            typedef Bare<decltype(reader)> Pairs;
            multiply_keys<Pairs>([&](int, int, int taken, auto& low, auto& high) { reader.take(taken, low, high); }, queries, score);
        });
    }
    float first = first_code<K>(mode, book, K_CLASSES == 1 ? 0 : lane & 3);
    score.shift = K_CLASSES == 1 && K_UNIT != CHANNEL ? queries.sum * first : sum_of_row(queries.quarter * first + queries.shift);
    if (K_UNIT == BLOCK) {
        score.scale = __uint_as_float(load_word(block));
        score.shift = (score.shift + (float)(i32)load_word(block + 4) * queries.sum) * score.scale;
    } else if (K_UNIT == HEAD) {
        score.scale = a.k_steps[head];
        score.shift = (score.shift + zero_of_steps<K>(mode) * queries.sum) * score.scale;
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

// Add what scores lack, of the query of row g. of_query: (slots, 64).
INLINE void add_turned(Scores& score, const float* of_query, const Arguments& a, const Item& item, int index, int lane) {
    const float* turned = of_query + (i64)TOKENS * (item.chunk == IN_PAGE ? index : a.capacity + item.chunk) + 2 * (lane & 3);
    float factor = SOFTCAP ? a.scaling : a.scaling * LOG2_E;
#pragma unroll
    for (int t = 0; t < 8; t++) {
        float2 two = *reinterpret_cast<const float2*>(turned + 8 * t);
        score.at(t, 0) = score.at(t, 0) * score.scale + score.shift + two.x * factor;
        score.at(t, 1) = score.at(t, 1) * score.scale + score.shift + two.y * factor;
    }
    score.scale = 1.f, score.shift = 0.f;
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
INLINE void add_item(const Item& item, const Arguments& a, const Book* books, Scores& weight, const Reading& reading, u32 at, int of_row, int head,
                     int lane, float2* sums, Softmax& row) {
    u32 mode = mode_of(item, V), staged = item.v_staged ? RESERVED + at + V_STAGED + scale_stage(V_UNIT) : 0;
    bool raw = item.chunk >= 0 || mode == RAW;
    const u8* block = staged ? shared_memory + staged - RESERVED : block_of(item, V);
    float scale = 1.f, zero = 0.f;
    if (V_UNIT == BLOCK && !raw) scale = __uint_as_float(load_word(block)), zero = (float)(i32)load_word(block + 4);
    if (V_UNIT == HEAD && !raw) scale = a.v_steps[head], zero = zero_of_steps<V>(mode);
    if (BY_TOKEN) {
        const u8* scales = V_UNIT == TOKEN ? shared_memory + at + V_STAGED : block;
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
        multiply_values<RawPairs<VALUE>>([&](int i, int, auto& low, auto& high) { tokens.channels(i, CHANNELS / 2, low, high); }, weights, add);
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
    auto first_of = [&](int its_class) { return first_code<V>(mode, book, its_class); };
    if (V_UNIT != CHANNEL) {
#pragma unroll
        for (int c = 0; c < V_CLASSES; c++) row.rest[c] += shift + sum * first_of(c);
    }
    auto add_channels = [&](int tile, float2 products) {
        u32 both = load_word(block + 2 * (8 * tile + 2 * (lane & 3)));
        u32 zeros = load_word(block + 2 * (CHANNELS + 8 * tile + 2 * (lane & 3)));
        float first = first_of(V_CLASSES == 1 ? 0 : class_of_tile<CHANNELS>(tile));
        products.x = (products.x + sum * (first + low_i16(zeros))) * low_bfloat16(both);
        products.y = (products.y + sum * (first + high_i16(zeros))) * high_bfloat16(both);
        add(tile, products);
    };
    if (is_patched<V>(mode)) {
        read_pieces(block, staged, scale_bytes(V_UNIT, CHANNELS), [&](auto words) {
            u8* room = shared_memory + at + OFFSETS;
            if constexpr (V_UNIT == CHANNEL)
                multiply_values_of_pieces(words, weights, sum, room, reading.ones, lane, add_channels);
            else
                multiply_values_of_pieces(words, weights, sum, room, reading.ones, lane, add);
        });
        return;
    }
    read_codes<V>(mode, block, staged, book, reading.v, reading.ones, lane, [&](auto& reader) {
        typedef Bare<decltype(reader)> Pairs;
        auto tile = [&](int i, int taken, auto& low, auto& high) {
            if (V_CLASSES > 1) reader.classes(book, class_of_tile<CHANNELS>(i), class_of_tile<CHANNELS>(i + VALUE_TILES), lane);
            reader.take(taken, low, high);
        };
        if constexpr (V_UNIT == CHANNEL)
            multiply_values<Pairs>(tile, weights, add_channels);
        else
            multiply_values<Pairs>(tile, weights, add);
    });
}

// The mode of the blocks whose table a CTA keeps: what the head's middle page has where heads have steps of their own, as nearly all pages of a head
// then take the same of two books. Other rows train their own book, which all but the first pages take.
template <int KIND>
INLINE u32 mode_to_keep(const Arguments& a, int row, int head) {
    i32 pages = a.count[row];
    if ((KIND == K ? K_UNIT : V_UNIT) != HEAD || !pages) return OWN_BOOK;
    const u32* directory = reinterpret_cast<const u32*>(a.pages[(i64)row * a.capacity + pages / 2]);
    return (directory[KIND * a.heads + head] & 15) == DEFAULT_BOOK ? DEFAULT_BOOK : OWN_BOOK;
}

// Load the row's books, the tables to be kept and the queries to shared memory.
INLINE void fill_shared(const Arguments& a, int row, int head, int first_query) {
    int thread = threadIdx.x;
    constexpr int threads = WARPS * LANES;
    u32* books = reinterpret_cast<u32*>(shared_memory + BOOKS_AT);
    const u32* from = reinterpret_cast<const u32*>(a.books + 4 * row);
    for (int i = thread; i < 4 * (int)sizeof(Book) / 4; i += threads) books[i] = from[i];
    u32 k_mode = mode_to_keep<K>(a, row, head), v_mode = mode_to_keep<V>(a, row, head);
    if (thread == 0) *reinterpret_cast<uint4*>(shared_memory + CONSTANTS_AT) = {a.ones, k_mode, v_mode, 0};
    const u32 *k_table = a.books[4 * row + (k_mode == OWN_BOOK)].table, *v_table = a.books[4 * row + 2 + (v_mode == OWN_BOOK)].table;
    if (K_COPIES && k_table) {
        u32* table = reinterpret_cast<u32*>(shared_memory + K_TABLE_AT);
        for (int i = thread; i < K_CLASSES * K_COPIES << K_BITS; i += threads) table[i] = k_table[i / max(1, K_COPIES)];
    }
    if (V_COPIES && v_table) {
        u32* table = reinterpret_cast<u32*>(shared_memory + V_TABLE_AT);
        for (int i = thread; i < V_CLASSES * V_COPIES << V_BITS; i += threads) table[i] = v_table[i / max(1, V_COPIES)];
    }
    float* queries = reinterpret_cast<float*>(shared_memory + QUERIES_AT);
    typedef typename Value<QUERY_VALUE>::Bits Bits;
    const Bits* q = reinterpret_cast<const Bits*>(a.q) + ((i64)(row * a.heads + head) * a.queries + first_query) * CHANNELS;
    for (int i = thread; i < QUERIES * CHANNELS; i += threads) {
        int query = i / CHANNELS;
        float x = first_query + query < a.queries ? Value<QUERY_VALUE>::widen(q[i]) * (SOFTCAP ? a.scaling : a.scaling * LOG2_E) : 0.f;
        queries[place_of_query(query, i % CHANNELS)] = x;
    }
    if (!SPLIT_QUERIES) return;
    __syncthreads();
    for (int i = thread; i < QUERIES * CHANNELS / 4; i += threads) {
        float4 x = reinterpret_cast<const float4*>(queries)[i];
        uint4 split;
        split_rows(x.x, x.y, split.x, split.y);
        split_rows(x.z, x.w, split.z, split.w);
        reinterpret_cast<uint4*>(queries)[i] = split;
    }
}

// Everything a warp has to do; leaves its sums, peaks and totals in shared memory.
INLINE void attend_items(const Arguments& a, int row, int head, int first_query) {
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, query = first_query + (lane >> 2);
    u32 mine = WARPS_AT + warp * WARP_BYTES;
    if (ROOMY) lane = keep((u32)lane), mine = keep(mine);
    const Book* books = reinterpret_cast<const Book*>(shared_memory + BOOKS_AT);
    float2* sums = reinterpret_cast<float2*>(shared_memory + mine + SUMS) + lane;
    for (int tile = 0; tile < CHANNELS / 8; tile++) sums[tile * LANES] = make_float2(0.f, 0.f);
    for (int i = OFFSETS; i < WARP_BYTES; i += 4 * LANES) reinterpret_cast<u32*>(shared_memory + mine + i)[lane] = 0;

    Queries queries;
    if (K_UNIT != CHANNEL) queries.begin(nullptr, lane);
    Softmax softmax;
    u32 k_mode = K_UNIT == HEAD ? load_shared(RESERVED + CONSTANTS_AT + 4) : OWN_BOOK;
    u32 v_mode = V_UNIT == HEAD ? load_shared(RESERVED + CONSTANTS_AT + 8) : OWN_BOOK;
    Kept of_k = {k_mode, form_of<K>(books[k_mode == OWN_BOOK])}, of_v = {v_mode, form_of<V>(books[2 + (v_mode == OWN_BOOK)])};
    Reading reading = {of_k, of_v, load_shared(RESERVED + CONSTANTS_AT)};
    // Query i is that of new token i mod new_tokens, which sees the tail up to itself.
    int tail_end = *a.tail_tokens - (a.new_tokens - 1) + query % a.new_tokens;
    int pages = a.count[row], items = pages + raw_chunks(a, row), step = gridDim.x * WARPS;
    const u64* addresses = a.pages + (i64)row * a.capacity;
    const i32* valid = a.valid + (i64)row * a.capacity;
    if (ROOMY) addresses = keep(addresses), valid = keep(valid);

    const float* of_query = a.turned + ((i64)(row * a.heads + head) * a.queries + min(query, a.queries - 1)) * a.slots * TOKENS;  // if TURNED

    int index = blockIdx.x * WARPS + warp;
    u64 address = index < pages ? addresses[index] : 0;
    i32 tokens = index < pages ? valid[index] : 0;
    auto describe = [&](Item& item, int number) {
        item.chunk = number < items ? number - pages : NONE;
        if (number < pages) describe_page(item, a, head, address, tokens);
    };
    auto look_ahead = [&](int number) {
        if (number >= pages) return;
        if (!ROOMY) addresses = a.pages + (i64)keep((u32)row) * a.capacity, valid = a.valid + (i64)keep((u32)row) * a.capacity;  // not held
        address = addresses[number], tokens = valid[number];
    };
    Item item = {};
    describe(item, index);
    look_ahead(index + step);
    stage<K>(item, a, RESERVED + mine + K_STAGED, lane);
    for (; index < items; index += step) {
        await_copies<0>();
        __syncwarp();  // K is there, and all have read the last V
        stage<V>(item, a, RESERVED + mine + V_STAGED, lane);
        Item next = item;
        auto go_on = [&] {
            describe(next, index + step);
            look_ahead(index + 2 * step);
        };
        if (ROOMY) go_on();
        Scores score;
        score_item(item, a, books, queries, reading, mine, row, head, lane, score);
        if constexpr (TURNED) add_turned(score, of_query, a, item, index, lane);
        __syncwarp();  // all have read this K
        if (!ROOMY) go_on();
        stage<K>(next, a, RESERVED + mine + K_STAGED, lane);
        float shrink = item.chunk == IN_PAGE && item.tokens == TOKENS ? weigh<true>(score, a, TOKENS, lane, softmax)
                                                                      : weigh_some(score, a, item, row, tail_end, lane, softmax);
        if (__any_sync(~0u, shrink != 1.f)) scale_down(shrink, sums, softmax);
        await_copies<1>();
        __syncwarp();
        add_item(item, a, books, score, reading, mine, row, head, lane, sums, softmax);
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
