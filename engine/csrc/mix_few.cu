// The hyper-connections between sublayers, for a few tokens: what one made goes into the four streams, and what of them
// goes into the next one, and how they mix behind that.
//
//   partial  a block takes 32 columns of all streams of four tokens: of each token its part of the 24 products with fn,
//            and of the ten sums of products of two streams
//   between  likewise, of the streams that it makes: it adds up the parts of what the sublayer made, spreads them over
//            the streams, and stores those on its way
//   finish   a block takes 256 columns of one token, adds up the parts, and has all it needs: the products say how much
//            of each stream goes in, and the ten sums how long the mixture is, so its norm needs no second look at it.
//            One more block of each token finds how its streams mix behind the sublayer.
//
// That is first needed when the sublayer is done, and making the matrix doubly stochastic takes longer than all else
// that finish does. So it leaves logits, and whoever spreads makes a matrix of them: between, while the sublayer's last
// kernel still runs. Behind the last sublayer of all, mix_out spreads alone; then the streams become one: four products
// instead of 24, and no mixing matrix.
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
__device__ __forceinline__ float inverse_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // two units
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
#define TOGETHER 4    // tokens of a block that makes parts
#define THREADS 512   // of it: a warp for each stream of each token, a lane for each column
#define WIDE 256      // columns of a block that finishes
#define FINISHING 192 // its threads: eight for each sum of the block that needs most
#define PRODUCTS 24
#define SLOTS 34      // the products, then the sums of streams (0,0) (1,1) (2,2) (3,3) (0,1) (1,2) (2,3) (3,0) (0,2) (1,3)
#define BATCH 8       // loads of a thread that are on their way at once

// What a sublayer made of the tokens: the sum of `count` parts [tokens, count, size] in order, and then of `beside`
// [tokens, size] unless that is null; and how it goes into the streams [tokens, 4, size] that it was made from: post
// [tokens, 4], and comb [tokens, 4, 4] after as many rounds of making it doubly stochastic, as it is with none.
struct Made {
    const float* parts;
    int count;
    const float *beside, *streams, *post, *comb;
    int rounds;
    float eps;
};

// value [4][4] -> softmax over rows, then rows and columns in turn divided by their sums. By one thread: all of it is a
// chain, and a sum of four is shorter in registers than over lanes.
__device__ __forceinline__ void make_doubly_stochastic(float (&value)[4][4], int rounds, float eps) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float top = fmaxf(fmaxf(value[j][0], value[j][1]), fmaxf(value[j][2], value[j][3]));
#pragma unroll
        for (int k = 0; k < 4; k++) value[j][k] = expf(value[j][k] - top);
    }
#pragma unroll 1
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

// combs: the matrices of `count` tokens, each by a lane of a warp that has no weights.
__device__ __forceinline__ void balance(float (*combs)[16], const Made& made, int first, int count) {
    if (warp_id() < THREADS / 32 - 1 || lane_id() >= count) return;
    float value[4][4];
#pragma unroll
    for (int i = 0; i < 16; i++) value[i / 4][i % 4] = fresh(made.comb + (first + lane_id()) * 16 + i);
    if (made.rounds) make_doubly_stochastic(value, made.rounds, made.eps);
#pragma unroll
    for (int i = 0; i < 16; i++) combs[lane_id()][i] = value[i / 4][i % 4];
}

// values[i]: the i-th of `count` parts, which are `size` apart; zeros behind the last one. An address takes one
// instruction.
__device__ __forceinline__ void send_for(float (&values)[BATCH], const float* parts, int count, u32 size) {
#pragma unroll
    for (int i = 0; i < BATCH; i++)
        values[i] = i < count ? *reinterpret_cast<const float*>(
            reinterpret_cast<const u8*>(parts) + (unsigned long long)(4 * size) * i) : 0.0f;
}

// The value of a thread's stream of its token at its column, of the streams that `made` leaves, given what balance()
// wrote; 0 where there is no such token. Of the kernel in front only what it made is read, so what else it takes can be on
// its way before that ends, unless the kernel has waited already (EARLY false).
template <bool EARLY>
__device__ __forceinline__ float spread(
    const float (*combs)[16], const Made& made, int first, int count, int size, int column) {
    int stream = warp_id() % 4, token = first + warp_id() / 4;
    bool here = warp_id() / 4 < count;
    float before[4], post, in[BATCH], beside = 0.0f;
    if (here) {
#pragma unroll
        for (int j = 0; j < 4; j++) before[j] = fresh(made.streams + ((token * 4 + j) * size + column));
        post = fresh(made.post + token * 4 + stream);
    }
    const float* parts = made.parts + (token * made.count * size + column);
    if (EARLY) await_previous();
    if (here) {
        send_for(in, parts, made.count, size);
        if (made.beside) beside = made.beside[token * size + column];
    }
    __syncthreads();  // while they are on their way
    if (!here) return 0.0f;
    float mixed = 0.0f, sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) mixed += combs[warp_id() / 4][4 * j + stream] * before[j];
#pragma unroll 1
    for (int part = 0; part < made.count; part += BATCH) {
        if (part) send_for(in, parts + part * size, made.count - part, size);
#pragma unroll
        for (int i = 0; i < BATCH; i++) sum += in[i];
    }
    return post * (sum + beside) + mixed;
}

// Of T tokens, of which `count` are there, the products of two rows with a block's columns: `weights` are a lane's four of
// each row. parts: where those of the first token and row go.
template <int T>
__device__ __forceinline__ void products(
    const Floats<4> (&weights)[2], const Floats<4> (*streams)[32], float* parts, int count, int blocks) {
    float values[2 * T];
#pragma unroll
    for (int t = 0; t < T; t++) {
        Floats<4> four = streams[t][lane_id()];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float& sum = values[i * T + t];
            sum = four.f[0] * weights[i].f[0];
#pragma unroll
            for (int c = 1; c < 4; c++) sum += four.f[c] * weights[i].f[c];
        }
    }
    float sum = sum_of_own(values);
    int row = lane_id() / 16, t = lane_id() / (16 / T) % T;
    if (lane_id() % (16 / T) == 0 && t < count) parts[(t * SLOTS + row) * blocks] = sum;
}

// One token's sums of products of two streams, of a block's columns: eight lanes have those of a stream with itself, the
// next one and the one after.
__device__ __forceinline__ void pairs(const Floats<4>* streams, float* parts, int blocks) {
    Floats<4> own = streams[lane_id()];
    float values[4] = {};
#pragma unroll
    for (int i = 0; i < 3; i++) {
        Floats<4> other = streams[(lane_id() + 8 * i) % 32];
#pragma unroll
        for (int c = 0; c < 4; c++) values[i] += own.f[c] * other.f[c];
    }
    fold<4, 4>(values);
    int pair = lane_id() % 8 / 2, slot = PRODUCTS + 4 * pair + lane_id() / 8;
    if (lane_id() % 2 == 0 && slot < SLOTS) parts[slot * blocks] = values[0];
}

// streams [tokens, 4, size], fn [ROWS, 4 * size] -> parts [tokens, SLOTS, size / COLUMNS], without products that are not
// there. MADE: the streams are those that `made` leaves, and are written.
template <int ROWS, bool MADE>
__device__ __forceinline__ void partial(
    const Made& made, float* streams, const float* fn, float* parts, int tokens, int size) {
    __shared__ __align__(16) float shared_streams[TOGETHER][4][COLUMNS], combs[TOGETHER][16];
    let_next_begin();
    int blocks = size / COLUMNS, block = blockIdx.x % blocks, first = blockIdx.x / blocks * TOGETHER;
    int count = tokens - first < TOGETHER ? tokens - first : TOGETHER;
    int warp = warp_id(), token = warp / 4, column = block * COLUMNS + lane_id();
    bool multiplies = warp < ROWS / 2;
    if (MADE) balance(combs, made, first, count);
    Floats<4> weights[2];
    if (multiplies)
#pragma unroll
        for (int i = 0; i < 2; i++)
            weights[i] = *reinterpret_cast<const Floats<4>*>(
                fn + (((2 * warp + i) * 4 + lane_id() / 8) * size + block * COLUMNS + lane_id() % 8 * 4));
    float* at = streams + ((first * 4 + warp) * size + column);
    float value;
    if constexpr (MADE) {
        value = spread<true>(combs, made, first, count, size, column);
        if (token < count) *at = value;
    } else {
        await_previous();
        if (token < count) value = *at;
    }
    if (token < count) shared_streams[token][warp % 4][lane_id()] = value;
    __syncthreads();
    parts += first * SLOTS * blocks + block;
    auto fours = reinterpret_cast<const Floats<4>(*)[32]>(shared_streams);
    if (multiplies) {
        if (count == 1) products<1>(weights, fours, parts + 2 * warp * blocks, count, blocks);
        else products<TOGETHER>(weights, fours, parts + 2 * warp * blocks, count, blocks);
    } else if (int t = warp - PRODUCTS / 2; t >= 0 && t < count) {
        pairs(fours[t], parts + t * SLOTS * blocks, blocks);
    }
}

#define PARTIAL(NAME, ROWS)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(                                                  \
        const float* streams, const float* fn, float* parts, int tokens, int size) {                                \
        partial<ROWS, false>(Made{}, const_cast<float*>(streams), fn, parts, tokens, size);                         \
    }
PARTIAL(penumbra_mix_partial, PRODUCTS)
PARTIAL(penumbra_collapse_partial, 4)

// Streams, post and comb are not from the kernel right in front: a sublayer lies between, with a product, which lets
// nobody begin before it has waited. A block is small enough to begin beside the last blocks of that one.
extern "C" __global__ void __launch_bounds__(THREADS, 3) penumbra_mix_between(
    const float* made, int count, const float* beside, const float* before, const float* post, const float* comb,
    int rounds, float eps, float* streams, const float* fn, float* parts, int tokens, int size) {
    partial<PRODUCTS, true>(
        Made{made, count, beside, before, post, comb, rounds, eps}, streams, fn, parts, tokens, size);
}

// Anything may be from the kernel right in front.
extern "C" __global__ void __launch_bounds__(THREADS, 3) penumbra_mix_out(
    const float* made, int count, const float* beside, const float* before, const float* post, const float* comb,
    int rounds, float eps, float* streams, int tokens, int size) {
    __shared__ __align__(16) float combs[TOGETHER][16];
    await_previous();
    int blocks = size / COLUMNS, first = blockIdx.x / blocks * TOGETHER, column = blockIdx.x % blocks * COLUMNS + lane_id();
    int here = tokens - first < TOGETHER ? tokens - first : TOGETHER;
    Made all{made, count, beside, before, post, comb, rounds, eps};
    balance(combs, all, first, here);
    float value = spread<false>(combs, all, first, here, size, column);
    if (warp_id() < 4 * here) streams[(first * 4 + warp_id()) * size + column] = value;
}

__device__ __forceinline__ float opened(float x) { return inverse(1.0f + expf(-x)); }

// x [tokens, size], normed by norm [size] unless that is null; post [tokens, 4] and the logits of comb [tokens, 4, 4],
// unless these are null: then a token has no block that makes them.
extern "C" __global__ void __launch_bounds__(FINISHING) penumbra_mix_finish(
    const float* parts, const float* streams, const float* base, const float* scale, const float* norm, float* x,
    float* post, float* comb, int size, float rms_eps, float hc_eps) {
    __shared__ __align__(16) float sums[SLOTS];
    let_next_begin();
    int wide = (size + WIDE - 1) / WIDE, each = post ? wide + 1 : wide;
    int token = blockIdx.x / each, part = blockIdx.x % each;
    int blocks = size / COLUMNS, column = part * WIDE + 4 * threadIdx.x;
    bool mixing = part < wide, mixes = mixing && 4 * threadIdx.x < WIDE && column < size;
    // A block that mixes needs the first four products and all sums of streams, the other one the other products and
    // how long the streams are.
    int nth = threadIdx.x / 8, slot = mixing ? (nth < 4 ? nth : nth + 20) : nth + 4;
    bool adds = nth < (mixing ? 14 : 24);
    int row = mixing ? threadIdx.x % 4 : threadIdx.x < 20 ? threadIdx.x + 4 : 4;
    float share = inverse(size);
    float bias = base[row], by = scale[row < 4 ? 0 : row < 8 ? 1 : 2];
    Floats<4> weights = {{1.0f, 1.0f, 1.0f, 1.0f}}, in_streams[4];
    int part_of_eight = 4 * (threadIdx.x % 8), left = blocks - part_of_eight;
    auto of_slot = reinterpret_cast<const Floats<4>*>(parts + (token * SLOTS + slot) * blocks + part_of_eight);
    if (mixes && norm) weights = *reinterpret_cast<const Floats<4>*>(norm + column);
    await_previous();
    if (mixes)
#pragma unroll
        for (int k = 0; k < 4; k++)
            in_streams[k] = *reinterpret_cast<const Floats<4>*>(streams + ((token * 4 + k) * size + column));
    Floats<4> found[BATCH] = {};
    if (adds)
#pragma unroll
        for (int i = 0; i < BATCH; i++)
            if (32 * i < left) found[i] = of_slot[8 * i];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < BATCH; i++) sum += (found[i].f[0] + found[i].f[1]) + (found[i].f[2] + found[i].f[3]);
#pragma unroll
    for (int d = 4; d > 0; d /= 2) sum += __shfl_xor_sync(ALL, sum, d);
    if (adds && threadIdx.x % 8 == 0) sums[slot] = sum;
    __syncthreads();
    float shrink = inverse_root(((sums[24] + sums[25]) + (sums[26] + sums[27])) * (0.25f * share) + rms_eps);
    float logit = sums[row] * shrink * by + bias;
    if (!mixing) {
        if (threadIdx.x < 4) post[token * 4 + threadIdx.x] = 2.0f * opened(logit);
        else if (threadIdx.x < 20) comb[token * 16 + threadIdx.x - 4] = logit;
        return;
    }
    if (warp_id() >= WIDE / 128) return;
    float in[4], own = opened(logit) + hc_eps, factor = 1.0f;
#pragma unroll
    for (int k = 0; k < 4; k++) in[k] = __shfl_sync(ALL, own, k);
    if (norm) {
        float squares = 0.0f;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            squares += in[k] * in[k] * sums[24 + k] + 2.0f * in[k] * in[(k + 1) % 4] * sums[28 + k];
            if (k < 2) squares += 2.0f * in[k] * in[k + 2] * sums[32 + k];
        }
        // What rounding left where streams cancel; no number stays none. Where the mixture is n times shorter than the
        // streams, its norm is off by some 1e-7 n^2.
        if (squares < 0.0f) squares = 0.0f;
        factor = inverse_root(squares * share + rms_eps);
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
    *reinterpret_cast<Floats<4>*>(x + (token * size + column)) = mixed;
}
