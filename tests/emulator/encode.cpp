#include <encode.cu>

#include "emulator.h"

extern "C" int run(const char* kernel, const Arguments* a, int, Dim3 grid, int threads, size_t shared, int ascending) {
    void (*const kernels[])(Arguments) = {measure_tokens, quantise, count_pairs, measure_blocks, place_pages, pack};
    const char* const names[] = {"measure_tokens", "quantise", "count_pairs", "measure_blocks", "place_pages", "pack"};
    for (int i = 0; i < 6; i++)
        if (!strcmp(kernel, names[i])) return launch(grid, threads, shared, ascending, [=] { kernels[i](*a); });
    return WRONG_LAUNCH;
}
