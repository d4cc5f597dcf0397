// Modes and sizes of blocks and the places of pages (docs/format.md, section 5).
#pragma once
#include "choose.cuh"

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
INLINE u32 base_of(u32 head, int s, int lane) {
    return head >> (4 + 7 * (KIND == K ? lane & 3 : 2 * s + (lane >> 4))) & MAX_BASE;
}

template <int KIND>
INLINE void measure_block(const Arguments& a, int page, int head, int lane, u32* histogram) {
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
            if (Of<KIND>::PATCHED) {
                u32 of_pieces = scales + choose_pieces<KIND>(codes, a.lengths + place * STREAMS, histogram, lane);
                if (of_pieces < size) mode = PATCHED, size = of_pieces;
            }
        } else {
            u32 width = lengths_head<KIND>(units[0], units[1], lane) & 15, sum = units[0] + units[1];
            for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            size = scales + 4 + 8 * width + (sum * UNIT_BITS + 7) / 8;
        }
    }
    if (Of<KIND>::HUFFMAN) {
        a.lengths[place * STREAMS + lane] = (u16)units[0];
        a.lengths[place * STREAMS + LANES + lane] = (u16)units[1];
    }
    if (lane == 0) a.modes[place] = (u8)mode, a.sizes[place] = (size + 15) & ~15u;
}

// One warp a block. Grid: (CTAs). Dynamic shared memory: MEASURE_SHARED.
KERNEL void __launch_bounds__(THREADS) measure_blocks(const __grid_constant__ Arguments a) {
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    u32* histogram = reinterpret_cast<u32*>(shared_memory) + warp * MAX_CODES;  // if any block may have pieces
    for (int i = blockIdx.x * WARPS + warp; i < a.pages * a.heads * 2; i += gridDim.x * WARPS) {
        int page = i / (2 * a.heads), head = i / 2 % a.heads;
        if (i % 2 == K)
            measure_block<K>(a, page, head, lane, histogram);
        else
            measure_block<V>(a, page, head, lane, histogram);
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
