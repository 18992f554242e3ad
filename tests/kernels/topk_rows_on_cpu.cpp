// One row after another of engine/csrc/topk_rows.cu, on the CPU.
#include "cuda_on_cpu.h"

unsigned char memory[1 << 17] __attribute__((aligned(16)));
#define __shared__
inline float larger(float x, float y) { return x != x || y != y ? __uint_as_float(0x7fffffffu) : x > y ? x : y; }
inline float plain(float x) { return x != x ? __uint_as_float(0x7fffffffu) : x + 0.0f; }
template <typename T> T* computed(T* pointer) { return pointer; }
template <unsigned d> uint32_t and_lower(uint32_t value) {
    uint32_t other = __shfl_up_sync(0xffffffffu, value, d);
    return (threadIdx.x & 31) < d ? value : value + other;
}
#include "topk_rows.cu"

static const float *g_scores, *g_maxima;
static const long long* g_positions;
static int* g_out;
static int g_width, g_tiles, g_k;

template <int THREADS> static void block_of_topk() {
    topk<THREADS>(g_scores, g_width, g_maxima, g_tiles, g_positions, 0, g_k, g_out);
}

// turns: 1 for eager warps, 2 for the last one first, 3 for both. Returns how many barriers the row that met most of them passed.
extern "C" long run_topk_rows(
    const float* scores, const float* maxima, const long long* positions, int* out, int rows, int width, int tiles, int k,
    int threads, int turns) {
    static_assert(sizeof(Shared) <= sizeof memory, "the block's shared memory");
    g_scores = scores, g_maxima = maxima, g_positions = positions, g_out = out;
    g_width = width, g_tiles = tiles, g_k = k;
    block::eager = turns & 1, block::backwards = turns & 2;
    long barriers = 0;
    for (int row = 0; row < rows; row++) {
        blockIdx.x = row;
        std::fill(std::begin(memory), std::end(memory), 0xa5);
        block::run(threads, threads == 256 ? block_of_topk<256> : threads == 512 ? block_of_topk<512> : block_of_topk<1024>);
        barriers = std::max(barriers, block::fibers[0].barriers);
    }
    return barriers;
}

extern "C" int bytes_of_shared() { return sizeof(Shared); }
