// The blocks of engine/csrc/few_tokens.cu, one after another, on the CPU.
#include <cmath>
#include "cuda_on_cpu.h"

#define __shared__
unsigned char memory[1 << 18] __attribute__((aligned(16)));
static void fetch16_once(void* to, const void* from) { std::memcpy(to, from, 16); }
static void fetch4(void* to, const void* from) { std::memcpy(to, from, 4); }
static float inverse_root(float x) { return 1.0f / std::sqrt(x); }
static _Float16 half_of(uint32_t bits) { uint16_t low = (uint16_t)bits; _Float16 x; std::memcpy(&x, &low, 2); return x; }
static uint32_t bits_of(_Float16 x) { uint16_t bits; std::memcpy(&bits, &x, 2); return bits; }
static uint32_t halves(float low, float high) { return bits_of((_Float16)low) | bits_of((_Float16)high) << 16; }
static void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    mma(c, {a0, a1, a2, a3}, b0, b1, [](uint32_t bits) { return (float)half_of(bits); });
}

#include "few_tokens.cu"

static void blocks(unsigned count, unsigned threads, void (*kernel)()) {
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < count; blockIdx.x++) {
        std::fill(std::begin(memory), std::end(memory), 0xff);  // NaN
        block::run(threads, kernel);
    }
}

struct Linears { const float* x; const float* norm; float* y; const Matrix* matrices; long long x_row; int tokens, inputs, per_group, span; float eps; };
struct Gated { const float* x; float* y; const Matrix* both; long long x_row; int tokens, inputs, span; float limit; };
static Linears l;
static Gated s;

#define PASSED(I) l.matrices[I].weights, l.matrices[I].scales, l.matrices[I].rows, l.matrices[I].columns,
extern "C" void run_linears(const Linears* call, unsigned threads) {
    l = *call;
    int count = 0, of_block = 16 * l.span;
    for (int i = 0; i < MATRICES; i++) count += (l.matrices[i].rows + of_block - 1) / of_block;
    blocks(count, threads, [] {
        if (l.norm)
            penumbra_linears_normed(EACH(PASSED) l.x, l.x_row, l.norm, l.eps, l.y, l.tokens, l.inputs, l.per_group, l.span);
        else
            penumbra_linears(EACH(PASSED) l.x, l.x_row, l.y, l.tokens, l.inputs, l.per_group, l.span);
    });
}
extern "C" void run_gated(const Gated* call, unsigned threads) {
    s = *call;
    blocks((s.both->rows + 16 * s.span - 1) / (16 * s.span), threads, [] {
        const Matrix &gate = s.both[0], &up = s.both[1];
        penumbra_gated(gate.weights, up.weights, gate.rows, s.x, s.x_row, s.y, s.tokens, s.inputs, s.limit, s.span);
    });
}
