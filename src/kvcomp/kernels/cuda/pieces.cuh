// Blocks of pieces, with a width and a frame each, and exceptions (docs/format.md, sections 4 and 5), as operands of the tensor cores.
//
// A piece is 16 codes of each lane, eight pairs: of K 16 channels of 32 tokens, of V 8 channels of 64 tokens. The operands of its fields are
// 128 + field. Exceptions are a second, sparse operand: how far each code is off.
#pragma once
#include "streams.cuh"

constexpr int PIECE_PAIRS = 8;
constexpr int OFFSET_BYTES = 2 * 16 * LANES;  // a warp's room for the offsets of a piece

struct Piece {
    int width, exceptions;
    float bias;  // what the operands of the fields are off by
};

// The pieces of a block, one after the other.
template <class Words>
struct Pieces {
    u32 heads;   // of piece ``lane``: width | exceptions << 16
    float bias;  // of piece ``lane``
    Words words, exceptions;  // of this lane and the next piece

    // block: what follows the scales.
    template <int CHANNELS>
    INLINE void begin(Words block, int lane) {
        constexpr int count = CHANNELS / 8;
        static_assert(count <= LANES, "each piece has a lane");
        u32 width = 0, frame = 0, outside = 0;
        if (lane < count) width = block.byte(lane), frame = block.byte(count + lane), outside = block.byte(2 * count + lane);
        heads = width | outside << 16;
        bias = (float)(((i32)(frame << 24) >> 24) - (width ? 128 : 0));
        u32 all = width;
        for (int step = 16; step; step /= 2) all += __shfl_xor_sync(~0u, all, step);
        words = block + (piece_heads(CHANNELS) + 4 * lane);
        exceptions = block + (piece_heads(CHANNELS) + 2 * LANES * all + 2 * lane);
    }

    INLINE Piece piece(int n) const {
        u32 head = __shfl_sync(~0u, heads, n);
        return {(int)(head & 0xffff), (int)(head >> 16), __shfl_sync(~0u, bias, n)};
    }
};

// A lane's fields of WIDTH bits: whole words, and half a one if there is an odd number of bits.
template <int WIDTH, class Words>
INLINE void take_fields(Words words, u32 ones, int lane, u32 (&pairs)[PIECE_PAIRS]) {
    u32 of_lane[WIDTH / 2 + 1];
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i++) of_lane[i] = words.word(4 * LANES * i);
    if (WIDTH % 2) of_lane[WIDTH / 2] = (words + -2 * lane).half(4 * LANES * (WIDTH / 2));
    unpack<WIDTH>(of_lane, 0, ones, pairs);
#pragma unroll
    for (int i = 0; i < PIECE_PAIRS; i++) pairs[i] = keep(pairs[i]);  // or the compiler takes ``ones`` behind all widths
}

// Fields of any of these widths; the last one without a question.
template <int WIDTH, int... OTHERS, class Words>
INLINE void take_fields_of(int width, Words words, u32 ones, int lane, u32 (&pairs)[PIECE_PAIRS]) {
    if (width == WIDTH) return take_fields<WIDTH>(words, ones, lane, pairs);
    if constexpr (sizeof...(OTHERS) > 1) take_fields_of<OTHERS...>(width, words, ones, lane, pairs);
    else take_fields<OTHERS...>(words, ones, lane, pairs);
}

// How far the codes of N pieces are off, as pairs of bfloat16. room: N OFFSET_BYTES of the warp, which are zero and shall be so afterwards: of each
// lane 16 bytes for the first eight positions, then as many for the others.
template <int N, class Words>
struct Offsets {
    u8* room;
    Words exceptions;  // of this lane
    int first, all;    // exceptions of the first piece, and of all

    // The offset of an exception to its place, which is returned.
    INLINE u16* put(int i, int lane) const {
        u32 exception = exceptions.half(2 * (i - lane)), within = (exception & 31) << 4 | (exception >> 4 & 14) | (exception & 256) << 1;
        u16* place = reinterpret_cast<u16*>(room + (N > 1 && i >= first ? within + OFFSET_BYTES : within));
        *place = (u16)(__float_as_uint((float)((int)(exception >> 9) - 64)) >> 16);
        return place;
    }

    // All of them to their places; returns the first's of the lane.
    INLINE u16* scatter(int lane) const {
        u16* mine = lane < all ? put(lane, lane) : nullptr;
#pragma unroll 1
        for (int i = lane + LANES; i < all; i += LANES) put(i, lane);
        return mine;
    }

    INLINE void take(int piece, int lane, u32 (&pairs)[PIECE_PAIRS]) const {
        const uint4* mine = reinterpret_cast<const uint4*>(room + piece * OFFSET_BYTES) + lane;
        uint4 low = mine[0], high = mine[LANES];
        pairs[0] = low.x, pairs[1] = low.y, pairs[2] = low.z, pairs[3] = low.w;
        pairs[4] = high.x, pairs[5] = high.y, pairs[6] = high.z, pairs[7] = high.w;
    }

    INLINE void clear(u16* mine, int lane) const {
        if (mine) *mine = 0;
#pragma unroll 1
        for (int i = lane + LANES; i < all; i += LANES) *put(i, lane) = 0;
    }
};

// Gives multiply(e, pairs) the operands of each of the next N pieces: those of the fields, then of what these lack.
template <int N, class Words, class Multiply>
INLINE void take_pieces(Pieces<Words>& pieces, const Piece (&next)[N], u8* room, u32 ones, int lane, Multiply multiply) {
    int all = 0;
#pragma unroll
    for (int e = 0; e < N; e++) all += next[e].exceptions;
    Offsets<N, Words> offsets = {room, pieces.exceptions, next[0].exceptions, all};
    u16* mine = all ? offsets.scatter(lane) : nullptr;
    pieces.exceptions = pieces.exceptions + 2 * all;
#pragma unroll
    for (int e = 0; e < N; e++) {
        if (!next[e].width) continue;
        u32 pairs[PIECE_PAIRS];
        take_fields_of<3, 2, 4, 5, 1, 6, 7, 8>(next[e].width, pieces.words, ones, lane, pairs);
        pieces.words = pieces.words + 2 * LANES * next[e].width;
        if (next[e].width == 8) {  // 128 + 128 and more are two operands
            u32 rest[PIECE_PAIRS];
#pragma unroll
            for (int i = 0; i < PIECE_PAIRS; i++) {
                rest[i] = (pairs[i] & 0x00800080u) * (0x4300u / 0x80u);  // 128 or 0
                pairs[i] &= ~0x00800080u;
            }
            multiply(e, rest);
        }
        multiply(e, pairs);
    }
    if (!all) return;
    __syncwarp();
    u32 pairs[N][PIECE_PAIRS];
#pragma unroll
    for (int e = 0; e < N; e++) offsets.take(e, lane, pairs[e]);
    __syncwarp();
    offsets.clear(mine, lane);
#pragma unroll
    for (int e = 0; e < N; e++) multiply(e, pairs[e]);
    __syncwarp();
}
