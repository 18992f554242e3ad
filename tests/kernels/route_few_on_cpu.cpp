// The blocks of engine/csrc/route_few.cu, one after another, on the CPU.
#include <cmath>
#include "cuda_on_cpu.h"

#define __shared__ static
static float root(float x) { return std::sqrt(x); }
static float quotient(float x, float y) { return x / y; }
#include "route_few.cu"

struct Gate {
    const float *x, *gate;
    float* parts;
    int tokens, experts, size, most;
};
struct Route {
    const float *parts, *bias;
    const long long *table, *token_ids;
    int* picks;
    float* weights;
    int *members, *owners;
    int splits, tokens, experts, k, blocks, values;
    float scaling;
};
static Gate g;
static Route r;

extern "C" void run_gate(const Gate* call) {
    g = *call;
    blockDim.x = THREADS;
    unsigned blocks = (g.experts + EXPERTS - 1) / EXPERTS * ((g.size + SPAN - 1) / SPAN);
    blocks *= (g.tokens + TOKENS - 1) / TOKENS;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        block::run(THREADS, [] {
            auto kernel = g.most == 1 ? penumbra_gate_1 : g.most == 2 ? penumbra_gate_2
                        : g.most == 4 ? penumbra_gate_4 : penumbra_gate_8;
            kernel(g.x, g.gate, g.parts, g.tokens, g.experts, g.size);
        });
}
extern "C" void run_route(const Route* call) {
    r = *call;
    blockDim.x = THREADS;
    blockIdx.x = 0;
    block::run(THREADS, [] {
        auto kernel = r.values == 8 ? penumbra_route_8 : r.values == 16 ? penumbra_route_16 : penumbra_route_32;
        kernel(r.parts, r.splits, r.bias, r.table, r.token_ids, r.picks, r.weights, r.members, r.owners, r.tokens,
               r.experts, r.k, r.blocks, r.scaling);
    });
}
