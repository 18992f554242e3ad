// The blocks of engine/csrc/mix_few.cu, one after another, on the CPU.
#include <cmath>
#include "cuda_on_cpu.h"

#define __shared__ static
static float inverse(float x) { return 1.0f / x; }
static float fresh(const float* at) { return *at; }
#include "mix_few.cu"

// made null: streams are there; comb null: four products, and x alone.
struct Call {
    const float *made, *beside, *before, *before_post, *before_comb;
    float* streams;
    const float *fn, *base, *scale, *norm;
    float *parts, *x, *post, *comb;
    int count, tokens, size, rounds;
    float rms_eps, hc_eps;
};
static Call c;

extern "C" void run_mix(const Call* call) {
    c = *call;
    blockDim.x = THREADS;
    for (blockIdx.x = 0; (int)blockIdx.x < c.size / COLUMNS; blockIdx.x++)
        block::run(THREADS, [] {
            if (c.made)
                penumbra_mix_between(c.made, c.count, c.beside, c.before, c.before_post, c.before_comb, c.streams, c.fn,
                                     c.parts, c.tokens, c.size);
            else if (c.comb) penumbra_mix_partial(c.streams, c.fn, c.parts, c.tokens, c.size);
            else penumbra_collapse_partial(c.streams, c.fn, c.parts, c.tokens, c.size);
        });
    for (blockIdx.x = 0; (int)blockIdx.x < c.tokens * ((c.size + WIDE - 1) / WIDE + (c.comb ? 1 : 0)); blockIdx.x++)
        block::run(THREADS, [] {
            penumbra_mix_finish(c.parts, c.streams, c.base, c.scale, c.norm, c.x, c.post, c.comb, c.size, c.rms_eps,
                                c.hc_eps, c.rounds);
        });
}
