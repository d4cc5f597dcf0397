#include <decompress.cu>

#include "emulator.h"

extern "C" int run(const char*, const Arguments* a, int, Dim3 grid, int threads, size_t shared, int ascending) {
    return launch(grid, threads, shared, ascending, [=] { decompress(*a); });
}
