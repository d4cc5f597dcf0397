// One instruction over and over, in CHAINS chains of a thread: cycles of the CTA to ``out[0]``. y, z: any numbers, which the compiler does not
// know. degree: how many lanes of a warp meet in a bank of shared memory, on different words.
constexpr int TURNS = 64, UNROLLED = 8;

__shared__ unsigned memory[4096];

template <class Step>
__device__ __forceinline__ void repeat(long long* out, Step step) {
    __syncthreads();
    long long begin = clock64();
    for (int turn = 0; turn < TURNS; turn++)
#pragma unroll
        for (int i = 0; i < UNROLLED; i++)
#pragma unroll
            for (int chain = 0; chain < CHAINS; chain++) step(chain);
    __syncthreads();
    if (threadIdx.x == 0) *out = clock64() - begin;
}

// Without a use of the results there would be no instructions.
template <class T>
__device__ __forceinline__ void use(long long* out, const T (&x)[CHAINS]) {
    T sum = 0;
    for (int i = 0; i < CHAINS; i++) sum += x[i];
    if (sum == (T)0x1234567) out[1] = 1;
}

#define RATE(NAME, TEXT)                                                                                   \
    extern "C" __global__ void NAME(long long* out, unsigned y, unsigned z, unsigned) {                 \
        unsigned x[CHAINS];                                                                                \
        for (int i = 0; i < CHAINS; i++) x[i] = threadIdx.x + i;                                           \
        repeat(out, [&](int i) { asm volatile(TEXT : "+r"(x[i]) : "r"(y), "r"(z)); });                  \
        use(out, x);                                                                                       \
    }

RATE(lop3, "lop3.b32 %0, %0, %1, %2, 0x96;")
RATE(shf, "shf.r.wrap.b32 %0, %0, %1, %2;")
RATE(prmt, "prmt.b32 %0, %0, %1, %2;")
RATE(imad, "mad.lo.u32 %0, %0, %1, %2;")
RATE(ffma, "{.reg .f32 a, b; mov.b32 a, %0; mov.b32 b, %1; fma.rn.f32 a, a, b, b; mov.b32 %0, a;}")

// Each word holds its own address, so a chain stays where it is.
extern "C" __global__ void lds(long long* out, unsigned, unsigned, unsigned degree) {
    unsigned base = (unsigned)__cvta_generic_to_shared(memory);
    for (int i = threadIdx.x; i < 4096; i += blockDim.x) memory[i] = base + 4 * i;
    __syncthreads();
    unsigned x[CHAINS];
    for (int i = 0; i < CHAINS; i++) x[i] = memory[threadIdx.x % 32 % degree * 32 + threadIdx.x % 32 / degree + 1024 * (i % 4)];
    repeat(out, [&](int i) { asm volatile("ld.shared.u32 %0, [%0];" : "+r"(x[i])); });
    use(out, x);
}

extern "C" __global__ void mma(long long* out, unsigned y, unsigned z, unsigned) {
    float c[CHAINS][4] = {}, sums[CHAINS];
    repeat(out, [&](int i) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, {%0,%1,%2,%3};"
            : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
            : "r"(y), "r"(z));
    });
    for (int i = 0; i < CHAINS; i++) sums[i] = c[i][0] + c[i][1] + c[i][2] + c[i][3];
    use(out, sums);
}
