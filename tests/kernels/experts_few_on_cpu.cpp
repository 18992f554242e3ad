// The blocks of engine/csrc/experts_few.cu on the CPU: each goes as far as it can, to where it waits for the others. What is
// on its way there is late here: a copy comes when it is waited for, until when its place holds NaN, and products are made
// of what their operands are by then.
#include "panels_on_cpu.h"

static Index gridDim;

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
        int row = lane / 4, lower = i / 2, column = lane % 4 * 2 + i % 2;
        float a[32], b[32];
        for (int k = 0; k < 32; k++) {
            a[k] = e4m3_of(operands[first + row * 4 + k % 16 / 4][k / 16 * 2 + lower] >> k % 4 * 8);
            b[k] = e4m3_of(at[k / 16 * apart + column * 16 + k % 16]);
        }
        (*p.sum)[i] = multiplied(a, b, 0.0f);
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
    std::map<u64*, Delivery> copies;
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
