// Blocks into pages (docs/format.md, sections 2 to 5).
#pragma once
#include "measure.cuh"

INLINE u16 upper_half(float x) { return (u16)(__float_as_uint(x) >> 16); }  // of a scale that bfloat16 holds exactly

// Scales and zeros of a block, or of the tokens of a page.
template <int UNIT>
INLINE void write_scales(u8* to, const float* scale, const i32* zero, bool used, int lane) {
    if (UNIT == BLOCK) {
        if (lane == 0)
            reinterpret_cast<u32*>(to)[0] = __float_as_uint(scale[0]), reinterpret_cast<i32*>(to)[1] = zero[0];
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
INLINE void write_streams(const Tensor& x, const Encoder& book, const u8* codes, const u16* lengths, u32* words,
                          u32 begin_bit, int lane) {
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
            u32 first = a - book.first[its_class], second = b - book.first[its_class];
            u32 k = book.split[its_class], low_bits = (1u << k) - 1;
            u32 word = book.words[book.begin[its_class] + (first >> k) * book.symbols[its_class] + (second >> k)];
            u32 length = word & 255;
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

// Codes as pieces, which ``choose_pieces`` chose: heads, words, exceptions. to: words that are zero.
template <int KIND>
INLINE void write_pieces(const u8* codes, const u16* chosen, u32* to, int lane) {
    constexpr int pieces = CHANNELS / 8;
    u8* heads = reinterpret_cast<u8*>(to);
    u32 rows = 0;
    for (int n = lane; n < pieces; n += LANES) {
        heads[n] = (u8)(chosen[n] >> 8), heads[pieces + n] = (u8)(chosen[n] - 128), heads[2 * pieces + n] = (u8)chosen[LANES + n];
        rows += chosen[n] >> 8;
    }
    for (int step = 16; step; step /= 2) rows += __shfl_xor_sync(~0u, rows, step);
    u8* words = heads + piece_heads(CHANNELS);
    u16* exceptions = reinterpret_cast<u16*>(words + 2 * LANES * rows);
    for (int n = 0; n < pieces; n++) {
        int width = chosen[n] >> 8, frame = (int)(chosen[n] & 255) - 128, end = frame + (1 << width) - 1, bits = 0;
        u64 pending = 0;
        u8* row = words;
        for (int position = 0; position < 16; position++) {
            int code = code_of_piece<KIND>(codes, n, position, lane), stored = min(max(code, frame), end);
            pending |= (u64)(stored - frame) << bits;
            bits += width;
            if (bits >= 32) {
                reinterpret_cast<u32*>(row)[lane] = (u32)pending;
                row += 4 * LANES, pending >>= 32, bits -= 32;
            }
            u32 lanes = __ballot_sync(~0u, code != stored);
            if (code != stored)
                exceptions[__popc(lanes & ((1u << lane) - 1))] = (u16)(position * LANES + lane | (code - stored + 64) << 9);
            exceptions += __popc(lanes);
        }
        if (bits) reinterpret_cast<u16*>(row)[lane] = (u16)pending;
        words += 2 * LANES * width;
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
        write_scales<unit>(to_page + token_scales_at(a.heads, KIND, K_UNIT), x.scale + block * MOST_UNITS,
                           x.zero + block * MOST_UNITS, used, lane);
    }
    if (mode == RAW) {
        const Bits* values = x.values + head * x.head + page * (i64)TOKENS * x.token;
        for (int i = lane; i < TOKENS * CHANNELS; i += LANES)
            reinterpret_cast<Bits*>(to)[i] = values[i / CHANNELS * x.token + i % CHANNELS];
        return;
    }
    const u8* codes = x.codes + block * TOKENS * CHANNELS;
    if (mode >= FIXED) {
        int width = mode - FIXED ? mode - FIXED : 8;
        u32 words = STREAMS * ((CHANNELS * width + 31) / 32);
        if (unit != TOKEN)
            write_scales<unit>(to, x.scale + block * MOST_UNITS, x.zero + block * MOST_UNITS, true, lane);
        write_fixed<KIND>(codes, reinterpret_cast<u32*>(to + scales), width, lane);
        for (u32 i = scales / 4 + words + lane; i < size / 4; i += LANES) reinterpret_cast<u32*>(to)[i] = 0;
        return;
    }
    __syncwarp();  // all have copied the block before
    for (u32 i = lane; i < size / 4; i += LANES) scratch[i] = 0;
    __syncwarp();
    if (unit != TOKEN)
        write_scales<unit>(reinterpret_cast<u8*>(scratch), x.scale + block * MOST_UNITS,
                           x.zero + block * MOST_UNITS, true, lane);
    if (mode == PATCHED)
        write_pieces<KIND>(codes, a.lengths + place * STREAMS, scratch + scales / 4, lane);
    else if (Of<KIND>::HUFFMAN)
        write_streams<KIND>(x, x.books[mode == OWN_BOOK], codes, a.lengths + place * STREAMS, scratch, 8 * scales,
                            lane);
    __syncwarp();
    for (u32 i = lane; i < size / 4; i += LANES) reinterpret_cast<u32*>(to)[i] = scratch[i];
}

// One warp a block; each has scratch for the largest block of streams. Grid: (CTAs).
constexpr int SCRATCH_BYTES =
    (4 * CHANNELS > 4 * TOKENS ? 4 * CHANNELS : 4 * TOKENS) + 4 + 72 + TOKENS * CHANNELS * 9 / 8 + STREAMS + 32 & ~15;

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
