// The hyper-connections in front of a sublayer, for a few tokens: what of the four streams goes in, and how they mix.
//
//   partial  a block takes 32 columns of all streams: of each token its part of the 24 products with fn, and of the ten
//            sums of products of two streams
//   finish   a block takes 512 columns of one token, adds up the parts, and has all it needs: the products say how much
//            of each stream goes in, and the ten sums how long the mixture is, so its norm needs no second look at it.
//            One more block of each token makes the mixing matrix doubly stochastic meanwhile.
//
// Parts are added in a fixed order, each token's alone: the same bits every time, in any company. fp32 throughout.
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h).

typedef unsigned int u32;

#define COLUMNS 32
#define WIDE 512      // columns of a block that finishes
#define THREADS 128   // a warp for each stream
#define PRODUCTS 24
#define SLOTS 34      // the products, then the sums of streams (0,0) (1,1) (2,2) (3,3) (0,1) (1,2) (2,3) (3,0) (0,2) (1,3)
#define ALL 0xffffffffu

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x >> 5; }

template <int HALF> __device__ __forceinline__ void fold(float (&values)[32]) {
    bool upper = lane_id() & HALF;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        float kept = upper ? values[i + HALF] : values[i], given = upper ? values[i] : values[i + HALF];
        values[i] = kept + __shfl_xor_sync(ALL, given, HALF);
    }
}

// 32 values of each lane -> the sum of value `lane` over all lanes, in 31 exchanges.
__device__ __forceinline__ float sum_of_own(float (&values)[32]) {
    fold<16>(values);
    fold<8>(values);
    fold<4>(values);
    fold<2>(values);
    fold<1>(values);
    return values[0];
}

// streams [tokens, 4, size], fn [24, 4 * size] -> parts [tokens, SLOTS, size / COLUMNS]
extern "C" __global__ void __launch_bounds__(THREADS) penumbra_mix_partial(
    const float* streams, const float* fn, float* parts, int tokens, int size) {
    __shared__ float warps[4][32];
    int stream = warp_id(), column = blockIdx.x * COLUMNS + lane_id(), blocks = size / COLUMNS;
    float weights[PRODUCTS];
#pragma unroll
    for (int j = 0; j < PRODUCTS; j++) weights[j] = fn[(long long)(4 * j + stream) * size + column];
    for (int t = 0; t < tokens; t++) {
        const float* at = streams + (long long)t * 4 * size + column;
        float own = at[stream * size], next = at[(stream + 1) % 4 * size], over = at[(stream + 2) % 4 * size];
        float values[32];
#pragma unroll
        for (int j = 0; j < PRODUCTS; j++) values[j] = own * weights[j];
        values[24] = own * own;
        values[25] = own * next;
        values[26] = own * over;  // of streams 0 and 1: the other two repeat them
#pragma unroll
        for (int j = 27; j < 32; j++) values[j] = 0.0f;
        float sum = sum_of_own(values);
        __syncthreads();
        warps[stream][lane_id()] = sum;
        __syncthreads();
        float* out = parts + (long long)t * SLOTS * blocks + blockIdx.x;
        int slot = threadIdx.x;
        if (slot < PRODUCTS) out[slot * blocks] = warps[0][slot] + warps[1][slot] + warps[2][slot] + warps[3][slot];
        else if (slot < SLOTS) out[slot * blocks] = warps[(slot - 24) % 4][24 + (slot - 24) / 4];
    }
}

__device__ __forceinline__ float opened(float x) { return 1.0f / (1.0f + expf(-x)); }

// x [tokens, size], normed by norm [size] unless that is null; post [tokens, 4], comb [tokens, 4, 4].
extern "C" __global__ void __launch_bounds__(THREADS) penumbra_mix_finish(
    const float* parts, const float* streams, const float* base, const float* scale, const float* norm, float* x,
    float* post, float* comb, int size, float rms_eps, float hc_eps, int rounds) {
    __shared__ float sums[SLOTS];
    int wide = (size + WIDE - 1) / WIDE, token = blockIdx.x / (wide + 1), part = blockIdx.x % (wide + 1);
    int blocks = size / COLUMNS;
    const float* mine = parts + (long long)token * SLOTS * blocks;
#pragma unroll
    for (int i = 0; i < (SLOTS + 3) / 4; i++) {
        int slot = warp_id() + 4 * i;
        float sum = 0.0f;
        if (slot < SLOTS)
            for (int b = lane_id(); b < blocks; b += 32) sum += mine[slot * blocks + b];
#pragma unroll
        for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(ALL, sum, d);
        if (slot < SLOTS && lane_id() == 0) sums[slot] = sum;
    }
    __syncthreads();
    float shrink = 1.0f / sqrtf((sums[24] + sums[25] + sums[26] + sums[27]) / (4.0f * size) + rms_eps);
    if (part == wide) {
        if (warp_id()) return;
        int lane = lane_id();
        if (lane < 4) post[token * 4 + lane] = 2.0f * opened(sums[4 + lane] * shrink * scale[1] + base[4 + lane]);
        // Lane 4 j + k has cell (j, k); the upper half repeats the lower one.
        int cell = lane & 15;
        float value = sums[8 + cell] * shrink * scale[2] + base[8 + cell];
        float top = fmaxf(value, __shfl_xor_sync(ALL, value, 1));
        top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));
        value = expf(value - top);
        for (int round = 0; round < rounds; round++) {
            float row = value + __shfl_xor_sync(ALL, value, 1);
            row += __shfl_xor_sync(ALL, row, 2);
            value = round ? value / (row + hc_eps) : value / row + hc_eps;
            float column = value + __shfl_xor_sync(ALL, value, 4);
            column += __shfl_xor_sync(ALL, column, 8);
            value /= column + hc_eps;
        }
        if (lane < 16) comb[token * 16 + lane] = value;
        return;
    }
    float in[4];
    for (int k = 0; k < 4; k++) in[k] = opened(sums[k] * shrink * scale[0] + base[k]) + hc_eps;
    float factor = 1.0f;
    if (norm) {
        float squares = 0.0f;
        for (int k = 0; k < 4; k++) {
            squares += in[k] * in[k] * sums[24 + k] + 2.0f * in[k] * in[(k + 1) % 4] * sums[28 + k];
            if (k < 2) squares += 2.0f * in[k] * in[k + 2] * sums[32 + k];
        }
        factor = 1.0f / sqrtf(squares / size + rms_eps);
    }
    const float* at = streams + (long long)token * 4 * size;
    for (int column = part * WIDE + threadIdx.x; column < (part + 1) * WIDE && column < size; column += THREADS) {
        float mixed = 0.0f;
        for (int k = 0; k < 4; k++) mixed += in[k] * at[k * size + column];
        mixed *= factor;
        x[(long long)token * size + column] = norm ? norm[column] * mixed : mixed;
    }
}
