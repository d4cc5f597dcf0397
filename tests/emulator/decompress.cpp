#include <decompress.cu>

#include "emulator.h"

extern "C" int run_decompress(const Arguments* a, int blocks, int ascending) {
    return launch({(u32)blocks, 1, 1}, WARPS * LANES, WARPS * TOKENS * CHANNELS, ascending, [=] { decompress(*a); });
}
