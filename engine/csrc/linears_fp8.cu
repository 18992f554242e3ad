// Products of up to eight tokens with e4m3 matrices as the checkpoint holds them, at the speed at which weights are read.
//
// wgmma multiplies tokens, its 64 rows, e4m3 in registers, by N rows of weights, its columns, where copies laid them. A
// token is two rows, as no e4m3 holds an activation: x = unit (c0 + c1 / 16), whose error is at most 2^-9 of a value that
// is no smaller than 2^-13 of the largest among the 128 inputs for which a unit is made. Eight tokens so fill the 16 rows
// of one warp, a lane has both sums of its token, and the other three warps multiply zeros; two of those send for weights.
// Warpgroup g's warp g has the tokens, so that the four of a block are served by four schedulers. wgmma counts few bits of
// a sum, so 32 inputs are a product of their own: sum += weights' scale * unit * (d0 + d1 / 16) in fp32.
//
// A block takes its share of all tiles of N rows, one behind the other, and its warpgroups take turns at the steps of
// 4,096 / N inputs, so that together they read rows in pieces of 16,384 / N bytes. Each has a ring of steps, filled by
// copies as soon as all its warps are done with one. At a tile's end the four sums of it are added in order. What is
// added to what, and in which order, depends on the shapes alone.
//
// Tokens become terms while the first tile is multiplied, a few steps ahead of it. So does an RMSNorm: x times its
// weights is what becomes terms, the sum of squares comes along, and sums are multiplied by the root.
//
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its
// own of what stands between #ifndef ON_CPU and #endif.

#include "warpgroup.cuh"

#define TOKENS 8
#define MATRICES 8  // of one launch
#define THREADS 512
#define FOURS 4     // warpgroups
#define BLOCK 128   // inputs, and rows, that share a scale
#define STAGES 5    // steps of a warpgroup's ring
#define STAGE 4096  // bytes of weights
#define TERMS 64    // bytes of a token for a product
#define PITCH 40    // of a token's sums: eight more than the most rows, so that four tokens meet in no bank

#ifndef ON_CPU
// 4 bytes, as fetch16.
__device__ __forceinline__ void fetch4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
// m64nNk32, of 32 or 16 rows of weights: a lane has rows lane / 4 (a[0], a[2]) and lane / 4 + 8 (a[1], a[3]) of its
// warp's 16 at inputs 4 (lane % 4) + 0..3, one to a byte, and (a[2], a[3]) those 16 later; sums as in warpgroup.cuh.
__device__ __forceinline__ void multiply(float (&sums)[16], const u32 (&a)[4], u64 weights) {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {" SUMS_16 "}, {%16, %17, %18, %19}, %20, add, 1, 1;}"
        : SIXTEEN(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(weights));
}
__device__ __forceinline__ void multiply(float (&sums)[8], const u32 (&a)[4], u64 weights) {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, "
        "add, 1, 1;}"
        : FOUR(0), FOUR(4) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(weights));
}
// As in warpgroup.cuh; a product's operands live until here.
template <int LEFT, int COUNT> __device__ __forceinline__ void await_products(float (&sums)[COUNT], u32 (&a)[4]) {
    await_products<LEFT>(sums);
    asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]) :: "memory");
}
// Nearest even, at most 448: low in bits 0..7.
__device__ __forceinline__ u32 e4m3s(float low, float high) {
    unsigned short both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ void values_of(u32 e4m3s, float& low, float& high) {
    asm("{\n"
        ".reg .b32 both;\n"
        ".reg .f16 low, high;\n"
        "cvt.rn.f16x2.e4m3x2 both, %2;\n"
        "mov.b32 {low, high}, both;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n"
        "}\n" : "=f"(low), "=f"(high) : "h"((unsigned short)e4m3s));
}
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
// 16 bytes of shared memory.
__device__ __forceinline__ void load(u32 (&words)[4], u32 address) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(address) : "memory");
}
#endif

// A lane's own value, which the compiler keeps, rather than compute it anew for each use.
__device__ __forceinline__ int settled(int value) { return __shfl_sync(ALL, value, lane_id()); }

// [rows, inputs] e4m3, and a scale for 128 x 128 of them.
struct Matrix {
    const u8* weights;
    const float* scales;
    int rows;
};

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

// Shared memory of a block: each warpgroup's ring, this, a unit for each block of inputs and token, the tokens' terms.
struct __align__(16) Fixed {
    float scales[FOURS][STAGES][4];  // of a step: [matrix][block of inputs]
    float sums[2][FOURS][TOKENS][PITCH];  // of even tiles and odd ones
    float squares[FOURS][TOKENS];
    u64 barriers[FOURS][STAGES];
    u8 zeros[4 * TERMS];
};
extern __shared__ __align__(1024) unsigned char memory[];
__device__ __forceinline__ Fixed& fixed() { return *reinterpret_cast<Fixed*>(memory + FOURS * STAGES * STAGE); }

// Where a tile is: its matrix, its first row there, and the rows of all matrices in front of that.
struct Place {
    Matrix of;
    int row, before;
};
template <int NEXT> __device__ __forceinline__ void pass(const Matrix (&matrices)[MATRICES], Place& found) {
    if constexpr (NEXT < MATRICES)
        if (found.row >= found.of.rows) {
            found = {matrices[NEXT], found.row - found.of.rows, found.before + found.of.rows};
            pass<NEXT + 1>(matrices, found);
        }
}
__device__ __forceinline__ Place place_of(const Matrix (&matrices)[MATRICES], int row) {
    Place found = {matrices[0], row, 0};
    pass<1>(matrices, found);
    return found;
}

// A warpgroup's steps of one tile after the other, as two of its warps send for them. A thread sends for 16 bytes of four
// rows of a step, each eight behind the one before.
template <int N, bool GATED> struct Pipe {
    typedef Shape<N, GATED> S;
    u32 thread;           // of the 64
    int to;               // where in a stage its first 16 bytes go
    const u8* next;
    const float* scales;  // of the next step: the first one, of the first matrix
    int tile, step;

    __device__ __forceinline__ void locate(const Matrix (&matrices)[MATRICES], int inputs, int four) {
        Place found = place_of(matrices, tile * S::ROWS);
        step = four;
        next = found.of.weights + (long long)(found.row + thread / 8) * inputs + step * S::STEP + thread % 8 * 16;
        scales = found.of.scales + (int)((u32)found.row / BLOCK * ((u32)inputs / BLOCK)) + step * S::BLOCKS;
    }

    __device__ __forceinline__ void send(const Matrix (&matrices)[MATRICES], int inputs, int four, int stage, int end) {
        if (tile >= end) return;
        u8* ring = memory + (four * STAGES + stage) * STAGE + to;
        Fixed& shared = fixed();
        long long rows = 8LL * inputs, other = matrices[1].weights - matrices[0].weights;
        long long first = GATED && N == 16 ? other : rows, second = N == 16 ? BLOCK : GATED ? other : 2 * rows;
#pragma unroll
        for (int i = 0; i < 4; i++)
            fetch16(ring + i * 8 * SLAB_ROW, next + i % 2 * first + i / 2 * second);
        if (thread < S::KINDS * S::BLOCKS) {
            long long kind = GATED && thread >= S::BLOCKS ? matrices[1].scales - matrices[0].scales : 0;
            fetch4(&shared.scales[four][stage][thread], scales + kind + thread % S::BLOCKS);
        }
        arrive_when_there(&shared.barriers[four][stage]);
        next += FOURS * S::STEP;
        scales += FOURS * S::BLOCKS;
        step += FOURS;
        if (step * S::STEP >= inputs && ++tile < end) locate(matrices, inputs, four);
    }
};

// Four inputs of a token, as both terms.
struct __align__(8) Terms {
    u32 w[2];
};

// 128 inputs of a token, four to a lane, which become terms: for each of four products what its lanes have of the token,
// 16 bytes a lane. Gives back their unit.
__device__ __forceinline__ float split(Floats<4> x, u8* terms, int tokens, int token, int block) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 size = __float_as_uint(x.f[i]) & 0x7fffffffu;
        most = size > most ? size : most;
    }
    // The largest comes to lie between 128 and 256, as far as there are powers of two.
    int exponent = (int)(__reduce_max_sync(ALL, most) >> 23), lane = lane_id();
    bool finite = exponent < 255;
    exponent = exponent < 8 ? 8 : exponent;
    float factor = __uint_as_float((u32)(261 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < 4; i++) x.f[i] *= factor;
    u32 low = e4m3s(x.f[0], x.f[1]), high = e4m3s(x.f[2], x.f[3]);
    Floats<4> held;
    values_of(low, held.f[0], held.f[1]);
    values_of(high, held.f[2], held.f[3]);
#pragma unroll
    for (int i = 0; i < 4; i++) x.f[i] = (x.f[i] - held.f[i]) * 16.0f;
    Terms made = {{low | high << 16, e4m3s(x.f[0], x.f[1]) | e4m3s(x.f[2], x.f[3]) << 16}};
    int at = ((block * tokens + token) * 4 + lane / 8) * TERMS + lane % 4 * 16 + lane / 4 % 2 * 8;
    *reinterpret_cast<Terms*>(terms + at) = made;
    return __uint_as_float(finite ? (u32)(exponent - 7) << 23 : 0x7fc00000u);
}

// A warpgroup's next AHEAD blocks of inputs, from those of `step` on, as terms; a warp has every fourth token, whose inputs
// are all on their way before it uses one.
template <typename S, int AHEAD, bool NORMED>
__device__ __forceinline__ void stage(
    u8* terms, float* units, float (&squares)[TOKENS], const float* x, long long x_row, const Norm& norm, int tokens,
    int inputs, int warp, int step) {
    int lane = lane_id(), first = step * S::STEP + lane * 4;
#pragma unroll 1
    for (int token = warp % 4; token < tokens; token += 4) {
        Floats<4> in[AHEAD], by[NORMED ? AHEAD : 1];
        auto input_of = [&](int n) { return first + n / S::BLOCKS * FOURS * S::STEP + n % S::BLOCKS * BLOCK; };
#pragma unroll
        for (int n = 0; n < AHEAD; n++) {
            if (input_of(n) >= inputs) continue;
            in[n] = *reinterpret_cast<const Floats<4>*>(x + token * x_row + input_of(n));
            if (NORMED) by[n] = *reinterpret_cast<const Floats<4>*>(norm.weights + input_of(n));
        }
#pragma unroll
        for (int n = 0; n < AHEAD; n++) {
            if (input_of(n) >= inputs) continue;
            int block = input_of(n) / BLOCK;
            if (NORMED) {
                float square = 0.0f;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    square += in[n].f[i] * in[n].f[i];
                    in[n].f[i] *= by[n].f[i];
                }
#pragma unroll
                for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(ALL, square, d);
                if (lane == 0) squares[token] += square;
            }
            float unit = split(in[n], terms, tokens, token, block);
            if (lane == 0) units[block * TOKENS + token] = unit;
        }
    }
}

// Four products, of 128 inputs.
template <int N> struct Products {
    static const int COUNT = 4, AT_ONCE = 32 / N;  // on their way, one or two: as many as there are registers for
    float sums[AT_ONCE][N / 2];
    u32 a[2][4];
    u32 terms, weights;  // of this lane, and all, for the first product

    template <int J> __device__ __forceinline__ void fetch() {
        if constexpr (J < COUNT) load(a[J % 2], terms + J * TERMS);
    }
    template <int J> __device__ __forceinline__ void begin() {
        begin_products();
        multiply(sums[J % AT_ONCE], a[J % 2], factor(weights + J * 2));
        close_products();
    }
    // add(sums) of product J and all behind it. Those before it were added, what AT_ONCE have room for has begun.
    template <int J, typename Add> __device__ __forceinline__ void finish(Add add) {
        const int BEGUN = J + AT_ONCE < COUNT ? J + AT_ONCE : COUNT;
        if (AT_ONCE == 1) fetch<BEGUN>();
        await_products<BEGUN - J - 1>(sums[J % AT_ONCE], a[J % 2]);
        if (AT_ONCE == 2) fetch<BEGUN>();
        add(sums[J % AT_ONCE]);
        if constexpr (BEGUN < COUNT) begin<BEGUN>();
        if constexpr (J + 1 < COUNT) finish<J + 1>(add);
    }
    template <int J> __device__ __forceinline__ void start() {
        fetch<J>();
        begin<J>();
        if constexpr (J + 1 < AT_ONCE) start<J + 1>();
    }
};

// This block's `share` of `tiles`. Rows come in groups of `per_group`, each of which has `inputs` of x to itself.
// take(place of the tile, row of it, token, products with the matrices) gets each.
template <int N, bool GATED, bool NORMED, typename Take>
__device__ __forceinline__ void for_tiles(
    const Matrix (&matrices)[MATRICES], const float* x, long long x_row, const Norm& norm, int tokens, int inputs,
    int per_group, int tiles, int share, Take take) {
    typedef Shape<N, GATED> S;
    Fixed& shared = fixed();
    float* units = reinterpret_cast<float*>(&shared + 1);
    u8* terms = reinterpret_cast<u8*>(units + inputs / BLOCK * TOKENS);
    // The compiler sees that lanes agree.
    int warp = __shfl_sync(ALL, warp_id(), 0), four = warp / 4, role = __shfl_sync(ALL, warp_id() % 4 ^ warp_id() / 4, 0);
    int lane = lane_id(), token = lane / 4, quad = lane % 4, steps = inputs / S::STEP;
    bool holds = role == 0, sends = role == 1 || role == 2, mine = holds && token < tokens;
    int tile = blockIdx.x * share, end = settled(tile + share < tiles ? tile + share : tiles);
    if (NORMED && lane < TOKENS && lane % 4 == warp % 4) shared.squares[four][lane] = 0.0f;
    if (threadIdx.x < sizeof(shared.zeros)) shared.zeros[threadIdx.x] = 0;
    if (threadIdx.x < FOURS * STAGES) make_barrier(shared.barriers[0] + threadIdx.x, 64);
    __syncthreads();

    Pipe<N, GATED> pipe;
    pipe.thread = (role - 1) * 32 + lane;
    pipe.to = settled(place(pipe.thread / 8, pipe.thread % 8));
    pipe.tile = sends && four < steps ? tile : end;
    pipe.locate(matrices, inputs, four);
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; s++) pipe.send(matrices, inputs, four, s, end);
    await_previous();

    int slot = 0, staged = four, group = 0;
    // This lane's terms, of zeros where it has no token, and how far it is to those of the next block.
    u32 own = settled(shared_address(mine ? terms + token * 4 * TERMS : shared.zeros) + quad * 16);
    u32 apart = mine ? tokens * 4 * TERMS : 0;
    u32 parity = 0, weights = __shfl_sync(ALL, along(shared_address(memory + four * STAGES * STAGE)), 0);
#pragma unroll 1
    for (; tile < end; tile++) {
        if (!GATED && !NORMED) {
            int own = tile * S::ROWS / per_group;
            if (own != group) {
                group = own;
                staged = four;  // all are done with the tokens before: behind their last product all met
            }
        }
        float total[N / 4] = {};  // rows 8 j + 2 quad + c of the lane's token: total[2 j + c]
#pragma unroll 1
        for (int step = four; step < steps; step += FOURS) {
            if (step >= staged) {
                const int AHEAD = NORMED ? 2 : 4;
                stage<S, AHEAD, NORMED>(
                    terms, units, shared.squares[four], x + (long long)group * inputs, x_row, norm, tokens, inputs, warp,
                    step);
                staged = step + AHEAD / S::BLOCKS * FOURS;
            }
            if (holds) {
                await(shared.barriers[four] + slot, parity);
                publish();  // here, where no copies are on their way
            }
            meet(1 + four, 128);  // which says as well that all are done with the step before
#pragma unroll 1
            for (int b = 0; b < S::BLOCKS; b++) {
                int block = step * S::BLOCKS + b;
                Products<N> products;
                products.terms = own + block * apart;
                products.weights = weights + (slot * STAGE + b * N * SLAB_ROW) / 16;
                products.template start<0>();
                float scale[S::KINDS];
                if (holds)
#pragma unroll
                    for (int k = 0; k < S::KINDS; k++)
                        scale[k] = shared.scales[four][slot][k * S::BLOCKS + b] * units[block * TOKENS + token];
                products.template finish<0>([&](const float (&sums)[N / 2]) {
                    if (holds)
#pragma unroll
                        for (int j = 0; j < N / 8; j++)
#pragma unroll
                            for (int c = 0; c < 2; c++)
                                total[2 * j + c] = fmaf(
                                    fmaf(sums[4 * j + 2 + c], 0.0625f, sums[4 * j + c]), scale[GATED ? j / (N / 16) : 0],
                                    total[2 * j + c]);
                });
            }
            // While the one with the tokens waits for the next step.
            pipe.send(matrices, inputs, four, slot ? slot - 1 : STAGES - 1, end);
            if (++slot == STAGES) {
                slot = 0;
                parity ^= 1;
            }
        }
        // While others may still read those of the tile before.
        if (mine)
#pragma unroll
            for (int j = 0; j < N / 8; j++)
                *reinterpret_cast<Floats<2>*>(&shared.sums[tile & 1][four][token][8 * j + 2 * quad]) =
                    Floats<2>{total[2 * j], total[2 * j + 1]};
        __syncthreads();
        int of = threadIdx.x / S::ROWS, row = threadIdx.x % S::ROWS;
        if (of >= tokens) continue;
        float root = 1.0f;
        if (NORMED) {
            float square = 0.0f;
#pragma unroll
            for (int f = 0; f < FOURS; f++) square += shared.squares[f][of];
            root = inverse_root(square / inputs + norm.eps);
        }
        float both[S::KINDS];
#pragma unroll
        for (int k = 0; k < S::KINDS; k++) {
            both[k] = 0.0f;
#pragma unroll
            for (int f = 0; f < FOURS; f++) both[k] += shared.sums[tile & 1][f][of][k * S::ROWS + row];
            if (NORMED) both[k] *= root;
        }
        take(place_of(matrices, tile * S::ROWS), row, of, both);
    }
}

#define EACH(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)
#define PARAMETERS(I) const u8* weights##I, const float* scales##I, int rows##I,
#define ENTRY(I) Matrix{weights##I, scales##I, rows##I},

template <int N, bool NORMED>
__device__ __forceinline__ void linears(
    const Matrix (&matrices)[MATRICES], const float* x, long long x_row, const Norm& norm, float* y, int tokens,
    int inputs, int per_group, int tiles, int share) {
    for_tiles<N, false, NORMED>(
        matrices, x, x_row, norm, tokens, inputs, per_group, tiles, share,
        [&](const Place& at, int row, int of, const float (&product)[1]) {
            y[(long long)tokens * at.before + (long long)of * at.of.rows + at.row + row] = product[0];
        });
}

// y: up to eight matrices' products of the same inputs, [tokens, rows] of one behind the other. N rows of one to a tile.
#define LINEARS_OF(N)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) penumbra_fp8_linears_##N(                               \
        EACH(PARAMETERS) const float* x, long long x_row, float* y, int tokens, int inputs, int per_group, int tiles, \
        int share) {                                                                                                 \
        linears<N, false>(                                                                                           \
            {EACH(ENTRY)}, x, x_row, Norm{nullptr, 0.0f}, y, tokens, inputs, per_group, tiles, share);               \
    }                                                                                                                \
    /* Likewise, of tokens that go through an RMSNorm first; all rows have the same inputs. */                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) penumbra_fp8_linears_normed_##N(                        \
        EACH(PARAMETERS) const float* x, long long x_row, const float* norm, float eps, float* y, int tokens,        \
        int inputs, int per_group, int tiles, int share) {                                                           \
        linears<N, true>({EACH(ENTRY)}, x, x_row, Norm{norm, eps}, y, tokens, inputs, per_group, tiles, share);      \
    }
LINEARS_OF(16)
LINEARS_OF(32)

template <int N>
__device__ __forceinline__ void gated(
    const Matrix (&both)[MATRICES], const float* x, long long x_row, float* y, int tokens, int inputs, float limit,
    int tiles, int share) {
    int rows = both[0].rows;
    for_tiles<N, true, false>(
        both, x, x_row, Norm{nullptr, 0.0f}, tokens, inputs, rows, tiles, share,
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
        long long x_row, float* y, int tokens, int inputs, float limit, int tiles, int share) {                      \
        gated<N>({{gate, gate_scales, rows}, {up, up_scales, rows}}, x, x_row, y, tokens, inputs, limit, tiles, share); \
    }
GATED_OF(16)
GATED_OF(32)
