// The routed experts of a few tokens: swiglu(gate x, up x), then down, FP4 weights read once and at the memory's speed.
//
// wgmma multiplies 64 rows of weights, e4m3 in registers, by 8 columns of tokens, e4m3 in shared memory: a warp has 16 of
// the rows. It counts few bits of a sum, so a group of 32 inputs, which shares a scale, is one product of its own; the
// scale multiplies it in fp32, where no scale is too far from another (code 0 counts as zero, not 2^-127). A token fills
// two columns, as no e4m3 holds an activation: x = unit (c0 + c1 / 16), off by 2^-9 of x at most, where bf16 is by 2^-8, or
// by 2^-21 of the largest of the 256 inputs that share a unit. So four tokens share a product, and a lane's two columns
// are the terms of one. A block of work with more is cut in fours, of which the second finds its weights in the L2.
//
// Weights are not as the checkpoint has them but in panels (engine/kernels/device/experts_few.py makes those), so that
// little is left to do for each: a panel is 64 rows, in steps of 256 inputs that lie one behind the other. A step is the
// 16 rows of each of four warps: what its lanes load, 16 bytes at a time and in order, then the scales:
//
//   [4 pairs of groups][32 lanes] of four words, [2 halves of the step][16 rows] of a word: four UE8M0 codes
//
// A lane's words are row lane / 4 and row lane / 4 + 8 at 8 inputs of a group of 32, then of the next group: inputs
// 4 (lane % 4) + 0..3 and those 16 later. gate and up share panels: a warp's upper eight rows are gate's, the lower up's.
//
// A word is eight e2m1 weights, which `unpack` spreads over the bytes of two words. Sign, exponent and mantissa come to
// e4m3's places (mask M), where they are the value over 2^6; a weight of the second four is stored xor-ed with bits that
// the shifts bring along, so that two shifts and a mask are all it needs.
//
// The four groups of warps cut the inputs of a panel between them; their sums are added in order. Each warp has a ring of
// steps, filled by bulk copies that lane 0 sends for as soon as a step is in registers. A block takes its share of all
// panels, one behind the other. What is added to what, and in which order, depends on the shapes alone.
//
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its
// own of what stands between #ifndef ON_CPU and #endif.

#include "warpgroup.cuh"

#define TOKENS 8      // of a block of work
#define ROOM 4        // tokens of a product
#define COLUMNS 8     // of a product
#define TERMS 2       // columns of a token
#define THREADS 512
#define WARPS 16
#define FOURS 4       // groups of four warps
#define STEP 256      // inputs
#define M 0x9c9c9c9cu
#define CORE 144      // bytes from 8 columns at 16 inputs, which lie together, to those at the next 16: 16 more than they
                      // are, so that neighbours start in other banks

#ifndef ON_CPU
// A copy, for which the barrier was made alone. By one lane.
__device__ __forceinline__ void send_for(void* to, const void* from, u32 bytes, u64* barrier) {
    u32 at = shared_address(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(at), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(at) : "memory");
}

// The lower half of what tells wgmma where a group's columns are: their address and the distance of the second 16 inputs,
// both in 16 bytes. The upper half is zero: no swizzle, and no second eight columns, whose distance it would say.
__device__ __forceinline__ u32 columns_at(const void* at) {
    u32 address = shared_address(at);
    return (address & 0x3ffff) >> 4 | (u32)(CORE >> 4) << 16;
}
// m64n8k32: a lane has rows lane / 4 (a[0], a[2]) and lane / 4 + 8 (a[1], a[3]) of its warp's 16 at inputs 4 (lane % 4) +
// 0..3, one to a byte, and (a[2], a[3]) those 16 later; columns 2 (lane % 4) + {0, 1} of these rows' sums. On its way
// until awaited.
__device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 columns) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, add, 1, 1;\n"
        "}\n" : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"((u64)columns) : "memory");
}
// The sums of four products, of which LEFT batches may still be on their way; their operands live until here.
template <int LEFT> __device__ __forceinline__ void await_products(float (&s)[4][4], u32 (&a)[4][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(s[j][i]), "+r"(a[j][i]) :: "memory");
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
// Past the L1, which may hold what was there before.
__device__ __forceinline__ int fresh(const int* at) {
    int value;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}
__device__ __forceinline__ Floats<4> fresh4(const float* at) {
    Floats<4> x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(x.f[0]), "=f"(x.f[1]), "=f"(x.f[2]), "=f"(x.f[3]) : "l"(at) : "memory");
    return x;
}
#endif

struct __align__(16) Step {
    Words weights[4][32];
    u32 scales[32];
};

// A part of the work: an expert, and its pairs.
struct __align__(16) Part {
    int expert, count;
    unsigned short pairs[ROOM];
};

// Shared memory of a block: this, then each warp's ring, then the tokens' columns and units, then the parts of work.
struct __align__(128) Shared {
    Floats<4> scales[WARPS][32];                     // of each warp's step: [2 halves][16 rows]
    float sums[2][FOURS][4][2 * 8 * ROOM + 8];       // twice: [warp of four][upper, lower][token][row], and no bank met
    u64 barriers[WARPS][8];
};
extern __shared__ __align__(128) unsigned char memory[];

__device__ __forceinline__ void unpack(u32 w, u32& first, u32& second) {
    first = w & M;
    second = (w << 2 ^ w >> 2) & M;
}

// Four codes -> 2^(code - 127) of each.
__device__ __forceinline__ Floats<4> powers(u32 codes) {
    const u32 exponent = 0x7f800000u;
    return {__uint_as_float(codes << 23 & exponent), __uint_as_float(codes << 15 & exponent),
            __uint_as_float(codes << 7 & exponent), __uint_as_float(codes >> 1 & exponent)};
}

// Cuts the blocks of work that have an owner into parts, of which there are so many. By every warp alone, which all write
// the same. members [blocks, 8] are the pairs of each, from its first place on, `pairs` where there is none.
__device__ __forceinline__ int cut(Part* parts, const int* members, const int* owners, int blocks, int pairs) {
    int all = 0, lane = lane_id();
    for (int base = 0; base < blocks; base += 32) {
        int at = base + lane, held = 0, owner = -1, mine[TOKENS];
        if (at < blocks) {
            owner = fresh(owners + at);
#pragma unroll
            for (int t = 0; t < TOKENS; t++) mine[t] = fresh(members + at * TOKENS + t);
#pragma unroll
            for (int t = 0; t < TOKENS; t++) held += mine[t] < pairs;
        }
        int count = owner < 0 ? 0 : (held + ROOM - 1) / ROOM;
        int before = count;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            int other = __shfl_up_sync(ALL, before, d);
            before += lane >= d ? other : 0;
        }
        int sum = __shfl_sync(ALL, before, 31);
#pragma unroll
        for (int i = 0; i < TOKENS / ROOM; i++) {
            if (i >= count) break;
            Part part = {owner, held - i * ROOM < ROOM ? held - i * ROOM : ROOM};
#pragma unroll
            for (int t = 0; t < ROOM; t++) part.pairs[t] = (unsigned short)mine[i * ROOM + t];
            parts[all + before - count + i] = part;
        }
        all += sum;
    }
    __syncwarp();
    return all;
}

// The steps of a warp: its part of the inputs of one panel after the other.
struct Pipe {
    Step* ring;
    u64* barriers;
    Floats<4>* scales;
    const u8* weights;
    const Part* parts;
    int panels, steps;     // of an expert, of a panel
    int first, last;       // of a panel's steps, this warp's
    int sent, end;         // panels of the block, counted through all parts: the one being sent for
    int step, left;        // which of its steps comes next, and how many do in all
    const u8* next;
    int stages, slot;
    u32 turn;

    // Where a warp's steps of a panel begin.
    __device__ __forceinline__ const u8* start_of(int pass) const {
        if (pass >= end) return nullptr;
        int part = pass / panels, panel = pass - part * panels;
        long long at = ((long long)parts[part].expert * panels + panel) * steps + first;
        return weights + (at * 4 + warp_id() % 4) * sizeof(Step);
    }

    // For the next step, which may be the first of the panel behind.
    __device__ __forceinline__ void send(int to, const u8* behind) {
        if (left > 0 && lane_id() == 0) send_for(ring + to, next, sizeof(Step), barriers + to);
        left--;
        next += 4 * sizeof(Step);
        if (++step == last) {
            step = first;
            sent++;
            next = behind;
        }
    }

    __device__ __forceinline__ void begin(int pass) {
        sent = pass;
        next = start_of(pass);
        step = first;
        left = (end - pass) * (last - first);
        slot = 0;
        turn = 0;
#pragma unroll 1
        for (int s = 0; s < stages; s++) send(s, start_of(sent + 1));
    }

    // Adds the products of a panel to sum: token lane % 4, rows lane / 4 and lane / 4 + 8. units [steps].
    __device__ __forceinline__ void multiply_panel(float (&sum)[2], u32 columns, const Floats<ROOM>* units) {
        int lane = lane_id();
        const u8* behind = start_of(sent + 1);  // as many steps are sent for as are multiplied: one comes to that
        columns += first * (STEP / 16 * CORE / 16);
#pragma unroll 1
        for (int s = first; s < last; s++) {
            await(barriers + slot, turn);
            const Step& from = ring[slot];
            Words in[4];
#pragma unroll
            for (int l = 0; l < 4; l++) in[l] = from.weights[l][lane];
            Floats<4> made = powers(from.scales[lane]);
            __syncwarp();  // all have read the scales of the step before
            scales[lane] = made;
            __syncwarp();  // all have read this step
            send(slot, behind);
            if (++slot == stages) {
                slot = 0;
                turn ^= 1;
            }
            u32 a[2][4][4];
            float products[2][4][4];
#pragma unroll
            for (int b = 0; b < 2; b++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const Words& words = in[2 * b + j / 2];
                    unpack(words.w[j % 2 * 2], a[b][j][0], a[b][j][2]);
                    unpack(words.w[j % 2 * 2 + 1], a[b][j][1], a[b][j][3]);
                }
                begin_products();
#pragma unroll
                for (int j = 0; j < 4; j++) multiply(products[b][j], a[b][j], columns + (4 * b + j) * (2 * CORE / 16));
                close_products();
            }
            Floats<4> scale[2][2];
#pragma unroll
            for (int b = 0; b < 2; b++)
#pragma unroll
                for (int h = 0; h < 2; h++) scale[b][h] = scales[16 * b + 8 * h + lane / 4];
            float unit = units[s].f[lane % 4], terms[4] = {};
            await_products<1>(products[0], a[0]);
            add(terms, products[0], scale[0]);
            await_products<0>(products[1], a[1]);
            add(terms, products[1], scale[1]);
#pragma unroll
            for (int h = 0; h < 2; h++) sum[h] = fmaf(fmaf(terms[2 * h + 1], 0.0625f, terms[2 * h]), unit, sum[h]);
            columns += STEP / 16 * CORE / 16;
        }
    }

    static __device__ __forceinline__ void add(float (&sum)[4], const float (&products)[4][4], const Floats<4> (&scale)[2]) {
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] = fmaf(products[j][i], scale[i / 2].f[j], sum[i]);
    }
};

// row(token) [inputs] fp32 of each of up to ROOM tokens -> their columns, as wgmma reads them: [inputs / 16] times 8
// columns of 16 bytes; and [inputs / STEP] units. By four warps for these steps, which are theirs.
template <typename Row>
__device__ __forceinline__ void stage(u8* columns, Floats<ROOM>* units, int tokens, int first, int last, Row row) {
    int items = (last - first) * tokens, lane = lane_id();  // a token's inputs of a step each
    for (int base = warp_id() % 4; base < items; base += 4 * ROOM) {
        Floats<4> x[ROOM][2];  // all on their way before one is needed
#pragma unroll
        for (int i = 0; i < ROOM; i++) {
            int item = base + 4 * i, step = item / tokens;
            if (item >= items) break;
            const float* from = row(item - step * tokens) + (first + step) * STEP + 4 * lane;
#pragma unroll
            for (int h = 0; h < 2; h++) x[i][h] = fresh4(from + STEP / 2 * h);
        }
#pragma unroll
        for (int i = 0; i < ROOM; i++) {
            int item = base + 4 * i, step = item / tokens, token = item - step * tokens;
            if (item >= items) break;
            step += first;
            u32 most = 0;
#pragma unroll
            for (int n = 0; n < 8; n++) {
                u32 size = __float_as_uint(x[i][n / 4].f[n % 4]) & 0x7fffffffu;
                most = size > most ? size : most;
            }
            // The largest comes to lie between 128 and 256, as far as there are powers of two.
            int exponent = (int)(__reduce_max_sync(ALL, most) >> 23);
            bool finite = exponent < 255;
            exponent = exponent < 8 ? 8 : exponent;
            float factor = __uint_as_float((u32)(261 - exponent) << 23);
            // Weights are 2^-6 of what they mean: their 2^6 is in the unit.
            if (lane == 0) units[step].f[token] = __uint_as_float(finite ? (u32)(exponent - 1) << 23 : 0x7fc00000u);
            u8* to = columns + (step * (STEP / 16) + lane / 4) * CORE + TERMS * token * 16 + lane % 4 * 4;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float rest[4];
#pragma unroll
                for (int n = 0; n < 4; n++) rest[n] = x[i][h].f[n] * factor;
#pragma unroll
                for (int term = 0; term < TERMS; term++) {
                    u32 low = e4m3s(rest[0], rest[1]), high = e4m3s(rest[2], rest[3]);
                    *reinterpret_cast<u32*>(to + 8 * h * CORE + 16 * term) = low | high << 16;
                    float held[4];
                    values_of(low, held[0], held[1]);
                    values_of(high, held[2], held[3]);
#pragma unroll
                    for (int n = 0; n < 4; n++) rest[n] = (rest[n] - held[n]) * 16.0f;
                }
            }
        }
    }
    publish();
}

// This block's panels of all parts of the work. x(pair) is a token's inputs; take(panel, warp of four, row, pair, sums of
// that row and the one 8 below) gets each product. EARLY: the work list was there before the kernel in front began.
template <bool EARLY, typename X, typename Take>
__device__ __forceinline__ void for_panels(
    const u8* weights, int panels, int inputs, const int* members, const int* owners, int blocks, int pairs, int stages,
    X x, Take take) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Step* rings = reinterpret_cast<Step*>(memory + sizeof(Shared));
    u8* columns = reinterpret_cast<u8*>(rings + WARPS * stages);
    Floats<ROOM>* units = reinterpret_cast<Floats<ROOM>*>(columns + inputs / 16 * CORE);
    Part* parts = reinterpret_cast<Part*>(units + inputs / STEP);
    int warp = __shfl_sync(ALL, warp_id(), 0), four = warp / 4, lane = lane_id();  // the compiler sees that lanes agree
    if (lane == 0) {
#pragma unroll 1
        for (int s = 0; s < stages; s++) make_barrier(&shared.barriers[warp][s], 1);
        publish();
    }
    __syncwarp();
    if (!EARLY) await_previous();
    u32 passes = cut(parts, members, owners, blocks, pairs) * panels, block = blockIdx.x;
    u32 share = passes / gridDim.x, more = passes % gridDim.x;
    int pass = block * share + (block < more ? block : more), end = pass + share + (block < more);
    int steps = inputs / STEP, each = (steps + FOURS - 1) / FOURS, first = four * each, last = first + each;
    Pipe pipe;
    pipe.ring = rings + warp * stages;
    pipe.barriers = shared.barriers[warp];
    pipe.scales = shared.scales[warp];
    pipe.weights = weights;
    pipe.parts = parts;
    pipe.panels = panels;
    pipe.steps = steps;
    pipe.first = first < steps ? first : steps;
    pipe.last = last < steps ? last : steps;
    pipe.end = end;
    pipe.stages = stages;
    pipe.begin(pass);
    if (EARLY) await_previous();
    u32 at = columns_at(columns);
    int taken = 0;
    while (pass < end) {
        int number = pass / panels, of = number * panels, until = of + panels < end ? of + panels : end;
        const Part& part = parts[number];
        // All are done with the tokens before: behind their last product all met.
        stage(columns, units, part.count, pipe.first, pipe.last, [&](int t) { return x(part.pairs[t]); });
        __syncthreads();
        for (; pass < until; pass++) {
            float sum[2] = {};
            pipe.multiply_panel(sum, at, units);
            // Two sets of sums take turns: one is written while others still read the last.
            auto& sums = shared.sums[taken++ & 1];
#pragma unroll
            for (int h = 0; h < 2; h++) sums[four][warp % 4][8 * (ROOM * h + lane % 4) + lane / 4] = sum[h];
            __syncthreads();
            if (warp >= part.count) continue;
            int place = lane / 8, row = lane % 8;
            float total[2] = {};
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int f = 0; f < FOURS; f++) total[h] += sums[f][place][8 * (ROOM * h + warp) + row];
            take(pass - of, place, row, part.pairs[warp], total[0], total[1]);
        }
    }
}

// y [pairs, inner]: swiglu(gate x, up x) of pairs (token * picks + pick) that go to the expert owners[block].
extern "C" __global__ void __launch_bounds__(THREADS, 1) penumbra_panels_gate_up(
    const float* x, const u8* weights, const int* members, const int* owners, float* y, int blocks, int pairs, int picks,
    int hidden, int inner, float limit, int stages) {
    auto of_token = [&](int pair) { return x + (long long)(pair / picks) * hidden; };
    for_panels<false>(weights, inner / 32, hidden, members, owners, blocks, pairs, stages, of_token,
                      [&](int panel, int warp, int row, int pair, float g, float u) {
        g = g > limit ? limit : g;
        u = u > limit ? limit : u < -limit ? -limit : u;
        y[(long long)pair * inner + panel * 32 + warp * 8 + row] = g / (1.0f + expf(-g)) * u;
    });
}

// y [pairs, hidden]: shares[pair] * down(x[pair]), x [pairs, inner]. Comes right behind penumbra_panels_gate_up, which
// began when the work list was there: so it is, whether that has ended or not.
extern "C" __global__ void __launch_bounds__(THREADS, 1) penumbra_panels_down(
    const float* x, const u8* weights, const float* shares, const int* members, const int* owners, float* y, int blocks,
    int pairs, int hidden, int inner, int stages) {
    auto of_pair = [&](int pair) { return x + (long long)pair * inner; };
    for_panels<true>(weights, hidden / 64, inner, members, owners, blocks, pairs, stages, of_pair,
                     [&](int panel, int warp, int row, int pair, float upper, float lower) {
        float* at = y + (long long)pair * hidden + panel * 64 + warp * 16 + row;
        float share = shares[pair];
        at[0] = upper * share;
        at[8] = lower * share;
    });
}
