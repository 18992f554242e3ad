// The blocks of engine/csrc/compress_long.cu, one after another, on the CPU. Copies are late here: one comes when it is
// waited for, until when its place holds NaN.
#include <cmath>
#include "panels_on_cpu.h"

static Index gridDim;

static int __ffs(int x) { return __builtin_ffs(x); }
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static float power2(float x) { return std::exp2(x); }
// Threads that are neighbours; every group of so many has a name.
static void meet(int name, int threads) {
    if (name != 1 + (int)threadIdx.x / threads) std::abort();
    block::wait(threadIdx.x / threads * threads, threads, &block::Fiber::parts);
}
// Copies of a stage are sent for by many lanes, behind the one that says how much is to come: it is there with the last.
static void await_whole(u64* barrier, uint32_t turn) {
    while ((phases(barrier).ended & 1) == turn) {
        auto found = copies.find(barrier);
        uint32_t bytes = 0;
        if (found != copies.end())
            for (const Copy& copy : found->second.copies) bytes += copy.bytes;
        if (found != copies.end() && bytes == found->second.bytes) await(barrier, turn);
        else block::pause();
    }
}
#define await await_whole

#include "compress_long.cu"

struct Call {
    const float *u, *g, *ape, *norm;
    float* ring;
    const s64* positions;
    const int *segment, *offsets;
    const s64* starts;
    const int *page_table, *ring_table;
    const float* freqs;
    u8* pool;
    s64 u_row, g_row, item_stride;
    int pages, tokens;
    float eps;
};
static Call c;

template <auto ENTRY> static void block_of() {
    ENTRY(c.u, c.u_row, c.g, c.g_row, c.ape, c.norm, c.ring, c.positions, c.segment, c.offsets, c.starts, c.page_table,
          c.ring_table, c.pages, c.freqs, c.eps, c.pool, c.item_stride, c.tokens);
}

extern "C" unsigned shared_bytes(unsigned dim, unsigned ratio) {
    return dim == 128 ? sizeof(Shared<128, 4>) : ratio == 4 ? sizeof(Shared<512, 4>) : sizeof(Shared<512, 128>);
}
extern "C" unsigned threads(unsigned dim) { return dim == 128 ? Shape<128, 4>::THREADS : Shape<512, 4>::THREADS; }
// eager, backwards: how far warps run ahead of others, and which; the last block is the first then.
extern "C" void order(int eager, int backwards) { block::eager = eager; block::backwards = backwards; }
extern "C" void run_compress(const Call* call, unsigned dim, unsigned ratio, bool turned, unsigned grid) {
    c = *call;
    blockDim.x = threads(dim);
    gridDim.x = grid;
    auto kernel = ratio == 128 ? block_of<penumbra_compress_c128_latents>
                  : dim == 512 ? block_of<penumbra_compress_c4_latents>
                  : turned     ? block_of<penumbra_compress_c4_keys_turned>
                               : block_of<penumbra_compress_c4_keys>;
    for (unsigned n = 0; n < grid; n++) {
        blockIdx.x = block::backwards ? grid - 1 - n : n;
        std::fill(std::begin(memory), std::end(memory), 0xff);  // NaN
        block::run(blockDim.x, kernel);
        if (!copies.empty()) std::abort();
    }
}
