// The routed experts of a few tokens: swiglu(gate x, up x), then down, FP4 weights read once and at the memory's speed.
//
// wgmma multiplies 64 rows of weights, e4m3 in registers, by 8 columns of tokens, e4m3 in shared memory: a warp has 16 of
// the rows. It counts few bits of a sum, so a group of 32 inputs, which shares a scale, is one product of its own; the
// scale multiplies it in fp32, where no scale is too far from another (code 0 counts as zero, not 2^-127). A token fills
// two columns, as no e4m3 holds an activation: x = unit (c0 + c1 / 16), off by 2^-9 of x at most, where bf16 is by 2^-8, or
// by 2^-21 of the largest of the 256 inputs that share a unit. So four tokens share a product, and a lane's two columns
// are the terms of one. A block of work with more is cut in fours, of which the second finds its weights in the L2.
//
// The four groups of warps cut the inputs of a panel between them; their sums are added in order, by a group that takes
// turns, while the others go on. Each warp has a ring of steps, filled by bulk copies that lane 0 sends for as soon as a
// step is in registers. A block takes its share of all panels of gate and up, one behind the other, and when all blocks
// have, its share of down's, whose first steps it has sent for by then. What is added to what, and in which order, depends
// on the shapes alone.
//
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its
// own of what stands between #ifndef ON_CPU and #endif.

#include "panels.cuh"

#define TOKENS 8      // of a block of work
#define ROOM 4        // tokens of a product
#define COLUMNS 8     // of a product
#define TERMS 2       // columns of a token
#define THREADS 512
#define WARPS 16
#define FOURS 4       // groups of four warps
#define CORE 144      // bytes from 8 columns at 16 inputs, which lie together, to those at the next 16: 16 more than they
                      // are, so that neighbours start in other banks

#ifndef ON_CPU
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
// Products of these factors can begin: none is computed later, as the compiler would like to.
__device__ __forceinline__ void begin_products(u32 (&a)[4][4]) {
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[j][i]));
    begin_products();
}
// The sums of four products, of which LEFT batches may still be on their way; their operands live until here.
template <int LEFT> __device__ __forceinline__ void await_products(float (&s)[4][4], u32 (&a)[4][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(s[j][i]), "+r"(a[j][i]) :: "memory");
}
// Past the L1, which may hold what was there before.
__device__ __forceinline__ int fresh(const int* at) {
    int value;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}
__device__ __forceinline__ Words fresh4(const void* at) {
    Words x;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3]) : "l"(at) : "memory");
    return x;
}
// What this thread knows to be written is so for whoever acquires the sum.
__device__ __forceinline__ u32 add_released(u32* to, u32 more) {
    u32 before;
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(more) : "memory");
    return before;
}
__device__ __forceinline__ u32 acquired(const u32* at) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}
#endif

// A part of the work: an expert, and its pairs.
struct __align__(16) Part {
    int expert, count;
    unsigned short pairs[ROOM];
};

// What a block has to do of one of the two products.
struct Share {
    const u8* weights;
    int panels, steps;  // of an expert, of a panel
    int pass, end;      // the block's panels, counted through all parts
    int first, last;    // the steps of a panel that are a warp's
};
__device__ __forceinline__ Share share_of(const u8* weights, int panels, int inputs, int parts, int four) {
    u32 all = parts * panels, each = all / gridDim.x, more = all % gridDim.x, block = blockIdx.x;
    int pass = block * each + (block < more ? block : more), end = pass + each + (block < more);
    int steps = inputs / STEP, some = (steps + FOURS - 1) / FOURS;
    int first = four * some < steps ? four * some : steps, last = first + some < steps ? first + some : steps;
    return Share{weights, panels, steps, pass, end, first, last};
}
// Where a warp is in what it sends for: a share, a part of the work, a panel of the expert; panels that are left.
struct Sent {
    int share, part, panel, panels;
};

// Shared memory of a block: this, then each warp's ring, then the tokens' columns and units, then the parts of work.
struct __align__(128) Shared {
    Floats<4> scales[WARPS][32];                     // of each warp's step: [2 halves][16 rows]
    float sums[2][FOURS][4][2 * 8 * ROOM + 8];       // twice: [warp of four][upper, lower][token][row], and no bank met
    Share shares[WARPS][2];
    Sent sent[WARPS];
    u64 barriers[WARPS][8];
    u64 full[2], empty[2];                           // of the sums
};
extern __shared__ __align__(128) unsigned char memory[];

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
        int at = base + lane, held = 0, owner = -1;
        Words mine[TOKENS / 4];
        if (at < blocks) {
            owner = fresh(owners + at);
#pragma unroll
            for (int t = 0; t < TOKENS / 4; t++) mine[t] = fresh4(members + at * TOKENS + 4 * t);
#pragma unroll
            for (int t = 0; t < TOKENS; t++) held += (int)mine[t / 4].w[t % 4] < pairs;
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
            for (int t = 0; t < ROOM; t++) part.pairs[t] = (unsigned short)mine[(i * ROOM + t) / 4].w[t % 4];
            parts[all + before - count + i] = part;
        }
        all += sum;
    }
    __syncwarp();
    return all;
}

// The steps of a warp: its part of the inputs of one panel after the other, through both shares. Lane 0 alone knows which
// comes next, and keeps in shared memory what it needs but once a panel.
struct Pipe {
    Step* ring;
    u64* barriers;
    Floats<4>* scales;
    const Share* shares;
    Sent* sent;
    const Part* parts;
    const u8* next;
    int steps;  // of the panel, that are left
    int stages, slot;
    u32 turn;

    __device__ __forceinline__ void begin() {
        slot = 0;
        turn = 0;
        steps = 0;
        if (lane_id() == 0) enter(0);
#pragma unroll 1
        for (int s = 0; s < stages; s++) send(s);
    }
    // To the first panel of this share, or of a later one where there is nothing to do of this.
    __device__ __forceinline__ void enter(int number) {
#pragma unroll 1
        for (; number < 2; number++) {
            const Share& share = shares[number];
            if (share.first == share.last || share.pass == share.end) continue;
            int part = share.pass / share.panels;
            *sent = Sent{number, part, share.pass - part * share.panels, share.end - share.pass};
            steps = share.last - share.first;
            find();
            return;
        }
    }
    __device__ __forceinline__ void find() {
        const Share& share = shares[sent->share];
        long long at = ((long long)parts[sent->part].expert * share.panels + sent->panel) * share.steps + share.first;
        next = share.weights + (at * 4 + warp_id() % 4) * sizeof(Step);
    }
    __device__ __forceinline__ void send(int to) {
        if (lane_id() == 0 && steps) {
            expect(barriers + to, sizeof(Step));
            bring_once(ring + to, next, sizeof(Step), barriers + to);
            next += 4 * sizeof(Step);
            if (--steps == 0) turn_page();
        }
        __syncwarp();  // for products, and scales
    }
    // To the next panel.
    __device__ __forceinline__ void turn_page() {
        if (--sent->panels == 0) {
            enter(sent->share + 1);
            return;
        }
        const Share& share = shares[sent->share];
        steps = share.last - share.first;
        next += 4 * (share.steps - steps) * sizeof(Step);
        if (++sent->panel == share.panels) {
            sent->panel = 0;
            sent->part++;
            find();
        }
    }

    // Adds the products of a panel to sum: token lane % 4, rows lane / 4 and lane / 4 + 8. units [steps].
    __device__ __forceinline__ void multiply_panel(
        float (&sum)[2], int first, int last, u32 columns, const Floats<ROOM>* units) {
        int lane = lane_id();
        columns += first * (STEP / 16 * CORE / 16);
#pragma unroll 1
        for (int s = first; s < last; s++) {
            await(barriers + slot, turn);
            const Step& from = ring[slot];
            Words in[4];
#pragma unroll
            for (int l = 0; l < 4; l++) in[l] = from.weights[l][lane];
            Floats<4> made = powers(from.scales[lane]);
            __syncwarp();  // all have read this step, and the scales of the one before
            scales[lane] = made;
            send(slot);
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
                begin_products(a[b]);
#pragma unroll
                for (int j = 0; j < 4; j++) multiply(products[b][j], a[b][j], columns + (4 * b + j) * (2 * CORE / 16));
                close_products();
            }
            float unit = units[s].f[lane % 4], terms[4] = {};
            Floats<4> scale[2] = {scales[lane / 4], scales[8 + lane / 4]};
            await_products<1>(products[0], a[0]);
            add(terms, products[0], scale);
            scale[0] = scales[16 + lane / 4];
            scale[1] = scales[24 + lane / 4];
            await_products<0>(products[1], a[1]);
            add(terms, products[1], scale);
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
// columns of 16 bytes; and [inputs / STEP] units. By the four warps whose steps these are.
template <typename Row>
__device__ __forceinline__ void stage(
    u8* columns, Floats<ROOM>* units, int tokens, int first, int last, int warp, Row row) {
    int items = (last - first) * tokens, lane = lane_id();  // a token's inputs of a step each
    for (int base = warp; base < items; base += 4 * ROOM) {
        Words x[ROOM][2];  // all on their way before one is needed
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
                u32 size = x[i][n / 4].w[n % 4] & 0x7fffffffu;
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
                for (int n = 0; n < 4; n++) rest[n] = __uint_as_float(x[i][h].w[n]) * factor;
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

// How many blocks have come, of 2^31: the first one counts for all that are not there.
__device__ u32 met;

// Until all blocks have come here, and what they wrote can be read past the L1. All are there at once: they are no more than
// multiprocessors, what is in front of them ends without them, and what is behind them begins when all have begun. Two such
// kernels that run at once could each keep the other's blocks out, so all of a process are on one stream.
__device__ __forceinline__ void meet_all() {
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 before = add_released(&met, blockIdx.x ? 1 : (1u << 31) - (gridDim.x - 1));
        while ((acquired(&met) ^ before) >> 31 == 0) {}
    }
    __syncthreads();
}

// y [pairs, hidden]: shares[pair] * down(h[pair]), h [pairs, inner]: swiglu(gate x, up x), of pairs (token * picks + pick)
// that go to the expert owners[block]. x [tokens, hidden].
extern "C" __global__ void __launch_bounds__(THREADS, 1) penumbra_experts_few(
    const float* x, const u8* gate_up, const u8* down, const float* shares, const int* members, const int* owners, float* h,
    float* y, int blocks, int tokens, int picks, int hidden, int inner, float limit, int stages) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int most = hidden > inner ? hidden : inner;
    Step* rings = reinterpret_cast<Step*>(memory + sizeof(Shared));
    u8* columns = reinterpret_cast<u8*>(rings + WARPS * stages);
    Floats<ROOM>* units = reinterpret_cast<Floats<ROOM>*>(columns + most / 16 * CORE);
    Part* parts = reinterpret_cast<Part*>(units + most / STEP);
    int warp = __shfl_sync(ALL, warp_id(), 0), four = warp / 4, slot = warp % 4;  // the compiler sees that lanes agree
    int place = lane_id() / 8, row = lane_id() % 8;
    if (lane_id() == 0) {
#pragma unroll 1
        for (int s = 0; s < stages; s++) make_barrier(&shared.barriers[warp][s], 1);
        if (warp < 2) {
            make_barrier(&shared.full[warp], WARPS);
            make_barrier(&shared.empty[warp], 4);
        }
        publish();
    }
    __syncthreads();
    await_previous();
    int count = cut(parts, members, owners, blocks, tokens * picks);
    const Share &first = shared.shares[warp][0], &second = shared.shares[warp][1];
    if (lane_id() < 2) {
        bool behind = lane_id() == 1;
        shared.shares[warp][lane_id()] = share_of(
            behind ? down : gate_up, behind ? hidden / 64 : inner / 32, behind ? inner : hidden, count, four);
    }
    __syncwarp();
    Pipe pipe{rings + warp * stages, shared.barriers[warp], shared.scales[warp], shared.shares[warp], &shared.sent[warp],
              parts, nullptr, 0, stages};
    pipe.begin();

    // The four warps need columns only at their own steps of a panel, and so do this without the others.
    auto stage_own = [&](const Share& share, int count, auto row_of) {
        meet(1 + four, 4 * 32);  // all are done with those before
        stage(columns, units, count, share.first, share.last, slot, row_of);
        meet(1 + four, 4 * 32);
    };
    u32 at = columns_at(columns), taken = 0;
    int pair = 0, column = 0;  // of this warp's slot of a part; pair -1: of none
    // enter(part) stages what is to be, take(panel, sums of a row, and of the one 8 below) gets each product.
    auto multiply = [&](const Share& share, auto enter, auto take) {
        int number = share.pass / share.panels, panel = share.pass - number * share.panels;
        bool entered = false;
#pragma unroll 1
        for (int left = share.end - share.pass; left > 0; left--) {
            if (!entered) {
                const Part& part = parts[number];
                pair = slot < part.count ? part.pairs[slot] : -1;
                column = slot;
                enter(part);
                entered = true;
            }
            float sum[2] = {};
            pipe.multiply_panel(sum, share.first, share.last, at, units);
            // Two sets of sums take turns, and the fours: one adds up a set while the others may fill the next.
            u32 set = taken % 2, turn = taken / 2 % 2;
            auto& sums = shared.sums[set];
            await(&shared.empty[set], turn ^ 1);
#pragma unroll
            for (int i = 0; i < 2; i++) sums[four][slot][8 * (ROOM * i + lane_id() % 4) + lane_id() / 4] = sum[i];
            arrive(&shared.full[set]);
            if (four == taken++ % FOURS) {
                await(&shared.full[set], turn);
                float total[2] = {};
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int f = 0; f < FOURS; f++) total[i] += sums[f][place][8 * (ROOM * i + column) + row];
                arrive(&shared.empty[set]);
                if (pair >= 0) take(panel, total[0], total[1]);
            }
            if (++panel == share.panels) {
                panel = 0;
                number++;
                entered = false;
            }
        }
    };

    bool few = tokens <= ROOM;  // all are staged at once, for whatever part
    if (few) stage_own(first, tokens, [&](int token) { return x + (long long)token * hidden; });
    multiply(first, [&](const Part& part) {
        if (few) column = pair < 0 ? 0 : pair / picks;
        else stage_own(first, part.count, [&](int t) { return x + (long long)(part.pairs[t] / picks) * hidden; });
    }, [&](int panel, float g, float u) {
        g = g > limit ? limit : g;
        u = u > limit ? limit : u < -limit ? -limit : u;
        h[(long long)pair * inner + panel * 32 + place * 8 + row] = g / (1.0f + expf(-g)) * u;
    });
    meet_all();
    float weight = 0.0f;
    multiply(second, [&](const Part& part) {
        if (pair >= 0) weight = shares[pair];
        stage_own(second, part.count, [&](int t) { return h + (long long)part.pairs[t] * inner; });
    }, [&](int panel, float upper, float lower) {
        float* to = y + (long long)pair * hidden + panel * 64 + place * 16 + row;
        to[0] = upper * weight;
        to[8] = lower * weight;
    });
}
