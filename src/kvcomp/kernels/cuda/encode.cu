// Values to pages: quantise, count pairs, choose modes and measure streams, place blocks and pages, pack. The bytes are those of
// kvcomp.kernels.reference. One launch each, over all pages and heads of a sequence; nothing in between needs the host but the codebook.
//
// To be compiled without contraction to fused multiply-adds: the error bound is proved for the arithmetic as written (quantise.py).
#include "page.cuh"

constexpr int CHANNELS = KVC_CHANNELS, VALUE = KVC_VALUE, WARPS = KVC_WARPS;
constexpr int K_UNIT = KVC_K_UNIT, V_UNIT = KVC_V_UNIT, K_CLASSES = KVC_K_CLASSES, V_CLASSES = KVC_V_CLASSES;
constexpr bool K_HUFFMAN = KVC_K_BITS > 0, V_HUFFMAN = KVC_V_BITS > 0;
constexpr int STREAMS = 64, UNIT_BITS = CHANNELS <= 128 ? 4 : 8, PAIRS = CHANNELS / 2;
constexpr int MOST_UNITS = CHANNELS > TOKENS ? CHANNELS : TOKENS;  // sets of a scale and a zero in a block
constexpr int MAX_CODES = 256, MAX_LEVELS = 128, MAX_BASE = 127;
constexpr float MAX_ZERO = 32767.f, LARGEST_FLOAT16 = 65504.f;
constexpr int COUNTED = 64;  // codes a side whose pairs are counted in shared memory
typedef typename Value<VALUE>::Bits Bits;

// A codebook for encoding; all zero if there is none. words: of class c from ``begin[c]`` on, of symbol hi_a * symbols[c] + hi_b the
// ``length | code << 8``, the code as it goes into the stream.
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
    u16* lengths;       // (pages, 2, heads, 64): of the streams in units
    u64* offsets;       // (pages + 1): of the pages and of the end, from ``out``
    u64* cursor;        // where the first page goes, and afterwards where the next may: one number, so that the host need not know
    u8* out;
    i32 pages, heads;
};

template <int KIND>
struct Of {
    static constexpr int UNIT = KIND == K ? K_UNIT : V_UNIT, CLASSES = KIND == K ? K_CLASSES : V_CLASSES;
    static constexpr bool HUFFMAN = KIND == K ? K_HUFFMAN : V_HUFFMAN;
};

// --- quantise (docs/format.md, section 3) ---

INLINE float lower(float a, float b) { return a != a || a < b ? a : b; }  // NaN stays
INLINE float higher(float a, float b) { return a != a || a > b ? a : b; }

INLINE int floor_log2(double x) {
    return x > 0 && x < __longlong_as_double(0x7ff0000000000000) ? (int)(__double_as_longlong(x) >> 52) - 1023 : 0;
}
INLINE double exact_power_of_two(int exponent) { return __longlong_as_double((i64)(max(exponent, -1022) + 1023) << 52); }

struct Parameters {
    float scale, inverse, zero;
    double bound;
    bool storable;
};

// Scale, zero and bound of a unit from its extremes, steps 1 to 3.
template <int UNIT>
INLINE Parameters parameters_of(float least, float most, double relative_scale) {
    double lo = least, hi = most, bound = relative_scale * (hi - lo) / 2, scale = 1., zero = 0.;
    if (lo == hi) {
        if (lo != 0) {
            int exponent = floor_log2(fabs(lo)) - 23;  // |lo| = integer 2^exponent, 24 bits
            i64 integer = exponent >= -900 ? (i64)(lo * exact_power_of_two(-exponent)) : 0;
            while (integer && !(integer & 1)) integer >>= 1, exponent++;
            scale = exact_power_of_two(exponent), zero = (double)integer;
        }
    } else {
        constexpr int significand = VALUE == FLOAT32 ? 24 : VALUE == FLOAT16 ? 11 : 8, least_exponent = VALUE == FLOAT16 ? -14 : -126;
        constexpr int scale_bits = UNIT == BLOCK ? 24 : 8;
        double peak = fmax(fabs(lo), fabs(hi)) + bound;
        double ulp = exact_power_of_two(max(floor_log2(peak), least_exponent) - (significand - 1));
        double fine = 2 * (bound - ulp / 2 - peak * 4.76837158203125e-07);  // 2^-21
        scale = exact_power_of_two(floor_log2(2 * bound));
        if (fine > 0 && fine < __longlong_as_double(0x7ff0000000000000)) {
            fine = __longlong_as_double(__double_as_longlong(fine) & -(1ll << (53 - scale_bits)));
            scale = fmax(scale, fine);
        }
    }
    bool storable = fabs(lo) < __longlong_as_double(0x7ff0000000000000) && fabs(hi) < __longlong_as_double(0x7ff0000000000000) &&
                    scale >= exact_power_of_two(-100) && scale <= exact_power_of_two(100);
    Parameters p;
    p.scale = storable ? (float)scale : 1.f;
    p.inverse = 1.f / p.scale;
    p.zero = lo == hi ? (float)zero : rintf((float)lo * p.inverse);
    p.storable = storable && fabsf(p.zero) <= MAX_ZERO;
    if (!p.storable) p.scale = p.inverse = 1.f, p.zero = 0.f;
    p.bound = bound;
    return p;
}

// The code of a value, or -1 if it misses its bound.
INLINE int code_of(float x, const Parameters& p) {
    float code = rintf(x * p.inverse) - p.zero;
    float back = Value<VALUE>::widen(Value<VALUE>::narrow((code + p.zero) * p.scale));
    return p.storable && code < MAX_LEVELS && fabs((double)back - (double)x) <= p.bound ? (int)code : -1;
}

// The same for the unit ``head``.
INLINE int code_by_step(float x, float step) {
    float nearest = rintf(x * (1.f / step)), error = x - nearest * step, half = step / 2;
    nearest += (error > half ? 1.f : 0.f) - (error < -half ? 1.f : 0.f);
    bool fits = nearest >= -128.f && nearest <= 127.f && (VALUE != FLOAT16 || fabsf(nearest * step) <= LARGEST_FLOAT16);
    return fits ? (int)nearest + 128 : -1;
}

constexpr int THREADS = WARPS * LANES;

// Extremes of each token over all heads. Grid: (pages, 2).
template <int KIND>
INLINE void range_of_tokens(const Arguments& a) {
    const Tensor& x = a.tensors[KIND];
    int page = blockIdx.x, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    for (int token = warp; token < TOKENS; token += WARPS) {
        const Bits* row = x.values + (page * (i64)TOKENS + token) * x.token;
        float lo = Value<VALUE>::widen(row[lane % CHANNELS]), hi = lo;
        for (int head = 0; head < a.heads; head++) {
            for (int c = lane; c < CHANNELS; c += LANES) {
                float value = Value<VALUE>::widen(row[head * x.head + c]);
                lo = lower(lo, value), hi = higher(hi, value);
            }
        }
        for (int step = 16; step; step /= 2) lo = lower(lo, __shfl_xor_sync(~0u, lo, step)), hi = higher(hi, __shfl_xor_sync(~0u, hi, step));
        if (lane == 0) x.token_range[(page * TOKENS + token) * 2] = lo, x.token_range[(page * TOKENS + token) * 2 + 1] = hi;
    }
}

KERNEL void __launch_bounds__(THREADS) measure_tokens(const __grid_constant__ Arguments a) {
    if (K_UNIT == TOKEN && blockIdx.y == K) range_of_tokens<K>(a);
    if (V_UNIT == TOKEN && blockIdx.y == V) range_of_tokens<V>(a);
}

// One block a CTA. Shared memory: extremes of the warps' parts, then the parameters of the units.
template <int KIND>
INLINE void quantise_block(const Arguments& a) {
    constexpr int unit = Of<KIND>::UNIT, units = unit == BLOCK || unit == HEAD ? 1 : unit == CHANNEL ? CHANNELS : TOKENS;
    const Tensor& x = a.tensors[KIND];
    int page = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    i64 block = (i64)page * a.heads + head;
    const Bits* values = x.values + head * x.head + page * (i64)TOKENS * x.token;
    Parameters* parameters = reinterpret_cast<Parameters*>(shared_memory);
    float* extremes = reinterpret_cast<float*>(shared_memory + MOST_UNITS * sizeof(Parameters));  // of the warps
    int* missed = reinterpret_cast<int*>(extremes + 2 * WARPS);
    if (threadIdx.x == 0) *missed = 0;
    auto value = [&](int token, int channel) { return Value<VALUE>::widen(values[token * x.token + channel]); };
    if (unit == BLOCK || unit == VECTOR) {
        float lo = value(warp, lane % CHANNELS), hi = lo;
        for (int token = warp; token < TOKENS; token += WARPS) {
            if (unit == VECTOR) lo = hi = value(token, lane % CHANNELS);
            for (int c = lane; c < CHANNELS; c += LANES) lo = lower(lo, value(token, c)), hi = higher(hi, value(token, c));
            if (unit == VECTOR) {
                for (int step = 16; step; step /= 2)
                    lo = lower(lo, __shfl_xor_sync(~0u, lo, step)), hi = higher(hi, __shfl_xor_sync(~0u, hi, step));
                if (lane == 0) parameters[token] = parameters_of<unit>(lo, hi, x.relative_scale);
            }
        }
        if (unit == BLOCK) {
            for (int step = 16; step; step /= 2)
                lo = lower(lo, __shfl_xor_sync(~0u, lo, step)), hi = higher(hi, __shfl_xor_sync(~0u, hi, step));
            if (lane == 0) extremes[2 * warp] = lo, extremes[2 * warp + 1] = hi;
            __syncthreads();
            if (threadIdx.x == 0) {
                for (int i = 1; i < WARPS; i++) lo = lower(lo, extremes[2 * i]), hi = higher(hi, extremes[2 * i + 1]);
                parameters[0] = parameters_of<unit>(lo, hi, x.relative_scale);
            }
        }
    }
    if (unit == CHANNEL) {
        for (int c = threadIdx.x; c < CHANNELS; c += THREADS) {
            float lo = value(0, c), hi = lo;
            for (int token = 1; token < TOKENS; token++) lo = lower(lo, value(token, c)), hi = higher(hi, value(token, c));
            parameters[c] = parameters_of<unit>(lo, hi, x.relative_scale);
        }
    }
    if (unit == TOKEN) {
        for (int t = threadIdx.x; t < TOKENS; t += THREADS) {
            const float* range = x.token_range + (page * TOKENS + t) * 2;
            parameters[t] = parameters_of<unit>(range[0], range[1], x.relative_scale);
        }
    }
    __syncthreads();
    // A set that cannot be stored makes the block raw, also where none of its values is looked at.
    bool fine = true;
    if (unit != HEAD)
        for (int i = threadIdx.x; i < units; i += THREADS) fine = fine && parameters[i].storable;
    u8* codes = x.codes + block * TOKENS * CHANNELS;
    for (int i = threadIdx.x; i < TOKENS * CHANNELS; i += THREADS) {
        int token = i / CHANNELS, channel = i % CHANNELS;
        int code = unit == HEAD ? code_by_step(value(token, channel), x.steps[head])
                                : code_of(value(token, channel), parameters[unit == BLOCK ? 0 : unit == CHANNEL ? channel : token]);
        fine = fine && code >= 0;
        codes[i] = (u8)code;
    }
    if (!fine) *missed = 1;
    __syncthreads();
    bool raw = *missed;
    if (threadIdx.x == 0) x.raw[block] = raw;
    if (unit != HEAD) {
        for (int i = threadIdx.x; i < units; i += THREADS) {
            bool kept = !raw || unit == TOKEN;  // token scales serve all heads; ``pack`` sees whether any is left
            x.scale[block * MOST_UNITS + i] = kept ? parameters[i].scale : 1.f;
            x.zero[block * MOST_UNITS + i] = kept ? (i32)parameters[i].zero : 0;
        }
    }
}

// Grid: (pages, heads, 2). Dynamic shared memory: QUANTISE_SHARED.
KERNEL void __launch_bounds__(THREADS) quantise(const __grid_constant__ Arguments a) {
    if (blockIdx.z == K)
        quantise_block<K>(a);
    else
        quantise_block<V>(a);
}

// --- pairs (section 4) ---

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

// Count the pairs of the blocks that are not raw. Grid: (CTAs, 2). Dynamic shared memory: COUNT_SHARED.
template <int KIND>
INLINE void count_blocks(const Arguments& a) {
    constexpr int classes = Of<KIND>::CLASSES, from = Of<KIND>::UNIT == HEAD ? 128 - COUNTED / 2 : 0;
    const Tensor& x = a.tensors[KIND];
    u32* near = reinterpret_cast<u32*>(shared_memory);
    for (int i = threadIdx.x; i < classes * COUNTED * COUNTED; i += THREADS) near[i] = 0;
    __syncthreads();
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    for (int block = blockIdx.x * WARPS + warp; block < a.pages * a.heads; block += gridDim.x * WARPS) {
        if (x.raw[block]) continue;
        for (int s = 0; s < 2; s++) {
            each_pair<KIND>(x.codes + (i64)block * TOKENS * CHANNELS, s, lane, [&](int its_class, int first, int second) {
                u32 i = first - from, j = second - from;
                if (i < COUNTED && j < COUNTED)
                    atomicAdd(&near[(its_class * COUNTED + i) * COUNTED + j], 1u);
                else
                    atomicAdd(&x.counts[(its_class * MAX_CODES + first) * MAX_CODES + second], 1u);
            });
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < classes * COUNTED * COUNTED; i += THREADS) {
        int its_class = i / (COUNTED * COUNTED), first = i / COUNTED % COUNTED + from, second = i % COUNTED + from;
        if (near[i]) atomicAdd(&x.counts[(its_class * MAX_CODES + first) * MAX_CODES + second], near[i]);
    }
}

KERNEL void __launch_bounds__(THREADS) count_pairs(const __grid_constant__ Arguments a) {
    if (K_HUFFMAN && blockIdx.y == K) count_blocks<K>(a);
    if (V_HUFFMAN && blockIdx.y == V) count_blocks<V>(a);
}

// --- modes and sizes (section 5) ---

// Bits of a pair under a book, or -1 if the book does not have it.
INLINE int bits_of(const Encoder& book, int its_class, int a, int b) {
    u32 first = a - book.first[its_class], second = b - book.first[its_class], levels = book.levels[its_class];
    if (first >= levels || second >= levels) return -1;
    int k = book.split[its_class];
    u32 word = book.words[book.begin[its_class] + (first >> k) * book.symbols[its_class] + (second >> k)];
    return (int)(word & 255) + 2 * k;
}

// What stands before the streams: bits 0 to 3 the width of the differences, then four bases.
template <int KIND>
INLINE u32 lengths_head(u32 low, u32 high, int lane) {
    u32 least_low = min(low, (u32)MAX_BASE), least_high = min(high, (u32)MAX_BASE);
    if (KIND == K) least_low = least_high = min(least_low, least_high);
    for (int step = KIND == K ? 4 : 1; step < (KIND == K ? 32 : 16); step *= 2) {
        least_low = min(least_low, __shfl_xor_sync(~0u, least_low, step));
        least_high = min(least_high, __shfl_xor_sync(~0u, least_high, step));
    }
    u32 most = max(low - least_low, high - least_high), head = 0;
    for (int step = 16; step; step /= 2) most = max(most, __shfl_xor_sync(~0u, most, step));
    for (int group = 0; group < 4; group++) {
        u32 of_low = __shfl_sync(~0u, least_low, KIND == K ? group : 16 * (group & 1));
        u32 of_high = __shfl_sync(~0u, least_high, KIND == K ? group : 16 * (group & 1));
        head |= (KIND == K || group < 2 ? of_low : of_high) << (4 + 7 * group);
    }
    return head | (most ? 32 - __clz((int)most) : 0);
}

template <int KIND>
INLINE u32 base_of(u32 head, int s, int lane) { return head >> (4 + 7 * (KIND == K ? lane & 3 : 2 * s + (lane >> 4))) & MAX_BASE; }

template <int KIND>
INLINE void measure_block(const Arguments& a, int page, int head, int lane) {
    constexpr int unit = Of<KIND>::UNIT, scales = scale_bytes(unit, CHANNELS);
    const Tensor& x = a.tensors[KIND];
    i64 block = (i64)page * a.heads + head, place = ((i64)page * 2 + KIND) * a.heads + head;
    const u8* codes = x.codes + block * TOKENS * CHANNELS;
    u32 mode = RAW, size = TOKENS * CHANNELS * sizeof(Bits), units[2] = {};
    if (!x.raw[block]) {
        mode = FIXED;
        if (Of<KIND>::HUFFMAN) {
            for (int which = 1; which >= 0 && mode == FIXED; which--) {
                const Encoder& book = x.books[which];
                if (!book.words) continue;
                bool covered = true;
                for (int s = 0; s < 2; s++) {
                    u32 total = 0;
                    each_pair<KIND>(codes, s, lane, [&](int its_class, int first, int second) {
                        int bits = bits_of(book, its_class, first, second);
                        covered = covered && bits >= 0;
                        total += bits;
                    });
                    units[s] = (total + UNIT_BITS - 1) / UNIT_BITS;
                }
                if (__all_sync(~0u, covered)) mode = which ? OWN_BOOK : DEFAULT_BOOK;
            }
        }
        if (mode == FIXED) {
            int most = 0;
            for (int i = lane; i < TOKENS * CHANNELS; i += LANES) {
                int value = unit == HEAD ? (int)codes[i] - 128 : (int)codes[i];
                most = max(most, value < 0 ? ~value : value);
            }
            for (int step = 16; step; step /= 2) most = max(most, __shfl_xor_sync(~0u, most, step));
            int width = (most ? 32 - __clz(most) : 0) + (unit == HEAD);
            if (width < 1) width = 1;
            mode = FIXED + width % 8;
            size = scales + 4 * STREAMS * ((CHANNELS * width + 31) / 32);
        } else {
            u32 width = lengths_head<KIND>(units[0], units[1], lane) & 15, sum = units[0] + units[1];
            for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            size = scales + 4 + 8 * width + (sum * UNIT_BITS + 7) / 8;
        }
    }
    a.lengths[place * STREAMS + lane] = (u16)units[0];
    a.lengths[place * STREAMS + LANES + lane] = (u16)units[1];
    if (lane == 0) a.modes[place] = (u8)mode, a.sizes[place] = (size + 15) & ~15u;
}

// One warp a block. Grid: (CTAs).
KERNEL void __launch_bounds__(THREADS) measure_blocks(const __grid_constant__ Arguments a) {
    int lane = threadIdx.x % LANES;
    for (int i = blockIdx.x * WARPS + threadIdx.x / LANES; i < a.pages * a.heads * 2; i += gridDim.x * WARPS) {
        int page = i / (2 * a.heads), head = i / 2 % a.heads;
        if (i % 2 == K)
            measure_block<K>(a, page, head, lane);
        else
            measure_block<V>(a, page, head, lane);
    }
}

INLINE u32 first_block(int heads) {
    return ((4 * (2 * heads + 1) + 15) & ~15) + ((K_UNIT == TOKEN) + (V_UNIT == TOKEN)) * TOKEN_SCALE_BYTES;
}

// Offsets of the pages. One CTA. Dynamic shared memory: THREADS sums of 64 bits.
KERNEL void __launch_bounds__(THREADS) place_pages(const __grid_constant__ Arguments a) {
    u64* sums = reinterpret_cast<u64*>(shared_memory);
    int share = (a.pages + THREADS - 1) / THREADS, begin = threadIdx.x * share, end = min(a.pages, begin + share);
    auto page_bytes = [&](int page) {
        u64 bytes = first_block(a.heads);
        for (int i = 0; i < 2 * a.heads; i++) bytes += a.sizes[(i64)page * 2 * a.heads + i];
        return bytes;
    };
    u64 mine = 0;
    for (int page = begin; page < end; page++) mine += page_bytes(page);
    sums[threadIdx.x] = mine;
    __syncthreads();
    u64 offset = *a.cursor;
    for (int i = 0; i < (int)threadIdx.x; i++) offset += sums[i];
    for (int page = begin; page < end; page++) {
        a.offsets[page] = offset;
        offset += page_bytes(page);
    }
    __syncthreads();  // all have read the cursor
    if (end == a.pages && begin < end) a.offsets[a.pages] = *a.cursor = offset;
}

// --- pack ---

INLINE u16 upper_half(float x) { return (u16)(__float_as_uint(x) >> 16); }  // of a scale that bfloat16 holds exactly

// Scales and zeros of a block, or of the tokens of a page.
template <int UNIT>
INLINE void write_scales(u8* to, const float* scale, const i32* zero, bool used, int lane) {
    if (UNIT == BLOCK) {
        if (lane == 0) reinterpret_cast<u32*>(to)[0] = __float_as_uint(scale[0]), reinterpret_cast<i32*>(to)[1] = zero[0];
    } else if (UNIT != HEAD) {
        constexpr int count = UNIT == CHANNEL ? CHANNELS : TOKENS;
        for (int i = lane; i < count; i += LANES) {
            reinterpret_cast<u16*>(to)[i] = used ? upper_half(scale[i]) : upper_half(1.f);
            reinterpret_cast<i16*>(to)[count + i] = used ? (i16)zero[i] : 0;
        }
    }
}

// Bits of one stream on their way into words that other lanes write too.
struct BitWriter {
    u32* words;
    u64 pending;
    u32 position;  // in bits

    INLINE void put(u32 value, u32 bits) {
        pending |= (u64)value << (position & 31);
        if ((position & 31) + bits >= 32) {
            atomicOr(words + (position >> 5), (u32)pending);
            pending >>= 32;
        }
        position += bits;
    }
    INLINE void end() {
        if (position & 31) atomicOr(words + (position >> 5), (u32)pending);
    }
};

template <int KIND>
INLINE void write_streams(const Tensor& x, const Encoder& book, const u8* codes, const u16* lengths, u32* words, u32 begin_bit, int lane) {
    u32 low = lengths[lane], high = lengths[LANES + lane];
    u32 head = lengths_head<KIND>(low, high, lane), width = head & 15;
    if (lane == 0) atomicOr(words + begin_bit / 32, head);
    u32 lengths_bit = begin_bit + 32, streams_bit = lengths_bit + 64 * width;
    for (int s = 0; s < 2; s++) {
        BitWriter difference = {words, 0, lengths_bit + width * (LANES * s + lane)};
        if (width) difference.put((s ? high : low) - base_of<KIND>(head, s, lane), width), difference.end();
    }
    u32 sum = low | high << 16, mine = sum;
    for (int step = 1; step < LANES; step *= 2) {
        u32 before = __shfl_up_sync(~0u, sum, step);
        sum += lane >= step ? before : 0;
    }
    u32 all = __shfl_sync(~0u, sum, LANES - 1) & 0xffff;
    sum -= mine;
    for (int s = 0; s < 2; s++) {
        BitWriter stream = {words, 0, streams_bit + (s ? (sum >> 16) + all : sum & 0xffff) * UNIT_BITS};
        each_pair<KIND>(codes, s, lane, [&](int its_class, int a, int b) {
            u32 first = a - book.first[its_class], second = b - book.first[its_class], k = book.split[its_class], low_bits = (1u << k) - 1;
            u32 word = book.words[book.begin[its_class] + (first >> k) * book.symbols[its_class] + (second >> k)], length = word & 255;
            stream.put(word >> 8 | (first & low_bits) << length | (second & low_bits) << (length + k), length + 2 * k);
        });
        stream.end();
    }
}

// Codes at a fixed width: word i of stream x is word 64 i + x.
template <int KIND>
INLINE void write_fixed(const u8* codes, u32* words, int width, int lane) {
    constexpr int unit = Of<KIND>::UNIT;
    u32 shift = unit == HEAD ? 128 - (1 << (width - 1)) : 0;
    for (int s = 0; s < 2; s++) {
        u32* to = words + LANES * s + lane;
        u64 pending = 0;
        int bits = 0;
        each_pair<KIND>(codes, s, lane, [&](int, int a, int b) {
            pending |= (u64)((a - shift) | (b - shift) << width) << bits;
            bits += 2 * width;
            if (bits >= 32) {
                *to = (u32)pending;
                to += STREAMS, pending >>= 32, bits -= 32;
            }
        });
        if (bits) *to = (u32)pending;
    }
}

template <int KIND>
INLINE void pack_block(const Arguments& a, int page, int head, int lane, u32* scratch) {
    constexpr int unit = Of<KIND>::UNIT, scales = scale_bytes(unit, CHANNELS);
    const Tensor& x = a.tensors[KIND];
    i64 block = (i64)page * a.heads + head, first = (i64)page * 2 * a.heads, place = first + KIND * a.heads + head;
    u32 before = 0, mode = a.modes[place], size = a.sizes[place];
    for (int i = lane; i < KIND * a.heads + head; i += LANES) before += a.sizes[first + i];
    for (int step = 16; step; step /= 2) before += __shfl_xor_sync(~0u, before, step);
    u32 offset = first_block(a.heads) + before;
    u8 *to_page = a.out + a.offsets[page], *to = to_page + offset;
    u32* directory = reinterpret_cast<u32*>(to_page);
    if (lane == 0) directory[KIND * a.heads + head] = offset | mode;
    if (KIND == V && head == a.heads - 1) {
        int words = 2 * a.heads + 1, padded = (words + 3) & ~3;
        if (lane == 0) directory[words - 1] = offset + size;
        for (int i = words + lane; i < padded; i += LANES) directory[i] = 0;
    }
    if (unit == TOKEN && head == 0) {
        bool used = false;
        for (int h = 0; h < a.heads; h++) used = used || !x.raw[block + h];
        write_scales<unit>(to_page + token_scales_at(a.heads, KIND, K_UNIT), x.scale + block * MOST_UNITS, x.zero + block * MOST_UNITS, used, lane);
    }
    if (mode == RAW) {
        const Bits* values = x.values + head * x.head + page * (i64)TOKENS * x.token;
        for (int i = lane; i < TOKENS * CHANNELS; i += LANES) reinterpret_cast<Bits*>(to)[i] = values[i / CHANNELS * x.token + i % CHANNELS];
        return;
    }
    const u8* codes = x.codes + block * TOKENS * CHANNELS;
    if (mode >= FIXED) {
        int width = mode - FIXED ? mode - FIXED : 8;
        u32 words = STREAMS * ((CHANNELS * width + 31) / 32);
        if (unit != TOKEN) write_scales<unit>(to, x.scale + block * MOST_UNITS, x.zero + block * MOST_UNITS, true, lane);
        write_fixed<KIND>(codes, reinterpret_cast<u32*>(to + scales), width, lane);
        for (u32 i = scales / 4 + words + lane; i < size / 4; i += LANES) reinterpret_cast<u32*>(to)[i] = 0;
        return;
    }
    __syncwarp();  // all have copied the block before
    for (u32 i = lane; i < size / 4; i += LANES) scratch[i] = 0;
    __syncwarp();
    if (unit != TOKEN) write_scales<unit>(reinterpret_cast<u8*>(scratch), x.scale + block * MOST_UNITS, x.zero + block * MOST_UNITS, true, lane);
    if (Of<KIND>::HUFFMAN) write_streams<KIND>(x, x.books[mode == OWN_BOOK], codes, a.lengths + place * STREAMS, scratch, 8 * scales, lane);
    __syncwarp();
    for (u32 i = lane; i < size / 4; i += LANES) reinterpret_cast<u32*>(to)[i] = scratch[i];
}

// One warp a block; each has scratch for the largest block of streams. Grid: (CTAs).
constexpr int SCRATCH_BYTES = (4 * CHANNELS > 4 * TOKENS ? 4 * CHANNELS : 4 * TOKENS) + 4 + 72 + TOKENS * CHANNELS * 9 / 8 + STREAMS + 32 & ~15;

KERNEL void __launch_bounds__(THREADS) pack(const __grid_constant__ Arguments a) {
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    u32* scratch = reinterpret_cast<u32*>(shared_memory + warp * SCRATCH_BYTES);
    for (int i = blockIdx.x * WARPS + warp; i < a.pages * a.heads * 2; i += gridDim.x * WARPS) {
        int page = i / (2 * a.heads), head = i / 2 % a.heads;
        if (i % 2 == K)
            pack_block<K>(a, page, head, lane, scratch);
        else
            pack_block<V>(a, page, head, lane, scratch);
    }
}

constexpr int QUANTISE_SHARED = MOST_UNITS * sizeof(Parameters) + 8 * WARPS + 16, COUNT_SHARED = 4 * (K_CLASSES > V_CLASSES ? K_CLASSES : V_CLASSES) * COUNTED * COUNTED;
constexpr int PLACE_SHARED = 8 * THREADS, PACK_SHARED = WARPS * SCRATCH_BYTES;
static_assert(QUANTISE_SHARED == KVC_QUANTISE_SHARED && COUNT_SHARED == KVC_COUNT_SHARED && PACK_SHARED == KVC_PACK_SHARED,
              "the host must reserve as much");
