// The bit streams of a block (docs/format.md, sections 4 and 5): 64 of them, two for each lane, read side by side.
//
// Every reader gives pairs of codes as two bfloat16 of value 128 + code, what the tensor cores multiply: a bfloat16 of 0x4300 + q is
// exactly 128 + q for q below 128.
#pragma once
#include "page.cuh"

constexpr u32 BFLOAT16_128 = 0x43004300u;

// Words of a block in shared memory, by the address of the next.
struct SharedWords {
    u32 at;
    INLINE u32 word(u32 bytes) const { return load_shared(at + bytes); }
    INLINE u32 half(u32 bytes) const { return load_shared_half(at + bytes); }
    INLINE u32 byte(u32 bytes) const { return load_shared_byte(at + bytes); }
};

// Words of a block anywhere.
struct PlainWords {
    const u8* at;
    INLINE u32 word(u32 bytes) const { return load_word(at + bytes); }
    INLINE u32 half(u32 bytes) const { return *reinterpret_cast<const u16*>(at + bytes); }
    INLINE u32 byte(u32 bytes) const { return at[bytes]; }
};

// The words of one stream, of which ``left`` lie behind the next: the last is taken again rather than read over.
struct BoundedWords {
    PlainWords words;
    u32 left;
    INLINE u32 word(u32) const { return words.word(0); }
};

INLINE SharedWords operator+(SharedWords words, i32 bytes) { return {words.at + bytes}; }
INLINE PlainWords operator+(PlainWords words, i32 bytes) { return {words.at + bytes}; }
INLINE BoundedWords operator+(BoundedWords words, u32 bytes) {
    return words.left ? BoundedWords{words.words + bytes, words.left - 1} : words;
}

// A stream whose words lie ``STEP`` bytes apart: a window of 64 bits, of which ``position`` (in its low five bits) are behind.
template <class Words, u32 STEP>
struct BitStream {
    u32 low, high, position;
    Words next;

    INLINE u32 take() {
        u32 word = next.word(0);
        next = next + STEP;
        return word;
    }

    // Begin at bit ``bit`` mod 32 of a word.
    INLINE void begin(Words from, u32 bit) {
        next = from;
        low = take();
        high = take();
        position = bit;
    }

    INLINE u32 window() const { return __funnelshift_r(low, high, position); }

    // Go on to a position at most 32 bits ahead; only the low six bits of either count.
    INLINE void move_to(u32 ahead) {
        shift_in((position ^ ahead) & 32);
        position = ahead;
    }

    INLINE void shift_in(u32 due) {
        if (due) {
            low = high;
            high = take();
        }
    }
};

template <>
INLINE void BitStream<SharedWords, 4>::shift_in(u32 due) {
    ::shift_in(low, high, next.at, due);
}

// Where the streams ``lane`` and ``32 + lane`` begin, in bits after where the first does. Returns the bytes before that, from ``lengths`` on.
template <int KIND, int CHANNELS, class Words>
INLINE u32 stream_starts(Words lengths, int lane, u32& first, u32& second) {
    constexpr u32 unit = CHANNELS <= 128 ? 4 : 8;
    u32 head = lengths.word(0), width = head & 15, bit = width * lane;
    Words low_words = lengths + (bit >> 5) * 4, high_words = low_words + 4 * width;  // those of the streams from 32 on lie ``width`` words further
    u32 mask = (1u << width) - 1;
    u32 low = __funnelshift_r(low_words.word(4), low_words.word(8), bit) & mask;
    u32 high = __funnelshift_r(high_words.word(4), high_words.word(8), bit) & mask;
    // The bases of both; of V that of the second lies 14 bits above the other.
    u32 bases = head >> (4 + 7 * (KIND == K ? lane & 3 : lane >> 4)) & (KIND == K ? 127 : 127 | 127 << 14);
    u32 mine = (low | high << 16) + (KIND == K ? bases * 0x10001 : bases + 3 * (bases & 127 << 14));
    u32 sum = mine;  // the sum of 32 lengths fits 16 bits
    add_from_below<1>(sum);
    add_from_below<2>(sum);
    add_from_below<4>(sum);
    add_from_below<8>(sum);
    add_from_below<16>(sum);
    u32 all = __shfl_sync(~0u, sum, LANES - 1) & 0xffff;
    sum -= mine;
    first = (sum & 0xffff) * unit;
    second = ((sum >> 16) + all) * unit;
    return 4 + 8 * width;
}

// The type behind a reference.
template <class T>
struct BareType {
    typedef T Type;
};
template <class T>
struct BareType<T&> {
    typedef T Type;
};
template <class T>
using Bare = typename BareType<T>::Type;

// The decode table of a book in shared memory: each entry COPIES times side by side, so that lanes rarely meet in a bank.
// The window is read LEAD bits early, which puts the index where the address wants it. PLACE: address of the first class.
template <u32 PLACE, int INDEX_BITS, int COPIES>
struct SharedTable {
    static constexpr int LEAD = COPIES == 1 ? 2 : COPIES == 2 ? 3 : COPIES == 4 ? 4 : COPIES == 8 ? 5 : 6;
    static constexpr u32 MASK = ((1u << INDEX_BITS) - 1) << LEAD;
    static constexpr u32 BYTES = 1u << (INDEX_BITS + LEAD);
    u32 place;  // of the class and of the lane's copy, behind PLACE

    INLINE void of(const u32*, u32 its_class, int lane) { place = its_class * BYTES + 4 * (lane % COPIES); }
    INLINE u32 entry(u32 window) const { return load_shared<PLACE>(window & MASK | place); }
};

// The same in global memory.
template <int INDEX_BITS>
struct PlainTable {
    static constexpr int LEAD = 2;
    static constexpr u32 MASK = ((1u << INDEX_BITS) - 1) << LEAD;
    const u8* entries;

    INLINE void of(const u32* table, u32 its_class, int) {
        entries = reinterpret_cast<const u8*>(table + ((size_t)its_class << INDEX_BITS));
    }
    INLINE u32 entry(u32 window) const { return load_word(entries + (window & MASK)); }
};

// What decoded pairs become. WIDE: codes up to 255 as two pairs whose sum is 128 + code, as bfloat16 holds no odd number above 256.
template <bool WIDE>
struct CodedPairs {
    typedef u32 Pair;
    static constexpr int PARTS = WIDE ? 2 : 1;
    static constexpr bool SHORT = !WIDE;  // whether the code for a tile is short enough to stand there more than once
    static INLINE u32 operand(u32 pair, int part) {
        if (!WIDE) return pair;
        return part ? (pair & 0x00800080u) * (0x4300u / 0x80u) : pair & ~0x00800080u;  // part 1: 128 or 0
    }
};

// Two streams of Huffman codes for pairs. PAIR_BITS: of the longest pair. SPLIT: whether the low bits of the codes may follow a symbol's code.
template <class Words, class Table, int PAIR_BITS, bool SPLIT, bool WIDE>
struct HuffmanPairs : CodedPairs<WIDE> {
    static constexpr int GROUP = (32 - Table::LEAD) / PAIR_BITS;  // pairs that surely fit a window
    static_assert(GROUP >= 1, "a window must hold a pair");
    BitStream<Words, 4> low, high;
    Table low_table, high_table;
    u32 low_split, high_split;
    u32 ones;  // BFLOAT16_128, an argument of the kernel so that the compiler does not take it apart

    INLINE void begin(Words block, u32 bit, u32 second_bit) {
        bit -= Table::LEAD;
        second_bit -= Table::LEAD;
        low.begin(block + (bit >> 5) * 4, bit);
        high.begin(block + (second_bit >> 5) * 4, second_bit);
    }

    // The classes of the pairs to come.
    INLINE void classes(const Book& book, int of_low, int of_high, int lane) {
        low_table.of(book.table, of_low, lane);
        high_table.of(book.table, of_high, lane);
        if (SPLIT) low_split = book.split[of_low], high_split = book.split[of_high];
    }

    template <int N, bool LOW_BITS>
    INLINE void group(BitStream<Words, 4>& stream, const Table& table, u32 split, u32* pairs) {
        u32 window = stream.window(), position = stream.position;
#pragma unroll
        for (int i = 0; i < N; i++) {
            u32 entry = table.entry(window);
            position += entry;  // the length; what is above does not matter
            u32 pair = __byte_perm(entry, ones, 0x5352);
            if (LOW_BITS || i + 1 < N) window = __funnelshift_r(window, 0u, entry);
            if (LOW_BITS) {
                // The second code's low bits to the upper half beside the first's.
                u32 rest = window >> Table::LEAD, both = rest & 0xffffu | rest << (16 - split) & 0xffff0000u;
                pair |= both & ((1u << split) - 1) * 0x10001u;
                window >>= 2 * split;
            }
            pairs[i] = pair;
        }
        stream.move_to(LOW_BITS ? position + 2 * N * split : position);
    }

    template <bool LOW_BITS, int N>
    INLINE void take_groups(u32 (&of_low)[N], u32 (&of_high)[N]) {
#pragma unroll
        for (int i = 0; i + GROUP <= N; i += GROUP) {
            group<GROUP, LOW_BITS>(low, low_table, low_split, of_low + i);
            group<GROUP, LOW_BITS>(high, high_table, high_split, of_high + i);
        }
        constexpr int rest = N % GROUP;
        if constexpr (rest > 0) {
            group<rest, LOW_BITS>(low, low_table, low_split, of_low + N - rest);
            group<rest, LOW_BITS>(high, high_table, high_split, of_high + N - rest);
        }
    }

    // The next N pairs of both streams. Classes without low bits do without what those cost.
    template <int N>
    INLINE void take(int, u32 (&of_low)[N], u32 (&of_high)[N]) {
        if (SPLIT && !WIDE && __any_sync(~0u, low_split | high_split))
            take_groups<SPLIT>(of_low, of_high);
        else
            take_groups<SPLIT && WIDE>(of_low, of_high);
    }
};

// Bytes from a word of a stream of fixed width to the next: word i of stream x is word 64 i + x.
constexpr u32 ROW = 4 * 2 * LANES;

// Some bits of a row of words, at most 16, from bit ``at`` on: they begin a byte of ``word``.
struct Field {
    u32 word, byte;

    INLINE Field(const u32* words, int at, int bits) {
        bool straddles = at % 32 + bits > 32;
        word = straddles ? __funnelshift_r(words[at / 32], words[at / 32 + 1], at) : words[at / 32] >> at % 8;
        byte = straddles ? 0 : at % 32 / 8;
    }

    // The two bytes, with those of another in the upper half.
    INLINE u32 beside(const Field& upper) const {
        return __byte_perm(word, upper.word, byte | (byte + 1) << 4 | (upper.byte + 4) << 8 | (upper.byte + 5) << 12);
    }
};

// Pairs of codes of WIDTH bits, which begin at bit ``begin`` of some words.
template <int WIDTH, int N>
INLINE void unpack(const u32* words, int begin, u32 ones, u32 (&pairs)[N]) {
    constexpr int group = 1 + (16 - WIDTH) / (2 * WIDTH);  // pairs whose first codes lie within 16 bits
#pragma unroll
    for (int i = 0; i < N; i += group) {
        int at = begin + 2 * WIDTH * i, pairs_here = min(group, N - i), bits = WIDTH * (2 * pairs_here - 1);
        u32 both = Field(words, at, bits).beside(Field(words, at + WIDTH, bits));  // first codes below, second codes above
#pragma unroll
        for (int e = 0; e < pairs_here; e++) pairs[i + e] = both >> 2 * WIDTH * e & ((1u << WIDTH) - 1) * 0x10001u | ones;
    }
}

// Two streams of codes of WIDTH bits, at most 7, where those of a turn fill whole words, so that every shift is a constant.
template <int WIDTH>
struct FixedPairs : CodedPairs<false> {
    PlainWords low, high;
    u32 last_low, last_high;  // words of which the next tile may need the rest
    u32 ones;

    INLINE void begin(PlainWords codes, int lane, u32) { low = codes + 4 * lane, high = low + 4 * LANES; }

    INLINE void classes(const Book&, int, int, int) {}

    // The next N pairs of a stream, of which ``taken`` were before in this turn.
    template <int N>
    INLINE void take_stream(int taken, PlainWords& next, u32& last, u32 (&pairs)[N]) const {
        int begin = 2 * WIDTH * taken % 32, end = begin + 2 * WIDTH * N;
        u32 words[(2 * WIDTH * N + 31) / 32 + 1];
#pragma unroll
        for (int i = 0; 32 * i < end; i++) {
            if (i == 0 && begin) {
                words[i] = last;
            } else {
                words[i] = next.word(0);
                next = next + ROW;
            }
        }
        last = words[(end - 1) / 32];
        unpack<WIDTH>(words, begin, ones, pairs);
    }

    template <int N>
    INLINE void take(int taken, u32 (&of_low)[N], u32 (&of_high)[N]) {
        take_stream(taken, low, last_low, of_low);
        take_stream(taken, high, last_high, of_high);
    }
};

// Two streams of codes of any width.
struct AnyWidthPairs : CodedPairs<true> {
    typedef BitStream<BoundedWords, ROW> Stream;
    Stream low, high;
    u32 width, ones;

    // words: of a stream.
    INLINE void begin(PlainWords codes, int lane, u32 words) {
        low.begin(BoundedWords{codes + 4 * lane, words - 1}, 0);
        high.begin(BoundedWords{codes + 4 * (LANES + lane), words - 1}, 0);
    }

    INLINE void classes(const Book&, int, int, int) {}

    INLINE u32 pair(Stream& stream) {
        u32 window = stream.window(), mask = (1u << width) - 1;
        stream.move_to(stream.position + 2 * width);
        return ones | (window & mask) | (window >> width & mask) << 16;
    }

    template <int N>
    INLINE void take(int, u32 (&of_low)[N], u32 (&of_high)[N]) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            of_low[i] = pair(low);
            of_high[i] = pair(high);
        }
    }
};
