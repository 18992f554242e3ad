// Products of up to eight tokens with matrices as the checkpoint has them: bf16 ones, FP8 ones that share a launch with
// those, or have many inputs for few rows (linears_fp8.cu has the others). All of it is reading weights: each is read
// once, becomes half precision in registers and goes to the tensor cores from there. Tokens beyond what halves hold,
// 65,504, are lost to an FP8 matrix.
//
// A warp multiplies tiles of 16 rows by 8 tokens (mma m16n8k16: weights are its 16 rows, tokens its 8 columns). The
// warps of a block share the block's rows and cut the inputs between them; their sums are added in order at the end, so
// the same inputs give the same bits, and a token's do not depend on its neighbours. Tokens lie in shared memory as
// halves, in the order in which unpacking a word of weights yields them.
//
//   bf16  16 bytes are 8 inputs of a row; operands are bf16
//   FP8   16 bytes are 16 inputs; e4m3 bits moved into fp16's places are its value over 2^8, subnormals included; a
//         scale for 128 x 128 weights multiplies the sum over its inputs
//
// What comes right before a product, or right behind it, is done on the way: the norm of its tokens where they are staged,
// and the gate of a shared expert where the sums of both its matrices are at hand.
//
// A block does `span` such groups of rows, one behind the other: the next one's weights are on their way while the
// warps' sums of one are added, and tokens are staged once. Weights are sent for before the block waits for the kernel
// in front of it to end.
//
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its
// own of what stands between #ifndef ON_CPU and #endif.

#include "warp.cuh"

#define TOKENS 8
#define MATRICES 8  // of one launch
#define STEP 128  // inputs: a scale of FP8
#define AHEAD 2   // steps whose weights a warp has on their way at once
#define PAD 4     // words behind a token in shared memory: neighbours start in other banks

#ifndef ON_CPU
// 4 bytes, as fetch16.
__device__ __forceinline__ void fetch4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void mma_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 halves(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
#endif

enum Format { BF16, FP8 };

// LOADS of 16 bytes for a row and step, of BYTES in memory.
template <Format F> struct Shape;
template <> struct Shape<BF16> { static const int LOADS = 4, BYTES = 256; };
template <> struct Shape<FP8> { static const int LOADS = 2, BYTES = 128; };

// What a warp keeps of one step of R tiles. A lane's own weights; scales are shared.
template <Format F, int R> struct __align__(16) Stage {
    Words weights[R][2][Shape<F>::LOADS][32];
    u32 scales[32];  // FP8: one float of each tile, and room for stages to begin at multiples of 128 bytes
};

extern __shared__ __align__(16) unsigned char memory[];

// Inputs i and j of the token in its word, counting words of eight inputs.
template <Format F> __device__ __forceinline__ constexpr int first_of(int word) {
    return F == BF16 ? 2 * word : (word & 2) * 2 + (word & 1);
}
template <Format F> __device__ __forceinline__ constexpr int second_of(int word) {
    return first_of<F>(word) + (F == BF16 ? 1 : 2);
}

// Eight inputs as words.
template <Format F> __device__ __forceinline__ Words packed(const Floats<4> (&inputs)[2]) {
    Words made;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int one = first_of<F>(j), other = second_of<F>(j);
        float low = inputs[one / 4].f[one % 4], high = inputs[other / 4].f[other % 4];
        made.w[j] = F == BF16 ? bf16s(low, high) : halves(low, high);
    }
    return made;
}

// Eight inputs of a token at a time, for all threads of a block: they have neighbours, of all tokens before they go on to
// the inputs behind. Counts, and does not divide.
struct Piece {
    u32 start, token;  // the same for the block
    __device__ __forceinline__ u32 column() const { return start + 8 * threadIdx.x; }
    __device__ __forceinline__ void next(u32 tokens) {
        if (++token == tokens) token = 0, start += 8 * blockDim.x;
    }
};

// row(token) [inputs] fp32 of each token -> its words in shared memory, `stride` apart. By all threads of the block, which
// send for four pieces each before they wait for one.
template <Format F, typename Row>
__device__ __forceinline__ void stage(u32* words, int stride, u32 tokens, u32 inputs, Row row) {
    Piece first = {0, 0};
    while (first.start < inputs) {
        Floats<4> in[4][2];
        Piece piece = first;
#pragma unroll
        for (int u = 0; u < 4; u++, piece.next(tokens))
            if (piece.column() < inputs) {
                const Floats<4>* at = reinterpret_cast<const Floats<4>*>(row(piece.token) + piece.column());
                in[u][0] = at[0];
                in[u][1] = at[1];
            }
#pragma unroll
        for (int u = 0; u < 4; u++, first.next(tokens))
            if (first.column() < inputs)
                *reinterpret_cast<Words*>(words + first.token * stride + first.column() / 2) = packed<F>(in[u]);
    }
}

// An RMSNorm of tokens: weights [inputs].
struct Norm {
    const float* weights;
    float eps;
};

// As `stage`, of tokens x that are normed first; inputs are a multiple of 256. A warp adds up the squares of 256
// neighbours, and their sums are added in order: it does not depend on the block's size or on other tokens. sums: [tokens]
// [inputs / 256] floats.
template <Format F>
__device__ __forceinline__ void stage_normed(
    u32* words, int stride, float* sums, u32 tokens, u32 inputs, const float* x, long long x_row, const Norm& norm) {
    u32 parts = inputs / 256, lane = lane_id();
    Piece first = {0, 0};
    while (first.start < inputs) {
        float squares[4];
        Piece piece = first;
#pragma unroll
        for (int u = 0; u < 4; u++, piece.next(tokens)) {
            Floats<4> one = {}, other = {};
            if (piece.column() < inputs) {
                const Floats<4>* at = reinterpret_cast<const Floats<4>*>(x + piece.token * x_row + piece.column());
                one = at[0];
                other = at[1];
            }
            squares[u] = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) squares[u] += one.f[i] * one.f[i] + other.f[i] * other.f[i];
        }
#pragma unroll
        for (int u = 0; u < 4; u++, first.next(tokens)) {
#pragma unroll
            for (int d = 16; d > 0; d /= 2) squares[u] += __shfl_xor_sync(ALL, squares[u], d);
            if (lane == 0 && first.column() < inputs) sums[first.token * parts + first.column() / 256] = squares[u];
        }
    }
    __syncthreads();
    float total = 0.0f;
    for (u32 i = 0; i < parts; i++) total += lane < tokens ? sums[lane * parts + i] : 0.0f;
    float factor = inverse_root(total / inputs + norm.eps);  // of the token whose number is the lane's
    first = {0, 0};
    while (first.start < inputs) {
        Floats<4> in[2][2], weights[2][2];
        Piece piece = first;
#pragma unroll
        for (int u = 0; u < 2; u++, piece.next(tokens))
            if (piece.column() < inputs) {
                const Floats<4>* at = reinterpret_cast<const Floats<4>*>(x + piece.token * x_row + piece.column());
                const Floats<4>* by = reinterpret_cast<const Floats<4>*>(norm.weights + piece.column());
#pragma unroll
                for (int h = 0; h < 2; h++) in[u][h] = at[h], weights[u][h] = by[h];
            }
#pragma unroll
        for (int u = 0; u < 2; u++, first.next(tokens)) {
            float own = __shfl_sync(ALL, factor, (int)first.token);
            if (first.column() >= inputs) continue;
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int i = 0; i < 4; i++) in[u][h].f[i] = weights[u][h].f[i] * (in[u][h].f[i] * own);
            *reinterpret_cast<Words*>(words + first.token * stride + first.column() / 2) = packed<F>(in[u]);
        }
    }
}

// The weights one lane multiplies: rows lane / 4 and lane / 4 + 8 of each of R tiles.
template <int R> struct Rows {
    const u8* weights[R];  // at the lane's first 16 bytes of the upper row
    int row_bytes, step_rows;  // step_rows: from a group's rows to the next one's
    const float* blocks[R];  // FP8: each tile's matrix's scales, one for 128 x 128 weights
    int first_row, columns;
};

// e4m3 bytes 0 and 2, 1 and 3 of a word -> halves of 2^-8 their value.
__device__ __forceinline__ u32 e4m3_even(u32 v) { return (v & 0x007f007fu) << 7 | (v & 0x00800080u) << 8; }
__device__ __forceinline__ u32 e4m3_odd(u32 v) { return (v & 0x7f007f00u) >> 1 | (v & 0x80008000u); }

// Each warp's part of the inputs, in steps.
struct Part {
    int first, last;
};
__device__ __forceinline__ Part part_of(int inputs) {
    int steps = inputs / STEP, warps = (int)blockDim.x / 32, share = (steps + warps - 1) / warps;
    int first = warp_id() * share, last = first + share;
    return Part{first < steps ? first : steps, last < steps ? last : steps};
}

// A warp's weights, group after group, AHEAD steps of them on their way at once.
template <Format F, int R> struct Pipe {
    typedef Shape<F> S;
    Stage<F, R>* ring;
    Rows<R> rows;
    Part part;
    int groups, step;  // groups left to send for, and the next one's step
    int in, out;       // places in the ring

    __device__ __forceinline__ void begin(Stage<F, R>* all, const Rows<R>& of, int inputs, int count) {
        ring = all + warp_id() * AHEAD;
        rows = of;
        part = part_of(inputs);
        groups = part.first < part.last ? count : 0;
        step = part.first;
        in = out = 0;
#pragma unroll
        for (int r = 0; r < R; r++) rows.weights[r] += part.first * S::BYTES;
#pragma unroll
        for (int u = 0; u < AHEAD; u++) send();
    }

    // Sends for a step, or closes an empty group behind the end.
    __device__ __forceinline__ void send() {
        int lane = lane_id();
        if (groups > 0) {
            Stage<F, R>& stage = ring[in];
#pragma unroll
            for (int r = 0; r < R; r++)
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int l = 0; l < S::LOADS; l++)
                        fetch16_once(&stage.weights[r][h][l][lane], rows.weights[r] + h * 8 * rows.row_bytes + l * 64);
            if (F == FP8)
#pragma unroll
                for (int r = 0; r < R; r++)
                    if (lane == 0) fetch4(&stage.scales[r], rows.blocks[r] + rows.first_row / 128 * rows.columns + step);
            int weights = S::BYTES;
            if (++step == part.last) {
                step = part.first;
                groups--;
                rows.first_row += rows.step_rows;
                weights += rows.step_rows * rows.row_bytes - (part.last - part.first) * S::BYTES;
            }
#pragma unroll
            for (int r = 0; r < R; r++) rows.weights[r] += weights;
        }
        close_group();
        in = in + 1 == AHEAD ? 0 : in + 1;
    }

    // Adds the products of a group's steps to sum. x: the words of this lane's token, or null.
    __device__ __forceinline__ void multiply(float (&sum)[R][4], const u32* x) {
        int lane = lane_id(), quad = lane & 3;
        for (int s = part.first; s < part.last; s++) {
            await_groups<AHEAD - 1>();
            const Stage<F, R>& stage = ring[out];
            const u32* at = x + s * (STEP / 2);
            float parts[R][4] = {};
#pragma unroll
            for (int l = 0; l < S::LOADS; l++) {
                const int words = F == BF16 ? 1 : 2;  // of the token, for one of weights
                Words b[words];
#pragma unroll
                for (int j = 0; j < words; j++)
                    b[j] = x ? *reinterpret_cast<const Words*>(at + (l * 16 + quad * 4) * words + 4 * j) : Words{};
#pragma unroll
                for (int r = 0; r < R; r++) {
                    Words upper = stage.weights[r][0][l][lane], lower = stage.weights[r][1][l][lane];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        u32 v = upper.w[i], w = lower.w[i];
                        if constexpr (F == BF16) {
                            if (i % 2 == 0)  // two words of weights make one product
                                mma_bf16(sum[r], {v, w, upper.w[i + 1], lower.w[i + 1]}, b[0].w[i], b[0].w[i + 1]);
                        } else {
                            mma_half(parts[r], e4m3_even(v), e4m3_even(w), e4m3_odd(v), e4m3_odd(w),
                                     b[i / 2].w[i % 2 * 2], b[i / 2].w[i % 2 * 2 + 1]);
                        }
                    }
                }
            }
            if (F == FP8) {
#pragma unroll
                for (int r = 0; r < R; r++) {
                    float scale = __uint_as_float(stage.scales[r]);
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[r][i] += parts[r][i] * scale;
                }
            }
            __syncwarp();  // all have read what lies there
            out = out + 1 == AHEAD ? 0 : out + 1;
            send();
        }
    }
};

// Adds up the warps' sums in order and hands them to `take(row, token, values of the tiles)`. sums: [warps][R][tokens]
// [16] floats, twice: groups take turns, so that one may write while others still read.
template <int R, typename Take>
__device__ __forceinline__ void add_up(const float (&sum)[R][4], float* sums, int turn, int tokens, Take take) {
    int warps = (int)blockDim.x / 32, lane = lane_id();
    sums += (turn & 1) * warps * R * tokens * 16;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int token = lane % 4 * 2 + i % 2, row = lane / 4 + i / 2 * 8;
            if (token < tokens) sums[((warp_id() * R + r) * tokens + token) * 16 + row] = sum[r][i];
        }
    __syncthreads();
    for (int n = threadIdx.x; n < 16 * tokens; n += blockDim.x) {
        float total[R];
#pragma unroll
        for (int r = 0; r < R; r++) total[r] = 0.0f;
        for (int w = 0; w < warps; w++)
#pragma unroll
            for (int r = 0; r < R; r++) total[r] += sums[(w * R + r) * tokens * 16 + n];
        take(n % 16, n / 16, total);
    }
}

// A matrix [rows, inputs] in the checkpoint's format: e4m3 with `columns` scales for each 128 rows, else bf16.
struct Matrix {
    const u8* weights;
    const float* scales;
    int rows, columns;
};

// `groups` times 16 rows from `first_row` on, of R matrices of one shape, times all tokens. take(row, token, products
// with the matrices) gets each. NORMED: the tokens go through `norm` first.
template <Format F, int R, bool NORMED, typename Take>
__device__ __forceinline__ void for_tokens(
    const float* x, long long x_row, const Norm& norm, const Matrix (&matrices)[R], int first_row, int groups,
    int tokens, int inputs, Take take) {
    Rows<R> rows;
    rows.row_bytes = inputs / STEP * Shape<F>::BYTES;
    rows.step_rows = 16;
    rows.first_row = first_row;
    rows.columns = matrices[0].columns;
#pragma unroll
    for (int r = 0; r < R; r++) {
        rows.weights[r] =
            matrices[r].weights + (long long)(first_row + lane_id() / 4) * rows.row_bytes + lane_id() % 4 * 16;
        rows.blocks[r] = matrices[r].scales;
    }
    Stage<F, R>* ring = reinterpret_cast<Stage<F, R>*>(memory);
    u32* words = reinterpret_cast<u32*>(ring + (int)blockDim.x / 32 * AHEAD);
    Pipe<F, R> pipe;
    pipe.begin(ring, rows, inputs, groups);
    int stride = inputs / 2 + PAD, token = lane_id() / 4;
    await_previous();
    if (NORMED)
        stage_normed<F>(words, stride, reinterpret_cast<float*>(words + tokens * stride), tokens, inputs, x, x_row, norm);
    else
        stage<F>(words, stride, tokens, inputs, [&](u32 t) { return x + t * x_row; });
    __syncthreads();
    const u32* mine = token < tokens ? words + token * stride : nullptr;
    float* sums = reinterpret_cast<float*>(words + tokens * stride);
    float power = F == FP8 ? 256.0f : 1.0f;
    for (int g = 0; g < groups; g++) {
        float sum[R][4] = {};
        pipe.multiply(sum, mine);
        add_up<R>(sum, sums, g, tokens, [&](int row, int of, float (&total)[R]) {
#pragma unroll
            for (int r = 0; r < R; r++) total[r] *= power;
            take(first_row + 16 * g + row, of, total);
        });
    }
}

#define EACH(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)
#define PARAMETERS(I) const u8* weights##I, const float* scales##I, int rows##I, int columns##I,
#define ENTRY(I) Matrix{weights##I, scales##I, rows##I, columns##I},

template <bool NORMED>
__device__ __forceinline__ void linears(
    const Matrix (&matrices)[MATRICES], const float* x, long long x_row, const Norm& norm, float* y, int tokens,
    int inputs, int per_group, int span) {
    int block = blockIdx.x, first = 0;
    Matrix mine[1] = {matrices[0]};
#pragma unroll
    for (int i = 1; i < MATRICES; i++) {
        int blocks = (mine[0].rows + 16 * span - 1) / (16 * span);
        if (block >= blocks) {
            block -= blocks;
            first += mine[0].rows;
            mine[0] = matrices[i];
        }
    }
    int row = block * 16 * span, left = (mine[0].rows - row) / 16, groups = left < span ? left : span;
    y += (long long)tokens * first;
    x += (long long)((first + row) / per_group) * inputs;
    int rows = mine[0].rows;
    auto take = [=](int row, int of, const float (&total)[1]) { y[(long long)of * rows + row] = total[0]; };
    if (mine[0].scales) for_tokens<FP8, 1, NORMED>(x, x_row, norm, mine, row, groups, tokens, inputs, take);
    else for_tokens<BF16, 1, NORMED>(x, x_row, norm, mine, row, groups, tokens, inputs, take);
}

// Up to eight matrices of the same inputs, one behind the other, in y too; `span` times 16 rows of one to a block. Rows
// come in groups of `per_group`, each of which has `inputs` of x to itself.
extern "C" __global__ void __launch_bounds__(512, 2) penumbra_linears(
    EACH(PARAMETERS) const float* x, long long x_row, float* y, int tokens, int inputs, int per_group, int span) {
    linears<false>({EACH(ENTRY)}, x, x_row, Norm{nullptr, 0.0f}, y, tokens, inputs, per_group, span);
}

// Likewise, of tokens that go through an RMSNorm first; all rows have the same inputs.
extern "C" __global__ void __launch_bounds__(512, 2) penumbra_linears_normed(
    EACH(PARAMETERS) const float* x, long long x_row, const float* norm, float eps, float* y, int tokens, int inputs,
    int per_group, int span) {
    linears<true>({EACH(ENTRY)}, x, x_row, Norm{norm, eps}, y, tokens, inputs, per_group, span);
}

// silu(min(gate, limit)) * clamp(up, -limit, limit)
__device__ __forceinline__ float gated(float gate, float up, float limit) {
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return gate / (1.0f + expf(-gate)) * up;
}

// y [tokens, rows]: gated(gate x, up x), both bf16 of one shape; `span` times 16 rows of each to a block.
extern "C" __global__ void __launch_bounds__(512, 1) penumbra_gated(
    const u8* gate, const u8* up, int rows, const float* x, long long x_row, float* y, int tokens, int inputs,
    float limit, int span) {
    const Matrix both[2] = {{gate, nullptr, rows, 0}, {up, nullptr, rows, 0}};
    int first = blockIdx.x * 16 * span, left = (rows - first) / 16, groups = left < span ? left : span;
    for_tokens<BF16, 2, false>(
        x, x_row, Norm{nullptr, 0.0f}, both, first, groups, tokens, inputs,
        [&](int row, int of, const float (&total)[2]) {
            y[(long long)of * rows + row] = gated(total[0], total[1], limit);
        });
}
