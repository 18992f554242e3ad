// Tokens drawn from rows of logits, as engine/kernels/sample.py says: the most likely one, or that of the highest logit
// over temperature plus Gumbel noise, among those that top_k, top_p and min_p leave.
//
//   parts  a block takes a span of a row: whether all of it is finite, its largest logit, and of a row without filters the
//          span's best token, of one with top_p and no top_k how likely all of it is
//   rows   a block takes a row: the best of the spans' tokens; or, with filters, the row's CANDIDATES most likely tokens,
//          which somebody has found, in order of rank. If they keep every candidate they might keep more, and the row is
//          left to whoever looks at all of it.
//
// Noise and sums are doubles, as on a CPU, and in a fixed order: the same bits every time, in any company.
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its own
// of what stands between #ifndef ON_CPU and #endif.

#include "warp.cuh"

typedef unsigned long long u64;

#define THREADS 256     // of a block that makes parts
#define SPANS 32        // of a row
#define CANDIDATES 512  // and threads of a block that takes a row
#define GOLDEN 0x9E3779B97F4A7C15ull

#ifndef ON_CPU
__device__ __forceinline__ double as_double(u64 bits) { return __longlong_as_double((long long)bits); }
#endif

// How rows are drawn from, as the host hands it over: each its own, or each that of its segment and of its position.
struct How {
    const struct Row* rows;
    const int* segment;           // or none: row i is drawn by rows[i]
    const long long* positions;  // of the tokens in front of those that are drawn, or none: keys are those of the positions
};
struct Row {
    u64 key, temperature, top_p, min_p, top_k;
    __device__ __forceinline__ bool greedy() const { return as_double(temperature) == 0.0; }
    __device__ __forceinline__ bool filtered() const {
        return !greedy() && (top_k > 0 || as_double(top_p) < 1.0 || as_double(min_p) > 0.0);
    }
};
struct Part {
    double best, likely;  // likely: the sum of exp((logit - top) / temperature)
    float top;
    int token, finite, spare;
};
enum State { DRAWN, NOT_FINITE, UNSURE };

__device__ __forceinline__ u64 mix(u64 x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}
__device__ __forceinline__ Row row_of(const How& how, int at) {
    Row row = how.rows[how.segment ? how.segment[at] : at];
    if (how.positions) row.key = mix(row.key + (u64)(how.positions[at] + 1) * GOLDEN);
    return row;
}
__device__ __forceinline__ double gumbel(u64 key, int token) {
    u64 bits = mix(key + (u64)(token + 1) * GOLDEN);
    return -log(-log(((double)(bits >> 11) + 0.5) * 0x1p-53));
}
__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// The best of N threads' (value, token), the lower token of equals; -1 is no token. In thread 0.
template <int N> __device__ __forceinline__ void best_of(double (&values)[N], int (&tokens)[N], double& value, int& token) {
    int thread = threadIdx.x;
    values[thread] = value;
    tokens[thread] = token;
    for (int d = N / 2; d > 0; d /= 2) {
        __syncthreads();
        if (thread < d && tokens[thread + d] >= 0)
            if (tokens[thread] < 0 || values[thread + d] > values[thread] ||
                (values[thread + d] == values[thread] && tokens[thread + d] < tokens[thread])) {
                values[thread] = values[thread + d];
                tokens[thread] = tokens[thread + d];
            }
    }
    value = values[0];
    token = tokens[0];
}

// logits [rows, vocabulary], each `row_stride` behind the one before -> parts [rows, SPANS].
extern "C" __global__ void __launch_bounds__(THREADS) penumbra_sample_parts(
    const float* logits, long long row_stride, const Row* rows, const int* segment, const long long* positions, Part* parts,
    int vocabulary) {
    __shared__ double values[THREADS];
    __shared__ int tokens[THREADS];
    __shared__ float tops[THREADS];
    await_previous();
    int at = blockIdx.x / SPANS, span = blockIdx.x % SPANS, thread = threadIdx.x;
    const Row row = row_of(How{rows, segment, positions}, at);
    int size = (vocabulary + SPANS - 1) / SPANS, first = span * size;
    int end = first + size < vocabulary ? first + size : vocabulary;
    const float* mine = logits + at * row_stride;
    float top = __uint_as_float(0xff800000u);
    bool finite = true;
    for (int i = first + thread; i < end; i += THREADS) {
        finite = finite && is_finite(mine[i]);
        top = fmaxf(top, mine[i]);
    }
    tops[thread] = top;
    tokens[thread] = finite;
    for (int d = THREADS / 2; d > 0; d /= 2) {
        __syncthreads();
        if (thread < d) {
            tops[thread] = fmaxf(tops[thread], tops[thread + d]);
            tokens[thread] &= tokens[thread + d];
        }
    }
    __syncthreads();
    top = tops[0];
    finite = tokens[0];
    __syncthreads();
    double temperature = as_double(row.temperature), best = 0.0, likely = 0.0;
    int token = -1;
    if (finite && !row.filtered()) {
        for (int i = first + thread; i < end; i += THREADS) {
            double value = row.greedy() ? mine[i] : gumbel(row.key, i) + mine[i] / temperature;
            if (token < 0 || value > best) {
                best = value;
                token = i;
            }
        }
        best_of<THREADS>(values, tokens, best, token);
    } else if (finite && as_double(row.top_p) < 1.0 && row.top_k == 0) {
        for (int i = first + thread; i < end; i += THREADS) likely += exp(((double)mine[i] - top) / temperature);
        values[thread] = likely;
        for (int d = THREADS / 2; d > 0; d /= 2) {
            __syncthreads();
            if (thread < d) values[thread] += values[thread + d];
        }
        likely = values[0];
    }
    if (thread == 0) parts[blockIdx.x] = Part{best, likely, top, token, finite, 0};
}

// candidates [rows, CANDIDATES]: the most likely tokens of rows that have filters, ascending -> drawn [rows, 2]: a token
// and a State.
extern "C" __global__ void __launch_bounds__(CANDIDATES) penumbra_sample_rows(
    const float* logits, long long row_stride, const Row* rows, const int* segment, const long long* positions,
    const Part* parts, const int* candidates, int* drawn) {
    __shared__ double values[CANDIDATES], ranked[CANDIDATES], before[2][CANDIDATES];
    __shared__ int tokens[CANDIDATES], ranked_tokens[CANDIDATES];
    __shared__ double all;
    await_previous();
    int at = blockIdx.x, thread = threadIdx.x;
    const Row row = row_of(How{rows, segment, positions}, at);
    parts += at * SPANS;
    bool finite = true;
    for (int s = 0; s < SPANS; s++) finite = finite && parts[s].finite;
    if (!finite || !row.filtered()) {
        double best = thread < SPANS ? parts[thread].best : 0.0;
        int token = thread < SPANS ? parts[thread].token : -1;
        best_of<CANDIDATES>(values, tokens, best, token);
        if (thread == 0) {
            drawn[2 * at] = finite ? token : 0;
            drawn[2 * at + 1] = finite ? DRAWN : NOT_FINITE;
        }
        return;
    }
    double temperature = as_double(row.temperature), top_p = as_double(row.top_p), min_p = as_double(row.min_p);
    int own = candidates[at * CANDIDATES + thread], rank = 0;
    double value = logits[at * row_stride + own] / temperature;
    values[thread] = value;
    __syncthreads();
    for (int i = 0; i < CANDIDATES; i++) rank += values[i] > value || (values[i] == value && i < thread);
    ranked[rank] = value;
    ranked_tokens[rank] = own;
    __syncthreads();
    value = ranked[thread];
    own = ranked_tokens[thread];
    double weight = exp(value - ranked[0]);
    int side = 0;
    before[0][thread] = weight;
    for (int d = 1; d < CANDIDATES; d *= 2, side ^= 1) {
        __syncthreads();
        before[side ^ 1][thread] = before[side][thread] + (thread >= d ? before[side][thread - d] : 0.0);
    }
    __syncthreads();
    if (thread == 0) {
        double sum = 0.0;
        if (row.top_k == 0)
            for (int s = 0; s < SPANS; s++) sum += parts[s].likely * exp(parts[s].top / temperature - ranked[0]);
        else
            sum = before[side][(row.top_k < CANDIDATES ? (int)row.top_k : CANDIDATES) - 1];
        all = sum;
    }
    __syncthreads();
    bool keeps = thread == 0 || ((row.top_k == 0 || (u64)thread < row.top_k) && weight >= min_p &&
                                 (top_p >= 1.0 || before[side][thread] - weight < top_p * all));
    // What is left are the first ones.
    tokens[thread] = keeps ? CANDIDATES : thread;
    for (int d = CANDIDATES / 2; d > 0; d /= 2) {
        __syncthreads();
        if (thread < d && tokens[thread + d] < tokens[thread]) tokens[thread] = tokens[thread + d];
    }
    __syncthreads();
    int left = tokens[0];
    __syncthreads();
    double best = value + gumbel(row.key, own);
    int token = thread < left ? own : -1;
    best_of<CANDIDATES>(values, tokens, best, token);
    if (thread == 0) {
        drawn[2 * at] = token;
        drawn[2 * at + 1] = left == CANDIDATES ? UNSURE : DRAWN;
    }
}
