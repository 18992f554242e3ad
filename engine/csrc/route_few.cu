// Where a few tokens go: the gate's products, the choice of experts, and the list of work for few_tokens.cu.
//
//   gate   a block multiplies a span of eight tokens with that span of eight experts' gates: each warp a part of it for
//          four experts, whose weights it holds in registers. They never change, so they are sent for before the tokens
//          are there. A span's sums are a part of the products; whoever reads them adds the parts in order.
//   route  one block. A warp takes every eighth token: adds up the parts, scores the experts and picks the best of
//          them, or those a table names. Then every pair of a token and a pick finds its place behind those of lower
//          experts and behind earlier ones of its own.
//
// fp32 throughout, as the CPU multiplies, so that near-ties go to the same experts. Sums are added in an order that
// does not depend on how many tokens there are: a token's bits are the same in any company.
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its
// own of what stands between #ifndef ON_CPU and #endif.

#include "warp.cuh"

#define TOKENS 8       // of a block that multiplies, and of a block of work
#define THREADS 256
#define WARPS 8
#define SPAN 1024     // columns of a block that multiplies
#define EXPERTS 8     // of such a block
#define TILE 4        // experts of a warp
#define QUARTERS 4    // warps that share a span of a tile
#define LOADS 2       // of 16 bytes, of a lane for an expert: a warp's 256 columns
#define PAIRS 512     // of a token and a pick
#define MOST_PICKS 16  // of a token

#ifndef ON_CPU
// To 1 in 2^23, and without a branch for what is rare.
__device__ __forceinline__ float root(float x) {
    float y;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float quotient(float x, float y) { return __fdividef(x, y); }
#endif

// x [tokens, size], gate [experts, size] -> parts [ceil(size / SPAN), tokens, experts]. MOST: 1, 2, 4 or 8, of the
// tokens of a block. size is a multiple of 128.
template <int MOST>
__device__ __forceinline__ void gate_parts(
    const float* x, const float* gate, float* parts, int tokens, int experts, int size) {
    __shared__ float sums[EXPERTS / TILE][QUARTERS][TILE * MOST];
    int groups = (experts + EXPERTS - 1) / EXPERTS, first = blockIdx.x % groups * EXPERTS;
    int spans = (size + SPAN - 1) / SPAN, span = blockIdx.x / groups % spans;
    int first_token = blockIdx.x / groups / spans * MOST;
    int tile = warp_id() / QUARTERS, quarter = warp_id() % QUARTERS;
    int column = span * SPAN + quarter * 32 * 4 * LOADS + lane_id() * 4;
    bool inside[LOADS];
    Floats<4> weights[TILE][LOADS];
#pragma unroll
    for (int l = 0; l < LOADS; l++) inside[l] = column + 128 * l < size;
#pragma unroll
    for (int e = 0; e < TILE; e++) {
        int expert = first + tile * TILE + e;
        const float* row = gate + (long long)(expert < experts ? expert : experts - 1) * size + column;
#pragma unroll
        for (int l = 0; l < LOADS; l++)
            weights[e][l] = inside[l] ? *reinterpret_cast<const Floats<4>*>(row + 128 * l) : Floats<4>{};
    }
    await_previous();
    Floats<4> in[MOST][LOADS];
#pragma unroll
    for (int t = 0; t < MOST; t++) {
        // Where tokens are fewer the last one stands in: no branch keeps loads from being on their way together.
        int token = first_token + t < tokens ? first_token + t : tokens - 1;
        const float* row = x + (long long)token * size + column;
#pragma unroll
        for (int l = 0; l < LOADS; l++) in[t][l] = inside[l] ? *reinterpret_cast<const Floats<4>*>(row + 128 * l) : Floats<4>{};
    }
    float sum[MOST * TILE];
#pragma unroll
    for (int t = 0; t < MOST; t++)
#pragma unroll
        for (int e = 0; e < TILE; e++) {
            float total = 0.0f;
#pragma unroll
            for (int l = 0; l < LOADS; l++)
#pragma unroll
                for (int i = 0; i < 4; i++) total = fmaf(weights[e][l].f[i], in[t][l].f[i], total);
            sum[t * TILE + e] = total;
        }
    float mine = sum_of_own<MOST * TILE>(sum);
    const int lanes = 32 / (MOST * TILE);  // that hold the same sum
    if (lane_id() % lanes == 0) sums[tile][quarter][lane_id() / lanes] = mine;
    __syncthreads();
    int at = threadIdx.x / EXPERTS, expert = threadIdx.x % EXPERTS;
    if (at < MOST && first_token + at < tokens && first + expert < experts) {
        float total = 0.0f;
#pragma unroll
        for (int q = 0; q < QUARTERS; q++) total += sums[expert / TILE][q][at * TILE + expert % TILE];
        parts[((long long)span * tokens + first_token + at) * experts + first + expert] = total;
    }
}

#define GATE(NAME, MOST)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(                                              \
        const float* x, const float* gate, float* parts, int tokens, int experts, int size) {                   \
        gate_parts<MOST>(x, gate, parts, tokens, experts, size);                                                \
    }
GATE(penumbra_gate_1, 1)
GATE(penumbra_gate_2, 2)
GATE(penumbra_gate_4, 4)
GATE(penumbra_gate_8, 8)

// Larger scores have larger keys, and none has 0; -0 is no score. What is not a number counts as infinite: a token
// whose scores are not numbers still picks experts, and its result is not a number either.
__device__ __forceinline__ u32 key_of(float score) {
    u32 bits = score == score ? __float_as_uint(score) : 0x7f800000u;
    return bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
}

template <int VALUES> struct Shared {
    float scores[WARPS][32 * VALUES];  // of the token that a warp is at
    int picks[PAIRS];
    int ranks[PAIRS];    // of a pair among those of its expert
    int opening[PAIRS];  // the picks of pairs that are the first of a block of work, else more than any expert
};

// sqrt(log(1 + e^z)), right to a few units of the last place wherever z lies, and without a branch: a lane's scores are
// computed side by side. log(1 + small) is 2 artanh(t), whose series has come to its end at t^15 where t <= 1 / 3.
__device__ __forceinline__ float score_of(float z) {
    float small = expf(-fabsf(z)), t = quotient(small, 2.0f + small), square = t * t, series = 1.0f / 15;
#pragma unroll
    for (int n = 13; n > 0; n -= 2) series = fmaf(series, square, 1.0f / n);
    return root((z > 0.0f ? z : 0.0f) + 2.0f * t * series);
}

// The sums of a warp's token over all spans: of expert lane + 32 i to z[i].
template <int VALUES>
__device__ __forceinline__ void add_parts(
    float (&z)[VALUES], const float* parts, int splits, int stride, int experts) {
    const int batch = 32 / VALUES;  // spans on their way at once
#pragma unroll
    for (int i = 0; i < VALUES; i++) z[i] = 0.0f;
#pragma unroll 1
    for (int first = 0; first < splits; first += batch) {
        // Behind the ends the last ones stand in: no condition keeps loads from being on their way together.
        float in[batch][VALUES];
#pragma unroll
        for (int b = 0; b < batch; b++) {
            const float* row = parts + (first + b < splits ? first + b : splits - 1) * stride;
#pragma unroll
            for (int i = 0; i < VALUES; i++) {
                int e = lane_id() + 32 * i;
                in[b][i] = row[e < experts ? e : experts - 1];
            }
        }
#pragma unroll
        for (int b = 0; b < batch; b++)
#pragma unroll
            for (int i = 0; i < VALUES; i++) z[i] += first + b < splits ? in[b][i] : 0.0f;
    }
}

// The expert of the largest of a warp's keys, of equals the lowest; its key becomes 0.
template <int VALUES> __device__ __forceinline__ int take_best(u32 (&keys)[VALUES]) {
    u32 best = 0;
    int at = 0;
#pragma unroll
    for (int i = 0; i < VALUES; i++)
        if (keys[i] > best) {
            best = keys[i];
            at = lane_id() + 32 * i;
        }
    u32 top = __reduce_max_sync(ALL, best);
    u32 pick = __reduce_min_sync(ALL, best == top ? (u32)at : ALL);
#pragma unroll
    for (int i = 0; i < VALUES; i++)
        if (pick == (u32)(lane_id() + 32 * i)) keys[i] = 0;
    return (int)pick;
}

// parts [splits, tokens, experts] as of gate_parts; either bias [experts], or table [., k] and token_ids [tokens] ->
//   picks [tokens, k]   the best of scores + bias, of equals the lower one, or as the table says
//   weights [tokens, k] score of each over their sum, times scaling
//   members [blocks, 8], owners [blocks]: blocks of work by expert, each of one expert's pairs (token * k + pick),
//                       ascending, and of no more than there are tokens: an expert that a token picks twice may have
//                       more. tokens * k and -1 where there is none.
// experts <= 32 * VALUES, k <= 16, tokens * k <= PAIRS.
template <int VALUES>
__device__ __forceinline__ void route(
    const float* parts, int splits, const float* bias, const long long* table, const long long* token_ids, int* picks,
    float* weights, int* members, int* owners, int tokens, int experts, int k, int blocks, float scaling) {
    __shared__ Shared<VALUES> s;
    int lane = lane_id(), pairs = tokens * k, room = tokens < TOKENS ? tokens : TOKENS;
    float z[VALUES], steering[VALUES];
#pragma unroll
    for (int i = 0; i < VALUES; i++) steering[i] = bias && lane + 32 * i < experts ? bias[lane + 32 * i] : 0.0f;
    await_previous();
#pragma unroll 1
    for (int i = threadIdx.x; i < blocks * TOKENS; i += THREADS) members[i] = pairs;
#pragma unroll 1
    for (int i = threadIdx.x; i < blocks; i += THREADS) owners[i] = -1;
#pragma unroll 1
    for (int token = warp_id(); token < tokens; token += WARPS) {
        long long id = table ? token_ids[token] : 0;
        add_parts<VALUES>(z, parts + token * experts, splits, tokens * experts, experts);
        int mine = table && lane < k ? (int)table[id * k + lane] : 0;
        u32 keys[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            float score = score_of(z[i]);
            s.scores[warp_id()][lane + 32 * i] = score;
            u32 key = key_of(score + steering[i]);
            keys[i] = lane + 32 * i < experts ? key : 0;
        }
        if (!table)
#pragma unroll 1
            for (int j = 0; j < k; j++) {
                int pick = take_best<VALUES>(keys);
                if (lane == j) mine = pick;
            }
        __syncwarp();
        float score = lane < k && (u32)mine < (u32)experts ? s.scores[warp_id()][mine] : 0.0f, total = 0.0f;
#pragma unroll
        for (int j = 0; j < MOST_PICKS; j++) total += __shfl_sync(ALL, score, j);  // 0 behind the last pick
        if (lane < k) {
            s.picks[token * k + lane] = mine;
            picks[token * k + lane] = mine;
            weights[token * k + lane] = score / (total + 1e-20f) * scaling;
        }
        __syncwarp();  // the scores have been read
    }
    __syncthreads();
    // Two neighbouring threads look for a pair's place, each among half of the others.
    int half = threadIdx.x % 2;
#pragma unroll 1
    for (int first = 0; first < pairs; first += THREADS / 2) {
        int pair = first + threadIdx.x / 2, expert = pair < pairs ? s.picks[pair] : 0, rank = 0;
#pragma unroll 4
        for (int i = half; i < pairs; i += 2) rank += s.picks[i] == expert && i < pair;
        rank += __shfl_xor_sync(ALL, rank, 1);
        if (half == 0 && pair < pairs) {
            s.ranks[pair] = rank;
            s.opening[pair] = rank % room == 0 ? expert : 0x7fffffff;
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int first = 0; first < pairs; first += THREADS / 2) {
        int pair = first + threadIdx.x / 2, expert = pair < pairs ? s.picks[pair] : 0, before = 0;
#pragma unroll 4
        for (int i = half; i < pairs; i += 2) before += s.opening[i] < expert;
        before += __shfl_xor_sync(ALL, before, 1);
        if (half == 0 && pair < pairs) {
            int rank = s.ranks[pair], block = before + rank / room;
            members[block * TOKENS + rank % room] = pair;
            if (rank % room == 0) owners[block] = expert;
        }
    }
}

#define ROUTE(NAME, VALUES)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(                                              \
        const float* parts, int splits, const float* bias, const long long* table, const long long* token_ids,  \
        int* picks, float* weights, int* members, int* owners, int tokens, int experts, int k, int blocks,      \
        float scaling) {                                                                                        \
        route<VALUES>(parts, splits, bias, table, token_ids, picks, weights, members, owners, tokens, experts, k, \
                      blocks, scaling);                                                                         \
    }
ROUTE(penumbra_route_8, 8)
ROUTE(penumbra_route_16, 16)
ROUTE(penumbra_route_32, 32)
