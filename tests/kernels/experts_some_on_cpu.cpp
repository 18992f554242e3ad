// The blocks of engine/csrc/experts_some.cu, one after another, on the CPU. Products are made at once, or as late as they
// may be: of what their operands are by then.
#include "panels_on_cpu.h"

static Index gridDim;

static bool late;
struct Product {
    float* sums;
    const uint32_t* a;
    u64 columns;
    int count;
    bool add;
};
static std::vector<Product> pending[544];
static void make(const Product& p) {
    static uint32_t operands[544][4];
    int lane = threadIdx.x % 32, first = threadIdx.x - lane;
    for (int i = 0; i < 4; i++) operands[threadIdx.x][i] = p.a[i];
    block::sync_warp();
    const unsigned char* at = memory + ((p.columns & 0x3fff) << 4);
    unsigned second = (p.columns >> 16 & 0x3fff) << 4, eight = (p.columns >> 32 & 0x3fff) << 4;
    if (p.columns >> 46) std::abort();
    for (int lower = 0; lower < 2; lower++) {
        float a[32], b[32];
        for (int k = 0; k < 32; k++)
            a[k] = e4m3_of(operands[first + lane / 4 * 4 + k % 16 / 4][k / 16 * 2 + lower] >> k % 4 * 8);
        for (int n = 0; n < p.count; n++) {
            if (n / 2 % 2 != lower) continue;
            int column = n / 4 * 8 + lane % 4 * 2 + n % 2;
            for (int k = 0; k < 32; k++) b[k] = e4m3_of(at[column / 8 * eight + k / 16 * second + column % 8 * 16 + k % 16]);
            p.sums[n] = multiplied(a, b, p.add ? p.sums[n] : 0.0f);
        }
    }
    block::sync_warp();
}
static u64 columns_at(const void* at) {
    return (u64)(4096 >> 4) << 32 | ((const unsigned char*)at - memory) >> 4 | 128 >> 4 << 16;
}
template <bool ADD, int COUNT> static void multiply(float (&sums)[COUNT], const uint32_t (&a)[4], u64 columns) {
    if (!ADD)
        for (float& x : sums) x = NAN;
    Product product{sums, a, columns, COUNT, ADD};
    if (late) pending[threadIdx.x].push_back(product);
    else make(product);
}
template <int GROUPS> static void begin_products(uint32_t (&)[GROUPS][4]) {}
static void close_products() {}
template <int GROUPS, int COUNT> static void await_products(float (&)[GROUPS][COUNT], uint32_t (&)[GROUPS][4]) {
    for (const Product& p : pending[threadIdx.x]) make(p);
    pending[threadIdx.x].clear();
}

#include "experts_some.cu"

struct Call {
    const float* x;
    const u8 *gate_up, *down;
    const float* shares;
    const int *members, *owners;
    u8 *columns, *inner_columns;
    float *units, *inner_units, *h, *y;
    int parts, pairs, picks, hidden, inner, block;
    float limit;
    int stages;
};
static Call c;
static u32 counter = 1 << 30;

extern "C" unsigned shared_bytes(unsigned block, unsigned stages) {
    return sizeof(Shared) + stages * Work{nullptr, nullptr, 0, 0, 0, 0, (int)block}.stage();
}
extern "C" void order(int eager, int backwards) {
    block::eager = eager;
    block::backwards = backwards;
    late = eager;
}
extern "C" void keep(int bits) { kept = bits; }
static void run(unsigned grid, unsigned threads, void (*kernel)()) {
    blockDim.x = threads;
    gridDim.x = grid;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) {
        std::memset(memory, 0xff, sizeof memory);
        block::run(threads, kernel);
        if (!copies.empty()) std::abort();
    }
}
extern "C" void run_experts(const Call* call, unsigned grid) {
    c = *call;
    unsigned eights = c.parts * c.block / 8;
    run(eights, TERM_THREADS, [] {
        penumbra_experts_terms(c.x, nullptr, c.members, c.owners, c.columns, c.units, &counter, c.pairs, c.picks, c.hidden, c.block);
    });
    run(grid, THREADS, [] {
        penumbra_experts_gate_up(c.gate_up, c.columns, c.units, c.members, c.owners, &counter, c.h, c.parts, c.pairs, c.hidden,
                                 c.inner, c.block, c.limit, c.stages);
    });
    run(eights, TERM_THREADS, [] {
        penumbra_experts_terms(c.h, c.shares, c.members, c.owners, c.inner_columns, c.inner_units, &counter, c.pairs, 1, c.inner, c.block);
    });
    run(grid, THREADS, [] {
        penumbra_experts_down(c.down, c.inner_columns, c.inner_units, c.members, c.owners, &counter, c.y, c.parts, c.pairs, c.hidden,
                              c.inner, c.block, c.stages);
    });
}
