// The blocks of engine/csrc/attend_long.cu, one after another, on the CPU.
#include <cmath>
#include "cuda_on_cpu.h"

#define __shared__
unsigned char memory[228 << 10] __attribute__((aligned(1024)));
#include "attend_on_cpu.h"
#include "warpgroup_on_cpu.h"

static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static float power2(float x) { return std::exp2(x); }
// Rounded to nearest, ties to even, as F16C does without asking for it of the compiler.
static uint32_t half(float x) {
    uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000;
    float size = std::fabs(x);
    if (x != x) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    int power = size < 0x1p-14f ? -14 : std::ilogb(size);
    uint32_t units = (uint32_t)std::nearbyint(std::ldexp(size, 10 - power));
    return sign | ((uint32_t)(power + 14) * 1024 + units);
}
static uint32_t halves(float low, float high) { return half(low) | half(high) << 16; }
static float of_half(uint32_t bits) {
    int power = bits >> 10 & 31, units = bits & 1023;
    float size = power == 31 ? (units ? NAN : INFINITY) : std::ldexp((float)(power ? units + 1024 : units), (power ? power : 1) - 25);
    return bits & 0x8000 ? -size : size;
}
static Floats<2> of_halves(uint32_t both) { return Floats<2>{{of_half(both & 0xffff), of_half(both >> 16)}}; }

#include "attend_long.cu"

struct Call {
    const float* q;
    const long long* positions;
    const int *segment, *page_table, *swa_table;
    const long long* oldest;
    const u8 *window, *pool;
    const int* selected;
    unsigned short* parts;
    float* stats;
    const float *sink, *freqs;
    float* out;
    long long window_stride, pool_stride;
    int pages, pool_bits, picks, heads, splits, pairs;
    float scale;
};
static Call c;

#define READ                                                                                                        \
    c.q, c.positions, c.segment, c.page_table, c.swa_table, c.oldest, c.pages, c.window, c.window_stride, c.pool,    \
        c.pool_stride, c.pool_bits, c.selected, c.picks
template <auto KERNEL> static void parts_of() { KERNEL(READ, c.parts, c.stats, c.heads, c.splits, c.scale); }
template <auto KERNEL> static void all_of() { KERNEL(READ, c.sink, c.freqs, c.pairs, c.out, c.heads, c.scale); }

// All of it if there is an `out`.
extern "C" void run_attend(const Call* call, unsigned tokens, unsigned keys, bool late) {
    static_assert(sizeof(Shared<64>) <= sizeof memory, "");
    c = *call;
    warpgroup::late = late;
    blockDim.x = THREADS;
    auto kernel = c.out ? (keys == 32 ? all_of<penumbra_attend_all_32> : all_of<penumbra_attend_all_64>)
                        : (keys == 32 ? parts_of<penumbra_attend_long_32> : parts_of<penumbra_attend_long_64>);
    for (blockIdx.x = 0; blockIdx.x < tokens * c.splits * (c.heads / HEADS); blockIdx.x++) {
        std::fill(std::begin(memory), std::end(memory), 0xff);  // NaN
        block::run(THREADS, kernel);
        for (auto& queue : warpgroup::queues)
            if (!queue.empty()) std::abort();
    }
}
struct Merge {
    const unsigned short* parts;
    const float *stats, *sink;
    const long long* positions;
    const float* freqs;
    float* out;
    int pairs, heads, splits;
};
static Merge m;
template <auto KERNEL> static void merged_by() {
    KERNEL(m.parts, m.stats, m.sink, m.positions, m.freqs, m.pairs, m.out, m.heads, m.splits);
}

extern "C" void run_merge(const Merge* call, unsigned tokens, unsigned most) {
    m = *call;
    auto body = most == 4 ? merged_by<penumbra_attend_long_merge_4>
              : most == 32 ? merged_by<penumbra_attend_long_merge_32>
                           : merged_by<penumbra_attend_long_merge_64>;
    blockDim.x = most == 4 ? 128 : 256;
    for (blockIdx.x = 0; blockIdx.x < tokens * m.heads * 2; blockIdx.x++) {
        std::fill(std::begin(memory), std::end(memory), 0xff);
        block::run(blockDim.x, body);
    }
}
extern "C" unsigned shared_bytes(unsigned keys) {
    return keys == 0 ? sizeof(Merging) : keys == 32 ? sizeof(Shared<32>) : sizeof(Shared<64>);
}
