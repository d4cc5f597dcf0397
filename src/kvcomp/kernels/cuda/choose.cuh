// The width and frame of each piece of a patched block (docs/format.md, section 5): those of the fewest bits.
#pragma once
#include "encode.cuh"

constexpr int PIECE_CODES = 16 * LANES, EXCEPTION_BITS = 16, MOST_EXCEPTIONS = 255, LEAST_OFFSET = -64, MOST_OFFSET = 63;
static_assert(CHANNELS / 8 <= LANES, "two numbers of each piece have room in the lengths of 64 streams");

// The code of a lane at a position of piece ``n``, from -128 to 127.
template <int KIND>
INLINE int code_of_piece(const u8* codes, int n, int position, int lane) {
    constexpr int pieces_of_half = CHANNELS / 16;
    int g = lane >> 2, j = lane & 3, u = position >> 2, e = position & 3;
    int token = KIND == K ? 8 * (u + 4 * (n / pieces_of_half)) + g : 16 * u + 2 * j + (e & 1) + 8 * (e >> 1);
    int channel = KIND == K ? 16 * (n % pieces_of_half) + 4 * j + e : 8 * n + g;
    return (int)codes[token * CHANNELS + channel] - (Of<KIND>::UNIT == HEAD ? 128 : 0);
}

// Choose for each piece; returns the bytes of all. chosen: ``width << 8 | frame + 128`` of piece n in [n], its exceptions in [32 + n].
// below: room for 256 numbers, how many codes are no more than each.
template <int KIND>
INLINE u32 choose_pieces(const u8* codes, u16* chosen, u32* below, int lane) {
    u32 bytes = piece_heads(CHANNELS);
    for (int n = 0; n < CHANNELS / 8; n++) {
        for (int i = lane; i < MAX_CODES; i += LANES) below[i] = 0;
        __syncwarp();
        int low = 127, high = -128;
        for (int position = 0; position < 16; position++) {
            int code = code_of_piece<KIND>(codes, n, position, lane);
            atomicAdd(below + code + 128, 1u);
            low = min(low, code), high = max(high, code);
        }
        for (int step = 16; step; step /= 2)
            low = min(low, __shfl_xor_sync(~0u, low, step)), high = max(high, __shfl_xor_sync(~0u, high, step));
        __syncwarp();
        // Sums up to each code: of a lane's eight, then of the lanes below.
        u32 mine = 0;
        for (int i = 0; i < MAX_CODES / LANES; i++) mine += below[MAX_CODES / LANES * lane + i];
        u32 sum = mine;
        for (int step = 1; step < LANES; step *= 2) {
            u32 before = __shfl_up_sync(~0u, sum, step);
            sum += lane >= step ? before : 0;
        }
        sum -= mine;
        for (int i = 0; i < MAX_CODES / LANES; i++) below[MAX_CODES / LANES * lane + i] = sum += below[MAX_CODES / LANES * lane + i];
        __syncwarp();
        u32 best = ~0u;  // bits << 12 | width << 8 | frame + 128
        for (int width = 0; width <= 8; width++) {
            int last = 128 - (1 << width);
            for (int frame = min(low, last) + lane; frame <= min(high, last); frame += LANES) {
                int end = frame + (1 << width) - 1;  // the greatest code that is no exception
                int inside = (int)below[end + 128] - (frame > -128 ? (int)below[frame + 127] : 0), outside = PIECE_CODES - inside;
                if (outside <= MOST_EXCEPTIONS && low - frame >= LEAST_OFFSET && high - end <= MOST_OFFSET)
                    best = min(best, (u32)(PIECE_CODES * width + EXCEPTION_BITS * outside) << 12 | width << 8 | (frame + 128));
            }
        }
        for (int step = 16; step; step /= 2) best = min(best, __shfl_xor_sync(~0u, best, step));
        u32 width = best >> 8 & 15, outside = ((best >> 12) - PIECE_CODES * width) / EXCEPTION_BITS;
        if (lane == 0) chosen[n] = (u16)best & 0xfff, chosen[LANES + n] = (u16)outside;
        bytes += PIECE_CODES / 8 * width + EXCEPTION_BITS / 8 * outside;
        __syncwarp();  // all have read the sums
    }
    return bytes;
}
