// The hyper-connections between sublayers, for a few tokens: what one made goes into the four streams, and what of them
// goes into the next one, and how they mix behind that.
//
//   partial  a block takes 32 columns of all streams: of each token its part of the 24 products with fn, and of the ten
//            sums of products of two streams
//   between  likewise, of the streams that it makes: it adds up the parts of what the sublayer made, spreads them over
//            the streams, and stores those on its way
//   finish   a block takes 512 columns of one token, adds up the parts, and has all it needs: the products say how much
//            of each stream goes in, and the ten sums how long the mixture is, so its norm needs no second look at it.
//            One more block of each token makes the mixing matrix doubly stochastic meanwhile.
//
// Behind the last sublayer the streams become one: four products instead of 24, and no mixing matrix.
//
// Parts are added in a fixed order, each token's alone: the same bits every time, in any company. fp32 throughout.
// Weights are read before a block waits for the kernel in front to end.
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its own
// of what stands between #ifndef ON_CPU and #endif.

#include "warp.cuh"

#ifndef ON_CPU
__device__ __forceinline__ float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // one unit in the last place
    return y;
}
// Past the L1, which may hold what was there before.
__device__ __forceinline__ float fresh(const float* at) {
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(at) : "memory");
    return value;
}
#endif

#define COLUMNS 32
#define WIDE 512      // columns of a block that finishes
#define THREADS 128   // a warp for each stream
#define TOGETHER 4  // tokens that are on their way at once
#define PRODUCTS 24
#define SLOTS 34      // the products, then the sums of streams (0,0) (1,1) (2,2) (3,3) (0,1) (1,2) (2,3) (3,0) (0,2) (1,3)

// What a sublayer made of the tokens: the sum of `count` parts [tokens, count, size] in order, and then of `beside`
// [tokens, size] unless that is null; and how it goes into the streams [tokens, 4, size] that it was made from.
struct Made {
    const float* parts;
    int count;
    const float *beside, *streams, *post, *comb;
};

// sums[t]: what `made` of token first + t comes to at `column`, of `tokens` tokens. All tokens' parts are on their way
// at once, eight of each.
__device__ __forceinline__ void add_up(
    float (&sums)[TOGETHER], const Made& made, int first, int tokens, int size, int column) {
    const int batch = 8;
    float beside[TOGETHER];
#pragma unroll
    for (int t = 0; t < TOGETHER; t++)
        beside[t] = made.beside && t < tokens ? made.beside[(long long)(first + t) * size + column] : 0.0f;
#pragma unroll 1
    for (int part = 0; part < made.count; part += batch) {
        float in[TOGETHER][batch];
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
#pragma unroll
            for (int i = 0; i < batch; i++)
                if (t < tokens && part + i < made.count)
                    in[t][i] = made.parts[((long long)(first + t) * made.count + part + i) * size + column];
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
#pragma unroll
            for (int i = 0; i < batch; i++)
                if (t < tokens && part + i < made.count) sums[t] = part + i ? sums[t] + in[t][i] : in[t][i];
    }
    if (made.beside)
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) sums[t] += beside[t];
}

// streams [tokens, 4, size], fn [ROWS, 4 * size] -> parts [tokens, SLOTS, size / COLUMNS], with zeros for products that are
// not there. MADE: the streams are those that `made` leaves, and are written.
template <int ROWS, bool MADE>
__device__ __forceinline__ void partial(
    const Made& made, float* streams, const float* fn, float* parts, int tokens, int size) {
    __shared__ float warps[TOGETHER][4][32], shared_streams[TOGETHER][4][32];
    int stream = warp_id(), lane = lane_id(), column = blockIdx.x * COLUMNS + lane, blocks = size / COLUMNS;
    float weights[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; j++) weights[j] = fn[(long long)(4 * j + stream) * size + column];
    if (!MADE) await_previous();
    for (int first = 0; first < tokens; first += TOGETHER) {
        int count = tokens - first < TOGETHER ? tokens - first : TOGETHER;
        float own[TOGETHER], next[TOGETHER], over[TOGETHER];
        if constexpr (MADE) {
            // Of the kernel in front only what it made is read, so what else it takes can be on its way before it ends.
            float before[TOGETHER][4], sums[TOGETHER] = {};
            float factors[TOGETHER];  // a warp's, spread over its lanes: comb [4, 4], then post [4]
#pragma unroll
            for (int t = 0; t < TOGETHER; t++)
                if (t < count) {
                    const float* at = made.streams + (long long)(first + t) * 4 * size + column;
#pragma unroll
                    for (int j = 0; j < 4; j++) before[t][j] = fresh(at + j * size);
                    factors[t] = fresh(lane < 16 ? made.comb + (first + t) * 16 + lane
                                                 : made.post + (first + t) * 4 + lane % 4);
                }
            if (first == 0) await_previous();
            add_up(sums, made, first, count, size, column);
#pragma unroll
            for (int t = 0; t < TOGETHER; t++)
                if (t < count) {
                    own[t] = __shfl_sync(ALL, factors[t], 16 + stream) * sums[t];
#pragma unroll
                    for (int j = 0; j < 4; j++) own[t] += __shfl_sync(ALL, factors[t], 4 * j + stream) * before[t][j];
                    shared_streams[t][stream][lane] = own[t];
                    streams[((long long)(first + t) * 4 + stream) * size + column] = own[t];
                }
            __syncthreads();
#pragma unroll
            for (int t = 0; t < TOGETHER; t++)
                if (t < count) {
                    next[t] = shared_streams[t][(stream + 1) % 4][lane];
                    over[t] = shared_streams[t][(stream + 2) % 4][lane];
                }
        } else {
#pragma unroll
            for (int t = 0; t < TOGETHER; t++)
                if (t < count) {
                    const float* at = streams + (long long)(first + t) * 4 * size + column;
                    own[t] = at[stream * size];
                    next[t] = at[(stream + 1) % 4 * size];
                    over[t] = at[(stream + 2) % 4 * size];
                }
        }
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
            if (t < count) {
                float values[32] = {};
#pragma unroll
                for (int j = 0; j < ROWS; j++) values[j] = own[t] * weights[j];
                values[24] = own[t] * own[t];
                values[25] = own[t] * next[t];
                values[26] = own[t] * over[t];  // of streams 0 and 1: the other two repeat them
                warps[t][stream][lane] = sum_of_own<32>(values);
            }
        __syncthreads();
        for (int n = threadIdx.x; n < count * SLOTS; n += THREADS) {
            int t = n / SLOTS, slot = n % SLOTS;
            const float(&of)[4][32] = warps[t];
            float sum = slot < PRODUCTS ? of[0][slot] + of[1][slot] + of[2][slot] + of[3][slot]
                                  : of[(slot - 24) % 4][24 + (slot - 24) / 4];
            parts[((long long)(first + t) * SLOTS + slot) * blocks + blockIdx.x] = sum;
        }
        __syncthreads();
    }
}

#define PARTIAL(NAME, ROWS)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(                                                     \
        const float* streams, const float* fn, float* parts, int tokens, int size) {                                \
        partial<ROWS, false>(Made{}, const_cast<float*>(streams), fn, parts, tokens, size);                         \
    }
PARTIAL(penumbra_mix_partial, PRODUCTS)
PARTIAL(penumbra_collapse_partial, 4)

// Streams, post and comb are not from the kernel right in front: a sublayer lies between. A block is small enough to
// begin beside the last blocks of that one.
extern "C" __global__ void __launch_bounds__(THREADS, 4) penumbra_mix_between(
    const float* made, int count, const float* beside, const float* before, const float* post, const float* comb,
    float* streams, const float* fn, float* parts, int tokens, int size) {
    partial<PRODUCTS, true>(Made{made, count, beside, before, post, comb}, streams, fn, parts, tokens, size);
}

__device__ __forceinline__ float opened(float x) { return 1.0f / (1.0f + expf(-x)); }

// value [4][4] -> softmax over rows, then rows and columns in turn divided by their sums. By one thread: all of it is a
// chain, and a sum of four is shorter in registers than over lanes.
__device__ __forceinline__ void make_doubly_stochastic(float (&value)[4][4], int rounds, float eps) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float top = fmaxf(fmaxf(value[j][0], value[j][1]), fmaxf(value[j][2], value[j][3]));
#pragma unroll
        for (int k = 0; k < 4; k++) value[j][k] = expf(value[j][k] - top);
    }
    for (int round = 0; round < rounds; round++) {
        float first = round ? 0.0f : eps;  // the softmax itself is exact, and eps then added to it
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float by = inverse((value[j][0] + value[j][1]) + (value[j][2] + value[j][3]) + (eps - first));
#pragma unroll
            for (int k = 0; k < 4; k++) value[j][k] = value[j][k] * by + first;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float by = inverse((value[0][k] + value[1][k]) + (value[2][k] + value[3][k]) + eps);
#pragma unroll
            for (int j = 0; j < 4; j++) value[j][k] *= by;
        }
    }
}

// x [tokens, size], normed by norm [size] unless that is null; post [tokens, 4], comb [tokens, 4, 4], unless that is null:
// then a token has no block that makes these two.
extern "C" __global__ void __launch_bounds__(THREADS) penumbra_mix_finish(
    const float* parts, const float* streams, const float* base, const float* scale, const float* norm, float* x,
    float* post, float* comb, int size, float rms_eps, float hc_eps, int rounds) {
    __shared__ float sums[SLOTS];
    const int own_slots = (SLOTS + 3) / 4;  // of a warp
    int wide = (size + WIDE - 1) / WIDE, each = comb ? wide + 1 : wide;
    int token = blockIdx.x / each, part = blockIdx.x % each;
    int blocks = size / COLUMNS, column = part * WIDE + 4 * threadIdx.x;
    bool mixes = part < wide && column < size;
    Floats<4> weights = {{1.0f, 1.0f, 1.0f, 1.0f}}, in_streams[4];
    if (mixes && norm) weights = *reinterpret_cast<const Floats<4>*>(norm + column);
    await_previous();
    if (mixes)
#pragma unroll
        for (int k = 0; k < 4; k++)
            in_streams[k] = *reinterpret_cast<const Floats<4>*>(streams + (long long)(token * 4 + k) * size + column);
    const float* mine = parts + (long long)token * SLOTS * blocks;
    float found[own_slots] = {};
    for (int b = 4 * lane_id(); b < blocks; b += 128)
#pragma unroll
        for (int i = 0; i < own_slots; i++)
            if (warp_id() + 4 * i < SLOTS) {
                Floats<4> four = *reinterpret_cast<const Floats<4>*>(mine + (warp_id() + 4 * i) * blocks + b);
                found[i] += (four.f[0] + four.f[1]) + (four.f[2] + four.f[3]);
            }
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
#pragma unroll
        for (int i = 0; i < own_slots; i++) found[i] += __shfl_xor_sync(ALL, found[i], d);
    if (lane_id() == 0)
#pragma unroll
        for (int i = 0; i < own_slots; i++)
            if (warp_id() + 4 * i < SLOTS) sums[warp_id() + 4 * i] = found[i];
    __syncthreads();
    float shrink = 1.0f / sqrtf((sums[24] + sums[25] + sums[26] + sums[27]) / (4.0f * size) + rms_eps);
    if (part == wide) {
        int at = threadIdx.x - 32;
        if (at >= 0 && at < 4) post[token * 4 + at] = 2.0f * opened(sums[4 + at] * shrink * scale[1] + base[4 + at]);
        if (threadIdx.x) return;
        float value[4][4];
#pragma unroll
        for (int i = 0; i < 16; i++) value[i / 4][i % 4] = sums[8 + i] * shrink * scale[2] + base[8 + i];
        make_doubly_stochastic(value, rounds, hc_eps);
#pragma unroll
        for (int i = 0; i < 16; i++) comb[token * 16 + i] = value[i / 4][i % 4];
        return;
    }
    float in[4];
#pragma unroll
    for (int k = 0; k < 4; k++) in[k] = opened(sums[k] * shrink * scale[0] + base[k]) + hc_eps;
    float factor = 1.0f;
    if (norm) {
        float squares = 0.0f;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            squares += in[k] * in[k] * sums[24 + k] + 2.0f * in[k] * in[(k + 1) % 4] * sums[28 + k];
            if (k < 2) squares += 2.0f * in[k] * in[k + 2] * sums[32 + k];
        }
        factor = 1.0f / sqrtf(squares / size + rms_eps);
    }
    if (!mixes) return;
    Floats<4> mixed;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        mixed.f[i] = 0.0f;
#pragma unroll
        for (int k = 0; k < 4; k++) mixed.f[i] += in[k] * in_streams[k].f[i];
        mixed.f[i] *= factor * weights.f[i];
    }
    *reinterpret_cast<Floats<4>*>(x + (long long)token * size + column) = mixed;
}
