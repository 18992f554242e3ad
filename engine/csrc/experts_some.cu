// The routed experts of more tokens than a few: swiglu(gate x, up x), then down, FP4 weights by up to 64 tokens at once.
//
// wgmma multiplies 64 rows of weights, e4m3 in registers, by N columns of tokens, e4m3 in shared memory: a warp has 16 of
// the rows. No e4m3 holds an activation, so a token is two terms, and two products are added up: x = unit (c0 + c1), off by
// 2^-9 of x at most, where bf16 is too, or by 2^-18 of the token's largest input. wgmma counts 13 bits of a sum, so a group
// of 32 inputs, which shares a scale, is a sum of its own; the scale multiplies it in fp32. That is an instruction for each
// row and token of a group, which issue in the time that the tensor cores take for both terms of them.
//
// `penumbra_experts_terms` makes terms of tokens, in the order in which the work list has them and as wgmma reads them, so
// that a step of a part is one copy. A part is an expert and up to `block` of its pairs; `block` is 16, 32 or 64, and N the
// least of these that holds them. A block of threads takes a part and four panels of its expert, one to each of four
// warpgroups, then the next such that no block has taken: so all are at panels that are neighbours, what several need of an
// expert or of a part is read once to the L2, and none is done long before the others. One warp more sends for steps,
// weights and tokens, as soon as a stage of the ring is read, through all the block's work. A sum's terms and their order
// depend on the shapes alone.
//
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its
// own of what stands between #ifndef ON_CPU and #endif.

#include "panels.cuh"

#define FOURS 4        // warpgroups, each with a panel
#define WARPS 16       // that multiply
#define THREADS 544
#define MOST_STAGES 8
#define CORE 128       // bytes: 8 columns of 16 inputs
#define PIECE 4096     // of 8 columns of a step: [8 groups][2 terms][2 halves of 16 inputs] of such
#define TERM_THREADS 256

#ifndef ON_CPU
// What tells wgmma where a group's columns are: their address, the distance of the second 16 inputs, that of the next eight
// columns, all in 16 bytes; no swizzle.
__device__ __forceinline__ u64 columns_at(const void* at) {
    return (u64)(PIECE >> 4) << 32 | (shared_address(at) & 0x3ffff) >> 4 | CORE >> 4 << 16;
}
// m64nNk32: a lane has rows lane / 4 (a[0], a[2]) and lane / 4 + 8 (a[1], a[3]) of its warp's 16 at inputs 4 (lane % 4) +
// 0..3, one to a byte, and (a[2], a[3]) those 16 later; sums as in warpgroup.cuh, += or, without ADD, =.
template <bool ADD> __device__ __forceinline__ void multiply(float (&sums)[8], const u32 (&a)[4], u64 columns) {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, %13, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, "
        "add, 1, 1;}"
        : FOUR(0), FOUR(4) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns), "n"((int)ADD));
}
template <bool ADD> __device__ __forceinline__ void multiply(float (&sums)[16], const u32 (&a)[4], u64 columns) {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {" SUMS_16 "}, {%16, %17, %18, %19}, %20, add, 1, 1;}"
        : SIXTEEN(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns), "n"((int)ADD));
}
template <bool ADD> __device__ __forceinline__ void multiply(float (&sums)[32], const u32 (&a)[4], u64 columns) {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" SUMS_32 "}, {%32, %33, %34, %35}, %36, add, 1, 1;}"
        : SIXTEEN(0), SIXTEEN(16) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns), "n"((int)ADD));
}
// Products of these factors can begin: none is computed later, as the compiler would like to.
template <int GROUPS> __device__ __forceinline__ void begin_products(u32 (&a)[GROUPS][4]) {
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[g][i]));
    begin_products();
}
// All sums; their operands live until here.
template <int GROUPS, int COUNT>
__device__ __forceinline__ void await_products(float (&sums)[GROUPS][COUNT], u32 (&a)[GROUPS][4]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[g][i]) :: "memory");
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[g][i]) :: "memory");
    }
}
#endif

// What a stage is of: a part, four panels of its expert, how many pairs it holds. Part -1: the work is done.
struct __align__(16) Told {
    int part, tile, held;
};

// Shared memory of a block: this, then the ring: columns of a step, and the panels of the four.
struct __align__(128) Shared {
    u64 full[MOST_STAGES], empty[MOST_STAGES];
    Told told[MOST_STAGES];
};
extern __shared__ __align__(128) unsigned char memory[];

// What a launch multiplies: for every part and each of `panels` of its expert, `steps` steps.
struct Work {
    const int *members, *owners;  // [parts, block] pairs of each, from its first place on, `pairs` where there is none
    int parts, pairs, panels, steps, block;

    __device__ __forceinline__ u32 columns() const { return block / 8 * PIECE; }  // bytes of a step
    __device__ __forceinline__ u32 stage() const { return columns() + FOURS * 4 * sizeof(Step); }
    // Parts that have an owner: the first ones.
    __device__ __forceinline__ int used() const {
        u32 mine = 0;
        for (int at = lane_id(); at < parts; at += 32) mine += owners[at] >= 0;
        return (int)__reduce_add_sync(ALL, mine);
    }
};

struct __align__(8) Pairs {
    int of[2];
};

// A ring of stages, of which one is next.
struct Ring {
    int stages, slot;
    u32 turn;

    __device__ __forceinline__ void pass() {
        if (++slot == stages) {
            slot = 0;
            turn ^= 1;
        }
    }
};

// An expert and, of the members of a part of it, a lane's own: on their way until used.
struct Found {
    int owner, first, second;
};
__device__ __forceinline__ Found find(const Work& work, u32 part, int used) {
    Found found = {0, work.pairs, work.pairs};
    if (part >= used) return found;
    const int* members = work.members + part * work.block;
    found.owner = work.owners[part];
    if (lane_id() < work.block) found.first = members[lane_id()];
    if (lane_id() + 32 < work.block) found.second = members[lane_id() + 32];
    return found;
}

// Sends for every step of the block's work. By one warp. Which is next it asks for while it sends for what is in front.
__device__ __forceinline__ void send_all(
    const Work& work, const u8* panels, const u8* columns, u32* counter, int stages) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Ring ring = {stages, 0, 0};
    int used = work.used(), lane = lane_id();
    u32 tiles = work.panels / FOURS, all = used * tiles, bytes = 4 * sizeof(Step);  // of a panel's step
    u32 item = blockIdx.x, taken = 0;
    Found found = find(work, item / tiles, used);
    if (lane == 0) taken = atomicAdd(counter, 1);
#pragma unroll 1
    while (item < all) {
        u32 next = gridDim.x + __shfl_sync(ALL, taken, 0);
        Found behind = find(work, next / tiles, used);
        if (lane == 0) taken = atomicAdd(counter, 1);
        int part = item / tiles, tile = item - part * tiles;
        int held = (int)__reduce_add_sync(ALL, (found.first < work.pairs) + (found.second < work.pairs));
        const u8* weights =
            panels + ((long long)found.owner * work.panels + tile * FOURS) * work.steps * bytes;
        const u8* tokens = columns + (long long)part * work.steps * work.columns();
        u32 some = (held + 7) / 8 * PIECE;
#pragma unroll 1
        for (int s = 0; s < work.steps; s++) {
            if (lane == 0) {
                await(&shared.empty[ring.slot], ring.turn ^ 1);
                u64* full = &shared.full[ring.slot];
                u8* to = memory + sizeof(Shared) + ring.slot * work.stage();
                shared.told[ring.slot] = Told{part, tile, held};
                expect(full, some + FOURS * bytes);
                bring(to, tokens, some, full);
                to += work.columns();
#pragma unroll
                for (int f = 0; f < FOURS; f++)
                    bring(to + f * bytes, weights + (long long)f * work.steps * bytes, bytes, full);
            }
            __syncwarp();
            weights += bytes;
            tokens += work.columns();
            ring.pass();
        }
        item = next;
        found = behind;
    }
    if (lane == 0) {
        await(&shared.empty[ring.slot], ring.turn ^ 1);
        shared.told[ring.slot] = Told{-1, 0, 0};
        expect(&shared.full[ring.slot], 0);
    }
}

// Code `n` of four -> 2^(code - 127).
__device__ __forceinline__ float power(u32 codes, int n) {
    return __uint_as_float((n < 3 ? codes << (23 - 8 * n) : codes >> 1) & 0x7f800000u);
}

// Adds a step's products to sum, which is as warpgroup.cuh says. Groups that follow each other share a batch of products,
// so that there are 32 sums on their way however many columns there are.
template <int N> __device__ __forceinline__ void multiply_step(float (&sum)[N / 2], const Step& from, u64 columns) {
    const int GROUPS = 64 / N, BATCHES = STEP / 32 / GROUPS;
    int lane = lane_id();
    u32 codes[2][2];
#pragma unroll
    for (int i = 0; i < 4; i++) codes[i / 2][i % 2] = from.scales[8 * i + lane / 4];
    Words words;
    u32 a[2][GROUPS][4];
    auto fill = [&](u32 (&a)[GROUPS][4], int first) {
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            int group = first + g;
            if (group % 2 == 0) words = from.weights[group / 2][lane];
            unpack(words.w[group % 2 * 2], a[g][0], a[g][2]);
            unpack(words.w[group % 2 * 2 + 1], a[g][1], a[g][3]);
        }
    };
    fill(a[0], 0);
#pragma unroll
    for (int b = 0; b < BATCHES; b++) {
        float made[GROUPS][N / 2];
        begin_products(a[b % 2]);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            u64 at = columns + (b * GROUPS + g) * (4 * CORE >> 4);
            multiply<false>(made[g], a[b % 2][g], at);
            multiply<true>(made[g], a[b % 2][g], at + (2 * CORE >> 4));
        }
        close_products();
        if (b + 1 < BATCHES) fill(a[(b + 1) % 2], (b + 1) * GROUPS);
        await_products(made, a[b % 2]);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            int group = b * GROUPS + g;
            float scale[2] = {power(codes[group / 4][0], group % 4), power(codes[group / 4][1], group % 4)};
#pragma unroll
            for (int n = 0; n < N / 2; n++) sum[n] = fmaf(made[g][n], scale[n / 2 % 2], sum[n]);
        }
    }
}

// A panel's product with all columns of a part, whose first step has come; take(pair, upper, lower) gets a lane's sums.
template <int N, typename Take>
__device__ __forceinline__ void multiply_panel(
    const Work& work, Ring& ring, const float* units, const Told& told, Take take) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    float sum[N / 2] = {};
#pragma unroll 1
    for (int s = 0; s < work.steps; s++) {
        await(&shared.full[ring.slot], ring.turn);
        const u8* stage = memory + sizeof(Shared) + ring.slot * work.stage();
        const Step* steps = reinterpret_cast<const Step*>(stage + work.columns());
        multiply_step<N>(sum, steps[warp_id()], columns_at(stage));
        arrive(&shared.empty[ring.slot]);
        ring.pass();
    }
    Pairs pairs[N / 8];  // all on their way before one is needed
    Floats<2> by[N / 8];
    int own = lane_id() % 4 * 2, first = told.part * work.block + own;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        pairs[j] = *reinterpret_cast<const Pairs*>(work.members + first + 8 * j);
        by[j] = *reinterpret_cast<const Floats<2>*>(units + first + 8 * j);
    }
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int c = 0; c < 2; c++)
            if (8 * j + own + c < told.held)
                take(pairs[j].of[c], sum[4 * j + c] * by[j].f[c], sum[4 * j + 2 + c] * by[j].f[c]);
}

// Every product of the block's share of the work; take(panel, pair, upper, lower).
template <typename Take>
__device__ __forceinline__ void multiply_all(
    const Work& work, const u8* panels, const u8* columns, const float* units, u32* counter, int stages,
    Take take) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int warp = __shfl_sync(ALL, warp_id(), 0);  // the compiler sees that lanes agree
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int s = 0; s < stages; s++) {
            make_barrier(&shared.full[s], 1);
            make_barrier(&shared.empty[s], WARPS);
        }
        publish();
    }
    __syncthreads();
    await_previous();
    if (warp == WARPS) {
        send_all(work, panels, columns, counter, stages);
        return;
    }
    Ring ring = {stages, 0, 0};
#pragma unroll 1
    while (true) {
        await(&shared.full[ring.slot], ring.turn);
        Told told = shared.told[ring.slot];
        if (told.part < 0) break;
        int panel = told.tile * FOURS + warp / 4;
        auto take_own = [&](int pair, float upper, float lower) { take(panel, pair, upper, lower); };
        if (told.held <= 16) multiply_panel<16>(work, ring, units, told, take_own);
        else if (told.held <= 32) multiply_panel<32>(work, ring, units, told, take_own);
        else multiply_panel<64>(work, ring, units, told, take_own);
    }
}

// h [pairs, inner]: swiglu(gate x, up x). units as `penumbra_experts_terms` made them, and columns.
extern "C" __global__ void __launch_bounds__(THREADS, 1) penumbra_experts_gate_up(
    const u8* panels, const u8* columns, const float* units, const int* members, const int* owners, u32* counter, float* h,
    int parts, int pairs, int hidden, int inner, int block, float limit, int stages) {
    Work work = {members, owners, parts, pairs, inner / 32, hidden / STEP, block};
    int row = warp_id() % 4 * 8 + lane_id() / 4;
    multiply_all(work, panels, columns, units, counter, stages, [&](int panel, int pair, float g, float u) {
        g = g > limit ? limit : g;
        u = u > limit ? limit : u < -limit ? -limit : u;
        h[(long long)pair * inner + panel * 32 + row] = g / (1.0f + expf(-g)) * u;
    });
}

// y [pairs, hidden]: shares[pair] * down(h[pair]), whose units hold the shares.
extern "C" __global__ void __launch_bounds__(THREADS, 1) penumbra_experts_down(
    const u8* panels, const u8* columns, const float* units, const int* members, const int* owners, u32* counter, float* y,
    int parts, int pairs, int hidden, int inner, int block, int stages) {
    Work work = {members, owners, parts, pairs, hidden / 64, inner / STEP, block};
    int row = warp_id() % 4 * 16 + lane_id() / 4;
    multiply_all(work, panels, columns, units, counter, stages, [&](int panel, int pair, float upper, float lower) {
        float* to = y + (long long)pair * hidden + panel * 64 + row;
        to[0] = upper;
        to[8] = lower;
    });
}

// x [., inputs] fp32, of which a pair has row pair / picks -> columns [parts, inputs / STEP, block / 8, PIECE] and units
// [parts, block] of the pairs in members, times shares[pair] where there are shares; counter 0. A block takes eight of
// them, its warps one each to find the unit; then a warp takes every eighth step, a lane one of the eight at every fourth
// 16 inputs.
extern "C" __global__ void __launch_bounds__(TERM_THREADS) penumbra_experts_terms(
    const float* x, const float* shares, const int* members, const int* owners, u8* columns, float* units, u32* counter,
    int pairs, int picks, int inputs, int block) {
    float* factors = reinterpret_cast<float*>(memory);
    int warp = warp_id(), lane = lane_id(), eights = block / 8, part = blockIdx.x / eights, eight = blockIdx.x % eights;
    await_previous();
    if (blockIdx.x == 0 && threadIdx.x == 0) *counter = 0;
    const int* mine = members + part * block + eight * 8;
    if (owners[part] < 0 || mine[0] >= pairs) return;
    if (mine[warp] < pairs) {
        const float* row = x + (long long)(mine[warp] / picks) * inputs;
        u32 most = 0;
#pragma unroll 8
        for (int k = 4 * lane; k < inputs; k += 128) {
            Words in = *reinterpret_cast<const Words*>(row + k);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                u32 size = in.w[n] & 0x7fffffffu;
                most = size > most ? size : most;
            }
        }
        // The largest comes to lie between 128 and 256, as far as there are powers of two.
        int exponent = (int)(__reduce_max_sync(ALL, most) >> 23);
        bool finite = exponent < 255;
        exponent = exponent < 8 ? 8 : exponent;
        if (lane == 0) {
            factors[warp] = __uint_as_float((u32)(261 - exponent) << 23);
            // Weights are 2^-6 of what they mean: their 2^6 is in the unit.
            float unit = __uint_as_float(finite ? (u32)(exponent - 1) << 23 : 0x7fc00000u);
            units[part * block + eight * 8 + warp] = shares ? unit * shares[mine[warp]] : unit;
        }
    }
    __syncthreads();
    int pair = mine[lane % 8], steps = inputs / STEP;
    if (pair >= pairs) return;
    const float* row = x + (long long)(pair / picks) * inputs;
    float factor = factors[lane % 8];
    for (int step = warp; step < steps; step += TERM_THREADS / 32) {
        u8* piece = columns + ((long long)(part * steps + step) * eights + eight) * PIECE;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int sixteen = 4 * i + lane / 8;
            Words first, second;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                Floats<4> in = reinterpret_cast<const Floats<4>*>(row + step * STEP + sixteen * 16)[j];
                float held[4];
#pragma unroll
                for (int n = 0; n < 4; n++) in.f[n] *= factor;
                u32 low = e4m3s(in.f[0], in.f[1]), high = e4m3s(in.f[2], in.f[3]);
                values_of(low, held[0], held[1]);
                values_of(high, held[2], held[3]);
                first.w[j] = low | high << 16;
#pragma unroll
                for (int n = 0; n < 4; n++) in.f[n] -= held[n];
                second.w[j] = e4m3s(in.f[0], in.f[1]) | e4m3s(in.f[2], in.f[3]) << 16;
            }
            u8* to = piece + sixteen / 2 * (4 * CORE) + sixteen % 2 * CORE + lane % 8 * 16;
            *reinterpret_cast<Words*>(to) = first;
            *reinterpret_cast<Words*>(to + 2 * CORE) = second;
        }
    }
}
