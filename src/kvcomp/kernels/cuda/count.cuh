// How often each pair of codes occurs: what a codebook is made from.
#pragma once
#include "encode.cuh"

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
            const u8* codes = x.codes + (i64)block * TOKENS * CHANNELS;
            each_pair<KIND>(codes, s, lane, [&](int its_class, int first, int second) {
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
