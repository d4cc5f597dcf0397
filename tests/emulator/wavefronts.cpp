// Wavefronts of each access of a warp to shared memory. Linked to a kernel that is compiled with -fsanitize=thread, so that g++ calls the
// functions at the end of this file at every read and write; nothing of the sanitizer itself is linked.
//
// Lanes run one after the other here, so what they did since their warp last met is put together when it meets: the n-th access of each
// lane at one place in the code is one instruction of the warp.
#define KVC_WAVEFRONTS
#include <map>
#include <set>
#include <vector>

#include "emulator.h"

constexpr int BANKS = 32, LINE = 128, SIZES = 3;

extern "C" {
// How many instructions took so many wavefronts, by access and size (4, 8, 16 bytes a lane); of GLOBAL_READ so many lines of 128 bytes.
unsigned long long wavefronts[GLOBAL_READ + 1][SIZES][WARP + 1];

// One for each different word of a bank among the active lanes; 16 lanes at a time read 8 bytes each, 8 lanes 16.
int wavefronts_of(const u64* addresses, u32 active, int bytes) {
    int sum = 0, at_once = std::min(WARP, BANKS * 4 / bytes);
    for (int first = 0; first < WARP; first += at_once) {
        std::set<u64> of_bank[BANKS];
        size_t most = 0;
        for (int lane = first; lane < first + at_once; lane++)
            for (u64 word = addresses[lane] / 4; active >> lane & 1 && word < (addresses[lane] + bytes + 3) / 4; word++) {
                of_bank[word % BANKS].insert(word);
                most = std::max(most, of_bank[word % BANKS].size());
            }
        sum += (int)most;
    }
    return sum;
}
}

namespace {

struct Noted {
    const void* place;
    Access access;
    u64 at;
    u32 bytes;
    bool active;
};

std::vector<std::vector<Noted>> of_threads;

std::vector<Noted>& of_this_thread() {
    if (of_threads.size() <= threadIdx.x) of_threads.resize(threadIdx.x + 1);
    return of_threads[threadIdx.x];
}

// A read or write at a place in the code. g++ takes the two halves of a float2, and the quarters of a uint4, one after the other.
void seen(const void* place, bool writes, const void* at, u32 bytes) {
    bool shared = (u64)at - (u64)shared_memory < MOST_SHARED;
    if (!shared && (writes || is_local(at))) return;
    Noted one = {place, !shared ? GLOBAL_READ : writes ? WRITE : READ, (u64)at, bytes, true};
    auto& all = of_this_thread();
    while (shared && one.bytes < 16 && !all.empty()) {
        const Noted& last = all.back();
        if (last.access != one.access || last.bytes != one.bytes || last.at != (one.at ^ one.bytes)) break;  // no half of the same
        one = {last.place, one.access, std::min(one.at, last.at), 2 * one.bytes, true};
        all.pop_back();
    }
    all.push_back(one);
}

int lines_of(const u64* addresses, u32 active) {
    std::set<u64> lines;
    for (int lane = 0; lane < WARP; lane++)
        if (active >> lane & 1) lines.insert(addresses[lane] / LINE);
    return (int)lines.size();
}

void count(int warp) {
    struct Instruction {
        Access access;
        u32 bytes, active = 0;
        u64 at[WARP] = {};
    };
    std::map<std::pair<const void*, int>, Instruction> instructions;
    for (int lane = 0; lane < WARP && warp * WARP + lane < (int)of_threads.size(); lane++) {
        std::map<const void*, int> times;
        for (const Noted& one : of_threads[warp * WARP + lane]) {
            Instruction& of = instructions[{one.place, times[one.place]++}];
            of.access = one.access, of.bytes = one.bytes, of.at[lane] = one.at;
            of.active |= (u32)one.active << lane;
        }
        of_threads[warp * WARP + lane].clear();
    }
    for (auto& [key, of] : instructions) {
        int size = of.bytes <= 4 ? 0 : of.bytes == 8 ? 1 : 2;
        wavefronts[of.access][size][of.access == GLOBAL_READ ? lines_of(of.at, of.active) : wavefronts_of(of.at, of.active, of.bytes)]++;
    }
}

const bool set = (warp_met = count, true);

}  // namespace

void note(Access access, const void* at, u32 bytes, bool active) {
    static const char places[GLOBAL_READ + 1] = {};
    of_this_thread().push_back({places + access, access, (u64)at, bytes, active});
}

// What g++ calls.
#define PLACE __builtin_return_address(0)
#define OF_SIZE(bytes)                                                                          \
    void __tsan_read##bytes(void* at) { seen(PLACE, false, at, bytes); }           \
    void __tsan_write##bytes(void* at) { seen(PLACE, true, at, bytes); }           \
    void __tsan_unaligned_read##bytes(void* at) { seen(PLACE, false, at, bytes); } \
    void __tsan_unaligned_write##bytes(void* at) { seen(PLACE, true, at, bytes); }
extern "C" {
OF_SIZE(1)
OF_SIZE(2)
OF_SIZE(4)
OF_SIZE(8)
OF_SIZE(16)
void __tsan_read_range(void* at, size_t bytes) { seen(PLACE, false, at, (u32)bytes); }
void __tsan_write_range(void* at, size_t bytes) { seen(PLACE, true, at, (u32)bytes); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
