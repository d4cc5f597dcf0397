#include <decode_attention.cu>

#include "emulator.h"

extern "C" int run_attend(const Arguments* a, int splits, int ascending) {
    int passes = (a->queries + QUERIES - 1) / QUERIES;
    Dim3 grid = {(u32)splits, (u32)(a->heads * passes), (u32)a->rows};
    int result = launch(grid, WARPS * LANES, SHARED_BYTES, ascending, [=] { attend(*a); });
    if (result || splits == 1) return result;
    Dim3 queries = {(u32)(a->rows * a->heads * a->queries), 1, 1};
    return launch(queries, (CHANNELS + 31) / 32 * 32, 0, ascending, [=] {
        if (threadIdx.x < CHANNELS) merge(*a, splits);
    });
}
