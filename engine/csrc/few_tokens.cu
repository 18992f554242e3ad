// Products of up to eight tokens with matrices as the checkpoint quantised them: most of a decode step, and all of it
// is reading weights. A weight is read once, becomes half precision in registers and goes to the tensor cores from there.
//
// A warp multiplies tiles of 16 rows by 8 tokens (mma m16n8k16: weights are its 16 rows, tokens its 8 columns). The
// warps of a block share the block's rows and cut the inputs between them; their sums are added in order at the end, so
// the same inputs give the same bits, and a token's do not depend on its neighbours. Tokens lie in shared memory as
// halves, in the order in which unpacking a word of weights yields them.
//
//   bf16  16 bytes are 8 inputs of a row; operands are bf16
//   FP8   16 bytes are 16 inputs; e4m3 bits moved into fp16's places are its value over 2^8, subnormals included; a
//         scale for 128 x 128 weights multiplies the sum over its inputs
//   FP4   16 bytes are 32 inputs, which share a scale; e2m1 bits moved into fp16's places are its value over 2^14. The
//         scale multiplies the weights: relative to the largest of the matrix, so that fp16 holds it. A group whose
//         scale is 2^23 times smaller than that loses bits, one 2^29 times smaller counts as zero.
//
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its own
// fetch16 and fetch4 and their groups, mma_half, mma_bf16, halves, bf16s and times.

typedef unsigned int u32;
typedef unsigned char u8;

#define TOKENS 8
#define MOST_THREADS 512
#define MATRICES 8  // of one launch
#define STEP 128  // inputs: a scale of FP8, four of FP4
#define PAD 4     // words behind a token in shared memory: neighbours start in other banks

struct __align__(16) Words {
    u32 w[4];
};

#ifndef ON_CPU
// 16 or 4 bytes on their way to shared memory; what a lane sends for, in groups that arrive in order.
__device__ __forceinline__ void fetch16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void fetch4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void await_groups() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
    __syncwarp();
}
__device__ __forceinline__ void mma_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 halves(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ u32 bf16s(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ u32 times(u32 a, u32 b) {  // halves
    u32 both;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
    return both;
}
#endif

enum Format { BF16, FP8, FP4 };

// LOADS of 16 bytes for a row and step, of BYTES in memory; AHEAD steps are on their way at once.
template <Format F> struct Shape;
template <> struct Shape<BF16> { static const int LOADS = 4, BYTES = 256, AHEAD = 2; };
template <> struct Shape<FP8> { static const int LOADS = 2, BYTES = 128, AHEAD = 2; };
template <> struct Shape<FP4> { static const int LOADS = 1, BYTES = 64, AHEAD = 4; };

// What a warp keeps of one step of R tiles. A lane's own weights; scales are shared.
template <Format F, int R> struct __align__(16) Stage {
    Words weights[R][2][Shape<F>::LOADS][32];
    u32 scales[32];  // FP4: four codes of each row; FP8: one float
};

extern __shared__ __align__(16) unsigned char memory[];
__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x >> 5; }

// Inputs i and j of the token in its word, counting words of eight inputs.
template <Format F> __device__ __forceinline__ int first_of(int word) {
    return F == BF16 ? 2 * word : F == FP8 ? (word & 2) * 2 + (word & 1) : word;
}
template <Format F> __device__ __forceinline__ int second_of(int word) {
    return first_of<F>(word) + (F == BF16 ? 1 : F == FP8 ? 2 : 4);
}

// x [inputs] fp32 of one token -> its words in shared memory. By all threads of the block.
template <Format F> __device__ void stage(u32* to, const float* x, int inputs) {
    for (int i = threadIdx.x; i < inputs / 2; i += blockDim.x) {
        const float* eight = x + i / 4 * 8;
        float low = eight[first_of<F>(i & 3)], high = eight[second_of<F>(i & 3)];
        to[i] = F == BF16 ? bf16s(low, high) : halves(low, high);
    }
}

// The weights of R tiles that one lane multiplies: rows lane / 4 and lane / 4 + 8 of each.
template <int R> struct Rows {
    const u8* weights[R][2];
    const u8* codes;      // FP4: of the one of the quad's rows that this lane sends for, a scale for 32 inputs
    const float* blocks;  // FP8: a scale for 128 inputs of all these rows
    u32 least;            // FP4: codes up to this one count as a scale of zero
};

// e4m3 bytes 0 and 2, 1 and 3 of a word -> halves of 2^-8 their value.
__device__ __forceinline__ u32 e4m3_even(u32 v) { return (v & 0x007f007fu) << 7 | (v & 0x00800080u) << 8; }
__device__ __forceinline__ u32 e4m3_odd(u32 v) { return (v & 0x7f007f00u) >> 1 | (v & 0x80008000u); }

// e2m1 codes N and N + 4 of a word -> halves of 2^-14 their value.
template <int N> __device__ __forceinline__ u32 e2m1(u32 v) {
    u32 size = v & 0x00070007u << 4 * N, sign = v & 0x00080008u << 4 * N;
    if constexpr (N == 3) return size >> 3 | sign;
    else return size << (9 - 4 * N) | sign << (12 - 4 * N);
}

// 2^(code - least - 15) in both halves, 0 for codes up to `least`.
__device__ __forceinline__ u32 factor(u32 code, u32 least) {
    return code > least ? (code - least) * 0x04000400u : 0u;
}

// Each warp's part of the inputs, in steps.
struct Part {
    int first, last;
};
__device__ __forceinline__ Part part_of(int inputs) {
    int steps = inputs / STEP, warps = (int)blockDim.x / 32, share = (steps + warps - 1) / warps;
    int first = warp_id() * share, last = first + share;
    return Part{first, last < steps ? last : steps};
}

// Sends for a step of this lane's rows, or closes an empty group behind the end.
template <Format F, int R>
__device__ __forceinline__ void send_for(Stage<F, R>* ring, const Rows<R>& rows, int step, Part part) {
    typedef Shape<F> S;
    int lane = lane_id(), quad = lane & 3;
    if (step < part.last) {
        Stage<F, R>& stage = ring[(step - part.first) % S::AHEAD];
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int l = 0; l < S::LOADS; l++)
                    fetch16(&stage.weights[r][h][l][lane], rows.weights[r][h] + (long long)step * S::BYTES + l * 64 + quad * 16);
        if (F == FP4) fetch4(&stage.scales[quad * 8 + lane / 4], rows.codes + 4 * step);
        if (F == FP8 && lane == 0) fetch4(&stage.scales[0], rows.blocks + step);
    }
    close_group();
}

// The first steps' weights: on their way while tokens are staged.
template <Format F, int R> __device__ __forceinline__ void begin(Stage<F, R>* ring, const Rows<R>& rows, Part part) {
    for (int u = 0; u < Shape<F>::AHEAD; u++) send_for<F, R>(ring, rows, part.first + u, part);
}

// Adds the products of a part's steps to sum, after `begin`. x: the words of this lane's token, or null.
template <Format F, int R>
__device__ __forceinline__ void multiply(
    float (&sum)[R][4], Stage<F, R>* ring, const Rows<R>& rows, const u32* x, Part part) {
    typedef Shape<F> S;
    int lane = lane_id(), quad = lane & 3;
    for (int step = part.first; step < part.last; step++) {
        await_groups<S::AHEAD - 1>();
        const Stage<F, R>& stage = ring[(step - part.first) % S::AHEAD];
        const u32* at = x + step * (STEP / 2);
        float parts[R][4] = {};
#pragma unroll
        for (int l = 0; l < S::LOADS; l++) {
            const int words = F == BF16 ? 1 : F == FP8 ? 2 : 4;  // of the token, for one of weights
            Words b[words];
            for (int j = 0; j < words; j++)
                b[j] = x ? *reinterpret_cast<const Words*>(at + (l * 16 + quad * 4) * words + 4 * j) : Words{};
#pragma unroll
            for (int r = 0; r < R; r++) {
                Words upper = stage.weights[r][0][l][lane], lower = stage.weights[r][1][l][lane];
                u32 high = 0, low = 0;
                if constexpr (F == FP4) {
                    high = factor(stage.scales[16 * r + lane / 4] >> 8 * quad & 255, rows.least);
                    low = factor(stage.scales[16 * r + 8 + lane / 4] >> 8 * quad & 255, rows.least);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    u32 v = upper.w[i], w = lower.w[i];
                    if constexpr (F == BF16) {
                        if (i % 2 == 0)  // two words of weights make one product
                            mma_bf16(sum[r], v, w, upper.w[i + 1], lower.w[i + 1], b[0].w[i], b[0].w[i + 1]);
                    } else if constexpr (F == FP8) {
                        mma_half(parts[r], e4m3_even(v), e4m3_even(w), e4m3_odd(v), e4m3_odd(w), b[i / 2].w[i % 2 * 2],
                                 b[i / 2].w[i % 2 * 2 + 1]);
                    } else {
                        mma_half(sum[r], times(e2m1<0>(v), high), times(e2m1<0>(w), low), times(e2m1<1>(v), high),
                                 times(e2m1<1>(w), low), b[i].w[0], b[i].w[1]);
                        mma_half(sum[r], times(e2m1<2>(v), high), times(e2m1<2>(w), low), times(e2m1<3>(v), high),
                                 times(e2m1<3>(w), low), b[i].w[2], b[i].w[3]);
                    }
                }
            }
        }
        float scale = F == FP8 ? __uint_as_float(stage.scales[0]) : 0.0f;
        if (F == FP8)
            for (int r = 0; r < R; r++)
                for (int i = 0; i < 4; i++) sum[r][i] += parts[r][i] * scale;
        __syncwarp();  // the scales have been read by all
        send_for<F, R>(ring, rows, step + S::AHEAD, part);
    }
}

// Adds up the warps' sums in order and hands each to `take(tile, row, token, value)`. sums: [warps][R][4][32] floats.
template <int R, typename Take>
__device__ __forceinline__ void add_up(const float (&sum)[R][4], float* sums, Take take) {
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 4; i++) sums[((warp_id() * R + r) * 4 + i) * 32 + lane_id()] = sum[r][i];
    __syncthreads();
    for (int n = threadIdx.x; n < 128; n += blockDim.x) {
        float total[R];
        for (int r = 0; r < R; r++) total[r] = 0.0f;
        for (int w = 0; w < (int)blockDim.x / 32; w++)
            for (int r = 0; r < R; r++) total[r] += sums[(w * R + r) * 128 + n];
        int i = n / 32, lane = n % 32;
        take(lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2, total);
    }
}

// A matrix [rows, inputs] in the checkpoint's format: e4m3 with `columns` scales for each 128 rows, else bf16.
struct Matrix {
    const u8* weights;
    const float* scales;
    int rows, columns;
};

// 16 R rows of a matrix times all tokens -> y [tokens, rows].
template <Format F, int R>
__device__ __forceinline__ void product(
    const float* x, long long x_row, const Matrix& matrix, int first_row, float* y, int tokens, int inputs) {
    Rows<R> rows;
    for (int r = 0; r < R; r++)
        for (int h = 0; h < 2; h++) {
            long long row = first_row + 16 * r + lane_id() / 4 + 8 * h;
            rows.weights[r][h] = matrix.weights + row * (inputs / STEP) * Shape<F>::BYTES;
        }
    if (F == FP8) rows.blocks = matrix.scales + (long long)(first_row / 128) * matrix.columns;
    Part part = part_of(inputs);
    Stage<F, R>* ring = reinterpret_cast<Stage<F, R>*>(memory);
    u32* words = reinterpret_cast<u32*>(ring + (int)blockDim.x / 32 * Shape<F>::AHEAD);
    ring += warp_id() * Shape<F>::AHEAD;
    begin<F, R>(ring, rows, part);
    int stride = inputs / 2 + PAD, token = lane_id() / 4;
    for (int t = 0; t < tokens; t++) stage<F>(words + t * stride, x + t * x_row, inputs);
    __syncthreads();
    float sum[R][4] = {};
    multiply<F, R>(sum, ring, rows, token < tokens ? words + token * stride : nullptr, part);
    __syncthreads();
    float power = F == FP8 ? 256.0f : 1.0f;
    add_up<R>(sum, reinterpret_cast<float*>(memory), [&](int row, int of, const float (&total)[R]) {
        if (of < tokens)
            for (int r = 0; r < R; r++) y[(long long)of * matrix.rows + first_row + 16 * r + row] = total[r] * power;
    });
}

// Up to eight matrices of the same inputs, one behind the other, in y too. Rows come in groups of `per_group`, each of
// which has `inputs` of x to itself.
template <int R>
__device__ __forceinline__ void products(
    const float* x, long long x_row, const Matrix* matrices, float* y, int tokens, int inputs, int per_group) {
    int row = blockIdx.x * 16 * R;
    Matrix mine = matrices[0];
#pragma unroll
    for (int i = 1; i < MATRICES; i++)
        if (row >= mine.rows) {
            row -= mine.rows;
            y += (long long)tokens * mine.rows;
            mine = matrices[i];
        }
    x += (long long)(row / per_group) * inputs;
    if (mine.scales) product<FP8, R>(x, x_row, mine, row, y, tokens, inputs);
    else product<BF16, R>(x, x_row, mine, row, y, tokens, inputs);
}

#define EACH(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)
#define PARAMETERS(I) const u8* weights##I, const float* scales##I, int rows##I, int columns##I,
#define ENTRY(I) Matrix{weights##I, scales##I, rows##I, columns##I},
#define LINEARS(NAME, R)                                                                                          \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS) NAME(                                              \
        EACH(PARAMETERS) const float* x, long long x_row, float* y, int tokens, int inputs, int per_group) {      \
        const Matrix matrices[MATRICES] = {EACH(ENTRY)};                                                          \
        products<R>(x, x_row, matrices, y, tokens, inputs, per_group);                                            \
    }
LINEARS(penumbra_linears_1, 1)
LINEARS(penumbra_linears_2, 2)

// The rows of tile r of an FP4 expert. A quad's lanes have the same ones, and each sends for the codes of one of them.
__device__ __forceinline__ void fp4_rows(
    Rows<2>& rows, int r, const u8* codes, const u8* scales, long long expert, int row, int outputs, int inputs) {
    int quad = lane_id() & 3;
    for (int h = 0; h < 2; h++) {
        long long at = expert * outputs + row + lane_id() / 4 + 8 * h;
        rows.weights[r][h] = codes + at * (inputs / 2);
        if (quad == 2 * r + h) rows.codes = scales + at * (inputs / 32);
    }
}

__device__ __forceinline__ float scale_of(int code) { return __uint_as_float((u32)code << 23); }  // 2^(code - 127)

// The rows times the tokens of one block of work: members [8] are its pairs, `pairs` where there is none. x(pair) is a
// token's inputs; take(row, pair, sums of both tiles) gets each product.
template <typename X, typename Take>
__device__ __forceinline__ void for_pairs(Rows<2>& rows, int most, int inputs, const int* members, int pairs, X x, Take take) {
    rows.least = (u32)(most > 29 ? most - 29 : 0);
    Part part = part_of(inputs);
    Stage<FP4, 2>* ring = reinterpret_cast<Stage<FP4, 2>*>(memory);
    u32* words = reinterpret_cast<u32*>(ring + (int)blockDim.x / 32 * Shape<FP4>::AHEAD);
    ring += warp_id() * Shape<FP4>::AHEAD;
    begin<FP4, 2>(ring, rows, part);
    int count = 0;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) count += members[t] < pairs;
    int stride = inputs / 2 + PAD, token = lane_id() / 4;
    for (int t = 0; t < count; t++) stage<FP4>(words + t * stride, x(members[t]), inputs);
    __syncthreads();
    float sum[2][4] = {};
    multiply<FP4, 2>(sum, ring, rows, token < count ? words + token * stride : nullptr, part);
    __syncthreads();
    float scale = scale_of((int)rows.least + 29);
    add_up<2>(sum, reinterpret_cast<float*>(memory), [&](int row, int of, const float (&total)[2]) {
        if (of < count) take(row, members[of], total[0] * scale, total[1] * scale);
    });
}

// y [pairs, inner]: swiglu(gate x, up x) of pairs (token * picks + pick) that go to the expert owners[block]. most: the
// largest scale code of the two stacks.
extern "C" __global__ void __launch_bounds__(MOST_THREADS) penumbra_gate_up(
    const float* x, const u8* gate, const u8* gate_scales, const u8* up, const u8* up_scales, int most,
    const int* members, const int* owners, float* y, int pairs, int picks, int hidden, int inner, float limit) {
    int tiles = inner / 16, block = blockIdx.x / tiles, first = blockIdx.x % tiles * 16, expert = owners[block];
    if (expert < 0) return;
    Rows<2> rows;
    fp4_rows(rows, 0, gate, gate_scales, expert, first, inner, hidden);
    fp4_rows(rows, 1, up, up_scales, expert, first, inner, hidden);
    auto of_token = [&](int pair) { return x + (long long)(pair / picks) * hidden; };
    for_pairs(rows, most, hidden, members + block * TOKENS, pairs, of_token, [&](int row, int pair, float g, float u) {
        g = g > limit ? limit : g;
        u = u > limit ? limit : u < -limit ? -limit : u;
        y[(long long)pair * inner + first + row] = g / (1.0f + expf(-g)) * u;
    });
}

// y [pairs, hidden]: weights[pair] * down(x[pair]), x [pairs, inner].
extern "C" __global__ void __launch_bounds__(MOST_THREADS) penumbra_down(
    const float* x, const u8* down, const u8* scales, int most, const float* weights, const int* members,
    const int* owners, float* y, int pairs, int hidden, int inner) {
    int tiles = hidden / 32, block = blockIdx.x / tiles, first = blockIdx.x % tiles * 32, expert = owners[block];
    if (expert < 0) return;
    Rows<2> rows;
    for (int r = 0; r < 2; r++) fp4_rows(rows, r, down, scales, expert, first + 16 * r, hidden, inner);
    auto of_pair = [&](int pair) { return x + (long long)pair * inner; };
    for_pairs(rows, most, inner, members + block * TOKENS, pairs, of_pair, [&](int row, int pair, float a, float b) {
        float* at = y + (long long)pair * hidden + first + row;
        at[0] = a * weights[pair];
        at[16] = b * weights[pair];
    });
}
