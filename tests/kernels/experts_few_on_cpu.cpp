// The blocks of engine/csrc/experts_few.cu on the CPU: each goes as far as it can, to where it waits for the others. What is
// on its way there is late here: a copy comes when it is waited for, until when its place holds NaN, and products are made
// of what their operands are by then.
#include <cmath>
#include <map>
#include "cuda_on_cpu.h"

#define __shared__
unsigned char memory[232448] __attribute__((aligned(128)));
static Index gridDim;
typedef unsigned long long u64;

// A barrier: phases that have ended, arrivals that this one lacks, those that each needs.
struct Phases { uint16_t ended, lacks, needs, none; };
static Phases& phases(u64* barrier) { return *(Phases*)barrier; }
static void arrived(u64* barrier) {
    Phases& p = phases(barrier);
    if (p.needs == 0xffff) std::abort();
    if (--p.lacks == 0) p.ended++, p.lacks = p.needs;
}
struct Copy { void* to; const void* from; uint32_t bytes; };
static std::map<u64*, Copy> copies;
static void make_barrier(u64* barrier, int arrivals) {
    phases(barrier) = Phases{0, (uint16_t)arrivals, (uint16_t)arrivals, 0};
}
static void publish() {}
static void send_for(void* to, const void* from, uint32_t bytes, u64* barrier) {
    if (copies.count(barrier) || (uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) std::abort();
    std::memset(to, 0xff, bytes);
    copies[barrier] = Copy{to, from, bytes};
}
static void await(u64* barrier, uint32_t turn) {
    if (phases(barrier).needs == 0xffff) std::abort();
    while ((phases(barrier).ended & 1) == turn) {
        auto found = copies.find(barrier);
        if (found == copies.end()) {
            block::pause();
            continue;
        }
        std::memcpy(found->second.to, found->second.from, found->second.bytes);
        copies.erase(found);
        arrived(barrier);
    }
}
static void arrive(u64* barrier) {
    block::sync_warp();
    if (threadIdx.x % 32 == 0) arrived(barrier);
}
// Threads that are neighbours; every group of so many has a name.
static void meet(int name, int threads) {
    if (name != 1 + (int)threadIdx.x / threads) std::abort();
    block::wait(threadIdx.x / threads * threads, threads, &block::Fiber::parts);
}
// As early as can be for the other blocks, which see it before this one's other threads do anything more.
static uint32_t add_released(uint32_t* to, uint32_t more) {
    uint32_t before = *to;
    *to += more;
    block::leave();
    return before;
}
static uint32_t acquired(const uint32_t* at) {
    block::pause();
    return *at;
}

static float e4m3_of(uint32_t code) {
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float size = (code & 127) == 127 ? NAN : exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
    return code & 128 ? -size : size;
}
static uint32_t e4m3(float x) {
    uint32_t sign = std::signbit(x) ? 128 : 0;
    x = std::fabs(x);
    if (x != x) return sign | 127;
    if (x >= 448) return sign | 126;
    int exponent = x < 0.015625f ? -6 : std::ilogb(x);
    float last = std::ldexp(1.0f, exponent - 3);
    uint32_t count = (uint32_t)std::nearbyint(x / last);  // 8..16 of a normal one
    return sign | (exponent == -6 && x < 0.015625f ? count : (uint32_t)(exponent + 6) * 8 + count);
}
static uint32_t e4m3s(float low, float high) { return e4m3(low) | e4m3(high) << 8; }
static void values_of(uint32_t both, float& low, float& high) { low = e4m3_of(both & 255); high = e4m3_of(both >> 8 & 255); }

// Hopper's wgmma of e4m3 keeps `kept` = 13 bits behind the point of products that are all shifted to the largest exponent
// among them, and as many of their sum's mantissa, and cuts off the rest. Here all bits, where it is 0.
static int kept = 0;
static double cut_off(double x, int last) { return std::ldexp(std::trunc(std::ldexp(x, -last)), last); }
static int exponent_of(float x) { return x == 0 ? -126 : std::max(-6, std::ilogb(x)); }

struct Product { float (*sum)[4]; const uint32_t (*a)[4]; uint32_t columns; int batch; };
static std::vector<Product> pending[512];
static int batches[512];
static uint32_t columns_at(const void* at) { return (uint32_t)((const unsigned char*)at - memory) >> 4 | 9u << 16; }
static void begin_products(uint32_t (&)[4][4]) {}
static void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t columns) {
    for (float& x : sum) x = NAN;
    pending[threadIdx.x].push_back(Product{&sum, &a, columns, batches[threadIdx.x]});
}
static void close_products() { batches[threadIdx.x]++; }
static void make(const Product& p) {
    static uint32_t operands[512][4];
    int lane = threadIdx.x % 32, first = threadIdx.x - lane;
    for (int i = 0; i < 4; i++) operands[threadIdx.x][i] = (*p.a)[i];
    block::sync_warp();
    const unsigned char* at = memory + ((p.columns & 0x3fff) << 4);
    unsigned apart = (p.columns >> 16 & 0x3fff) << 4;
    for (int i = 0; i < 4; i++) {
        int row = lane / 4, lower = i / 2, column = lane % 4 * 2 + i % 2, most = -999;
        float a[32], b[32];
        double sum = 0;
        for (int k = 0; k < 32; k++) {
            a[k] = e4m3_of(operands[first + row * 4 + k % 16 / 4][k / 16 * 2 + lower] >> k % 4 * 8 & 255);
            b[k] = e4m3_of(at[k / 16 * apart + column * 16 + k % 16]);
            most = std::max(most, exponent_of(a[k]) + exponent_of(b[k]));
        }
        for (int k = 0; k < 32; k++) sum += kept ? cut_off((double)a[k] * b[k], most - kept) : (double)a[k] * b[k];
        (*p.sum)[i] = (float)(kept && sum != 0 && sum == sum ? cut_off(sum, std::ilogb(sum) - kept) : sum);
    }
    block::sync_warp();
}
template <int LEFT> static void await_products(float (&)[4][4], uint32_t (&)[4][4]) {
    auto& mine = pending[threadIdx.x];
    while (!mine.empty() && mine.front().batch < batches[threadIdx.x] - LEFT) {
        make(mine.front());
        mine.erase(mine.begin());
    }
}
static int fresh(const int* at) { return *at; }
struct Words;
static Words fresh4(const void* at);

#include "experts_few.cu"
static Words fresh4(const void* at) { return *(const Words*)at; }

struct Call {
    const float* x;
    const u8 *gate_up, *down;
    const float* shares;
    const int *members, *owners;
    float *h, *y;
    int blocks, tokens, picks, hidden, inner;
    float limit;
    int stages;
};
static Call c;

// A block's part of what the others have of their own, while one of these goes on.
struct Aside {
    std::vector<block::Fiber> fibers;
    std::vector<uint32_t> lane_values;
    std::vector<unsigned char> memory = std::vector<unsigned char>(sizeof ::memory, 0xff);  // NaN
    std::map<u64*, Copy> copies;
    bool done = false;

    void change_places() {
        fibers.swap(block::fibers);
        lane_values.swap(block::lane_values);
        std::swap_ranges(memory.begin(), memory.end(), ::memory);
        copies.swap(::copies);
    }
};

extern "C" unsigned shared_bytes(unsigned inputs, unsigned stages, unsigned pairs) {
    return sizeof(Shared) + WARPS * stages * sizeof(Step) + inputs / 16 * CORE + inputs / STEP * sizeof(Floats<ROOM>) +
           pairs * sizeof(Part);
}
extern "C" void order(int eager, int backwards) { block::eager = eager; block::backwards = backwards; }
extern "C" void keep(int bits) { kept = bits; }
extern "C" void run_experts(const Call* call, unsigned grid) {
    c = *call;
    blockDim.x = THREADS;
    gridDim.x = grid;
    std::vector<Aside> blocks(grid);
    for (unsigned left = grid, idle = 0; left;) {
        if (++idle > 2) { std::fprintf(stderr, "the blocks wait for each other\n"); std::abort(); }
        for (unsigned n = 0; n < grid; n++) {
            blockIdx.x = block::backwards ? grid - 1 - n : n;
            Aside& aside = blocks[blockIdx.x];
            if (aside.done) continue;
            aside.change_places();
            if (block::fibers.empty())
                block::begin(THREADS, [] {
                    penumbra_experts_few(c.x, c.gate_up, c.down, c.shares, c.members, c.owners, c.h, c.y, c.blocks, c.tokens,
                                         c.picks, c.hidden, c.inner, c.limit, c.stages);
                });
            aside.done = block::go_on();
            if (aside.done) {
                if (!copies.empty()) std::abort();
                left--;
                idle = 0;
            }
            aside.change_places();
        }
    }
}
