// Values to codes under the bound (docs/format.md, section 3): step by step as kvcomp.codec.quantise says.
#pragma once
#include "encode.cuh"

INLINE float lower(float a, float b) { return a != a || a < b ? a : b; }  // NaN stays
INLINE float higher(float a, float b) { return a != a || a > b ? a : b; }

INLINE int floor_log2(double x) {
    return x > 0 && x < __longlong_as_double(0x7ff0000000000000) ? (int)(__double_as_longlong(x) >> 52) - 1023 : 0;
}
INLINE double exact_power_of_two(int exponent) {
    return __longlong_as_double((i64)(max(exponent, -1022) + 1023) << 52);
}

struct Parameters {
    float scale, inverse, zero;
    double bound;
    bool storable;
};

// Scale, zero and bound of a unit from its extremes, steps 1 to 3.
template <int UNIT>
INLINE Parameters parameters_of(float least, float most, double relative_scale) {
    double lo = least, hi = most, bound = relative_scale * (hi - lo) / 2, scale = 1., zero = 0.;
    if (lo == hi) {
        if (lo != 0) {
            int exponent = floor_log2(fabs(lo)) - 23;  // |lo| = integer 2^exponent, 24 bits
            i64 integer = exponent >= -900 ? (i64)(lo * exact_power_of_two(-exponent)) : 0;
            while (integer && !(integer & 1)) integer >>= 1, exponent++;
            scale = exact_power_of_two(exponent), zero = (double)integer;
        }
    } else {
        constexpr int significand = VALUE == FLOAT32 ? 24 : VALUE == FLOAT16 ? 11 : 8,
                      least_exponent = VALUE == FLOAT16 ? -14 : -126;
        constexpr int scale_bits = UNIT == BLOCK ? 24 : 8;
        double peak = fmax(fabs(lo), fabs(hi)) + bound;
        double ulp = exact_power_of_two(max(floor_log2(peak), least_exponent) - (significand - 1));
        double fine = 2 * (bound - ulp / 2 - peak * 4.76837158203125e-07);  // 2^-21
        scale = exact_power_of_two(floor_log2(2 * bound));
        if (fine > 0 && fine < __longlong_as_double(0x7ff0000000000000)) {
            fine = __longlong_as_double(__double_as_longlong(fine) & -(1ll << (53 - scale_bits)));
            scale = fmax(scale, fine);
        }
    }
    bool storable = fabs(lo) < __longlong_as_double(0x7ff0000000000000) &&
                    fabs(hi) < __longlong_as_double(0x7ff0000000000000) &&
                    scale >= exact_power_of_two(-100) && scale <= exact_power_of_two(100);
    Parameters p;
    p.scale = storable ? (float)scale : 1.f;
    p.inverse = 1.f / p.scale;
    p.zero = lo == hi ? (float)zero : rintf((float)lo * p.inverse);
    p.storable = storable && fabsf(p.zero) <= MAX_ZERO;
    if (!p.storable) p.scale = p.inverse = 1.f, p.zero = 0.f;
    p.bound = bound;
    return p;
}

// The code of a value, or -1 if it misses its bound.
INLINE int code_of(float x, const Parameters& p) {
    float code = rintf(x * p.inverse) - p.zero;
    float back = Value<VALUE>::widen(Value<VALUE>::narrow((code + p.zero) * p.scale));
    return p.storable && code < MAX_LEVELS && fabs((double)back - (double)x) <= p.bound ? (int)code : -1;
}

// The same for the unit ``head``.
INLINE int code_by_step(float x, float step) {
    float nearest = rintf(x * (1.f / step)), error = x - nearest * step, half = step / 2;
    nearest += (error > half ? 1.f : 0.f) - (error < -half ? 1.f : 0.f);
    bool fits = nearest >= -128.f && nearest <= 127.f && (VALUE != FLOAT16 || fabsf(nearest * step) <= LARGEST_FLOAT16);
    return fits ? (int)nearest + 128 : -1;
}

// Extremes of each token over all heads. Grid: (pages, 2).
template <int KIND>
INLINE void range_of_tokens(const Arguments& a) {
    const Tensor& x = a.tensors[KIND];
    int page = blockIdx.x, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    for (int token = warp; token < TOKENS; token += WARPS) {
        const Bits* row = x.values + (page * (i64)TOKENS + token) * x.token;
        float lo = Value<VALUE>::widen(row[lane % CHANNELS]), hi = lo;
        for (int head = 0; head < a.heads; head++) {
            for (int c = lane; c < CHANNELS; c += LANES) {
                float value = Value<VALUE>::widen(row[head * x.head + c]);
                lo = lower(lo, value), hi = higher(hi, value);
            }
        }
        for (int step = 16; step; step /= 2)
            lo = lower(lo, __shfl_xor_sync(~0u, lo, step)), hi = higher(hi, __shfl_xor_sync(~0u, hi, step));
        if (lane == 0)
            x.token_range[(page * TOKENS + token) * 2] = lo, x.token_range[(page * TOKENS + token) * 2 + 1] = hi;
    }
}

KERNEL void __launch_bounds__(THREADS) measure_tokens(const __grid_constant__ Arguments a) {
    if (K_UNIT == TOKEN && blockIdx.y == K) range_of_tokens<K>(a);
    if (V_UNIT == TOKEN && blockIdx.y == V) range_of_tokens<V>(a);
}

// One block a CTA. Shared memory: extremes of the warps' parts, then the parameters of the units.
template <int KIND>
INLINE void quantise_block(const Arguments& a) {
    constexpr int unit = Of<KIND>::UNIT,
                  units = unit == BLOCK || unit == HEAD ? 1 : unit == CHANNEL ? CHANNELS : TOKENS;
    const Tensor& x = a.tensors[KIND];
    int page = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    i64 block = (i64)page * a.heads + head;
    const Bits* values = x.values + head * x.head + page * (i64)TOKENS * x.token;
    Parameters* parameters = reinterpret_cast<Parameters*>(shared_memory);
    float* extremes = reinterpret_cast<float*>(shared_memory + MOST_UNITS * sizeof(Parameters));  // of the warps
    int* missed = reinterpret_cast<int*>(extremes + 2 * WARPS);
    if (threadIdx.x == 0) *missed = 0;
    auto value = [&](int token, int channel) { return Value<VALUE>::widen(values[token * x.token + channel]); };
    if (unit == BLOCK || unit == VECTOR) {
        float lo = value(warp, lane % CHANNELS), hi = lo;
        for (int token = warp; token < TOKENS; token += WARPS) {
            if (unit == VECTOR) lo = hi = value(token, lane % CHANNELS);
            for (int c = lane; c < CHANNELS; c += LANES)
                lo = lower(lo, value(token, c)), hi = higher(hi, value(token, c));
            if (unit == VECTOR) {
                for (int step = 16; step; step /= 2)
                    lo = lower(lo, __shfl_xor_sync(~0u, lo, step)), hi = higher(hi, __shfl_xor_sync(~0u, hi, step));
                if (lane == 0) parameters[token] = parameters_of<unit>(lo, hi, x.relative_scale);
            }
        }
        if (unit == BLOCK) {
            for (int step = 16; step; step /= 2)
                lo = lower(lo, __shfl_xor_sync(~0u, lo, step)), hi = higher(hi, __shfl_xor_sync(~0u, hi, step));
            if (lane == 0) extremes[2 * warp] = lo, extremes[2 * warp + 1] = hi;
            __syncthreads();
            if (threadIdx.x == 0) {
                for (int i = 1; i < WARPS; i++) lo = lower(lo, extremes[2 * i]), hi = higher(hi, extremes[2 * i + 1]);
                parameters[0] = parameters_of<unit>(lo, hi, x.relative_scale);
            }
        }
    }
    if (unit == CHANNEL) {
        for (int c = threadIdx.x; c < CHANNELS; c += THREADS) {
            float lo = value(0, c), hi = lo;
            for (int token = 1; token < TOKENS; token++)
                lo = lower(lo, value(token, c)), hi = higher(hi, value(token, c));
            parameters[c] = parameters_of<unit>(lo, hi, x.relative_scale);
        }
    }
    if (unit == TOKEN) {
        for (int t = threadIdx.x; t < TOKENS; t += THREADS) {
            const float* range = x.token_range + (page * TOKENS + t) * 2;
            parameters[t] = parameters_of<unit>(range[0], range[1], x.relative_scale);
        }
    }
    __syncthreads();
    // A set that cannot be stored makes the block raw, also where none of its values is looked at.
    bool fine = true;
    if (unit != HEAD)
        for (int i = threadIdx.x; i < units; i += THREADS) fine = fine && parameters[i].storable;
    u8* codes = x.codes + block * TOKENS * CHANNELS;
    for (int i = threadIdx.x; i < TOKENS * CHANNELS; i += THREADS) {
        int token = i / CHANNELS, channel = i % CHANNELS;
        int code = unit == HEAD ? code_by_step(value(token, channel), x.steps[head])
                                : code_of(value(token, channel),
                                          parameters[unit == BLOCK ? 0 : unit == CHANNEL ? channel : token]);
        fine = fine && code >= 0;
        codes[i] = (u8)code;
    }
    if (!fine) *missed = 1;
    __syncthreads();
    bool raw = *missed;
    if (threadIdx.x == 0) x.raw[block] = raw;
    if (unit != HEAD) {
        for (int i = threadIdx.x; i < units; i += THREADS) {
            bool kept = !raw || unit == TOKEN;  // token scales serve all heads; ``pack`` sees whether any is left
            x.scale[block * MOST_UNITS + i] = kept ? parameters[i].scale : 1.f;
            x.zero[block * MOST_UNITS + i] = kept ? (i32)parameters[i].zero : 0;
        }
    }
}

// Grid: (pages, heads, 2). Dynamic shared memory: QUANTISE_SHARED.
KERNEL void __launch_bounds__(THREADS) quantise(const __grid_constant__ Arguments a) {
    if (blockIdx.z == K)
        quantise_block<K>(a);
    else
        quantise_block<V>(a);
}
