// The blocks of engine/csrc/mix_few.cu, one after another, on the CPU.
#include <cmath>
#include "cuda_on_cpu.h"

#define __shared__ static
static float inverse(float x) { return 1.0f / x; }
#include "mix_few.cu"

struct Call {
    const float *streams, *fn, *base, *scale, *norm;
    float *parts, *x, *post, *comb;
    int tokens, size, rounds;
    float rms_eps, hc_eps;
};
static Call c;

extern "C" void run_mix(const Call* call) {
    c = *call;
    blockDim.x = THREADS;
    for (blockIdx.x = 0; (int)blockIdx.x < c.size / COLUMNS; blockIdx.x++)
        block::run(THREADS, [] { penumbra_mix_partial(c.streams, c.fn, c.parts, c.tokens, c.size); });
    for (blockIdx.x = 0; (int)blockIdx.x < c.tokens * ((c.size + WIDE - 1) / WIDE + 1); blockIdx.x++)
        block::run(THREADS, [] {
            penumbra_mix_finish(c.parts, c.streams, c.base, c.scale, c.norm, c.x, c.post, c.comb, c.size, c.rms_eps,
                                c.hc_eps, c.rounds);
        });
}
