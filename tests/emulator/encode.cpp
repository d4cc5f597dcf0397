#include <encode.cu>

#include "emulator.h"

// Everything up to the counts, then everything behind the codebooks.
extern "C" int run_quantise(const Arguments* a, int ascending) {
    u32 pages = a->pages, heads = a->heads;
    int result = launch({pages, 2, 1}, THREADS, 0, ascending, [=] { measure_tokens(*a); });
    if (!result) result = launch({pages, heads, 2}, THREADS, QUANTISE_SHARED, ascending, [=] { quantise(*a); });
    if (!result) result = launch({2, 2, 1}, THREADS, COUNT_SHARED, ascending, [=] { count_pairs(*a); });
    return result;
}

extern "C" int run_measure(const Arguments* a, int ascending) {
    int result = launch({3, 1, 1}, THREADS, 0, ascending, [=] { measure_blocks(*a); });
    if (!result) result = launch({1, 1, 1}, THREADS, PLACE_SHARED, ascending, [=] { place_pages(*a); });
    return result;
}

extern "C" int run_pack(const Arguments* a, int ascending) {
    return launch({3, 1, 1}, THREADS, PACK_SHARED, ascending, [=] { pack(*a); });
}
