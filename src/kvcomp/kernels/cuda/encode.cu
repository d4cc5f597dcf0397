// Values to pages. The bytes are those of kvcomp.kernels.reference. Each step is one launch over all pages and heads of
// a sequence; nothing in between needs the host but the codebook.
//
// To be compiled without contraction to fused multiply-adds: the error bound is proved for the arithmetic as written
// (kvcomp.codec.quantise).
#include "quantise.cuh"
#include "count.cuh"
#include "measure.cuh"
#include "pack.cuh"

constexpr int QUANTISE_SHARED = MOST_UNITS * sizeof(Parameters) + 8 * WARPS + 16;
constexpr int COUNT_SHARED = 4 * (K_CLASSES > V_CLASSES ? K_CLASSES : V_CLASSES) * COUNTED * COUNTED;
constexpr int MEASURE_SHARED = K_PATCHED || V_PATCHED ? 4 * MAX_CODES * WARPS : 0;
constexpr int PLACE_SHARED = 8 * THREADS, PACK_SHARED = WARPS * SCRATCH_BYTES;
static_assert(QUANTISE_SHARED == KVC_QUANTISE_SHARED && COUNT_SHARED == KVC_COUNT_SHARED &&
                  MEASURE_SHARED == KVC_MEASURE_SHARED && PACK_SHARED == KVC_PACK_SHARED,
              "the host must reserve as much");
