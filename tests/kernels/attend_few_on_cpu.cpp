// The blocks of engine/csrc/attend_few.cu, one after another, on the CPU.
#include <cmath>
#include "cuda_on_cpu.h"
#include "attend_on_cpu.h"

#define __shared__
unsigned char memory[1 << 17] __attribute__((aligned(64)));
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static int __ffs(uint32_t bits) { return __builtin_ffs((int)bits); }
// ldmatrix.x4.trans: matrix i's rows are at the addresses of lanes 8 i to 8 i + 7; a lane gets rows 2 (l % 4) + {0, 1} of
// column l / 4 of each.
static void turned(uint32_t (&to)[4], const Words* row) {
    uint32_t at[32];
    std::memcpy(at, block::exchange((uint32_t)((const unsigned char*)row - memory)), sizeof at);
    int lane = threadIdx.x & 31;
    for (int i = 0; i < 4; i++) {
        to[i] = 0;
        for (int k = 0; k < 2; k++) {
            uint16_t value;
            std::memcpy(&value, memory + at[8 * i + lane % 4 * 2 + k] + lane / 4 * 2, 2);
            to[i] |= (uint32_t)value << 16 * k;
        }
    }
    block::sync_warp();
}

#include "attend_few.cu"

struct Call {
    const float* q;
    const long long* positions;
    const int *segment, *page_table, *swa_table;
    const long long* oldest;
    const u8 *window, *pool;
    const int* selected;
    float *parts, *tops, *totals;
    long long window_stride, pool_stride;
    int pages, pool_bits, picks, heads, splits;
    float scale;
};
static Call c;

template <void (*KERNEL)(PARAMETERS)> static void block_of() {
    KERNEL(c.q, c.positions, c.segment, c.page_table, c.swa_table, c.oldest, c.pages, c.window, c.window_stride,
           c.pool, c.pool_stride, c.pool_bits, c.selected, c.picks, c.parts, c.tops, c.totals,
           c.heads, c.splits, c.scale);
}

extern "C" void run_attend(const Call* call, unsigned tokens, unsigned tiles) {
    static_assert(sizeof(Shared<2>) <= sizeof memory, "");
    c = *call;
    blockDim.x = THREADS;
    for (blockIdx.x = 0; blockIdx.x < tokens * c.splits * (c.heads / 16 / tiles); blockIdx.x++) {
        std::fill(std::begin(memory), std::end(memory), 0xff);  // NaN
        block::run(THREADS, tiles == 1 ? block_of<penumbra_attend_few_1> : block_of<penumbra_attend_few_2>);
    }
}
struct Merge {
    const float *parts, *tops, *totals, *sink;
    const long long* positions;
    const float* freqs;
    float* out;
    int pairs, heads, splits;
};
static Merge m;

extern "C" void run_merge(const Merge* call, unsigned tokens) {
    m = *call;
    blockDim.x = MERGERS;
    for (blockIdx.x = 0; blockIdx.x < tokens * m.heads; blockIdx.x++)
        block::run(MERGERS, [] {
            penumbra_attend_merge(m.parts, m.tops, m.totals, m.sink, m.positions, m.freqs, m.pairs, m.out, m.heads,
                                  m.splits);
        });
}
extern "C" unsigned shared_bytes(unsigned tiles) { return tiles == 1 ? sizeof(Shared<1>) : sizeof(Shared<2>); }
