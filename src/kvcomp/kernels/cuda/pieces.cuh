// Blocks of pieces, with a width and a frame each, and exceptions (docs/format.md, sections 4 and 5), as operands of the tensor cores.
//
// A piece is 16 codes of each lane, eight pairs: of K 16 channels of 32 tokens, of V 8 channels of 64 tokens. The operands of its fields are
// 128 + field. Exceptions are a second, sparse operand: how far each code is off.
#pragma once
#include "streams.cuh"

constexpr int PIECE_PAIRS = 8;
constexpr int OFFSET_BYTES = 2 * 16 * LANES;  // a warp's room for the offsets of a piece

struct Piece {
    int width, frame, exceptions;
    const u8 *words, *offsets;

    // What the operands of the fields are off by.
    INLINE float bias() const { return (float)(width ? frame - 128 : frame); }
};

// The pieces of a block. Lane n knows those numbers of piece n.
struct Pieces {
    u32 head;    // width | frame << 8 | exceptions << 16
    u32 before;  // of the pieces before it: widths | exceptions << 16
    const u8 *words, *exceptions;

    // block: what follows the scales.
    template <int CHANNELS>
    INLINE void begin(const u8* block, int lane) {
        constexpr int count = CHANNELS / 8;
        static_assert(count <= LANES, "each piece has a lane");
        head = lane < count ? block[lane] | block[count + lane] << 8 | block[2 * count + lane] << 16 : 0;
        u32 mine = head & 0xff00ff;
        before = mine;
        add_from_below<1>(before);
        add_from_below<2>(before);
        add_from_below<4>(before);
        add_from_below<8>(before);
        add_from_below<16>(before);
        u32 all = __shfl_sync(~0u, before, LANES - 1);
        before -= mine;
        words = block + piece_heads(CHANNELS);
        exceptions = words + 2 * LANES * (all & 0xffff);
    }

    INLINE Piece piece(int n) const {
        u32 its_head = __shfl_sync(~0u, head, n), others = __shfl_sync(~0u, before, n);
        return {(int)(its_head & 255), (int)(its_head << 16) >> 24, (int)(its_head >> 16), words + 2 * LANES * (others & 0xffff),
                exceptions + 2 * (others >> 16)};
    }
};

// A lane's fields of WIDTH bits: whole words, and half a one if there is an odd number of bits.
template <int WIDTH>
INLINE void take_fields(const u8* words, u32 ones, int lane, u32 (&pairs)[PIECE_PAIRS]) {
    u32 of_lane[WIDTH / 2 + 1];
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i++) of_lane[i] = load_word(words + 4 * (LANES * i + lane));
    if (WIDTH % 2) of_lane[WIDTH / 2] = *reinterpret_cast<const u16*>(words + 4 * LANES * (WIDTH / 2) + 2 * lane);
    unpack<WIDTH>(of_lane, 0, ones, pairs);
}

template <int WIDTH = 1>
INLINE void take_fields_of(const Piece& piece, u32 ones, int lane, u32 (&pairs)[PIECE_PAIRS]) {
    if constexpr (WIDTH == 8) {
        take_fields<8>(piece.words, ones, lane, pairs);
    } else {
        if (piece.width == WIDTH) return take_fields<WIDTH>(piece.words, ones, lane, pairs);
        take_fields_of<WIDTH + 1>(piece, ones, lane, pairs);
    }
}

// How far the codes of a lane are off, as two bfloat16. room: OFFSET_BYTES of the warp, which are zero and shall be so afterwards: of each lane 16
// bytes for the first eight positions, then as many for the others.
INLINE void take_offsets(const Piece& piece, u8* room, int lane, u32 (&pairs)[PIECE_PAIRS]) {
    const u16* exceptions = reinterpret_cast<const u16*>(piece.offsets);
    auto place = [&](u32 exception) {
        return reinterpret_cast<u16*>(room + ((exception & 31) << 4 | (exception >> 4 & 14) | (exception & 256) << 1));
    };
    for (int i = lane; i < piece.exceptions; i += LANES)
        *place(exceptions[i]) = (u16)(__float_as_uint((float)((int)(exceptions[i] >> 9) - 64)) >> 16);
    __syncwarp();
    const uint4* mine = reinterpret_cast<const uint4*>(room) + lane;
    uint4 first = mine[0], second = mine[LANES];
    pairs[0] = first.x, pairs[1] = first.y, pairs[2] = first.z, pairs[3] = first.w;
    pairs[4] = second.x, pairs[5] = second.y, pairs[6] = second.z, pairs[7] = second.w;
    __syncwarp();
    for (int i = lane; i < piece.exceptions; i += LANES) *place(exceptions[i]) = 0;
    __syncwarp();
}

// Gives multiply(pairs) the operands of a piece: those of the fields, then of what these lack.
template <class Multiply>
INLINE void take_piece(const Piece& piece, u8* room, u32 ones, int lane, Multiply multiply) {
    u32 pairs[PIECE_PAIRS], rest[PIECE_PAIRS];
    bool wide = piece.width == 8;  // which leaves no exceptions
    if (piece.width) {
        take_fields_of(piece, ones, lane, pairs);
        if (wide) {
#pragma unroll
            for (int i = 0; i < PIECE_PAIRS; i++) {
                rest[i] = (pairs[i] & 0x00800080u) * (0x4300u / 0x80u);  // 128 or 0
                pairs[i] &= ~0x00800080u;
            }
        }
        multiply(pairs);
    }
    if (piece.exceptions) take_offsets(piece, room, lane, rest);
    if (piece.exceptions || wide) multiply(rest);
}
