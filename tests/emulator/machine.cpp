// Fibers, barriers, tensor-core products and deferred copies of the emulator.
#include <csetjmp>
#include <csignal>
#include <cstdlib>
#include <deque>
#include <functional>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

#include "emulator.h"

alignas(128) u8 shared_memory[MOST_SHARED];
Dim3 threadIdx, blockIdx, blockDim, gridDim;

unsigned long long shuffles, products, powers;
u32 launched_shared;
void (*warp_met)(int);

namespace {

constexpr size_t STACK = 1 << 18;
constexpr int GUARD = 1 << 16;

struct Copy {
    u32 to;
    const void* from;
};

struct Fiber {
    ucontext_t context;
    jmp_buf state;
    bool started = false, done = false;
    std::deque<std::vector<Copy>> groups{1};
    u32 word, operand[6];
};

struct Meeting {
    int arrived = 0, number = 0;
};

std::vector<Fiber> fibers;
std::vector<Meeting> warps;
Meeting block;
std::vector<char> stacks;
int current, forward;
const std::function<void()>* kernel;
jmp_buf home;
sigjmp_buf crash;
bool out_of_shared;

void run(int index) {
    current = index;
    threadIdx = {(u32)index, 0, 0};
    if (fibers[index].started) _longjmp(fibers[index].state, 1);
    fibers[index].started = true;
    setcontext(&fibers[index].context);
}

void run_next() {
    int n = (int)fibers.size(), next = current;
    for (int i = 0; i < n; i++) {
        next = (next + (forward ? 1 : n - 1)) % n;
        if (!fibers[next].done) run(next);
    }
    _longjmp(home, 1);
}

void pause() {
    if (!_setjmp(fibers[current].state)) run_next();
}

void meet(Meeting& meeting, int all) {
    int number = meeting.number;
    if (++meeting.arrived == all) {
        if (warp_met) warp_met(current / WARP);
        meeting.arrived = 0;
        meeting.number++;
    } else {
        while (meeting.number == number) pause();
    }
}

void body() {
    (*kernel)();
    Fiber& mine = fibers[current];
    for (auto& group : mine.groups) group.clear();
    mine.done = true;
    run_next();
}

// A sum as tensor cores form it (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021): every addend is cut off at the last bit that
// float32 has of the largest one, and their exact sum at float32's. Nothing is rounded. Some keep a bit or two more; this is the coarsest.
float sum_cut_off(float c, const double (&products)[8]) {
    double plain = c, largest = std::fabs(c);
    for (double x : products) plain += x, largest = std::max(largest, std::fabs(x));
    if (!std::isfinite(plain) || largest == 0) return (float)plain;
    int last = std::ilogb(largest) - 23;
    double units = std::ldexp(1.0, -last);
    i64 sum = (i64)(c * units);  // towards zero
    for (double x : products) sum += (i64)(x * units);
    while (std::llabs(sum) >> 24) sum /= 2, last++;
    return (float)std::ldexp((double)sum, last);
}

void on_crash(int) { siglongjmp(crash, 1); }

bool run_block(int threads) {
    memset(shared_memory, 0xff, sizeof shared_memory);  // NaN
    fibers.assign(threads, Fiber());
    warps.assign((threads + WARP - 1) / WARP, Meeting());
    block = Meeting();
    stacks.resize(threads * STACK);
    for (int i = 0; i < threads; i++) {
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack.ss_sp = stacks.data() + i * STACK;
        fibers[i].context.uc_stack.ss_size = STACK;
        fibers[i].context.uc_link = nullptr;
        makecontext(&fibers[i].context, body, 0);
    }
    if (!_setjmp(home)) run(forward ? 0 : threads - 1);
    for (auto& fiber : fibers)
        if (!fiber.done) return false;
    for (int warp = 0; warp_met && warp < (int)warps.size(); warp++) warp_met(warp);
    for (size_t i = launched_shared; i < sizeof shared_memory; i++)
        if (shared_memory[i] != 0xff) return false;
    return true;
}

}  // namespace

int this_lane() { return current % WARP; }
bool is_local(const void* at) { return at >= stacks.data() && at < stacks.data() + stacks.size(); }
u32* shown(int lane) { return &fibers[current / WARP * WARP + lane].word; }
void meet_warp() { meet(warps[current / WARP], WARP); }
void meet_block() { meet(block, (int)fibers.size()); }

void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    products++;
    u32* mine = fibers[current].operand;
    for (int i = 0; i < 4; i++) mine[i] = a[i];
    mine[4] = b0, mine[5] = b1;
    meet_warp();
    int lane = this_lane(), g = lane >> 2, j = lane & 3, first = current - lane;
    auto half = [](u32 both, int which) { return __uint_as_float(which ? both & 0xffff0000u : both << 16); };
    for (int i = 0; i < 4; i++) {
        int row = g + 8 * (i >> 1), column = 2 * j + (i & 1);
        for (int part = 0; part < 2; part++) {
            double of_part[8];
            for (int k = 0; k < 8; k++) {
                const u32* of_row = fibers[first + (row & 7) * 4 + k / 2].operand;
                const u32* of_column = fibers[first + column * 4 + k / 2].operand;
                of_part[k] = (double)half(of_row[(row >> 3) + 2 * part], k & 1) * half(of_column[4 + part], k & 1);
            }
            c[i] = sum_cut_off(c[i], of_part);
        }
    }
    meet_warp();
}

void raise_out_of_range() { raise(SIGSEGV); }
void start_copy(u32 to, const void* from) {
    if (to % 16 || (size_t)from % 16) raise(SIGSEGV);
    fibers[current].groups.back().push_back({to, from});
}
void end_copies() { fibers[current].groups.emplace_back(); }
void await_groups(int later) {
    auto& groups = fibers[current].groups;
    while ((int)groups.size() - 1 > later) {
        for (auto& copy : groups.front()) memcpy(shared_memory + copy.to, copy.from, 16);
        groups.pop_front();
    }
}

int launch(Dim3 grid, int threads, size_t shared, bool ascending, const std::function<void()>& body_of_thread) {
    static char signal_stack[1 << 16];
    stack_t alternate = {};
    alternate.ss_sp = signal_stack;
    alternate.ss_size = sizeof signal_stack;
    sigaltstack(&alternate, nullptr);
    struct sigaction action = {}, segv, bus;
    action.sa_handler = on_crash;
    action.sa_flags = SA_ONSTACK;
    sigaction(SIGSEGV, &action, &segv);
    sigaction(SIGBUS, &action, &bus);
    int result = FINE;
    forward = ascending;
    launched_shared = (u32)shared;
    kernel = &body_of_thread;
    gridDim = grid;
    blockDim = {(u32)threads, 1, 1};
    if (sigsetjmp(crash, 1)) {
        result = OUT_OF_RANGE;
    } else {
        for (u32 z = 0; z < grid.z && !result; z++)
            for (u32 y = 0; y < grid.y && !result; y++)
                for (u32 x = 0; x < grid.x && !result; x++) {
                    blockIdx = {x, y, z};
                    if (!run_block(threads)) result = OUT_OF_SHARED;
                }
    }
    sigaction(SIGSEGV, &segv, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
    return result;
}

// Memory of ``bytes`` that ends at a page which nobody may touch, and begins behind another.
extern "C" void* guarded(size_t bytes) {
    size_t page = 4096, inner = (bytes + page - 1) / page * page;
    u8* all = (u8*)mmap(nullptr, inner + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    mprotect(all, page, PROT_NONE);
    mprotect(all + page + inner, page, PROT_NONE);
    return all + page + inner - bytes;
}

extern "C" void release(void* memory, size_t bytes) {
    size_t page = 4096, inner = (bytes + page - 1) / page * page;
    munmap((u8*)memory + bytes - inner - page, inner + 2 * page);
}
