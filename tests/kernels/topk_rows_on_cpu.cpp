// One row after another of engine/csrc/topk_rows.cu, on the CPU.
#include "cuda_on_cpu.h"

unsigned char memory[1 << 18];
#define __shared__
#include "topk_rows.cu"

static const float *g_scores, *g_maxima;
static const long long* g_positions;
static int* g_out;
static int64_t g_width;
static int g_k;

extern "C" void run_topk_rows(
    const float* scores, const float* maxima, const long long* positions, int* out, int64_t rows, int64_t width, int k) {
    static_assert(sizeof(Shared) <= sizeof memory, "the block's shared memory");
    g_scores = scores, g_maxima = maxima, g_positions = positions, g_out = out, g_width = width, g_k = k;
    for (int64_t row = 0; row < rows; row++) {
        blockIdx.x = row;
        std::fill(std::begin(memory), std::end(memory), 0xa5);
        block::run(THREADS, [] {
            penumbra_topk_rows(g_scores, g_width, g_maxima, g_width / TILE, g_positions, 1, g_k, g_out);
        });
    }
}
