// The blocks of engine/csrc/mix_few.cu, one after another, on the CPU.
#include <cmath>
#include "cuda_on_cpu.h"

#define __shared__ static
static float inverse(float x) { return 1.0f / x; }
static float inverse_root(float x) { return 1.0f / std::sqrt(x); }
static float fresh(const float* at) { return *at; }

// What the kernel in front writes is not there until a thread of the block has waited for it: NaN.
static std::vector<std::pair<std::vector<float>, float*>> late;
static void front_ends() {
    for (auto& [values, at] : late) std::copy(values.begin(), values.end(), at);
}
static void front_begins() {
    for (auto& [values, at] : late) std::fill_n(at, values.size(), std::nanf(""));
}
#define await_previous front_ends
#include "mix_few.cu"
#undef await_previous

// made null: streams are there; comb null: four products, and x alone; fn null: what was made goes into the streams, and
// that is all. rounds: of before_comb. turns: 1 for eager warps, 2 for the last one first, 3 for both.
struct Call {
    const float *made, *beside, *before, *before_post, *before_comb;
    float* streams;
    const float *fn, *base, *scale, *norm;
    float *parts, *x, *post, *comb;
    int count, tokens, size, rounds, turns;
    float rms_eps, hc_eps;
};
static Call c;

static void comes_late(const float* at, int count) {
    if (at) late.push_back({std::vector<float>(at, at + count), const_cast<float*>(at)});
}
static void run_grid(int blocks, int threads, void (*kernel)()) {
    blockDim.x = threads;
    for (blockIdx.x = 0; (int)blockIdx.x < blocks; blockIdx.x++) {
        front_begins();
        block::run(threads, kernel);
    }
    front_ends();
    late.clear();
}

extern "C" void run_mix(const Call* call) {
    c = *call;
    block::eager = c.turns & 1, block::backwards = c.turns & 2;
    int of_streams = c.tokens * 4 * c.size, groups = (c.tokens + TOGETHER - 1) / TOGETHER;
    if (c.made) comes_late(c.made, c.tokens * c.count * c.size), comes_late(c.beside, c.tokens * c.size);
    else comes_late(c.streams, of_streams);
    if (!c.fn) {
        comes_late(c.before, of_streams), comes_late(c.before_post, c.tokens * 4), comes_late(c.before_comb, c.tokens * 16);
        return run_grid(groups * c.size / COLUMNS, THREADS, [] {
            penumbra_mix_out(c.made, c.count, c.beside, c.before, c.before_post, c.before_comb, c.rounds, c.hc_eps, c.streams,
                             c.tokens, c.size);
        });
    }
    run_grid(groups * c.size / COLUMNS, THREADS, [] {
        if (c.made)
            penumbra_mix_between(c.made, c.count, c.beside, c.before, c.before_post, c.before_comb, c.rounds, c.hc_eps,
                                 c.streams, c.fn, c.parts, c.tokens, c.size);
        else if (c.comb) penumbra_mix_partial(c.streams, c.fn, c.parts, c.tokens, c.size);
        else penumbra_collapse_partial(c.streams, c.fn, c.parts, c.tokens, c.size);
    });
    comes_late(c.streams, of_streams), comes_late(c.parts, c.tokens * SLOTS * (c.size / COLUMNS));
    run_grid(c.tokens * ((c.size + WIDE - 1) / WIDE + (c.comb ? 1 : 0)), FINISHING, [] {
        penumbra_mix_finish(c.parts, c.streams, c.base, c.scale, c.norm, c.x, c.post, c.comb, c.size, c.rms_eps, c.hc_eps);
    });
}
