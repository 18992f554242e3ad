// Products of up to eight tokens with e4m3 matrices as the checkpoint holds them, at the speed at which weights are
// read.
//
// wgmma multiplies 64 rows of weights by 16 columns of tokens, both e4m3 in shared memory: weights where copies laid
// them, a token as two columns, as no e4m3 holds an activation: x = unit (c0 + c1 / 16), whose error is at most 2^-9 of
// the value, or 2^-21 of the largest among the 128 inputs for which a unit is made. wgmma counts few bits of a sum, so 32 inputs are a product of their own: sum += weights' scale * unit * (d0 + d1 / 16) in fp32.
//
// Matrices are cut into tiles of N = 16 or 32 rows, so that all multiprocessors have as much to read. What a product
// has of rows behind those, and of columns behind the tokens', is whatever lies there, and nobody looks at it.
//
// A block takes its share of all tiles. Its four warpgroups take a tile each, as long as there are four, and nothing is
// exchanged; of others they take turns at the steps of 4,096 / N inputs, and a tile's four sums are added in order.
// Each has a ring of `stages` steps, filled by copies as soon as all its warps are done with one. What is added to
// what, and in which order, depends on the shapes alone.
//
// Tokens become terms as soon as the kernel in front has ended, all at once, while the ring fills. So does an RMSNorm:
// x times its weights is what becomes terms, the sum of squares comes along, and sums are multiplied by the root.
//
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its
// own of what stands between #ifndef ON_CPU and #endif.

#include "matrices.cuh"
#include "warpgroup.cuh"

#define TOKENS 8
#define THREADS 512
#define FOURS 4     // warpgroups
#define BLOCK 128   // inputs, and rows, that share a scale
#define STAGES 8    // steps of a warpgroup's ring, at most
#define STAGE 4096  // bytes of weights
#define WARPS (THREADS / 32)
#define COLUMNS 16  // of a product: both terms of eight tokens
#define PITCH 40    // of a token's sums: eight more than the most rows, so that four tokens meet in no bank

#ifndef ON_CPU
// 4 bytes, as fetch16.
__device__ __forceinline__ void fetch4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
// m64n16k32, both factors along; sums as in warpgroup.cuh, which are only those of this product.
__device__ __forceinline__ void multiply(float (&sums)[8], u64 weights, u64 terms) {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, add, 1, 1;}"
        : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3]), "=f"(sums[4]), "=f"(sums[5]), "=f"(sums[6]),
          "=f"(sums[7])
        : "l"(weights), "l"(terms));
}
// Of two magnitudes; not a number, without a sign, where one is not.
__device__ __forceinline__ float largest(float a, float b) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(fabsf(a)), "f"(fabsf(b)));
    return most;
}
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ void store(void* to, u32 word) { *(u32*)to = word; }
#endif

// An RMSNorm of tokens: weights [inputs].
struct Norm {
    const float* weights;
    float eps;
};

// Of a tile with N rows of weights: all of one matrix, or, GATED, half of them the other's, the same ones.
template <int N, bool GATED> struct Shape {
    static const int ROWS = GATED ? N / 2 : N, KINDS = GATED ? 2 : 1;
    static const int STEP = STAGE / N, BLOCKS = STEP / BLOCK;
};

// Shared memory of a block: the tokens' terms, each warpgroup's ring, this, a unit for each block of inputs and token,
// and the squares of each pair of them. Products read up to 6 KB behind what they are meant to.
struct __align__(16) Fixed {
    struct Ring {
        float scales[STAGES][4];  // of a step: [matrix][block of inputs]
        u64 barriers[STAGES];
    } rings[FOURS];
    float sums[2][FOURS][TOKENS][PITCH];  // of even tiles and odd ones
};
extern __shared__ __align__(1024) unsigned char memory[];

// A block's tiles, of which a warpgroup takes every fourth one of those before `wholes`, and of those behind them each
// fourth step.
struct Share {
    int first, wholes, end;
    __device__ __forceinline__ int begin(int four) const { return first < wholes ? first + four : first; }
    __device__ __forceinline__ int after(int tile) const {
        return tile >= wholes ? tile + 1 : tile + FOURS < wholes ? tile + FOURS : wholes;
    }
    __device__ __forceinline__ int stride(int tile) const { return tile < wholes ? 1 : FOURS; }
};

// A warpgroup's steps of one tile after the other, as one of its warps sends for them. A lane sends for 16 bytes of
// eight rows of a step, each four behind the one before.
template <int N, bool GATED> struct Pipe {
    typedef Shape<N, GATED> S;
    u32 to;               // in the first stage, its first 16 bytes
    Fixed::Ring* ring;
    const u8* next;
    const float* scales;  // of the next step: the first one, of the first matrix
    int tile, step, end;

    __device__ __forceinline__ void locate(const Matrix (&matrices)[MATRICES], const Share& share, int inputs, int four) {
        Place found = place_of(matrices, tile * S::ROWS);
        step = tile < share.wholes ? 0 : four;
        next = found.of.weights + (long long)(found.row + lane_id() / 8) * inputs + step * S::STEP + lane_id() % 8 * 16;
        scales = found.of.scales + (int)((u32)found.row / BLOCK * ((u32)inputs / BLOCK)) + step * S::BLOCKS;
    }

    __device__ __forceinline__ void send(
        const Matrix (&matrices)[MATRICES], const Share& share, int inputs, int four, int stage) {
        if (tile >= end) return;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int row = i * 4 % N, block = i * 4 / N;
            long long from = (long long)(row % S::ROWS) * inputs + block * BLOCK;
            if (row >= S::ROWS) from += matrices[1].weights - matrices[0].weights;
            fetch16_once(memory + (to ^ i % 2 * 64) + stage * STAGE + i * 4 * SLAB_ROW, next + from);
        }
        int lane = lane_id();
        if (lane < S::KINDS * S::BLOCKS) {
            long long kind = GATED && lane >= S::BLOCKS ? matrices[1].scales - matrices[0].scales : 0;
            fetch4(ring->scales[stage] + lane, scales + kind + lane % S::BLOCKS);
        }
        arrive_when_there(ring->barriers + stage);
        int stride = share.stride(tile);
        next += stride * S::STEP;
        scales += stride * S::BLOCKS;
        step += stride;
        if (step * S::STEP >= inputs && (tile = share.after(tile)) < end) locate(matrices, share, inputs, four);
    }
};

// 128 inputs of a token, four to a lane, which become terms, a word of each. Gives back their unit.
__device__ __forceinline__ float split(Floats<4> x, u32 (&terms)[2]) {
    float most = largest(largest(x.f[0], x.f[1]), largest(x.f[2], x.f[3]));
    return terms_of(x, __float_as_uint(most), terms);
}

// Tokens as terms, `apart` bytes for 128 inputs, by all warps: pairs of such blocks, of which each warp has AHEAD on
// their way. Instructions are what it takes, so a pair shares all it can.
template <bool NORMED, int AHEAD>
__device__ __forceinline__ void stage(
    u8* terms, int apart, float* units, float* squares, const float* x, int x_row, const Norm& norm, int tokens,
    int blocks) {
    int count = (blocks + 1) / 2 * tokens, lane = lane_id();
    u32 inverse = 65536u / tokens + 1;
#pragma unroll 1
    for (int first = warp_id(); first < count; first += WARPS * AHEAD) {
        Floats<4> in[AHEAD][2], by[NORMED ? AHEAD : 1][2];
#pragma unroll
        for (int n = 0; n < AHEAD; n++) {
            int item = first + n * WARPS, pair = item * inverse >> 16, token = item - pair * tokens;
            if (item >= count) break;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int at = (2 * pair + i) * BLOCK + lane * 4;
                in[n][i] = by[NORMED ? n : 0][i] = Floats<4>{};
                if (i == 1 && 2 * pair + 1 == blocks) continue;
                in[n][i] = *reinterpret_cast<const Floats<4>*>(x + (token * x_row + at));
                if (NORMED) by[n][i] = *reinterpret_cast<const Floats<4>*>(norm.weights + at);
            }
        }
#pragma unroll
        for (int n = 0; n < AHEAD; n++) {
            int item = first + n * WARPS, pair = item * inverse >> 16, token = item - pair * tokens;
            if (item >= count) break;
            if (NORMED) {
                float square = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    square += in[n][i / 4].f[i % 4] * in[n][i / 4].f[i % 4];
                    in[n][i / 4].f[i % 4] *= by[n][i / 4].f[i % 4];
                }
#pragma unroll
                for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(ALL, square, d);
                if (lane == 0) squares[pair * TOKENS + token] = square;
            }
            u32 made[2][2];
            float unit[2] = {split(in[n][0], made[0]), split(in[n][1], made[1])};
            int at = place(2 * token, lane / 4);
            u8 *to = terms + 2 * pair * apart + lane % 4 * 4 + at, *next_row = to + ((at ^ 16) - at + SLAB_ROW);
            float* unit_to = units + 2 * pair * TOKENS + token;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (i == 1 && 2 * pair + 1 == blocks) continue;
                store(to + i * apart, made[i][0]);
                store(next_row + i * apart, made[i][1]);
                if (lane == 0) unit_to[i * TOKENS] = unit[i];
            }
        }
    }
    __syncthreads();
}

// Four products, of 128 inputs, all on their way at once.
struct Products {
    static const int COUNT = 4;
    float sums[COUNT][COLUMNS / 2];

    __device__ __forceinline__ void begin(u32 weights, u32 terms) {
        begin_products();
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            multiply(sums[i], factor(weights + i * 2), factor(terms + i * 2));
            close_products();
        }
    }
    // total[2 j + r] of row lane / 4 + 8 r and token lane % 4 + 4 j, of product I and all behind it.
    template <int I> __device__ __forceinline__ void add(bool used, const float (&scale)[4], float (&total)[4]) {
        await_products<COUNT - 1 - I>(sums[I]);
        if (used)
#pragma unroll
            for (int t = 0; t < 4; t++) {
                int first = t / 2 * 4 + t % 2 * 2;
                total[t] = fmaf(fmaf(sums[I][first + 1], 0.0625f, sums[I][first]), scale[t], total[t]);
            }
        if constexpr (I + 1 < COUNT) add<I + 1>(used, scale, total);
    }
};

// This block's `share` of `tiles`. Rows come in groups of `per_group`, each of which has `inputs` of x to itself.
// take(place of the tile, row of it, token, products with the matrices) gets each.
template <int N, bool GATED, bool NORMED, typename Take>
__device__ __forceinline__ void for_tiles(
    const Matrix (&matrices)[MATRICES], const float* x, long long x_row, const Norm& norm, int tokens, int inputs,
    int per_group, int tiles, int share, int stages, Take take) {
    typedef Shape<N, GATED> S;
    int blocks = inputs / BLOCK, steps = inputs / S::STEP, apart = (tokens > 4 ? 2 : 1) * 8 * SLAB_ROW;
    u8 *terms = memory, *ring = terms + blocks * apart;
    Fixed& shared = *reinterpret_cast<Fixed*>(ring + FOURS * stages * STAGE);
    float *units = reinterpret_cast<float*>(&shared + 1), *squares = units + blocks * TOKENS;
    // The compiler sees that lanes agree.
    int warp = __shfl_sync(ALL, warp_id() % 4, 0), four = __shfl_sync(ALL, warp_id() / 4, 0);
    int lane = lane_id(), quad = lane % 4;
    bool used = warp < N / 16, sends = warp == 3;
    Share mine;
    mine.first = blockIdx.x * share;
    mine.end = mine.first + share < tiles ? mine.first + share : tiles;
    // Those that share tokens.
    bool wholes = !GATED && (NORMED || per_group == tiles * S::ROWS);
    mine.wholes = wholes ? mine.first + (mine.end - mine.first) / FOURS * FOURS : mine.first;
    if (warp == 0 && lane < STAGES) make_barrier(shared.rings[four].barriers + lane, 32);
    __syncthreads();

    Pipe<N, GATED> pipe;
    pipe.to = (u32)(ring - memory) + four * stages * STAGE + place(lane / 8, lane % 8);
    pipe.ring = shared.rings + four;
    pipe.end = !sends ? mine.first : four < steps ? mine.end : mine.wholes;
    pipe.tile = mine.begin(four);
    pipe.locate(matrices, mine, inputs, four);
#pragma unroll 1
    for (int s = 0; s < stages; s++) pipe.send(matrices, mine, inputs, four, s);
    await_previous();

    // Shuffled, so that they are not computed anew in every step.
    u32 first_terms = __shfl_sync(ALL, along(shared_address(terms)), 0);
    u32 first_weights = __shfl_sync(ALL, along(shared_address(ring + four * stages * STAGE)), 0);
    int slot = 0, behind = -1;  // where this step is, and the one before
    u32 parity = 0;
    int group = GATED || NORMED ? 0 : mine.first * S::ROWS / per_group;
    const int AHEAD = NORMED ? 2 : 4;
    stage<NORMED, AHEAD>(
        terms, apart, units, squares, x + (long long)group * inputs, (int)x_row, norm, tokens, blocks);
    float root = 1.0f;  // of token lane % 8
    if (NORMED) {
        float square = 0.0f;
        for (int pair = lane / 8; 2 * pair < blocks; pair += 4) square += squares[pair * TOKENS + lane % 8];
#pragma unroll
        for (int d = 16; d >= 8; d /= 2) square += __shfl_xor_sync(ALL, square, d);
        root = inverse_root(square / inputs + norm.eps);
    }
#pragma unroll 1
    for (int tile = mine.begin(four); tile < mine.end; tile = mine.after(tile)) {
        if (!GATED && !NORMED && tile > mine.first && tile >= mine.wholes) {
            int group = tile * S::ROWS / per_group;
            // Nobody needs the tokens before: behind the last product with them all met.
            if (tile * S::ROWS == group * per_group)
                stage<NORMED, 1>(
                    terms, apart, units, squares, x + (long long)group * inputs, (int)x_row, norm, tokens, blocks);
        }
        int stride = mine.stride(tile);
        float total[4] = {};  // total[2 j + r] of row 16 warp + lane / 4 + 8 r, token quad + 4 j
#pragma unroll 1
        for (int step = stride == 1 ? 0 : four; step < steps; step += stride) {
            if (warp == 2) {
                await(pipe.ring->barriers + slot, parity);
                publish();  // copies and terms, by a warp that has no copies on their way and no sums to add
            }
            meet(1 + four, 128);  // which says as well that all are done with the step before
            if (behind >= 0) pipe.send(matrices, mine, inputs, four, behind);
#pragma unroll 1
            for (int b = 0; b < S::BLOCKS; b++) {
                int block = step * S::BLOCKS + b;
                Products products;
                products.begin(
                    first_weights + slot * (STAGE / 16) + b * N * SLAB_ROW / 16, first_terms + block * (apart / 16));
                float scale[4];
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    int kind = !GATED ? 0 : N == 16 ? t % 2 : warp % 2;
                    scale[t] = pipe.ring->scales[slot][kind * S::BLOCKS + b] * units[block * TOKENS + quad + t / 2 * 4];
                }
                products.template add<0>(used, scale, total);
            }
            behind = slot;
            if (++slot == stages) {
                slot = 0;
                parity ^= 1;
            }
        }
        int row = 16 * warp + lane / 4;
        if constexpr (!GATED)
            if (stride == 1) {
                Place at = place_of(matrices, tile * S::ROWS);
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    int of = quad + t / 2 * 4;
                    float by = NORMED ? __shfl_sync(ALL, root, of) : 1.0f;
                    float product[1] = {total[t] * by};
                    if (used && of < tokens) take(at, row + t % 2 * 8, of, product);
                }
                continue;
            }
        // While others may still read those of the tile before.
        if (used)
#pragma unroll
            for (int t = 0; t < 4; t++)
                if (quad + t / 2 * 4 < tokens)
                    shared.sums[tile & 1][four][quad + t / 2 * 4][row + t % 2 * 8] = total[t];
        __syncthreads();
        int of = threadIdx.x / S::ROWS;
        row = threadIdx.x % S::ROWS;
        float by = NORMED ? __shfl_sync(ALL, root, of % TOKENS) : 1.0f;
        if (of < tokens) {
            float both[S::KINDS];
#pragma unroll
            for (int k = 0; k < S::KINDS; k++) {
                both[k] = 0.0f;
#pragma unroll
                for (int f = 0; f < FOURS; f++) both[k] += shared.sums[tile & 1][f][of][k * S::ROWS + row];
                both[k] *= by;
            }
            take(place_of(matrices, tile * S::ROWS), row, of, both);
        }
    }
}

#define EACH(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)
#define PARAMETERS(I) const u8* weights##I, const float* scales##I, int rows##I,
#define ENTRY(I) Matrix{weights##I, scales##I, rows##I},

template <int N, bool NORMED>
__device__ __forceinline__ void linears(
    const Matrix (&matrices)[MATRICES], const float* x, long long x_row, const Norm& norm, float* y, int tokens,
    int inputs, int per_group, int tiles, int share, int stages) {
    for_tiles<N, false, NORMED>(
        matrices, x, x_row, norm, tokens, inputs, per_group, tiles, share, stages,
        [&](const Place& at, int row, int of, const float (&product)[1]) {
            y[(long long)tokens * at.before + (long long)of * at.of.rows + at.row + row] = product[0];
        });
}

// y: up to eight matrices' products of the same inputs, [tokens, rows] of one behind the other. N rows of one to a tile.
#define LINEARS_OF(N)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) penumbra_fp8_linears_##N(                               \
        EACH(PARAMETERS) const float* x, long long x_row, float* y, int tokens, int inputs, int per_group, int tiles, \
        int share, int stages) {                                                                                     \
        linears<N, false>(                                                                                           \
            {EACH(ENTRY)}, x, x_row, Norm{nullptr, 0.0f}, y, tokens, inputs, per_group, tiles, share, stages);       \
    }                                                                                                                \
    /* Likewise, of tokens that go through an RMSNorm first; all rows have the same inputs. */                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) penumbra_fp8_linears_normed_##N(                        \
        EACH(PARAMETERS) const float* x, long long x_row, const float* norm, float eps, float* y, int tokens,        \
        int inputs, int per_group, int tiles, int share, int stages) {                                               \
        linears<N, true>({EACH(ENTRY)}, x, x_row, Norm{norm, eps}, y, tokens, inputs, per_group, tiles, share, stages); \
    }
LINEARS_OF(16)
LINEARS_OF(32)

template <int N>
__device__ __forceinline__ void gated(
    const Matrix (&both)[MATRICES], const float* x, long long x_row, float* y, int tokens, int inputs, float limit,
    int tiles, int share, int stages) {
    int rows = both[0].rows;
    for_tiles<N, true, false>(
        both, x, x_row, Norm{nullptr, 0.0f}, tokens, inputs, rows, tiles, share, stages,
        [&](const Place& at, int row, int of, const float (&product)[2]) {
            float gate = product[0] > limit ? limit : product[0], up = product[1];
            up = up > limit ? limit : up < -limit ? -limit : up;
            y[(long long)of * rows + at.row + row] = gate / (1.0f + expf(-gate)) * up;
        });
}

// y [tokens, rows]: silu(min(gate x, limit)) * clamp(up x, -limit, limit), both [rows, inputs]. N / 2 rows of each to a
// tile.
#define GATED_OF(N)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) penumbra_fp8_gated_##N(                                 \
        const u8* gate, const float* gate_scales, const u8* up, const float* up_scales, int rows, const float* x,    \
        long long x_row, float* y, int tokens, int inputs, float limit, int tiles, int share, int stages) {          \
        gated<N>(                                                                                                    \
            {{gate, gate_scales, rows}, {up, up_scales, rows}}, x, x_row, y, tokens, inputs, limit, tiles, share,    \
            stages);                                                                                                 \
    }
GATED_OF(16)
GATED_OF(32)
