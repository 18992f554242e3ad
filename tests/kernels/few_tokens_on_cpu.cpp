// The blocks of engine/csrc/few_tokens.cu, one after another, on the CPU.
#include <cmath>
#include "cuda_on_cpu.h"

#define __shared__
unsigned char memory[1 << 18] __attribute__((aligned(16)));
static inline float __uint_as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static void fetch16(void* to, const void* from) { std::memcpy(to, from, 16); }
static void fetch4(void* to, const void* from) { std::memcpy(to, from, 4); }
static void close_group() {}
template <int> void await_groups() { block::sync_warp(); }
static int fresh(const int* at) { return *at; }
static uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    uint64_t bytes = (uint64_t)high << 32 | low;
    uint32_t made = 0;
    for (int i = 0; i < 4; i++) made |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return made;
}
static void __syncwarp() { block::sync_warp(); }
static _Float16 half_of(uint32_t bits) { uint16_t low = (uint16_t)bits; _Float16 x; std::memcpy(&x, &low, 2); return x; }
static uint32_t bits_of(_Float16 x) { uint16_t bits; std::memcpy(&bits, &x, 2); return bits; }
static uint32_t halves(float low, float high) { return bits_of((_Float16)low) | bits_of((_Float16)high) << 16; }
static uint32_t bf16s(float low, float high) {
    uint32_t parts[2] = {__float_as_uint(low), __float_as_uint(high)};
    for (uint32_t& part : parts) part = (part + 0x7fff + (part >> 16 & 1)) >> 16;
    return parts[0] | parts[1] << 16;
}
static uint32_t times(uint32_t a, uint32_t b) {
    return bits_of(half_of(a) * half_of(b)) | bits_of(half_of(a >> 16) * half_of(b >> 16)) << 16;
}
// m16n8k16: lane l has rows l / 4 and l / 4 + 8 of the first factor at inputs 2 (l % 4) + {0, 1, 8, 9}, column l / 4 of
// the second at the same ones, and columns 2 (l % 4) + {0, 1} of the sum in both rows.
template <typename Value> static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value value) {
    uint32_t first[4][32], second[2][32];
    for (int i = 0; i < 4; i++) std::memcpy(first[i], block::exchange(a[i]), 128), block::sync_warp();
    for (int i = 0; i < 2; i++) std::memcpy(second[i], block::exchange(b[i]), 128), block::sync_warp();
    int lane = threadIdx.x & 31;
    for (int i = 0; i < 4; i++) {
        int row = lane / 4, column = lane % 4 * 2 + i % 2;
        double sum = c[i];
        for (int quad = 0; quad < 4; quad++)
            for (int pair = 0; pair < 2; pair++) {
                uint32_t w = first[2 * pair + i / 2][row * 4 + quad], x = second[pair][column * 4 + quad];
                sum += (double)value(w) * value(x) + (double)value(w >> 16) * value(x >> 16);
            }
        c[i] = (float)sum;
    }
}
static void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    mma(c, {a0, a1, a2, a3}, {b0, b1}, [](uint32_t bits) { return (float)half_of(bits); });
}
static void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    mma(c, {a0, a1, a2, a3}, {b0, b1}, [](uint32_t bits) { return __uint_as_float(bits << 16); });
}

#include "few_tokens.cu"

static void blocks(unsigned count, unsigned threads, void (*kernel)()) {
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < count; blockIdx.x++) {
        std::fill(std::begin(memory), std::end(memory), 0xff);  // NaN
        block::run(threads, kernel);
    }
}

struct Linears { const float* x; float* y; const Matrix* matrices; long long x_row; int tokens, inputs, per_group, span; };
struct GateUp { const float* x; const u8 *gate, *gate_scales, *up, *up_scales; int most; const int *members, *owners; float* y; int pairs, picks, hidden, inner; float limit; int span; };
struct Down { const float* x; const u8 *down, *scales; int most; const float* weights; const int *members, *owners; float* y; int pairs, hidden, inner, span; };
static Linears l;
static GateUp g;
static Down d;

#define PASSED(I) l.matrices[I].weights, l.matrices[I].scales, l.matrices[I].rows, l.matrices[I].columns,
extern "C" void run_linears(const Linears* call, unsigned threads) {
    l = *call;
    int count = 0, of_block = 16 * l.span;
    for (int i = 0; i < MATRICES; i++) count += (l.matrices[i].rows + of_block - 1) / of_block;
    blocks(count, threads, [] {
        penumbra_linears(EACH(PASSED) l.x, l.x_row, l.y, l.tokens, l.inputs, l.per_group, l.span);
    });
}
extern "C" void run_gate_up(const GateUp* call, unsigned blocks_of_work, unsigned threads) {
    g = *call;
    blocks(blocks_of_work * (g.inner / (16 * g.span)), threads, [] {
        penumbra_gate_up(g.x, g.gate, g.gate_scales, g.up, g.up_scales, g.most, g.members, g.owners, g.y, g.pairs,
                         g.picks, g.hidden, g.inner, g.limit, g.span);
    });
}
extern "C" void run_down(const Down* call, unsigned blocks_of_work, unsigned threads) {
    d = *call;
    blocks(blocks_of_work * (d.hidden / (32 * d.span)), threads, [] {
        penumbra_down(d.x, d.down, d.scales, d.most, d.weights, d.members, d.owners, d.y, d.pairs, d.hidden, d.inner,
                      d.span);
    });
}
