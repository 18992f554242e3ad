// Products of some tens of tokens with e4m3 matrices as the checkpoint holds them, each weight read once for up to 128.
//
// A first kernel makes tokens terms, with or without an RMSNorm: x = unit (c0 + c1 / 16), as no e4m3 holds an activation,
// of an error of at most 2^-9 of the value, or 2^-21 of the largest among the 128 inputs for which a unit is made. It lays 32 tokens' terms of 128 inputs as the 64 rows of a factor that one copy brings to shared memory:
// in each 16 of them those of eight tokens, first terms before second ones, so that a lane has both sums of its token.
//
// A product is 64 rows of terms by 128 rows of weights, or by 64 in either warpgroup where there are no more than 32
// tokens. wgmma counts few bits of a sum, 13 behind the point of its largest term: 128 inputs, which share all scales, are
// one chain of four products from zero, and sum += weights' scale * unit * (d0 + d1 / 16) in fp32. What is cut off is a
// tenth of what two terms round away (3e-8 of 2.4e-7, as 1 - 2 <x, y> / (<x, x> + <y, y>)); chains of one would lose
// less, for four times as many additions, which would take as long as the products.
//
// An item is 128 rows of weights and a part of the inputs, for up to 128 tokens. A block takes every so many'th, and its
// ring of 128 inputs a stage goes on from one to the next: two warps send for weights, one for terms, two warpgroups
// multiply. A last kernel adds parts in their order. What is added to what depends on a matrix's shape alone.
//
// Of more than 32 tokens, terms are as many bytes as weights, or twice that, and the L2 would be what takes longest. There
// two blocks, a cluster, have neighbouring rows and the same inputs; each sends for half of the terms, to both.
//
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its
// own of what stands between #ifndef ON_CPU and #endif.

#include "matrices.cuh"
#include "warpgroup.cuh"

#ifndef ON_CPU
extern __shared__ __align__(1024) unsigned char memory[];
#endif

#define BLOCK 128          // inputs, and rows, that share a scale: a stage
#define WEIGHTS 16384      // bytes of a stage
#define TILE 32            // tokens: of 64 rows
#define TERMS 8192         // bytes of a tile of tokens in a stage
#define MULTIPLIERS 256    // threads: two warpgroups
#define SENDERS 64         // of weights
#define THREADS (MULTIPLIERS + SENDERS + 32)
#define SPLITTERS 256      // threads of a block that makes terms of tokens without a norm

#ifndef ON_CPU
__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}
// To both blocks of a cluster: the same place, and the same barrier, of each.
__device__ __forceinline__ void bring_to_both(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
        :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"((unsigned short)3) : "memory");
}
// At this barrier of a block of the cluster.
__device__ __forceinline__ void arrive_at(u64* barrier, u32 block) {
    asm volatile(
        "{.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];}"
        :: "r"(shared_address(barrier)), "r"(block) : "memory");
}
// All threads of the cluster; barriers that were made before are seen by it.
__device__ __forceinline__ void meet_cluster() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
#endif

// Tokens as terms: of every 128 inputs `tiles` tiles of tokens, and a unit for each token of those.
struct Tokens {
    u8* terms;
    float* units;
    int tiles;

    __device__ __forceinline__ long long tile(int block, int tile) const { return (long long)block * tiles + tile; }
};

// 128 inputs of a token, four to a lane, become terms. Gives back their unit.
__device__ __forceinline__ float split(Floats<4> x, u8* tile, int token) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 size = __float_as_uint(x.f[i]) & 0x7fffffffu;
        most = size > most ? size : most;
    }
    u32 terms[2];
    float unit = terms_of(x, most, terms);
    int lane = lane_id();
    u8* at = tile + place(token / 8 * 16 + token % 8, lane / 4) + lane % 4 * 4;
    *reinterpret_cast<u32*>(at) = terms[0];
    *reinterpret_cast<u32*>(at + 8 * SLAB_ROW) = terms[1];
    return unit;
}

// x [tokens, 128 * blocks] as terms: a warp makes those of 128 inputs.
extern "C" __global__ void __launch_bounds__(SPLITTERS) penumbra_some_terms(
    const float* x, long long x_row, u8* terms, float* units, int tiles, int blocks) {
    await_previous();
    const int WARPS = SPLITTERS / 32;
    int turns = (blocks + WARPS - 1) / WARPS, token = blockIdx.x / turns;
    int block = blockIdx.x % turns * WARPS + warp_id();
    if (block >= blocks) return;
    Tokens to{terms, units, tiles};
    long long tile = to.tile(block, token / TILE);
    const float* from = x + token * x_row + block * BLOCK + lane_id() * 4;
    float unit = split(*reinterpret_cast<const Floats<4>*>(from), terms + tile * TERMS, token % TILE);
    if (lane_id() == 0) units[tile * TILE + token % TILE] = unit;
}

// Likewise, of tokens that go through an RMSNorm first: one to a block, of 32 threads for each 128 inputs, at most 1,024.
extern "C" __global__ void __launch_bounds__(1024) penumbra_some_terms_normed(
    const float* x, long long x_row, const float* norm, float eps, u8* terms, float* units, int tiles, int blocks) {
    await_previous();
    float* squares = reinterpret_cast<float*>(memory);
    int token = blockIdx.x, warps = blockDim.x / 32, lane = lane_id();
    const float* from = x + token * x_row + lane * 4;
    float square = 0.0f;
    for (int block = warp_id(); block < blocks; block += warps) {
        Floats<4> in = *reinterpret_cast<const Floats<4>*>(from + block * BLOCK);
#pragma unroll
        for (int i = 0; i < 4; i++) square += in.f[i] * in.f[i];
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(ALL, square, d);
    if (lane == 0) squares[warp_id()] = square;
    __syncthreads();
    square = lane < warps ? squares[lane] : 0.0f;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(ALL, square, d);
    float root = inverse_root(square / (blocks * BLOCK) + eps);
    Tokens to{terms, units, tiles};
    for (int block = warp_id(); block < blocks; block += warps) {
        Floats<4> in = *reinterpret_cast<const Floats<4>*>(from + block * BLOCK);
        Floats<4> by = *reinterpret_cast<const Floats<4>*>(norm + block * BLOCK + lane * 4);
#pragma unroll
        for (int i = 0; i < 4; i++) in.f[i] *= by.f[i];
        long long tile = to.tile(block, token / TILE);
        float unit = split(in, terms + tile * TERMS, token % TILE);
        if (lane == 0) units[tile * TILE + token % TILE] = unit * root;
    }
}

// How all is cut: rows come in groups of `per_group`, each of which has `steps` times 128 inputs of x to itself.
struct Cut {
    int steps, parts, per_group, items;
};

// For one block, TILES tiles of tokens.
template <int TILES> struct Shape {
    static const int COLUMNS = TILES == 1 ? 64 : 128;  // of weights, of a warpgroup's product
    static const int OWN = TILES == 4 ? 2 : 1;         // tiles of tokens of a warpgroup
    static const int AT_ONCE = TILES == 1 ? 2 : 1;     // of its products on their way
    static const int TOGETHER = TILES == 1 ? 1 : 2;    // blocks that share terms
    static const int STAGE = WEIGHTS + TILES * TERMS, STAGES = TILES == 1 ? 8 : TILES == 2 ? 6 : 4;
};
// Shared memory of a block: the ring, and this.
template <int TILES> struct __align__(16) Fixed {
    float units[Shape<TILES>::STAGES][TILES * TILE];
    u64 full[Shape<TILES>::STAGES], empty[Shape<TILES>::STAGES];
};
template <int TILES> __device__ __forceinline__ Fixed<TILES>& fixed() {
    return *reinterpret_cast<Fixed<TILES>*>(memory + Shape<TILES>::STAGES * Shape<TILES>::STAGE);
}

// An item, of one block or of those that share terms: the tiles of tokens are what differs first, so that blocks which run
// at once share their weights.
template <int TILES> struct Item {
    typedef Shape<TILES> S;
    int tokens, part, row, group, first, end;  // first tile of tokens, row of all matrices, steps

    __device__ __forceinline__ Item(const Cut& cut, const Tokens& x, int item) {
        int turns = x.tiles / TILES;
        tokens = item % turns * TILES;
        item /= turns;
        part = item % cut.parts;
        row = (item / cut.parts * S::TOGETHER + blockIdx.x % S::TOGETHER) * BLOCK;
        group = row / cut.per_group;
        first = part * cut.steps / cut.parts;
        end = (part + 1) * cut.steps / cut.parts;
    }
};

// A ring's next stage.
template <int STAGES> struct Slot {
    int stage = 0;
    u32 parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

template <int TILES>
__device__ __forceinline__ void send_weights(
    const Matrix (&matrices)[MATRICES], const Tokens& x, const Cut& cut, int thread) {
    typedef Shape<TILES> S;
    Fixed<TILES>& shared = fixed<TILES>();
    Slot<S::STAGES> slot;
    bool waited = false;
    long long inputs = (long long)cut.steps * BLOCK;
    // A warp's copies are whole rows of 128 bytes, eight rows between those of a thread.
    int to = place(thread / 8, thread % 8);
    for (int i = blockIdx.x / S::TOGETHER; i < cut.items; i += gridDim.x / S::TOGETHER) {
        Item<TILES> item(cut, x, i);
        Place at = place_of(matrices, item.row);
        const u8* next = at.of.weights + (at.row + thread / 8) * inputs + item.first * BLOCK + thread % 8 * 16;
        // Two stages at a time: what lies side by side in memory is sent for at once.
        for (int step = item.first; step < item.end; step += 2, next += 2 * BLOCK) {
            bool both = step + 1 < item.end;
            Slot<S::STAGES> other = slot;
            other.advance();
            // Weights are on their way before what is in front has ended; here is room for no more of them.
            if (!waited && (both ? other : slot).parity) {
                await_previous();
                waited = true;
            }
            await(&shared.empty[slot.stage], slot.parity ^ 1);
            if (both) await(&shared.empty[other.stage], other.parity ^ 1);
            u8 *first = memory + slot.stage * S::STAGE + to, *second = memory + other.stage * S::STAGE + to;
#pragma unroll
            for (int n = 0; n < BLOCK / (SENDERS / 8); n++) {
                const u8* row = next + n * (SENDERS / 8) * inputs;
                fetch16(first + n * (SENDERS / 8) * SLAB_ROW, row);
                if (both) fetch16(second + n * (SENDERS / 8) * SLAB_ROW, row + BLOCK);
            }
            arrive_when_there(&shared.full[slot.stage]);
            if (both) arrive_when_there(&shared.full[other.stage]);
            slot = other;
            if (both) slot.advance();
        }
    }
    if (!waited) await_previous();
}

template <int TILES> __device__ __forceinline__ void send_terms(const Tokens& x, const Cut& cut, int tokens) {
    typedef Shape<TILES> S;
    Fixed<TILES>& shared = fixed<TILES>();
    Slot<S::STAGES> slot;
    await_previous();
    for (int i = blockIdx.x / S::TOGETHER; i < cut.items; i += gridDim.x / S::TOGETHER) {
        Item<TILES> item(cut, x, i);
        // Tokens that are there: sums of other rows are nobody's.
        int here = tokens - item.tokens * TILE < TILES * TILE ? tokens - item.tokens * TILE : TILES * TILE;
        int bytes = (here + 7) / 8 * (TERMS / (TILE / 8));
        for (int step = item.first; step < item.end; step++) {
            await(&shared.empty[slot.stage], slot.parity ^ 1);
            if (lane_id() == 0) {
                long long tile = x.tile(item.group * cut.steps + step, item.tokens);
                u64* full = &shared.full[slot.stage];
                u8* to = memory + slot.stage * S::STAGE + WEIGHTS;
                const u8* from = x.terms + tile * TERMS;
                expect(full, bytes + TILES * TILE * 4);
                if constexpr (S::TOGETHER == 1) {
                    bring(to, from, bytes, full);
                } else {
                    int half = bytes / 2, first = blockIdx.x % 2 * half;
                    bring_to_both(to + first, from + first, half, full);
                }
                bring(shared.units[slot.stage], x.units + tile * TILE, TILES * TILE * 4, full);
            }
            slot.advance();
        }
    }
}

template <int TILES>
__device__ __forceinline__ void multiply_all(
    const Matrix (&matrices)[MATRICES], const Tokens& x, const Cut& cut, float* y, int tokens, int rows, int four,
    int warp) {
    typedef Shape<TILES> S;
    Fixed<TILES>& shared = fixed<TILES>();
    Slot<S::STAGES> slot;
    int lane = lane_id();
    int first_tile = TILES == 1 ? 0 : four * S::OWN, column = TILES == 1 ? four * S::COLUMNS : 0;
    int mine = first_tile * TILE + warp * 8 + lane / 4;  // this lane's first token among the block's
    u32 ring = along(shared_address(memory));
    await_previous();
    for (int i = blockIdx.x / S::TOGETHER; i < cut.items; i += gridDim.x / S::TOGETHER) {
        Item<TILES> item(cut, x, i);
        Place at = place_of(matrices, item.row);
        const float* scales = at.of.scales + (long long)(at.row / BLOCK) * cut.steps;
        float total[S::OWN][S::COLUMNS / 4] = {};  // columns 8 j + 2 (lane % 4) + c of a token: total[2 j + c]
        float sums[S::AT_ONCE][S::COLUMNS / 2], by[S::AT_ONCE][S::OWN];
        float ahead = 0.0f;  // a lane's of 32 steps' scales
        auto open = [&](int step, int set, const Slot<S::STAGES>& at) {
            int passed = (step - item.first) % 32;
            if (passed == 0) ahead = step + lane < item.end ? scales[step + lane] : 0.0f;
            float scale = __shfl_sync(ALL, ahead, passed);
            await(&shared.full[at.stage], at.parity);
#pragma unroll
            for (int m = 0; m < S::OWN; m++) by[set][m] = shared.units[at.stage][mine + m * TILE] * scale;
        };
        auto start = [&](int m, int set, int stage) {
            u32 weights = ring + stage * (S::STAGE / 16) + column * (SLAB_ROW / 16);
            u32 terms = ring + (stage * S::STAGE + WEIGHTS + (first_tile + m) * TERMS) / 16;
            begin_products();
#pragma unroll
            for (int k = 0; k < 4; k++)
                products_of_e4m3(sums[set], factor(terms + 2 * k), factor(weights + 2 * k), k > 0);
            close_products();
        };
        auto close = [&](int stage) {
            __syncwarp();
            if (S::TOGETHER == 1 && lane == 0) arrive(&shared.empty[stage]);
            if (S::TOGETHER == 2 && lane < 2) arrive_at(&shared.empty[stage], lane);
        };
        auto add = [&](int m, int set) {
#pragma unroll
            for (int j = 0; j < S::COLUMNS / 8; j++)
#pragma unroll
                for (int c = 0; c < 2; c++)
                    total[m][2 * j + c] = fmaf(
                        fmaf(sums[set][4 * j + 2 + c], 0.0625f, sums[set][4 * j + c]), by[set][m], total[m][2 * j + c]);
        };
        int step = item.first;
        if constexpr (S::AT_ONCE == 2) {
#pragma unroll 1
            for (; step + 1 < item.end; step += 2) {
                Slot<S::STAGES> next = slot;
                next.advance();
                open(step, 0, slot);
                open(step + 1, 1, next);
                publish();
                start(0, 0, slot.stage);
                start(0, 1, next.stage);
                await_products<1>(sums[0]);
                close(slot.stage);
                add(0, 0);
                await_products<0>(sums[1]);
                close(next.stage);
                add(0, 1);
                slot = next;
                slot.advance();
            }
        }
#pragma unroll 1
        for (; step < item.end; step++) {
            open(step, 0, slot);
            publish();
#pragma unroll
            for (int m = 0; m < S::OWN; m++) {
                start(m, 0, slot.stage);
                await_products<0>(sums[0]);
                if (m == S::OWN - 1) close(slot.stage);
                add(m, 0);
            }
            slot.advance();
        }
        float* part = y + (long long)item.part * tokens * rows + (long long)at.before * tokens;
#pragma unroll
        for (int m = 0; m < S::OWN; m++) {
            int token = item.tokens * TILE + mine + m * TILE;
            if (token >= tokens) continue;
            float* out = part + (long long)token * at.of.rows + at.row + column + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < S::COLUMNS / 8; j++)
                *reinterpret_cast<Floats<2>*>(out + 8 * j) = Floats<2>{total[m][2 * j], total[m][2 * j + 1]};
        }
    }
}

#define EACH(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)
#define PARAMETERS(I) const u8* weights##I, const float* scales##I, int rows##I,
#define ENTRY(I) Matrix{weights##I, scales##I, rows##I},

template <int TILES>
__device__ __forceinline__ void products(
    const Matrix (&matrices)[MATRICES], const Tokens& x, const Cut& cut, float* y, int tokens, int rows) {
    Fixed<TILES>& shared = fixed<TILES>();
    if (threadIdx.x < Shape<TILES>::STAGES) {
        make_barrier(&shared.full[threadIdx.x], SENDERS + 1);
        make_barrier(&shared.empty[threadIdx.x], MULTIPLIERS / 32 * Shape<TILES>::TOGETHER);
    }
    publish();  // copies arrive at them
    if (Shape<TILES>::TOGETHER == 1) __syncthreads();
    else meet_cluster();
    int warp = __shfl_sync(ALL, warp_id(), 0);  // the compiler sees that lanes agree
    if (warp < MULTIPLIERS / 32)
        multiply_all<TILES>(matrices, x, cut, y, tokens, rows, warp / 4, warp % 4);
    else if (warp < (MULTIPLIERS + SENDERS) / 32)
        send_weights<TILES>(matrices, x, cut, threadIdx.x - MULTIPLIERS);
    else
        send_terms<TILES>(x, cut, tokens);
    if (Shape<TILES>::TOGETHER > 1) meet_cluster();  // the other one may still arrive here
}

// y: up to eight matrices' products of the same tokens, [tokens, rows] of one behind the other, `rows` in all, and that
// for one part of the inputs after the other.
#define PRODUCTS_OF(TILES, CLUSTER)                                                                                   \
    extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1) penumbra_some_products_##TILES(                         \
        EACH(PARAMETERS) u8* terms, float* units, int tiles, float* y, int tokens, int rows, int steps, int parts,   \
        int per_group, int items) {                                                                                  \
        products<TILES>({EACH(ENTRY)}, {terms, units, tiles}, {steps, parts, per_group, items}, y, tokens, rows);    \
    }
PRODUCTS_OF(1, )
PRODUCTS_OF(2, __cluster_dims__(2))
PRODUCTS_OF(4, __cluster_dims__(2))

// y [4 count] = parts [parts, 4 count], added in their order.
extern "C" __global__ void __launch_bounds__(256) penumbra_some_added(
    const float* parts, float* y, long long count, int number) {
    await_previous();
    long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= count) return;
    Floats<4> sum = reinterpret_cast<const Floats<4>*>(parts)[at];
#pragma unroll 4
    for (int part = 1; part < number; part++) {
        Floats<4> more = reinterpret_cast<const Floats<4>*>(parts)[part * count + at];
#pragma unroll
        for (int i = 0; i < 4; i++) sum.f[i] += more.f[i];
    }
    reinterpret_cast<Floats<4>*>(y)[at] = sum;
}
