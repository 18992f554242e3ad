// The blocks of engine/csrc/attend_few.cu, one after another, on the CPU.
#include <cmath>
#include "cuda_on_cpu.h"

#define __shared__
unsigned char memory[1 << 17] __attribute__((aligned(64)));
struct Four;
static void fetch16(void* to, const void* from) {
    if (from) std::memcpy(to, from, 16);
    else std::memset(to, 0, 16);
}
static void close_group() {}
template <int> void await_groups() { block::sync_warp(); }
static void __syncwarp() { block::sync_warp(); }
static int __ffs(uint32_t bits) { return __builtin_ffs((int)bits); }
static float __uint_as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) out |= (uint32_t)(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return out;
}
static float bf16_of(uint32_t bits) { return __uint_as_float(bits << 16); }
static uint32_t bf16(float x) {
    uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static uint32_t bf16s(float low, float high) { return bf16(low) | bf16(high) << 16; }
static uint32_t times(uint32_t a, uint32_t b) {
    return bf16s(bf16_of(a) * bf16_of(b), bf16_of(a >> 16) * bf16_of(b >> 16));
}
// m16n8k16: lane l has rows l / 4 and l / 4 + 8 of the first factor at inputs 2 (l % 4) + {0, 1, 8, 9}, column l / 4 of
// the second at the same ones, and columns 2 (l % 4) + {0, 1} of the sum in both rows.
static void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static float first[8][32][8], second[8][32][4];  // of a warp's lanes
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int i = 0; i < 8; i++) first[warp][lane][i] = bf16_of(a[i / 2] >> 16 * (i % 2));
    for (int i = 0; i < 4; i++) second[warp][lane][i] = bf16_of((i < 2 ? b0 : b1) >> 16 * (i % 2));
    block::sync_warp();
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 * 4, column = (lane % 4 * 2 + i % 2) * 4;
        double sum = c[i];
        for (int quad = 0; quad < 4; quad++)
            for (int k = 0; k < 4; k++)
                sum += (double)first[warp][row + quad][k / 2 * 4 + i / 2 * 2 + k % 2] * second[warp][column + quad][k];
        c[i] = (float)sum;
    }
    block::sync_warp();
}
// ldmatrix.x4.trans: matrix i's rows are at the addresses of lanes 8 i to 8 i + 7; a lane gets rows 2 (l % 4) + {0, 1} of
// column l / 4 of each.
static void turned(uint32_t (&to)[4], const Four* row) {
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
           c.pool, c.pool_stride, c.pool_bits, c.selected, c.picks, c.parts, c.tops, c.totals, c.heads, c.splits,
           c.scale);
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
