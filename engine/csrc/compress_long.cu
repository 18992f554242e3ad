// The compressors over many tokens: neighbouring tokens pooled into a row, normed, turned, encoded and stored
// (engine/kernels/compress.py says what each of that means). Nearly all its time is spent on reading values and gates once.
//
// Each multiprocessor has one block of eight warps that make rows, in groups with a thread for four channels: two groups
// of four warps, or for the indexer's keys eight of one. Groups take equal parts of the step's tokens, and make the rows
// that those close. A group has STAGES places in shared memory for TAKEN tokens each: while it pools one of them, bulk
// copies bring the next ones. Another warp, its leader, looks up which rows there are, up to 32 at once, and sends for
// them: no row waits for either. What a row still needs of tokens before this step comes from the ring in the same way.
//
//   C4    a stage is a row: the first half of the channels of the four tokens before, the second half of its own four.
//         A thread keeps what is added to their gates in registers.
//   C128  a row is 16 stages, the softmax goes on from one to the next. A group makes two rows at once where it has two:
//         what is added to gates, 256 KB, is then read half as often from the L2 cache, whose bandwidth it takes too.
//
// C4 rings: a token that this kernel remembers (Sender::remembered) lies in a page behind the one its segment begins in,
// and its ring belongs to the page. What rows read of rings are tokens before the segment's beginning, whose pages are
// that one or earlier. So no block writes what another may still be reading. A token's halves are written by the
// two rows that have them, one in its own block and one in the next, which is why both must be closed in this step. The
// other tokens to be remembered, and all of C128's, are another launch's: engine/kernels/device/compress.py.
//
// Sums are added in one fixed order: a row's bits depend neither on where a prompt was cut into steps nor on what else is
// in the step. Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h).

#include "warpgroup.cuh"

#define WARPS 8  // that make rows
#define TAKEN 8   // tokens of a stage, half of their channels of C4
#define STAGES 2  // of a group: 128 KB in all. Three were 3% slower
#define PAGE 256  // tokens
#define C4_RING 16
#define C128_RING 256
#define TURNED 64  // channels, the last ones
#define GROUP 64   // values of a latent that share a scale
#define LATENT_BYTES 576
#define LATENT_NOPE 448
#define SCALE_BYTES 8
#define LOG2_E 1.4426950408889634f
#define INFINITE __uint_as_float(0x7f800000u)

#ifndef ON_CPU
// Of a phase of a barrier, and all that the warp has read before.
__device__ __forceinline__ void arrive(u64* barrier) {
    __syncwarp();
    if (lane_id() == 0)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ float power2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

typedef long long s64;
typedef Floats<4> Four;

// What a group must know of a stage.
struct Record {
    int rows;         // that are made at once, 0: there are no more
    int position;     // of the token that closes the row
    int item;         // of the pool
    u32 here;         // a bit for each token: of this step, what is added to its gate still lacks
    u32 remembered;   // likewise: goes to the ring
    int rings[2];     // its first token's place among the ring's, for each four tokens
};

template <int D, int RATIO> struct Shape {
    static constexpr int MAKERS = D / 128;  // warps of a group that make its rows
    static constexpr int GROUPS = WARPS / MAKERS;
    static constexpr int THREADS = 32 * (WARPS + GROUPS);
    static constexpr int WIDTH = RATIO == 4 ? 2 * D : D;    // channels of a token
    static constexpr int STRIPS = RATIO == 4 ? 1 : RATIO / TAKEN;
    static constexpr int HELD = RATIO == 4 ? 1 : 2;         // rows at once
    static constexpr int LOOKED = RATIO == 4 ? 4 : 8;       // tokens that a lane looks at, at once
    static constexpr int PER_ITEM = PAGE / RATIO;
};

template <int D, int RATIO> struct Shared {
    using S = Shape<D, RATIO>;
    float stages[S::GROUPS][STAGES][TAKEN][2][D];  // values, gates
    float squares[S::GROUPS][2][4];                // sums of warps, of two rows by turns
    u64 full[S::GROUPS][STAGES], empty[S::GROUPS][STAGES];
    Record records[S::GROUPS][STAGES];
};
extern __shared__ __align__(128) unsigned char memory[];

// u, g [tokens, width], so many values from a token to the next; ape [RATIO, width]; norm [D];
// ring [., 16 or 256, 2 width]: a token's values, then gates; positions, segment [tokens]; offsets, starts of segments;
// page_table [., pages], and of the rings' items either [., pages] or, of C128, [.]; freqs [32]; pool: 64 or 2 rows an item.
#define PARAMETERS                                                                                                  \
    const float *u, s64 u_row, const float *g, s64 g_row, const float *ape, const float *norm, float *ring,         \
        const s64 *positions, const int *segment, const int *offsets, const s64 *starts, const int *page_table,     \
        const int *ring_table, int pages, const float *freqs, float eps, u8 *pool, s64 item_stride, int tokens
#define PASSED                                                                                                      \
    u, u_row, g, g_row, ape, norm, ring, positions, segment, offsets, starts, page_table, ring_table, pages, freqs, \
        eps, pool, item_stride, tokens

__device__ __forceinline__ Four read4(const float* from) { return *reinterpret_cast<const Four*>(from); }
__device__ __forceinline__ void write4(float* to, const Four& four) { *reinterpret_cast<Four*>(to) = four; }

// A row that is to be made, as a lane of the leader has looked it up.
struct Row {
    int position, start, end;  // of the token that closes it, and of its segment
    int origin;                // the step's number of the segment's token 0, which may be negative
    int item, rings[2];
};

// The leader's: which rows come next, and which part of them.
template <int D, int RATIO> struct Sender {
    using S = Shape<D, RATIO>;
    int next, last;  // of the group's tokens, those that were not looked at yet
    int base;        // first of those that the lane looked at,
    u32 closing;     // and which of them close rows that were not looked up
    Row row;         // what the lane looked up last,
    u32 ready;       // and which lanes' rows wait,
    u32 chunk, rest; // which are being made, and which of those still lack this strip
    int strip;

    __device__ __forceinline__ void begin(int first, int end) {
        next = first;
        last = end;
        base = 0;
        row = Row{};
        closing = ready = chunk = rest = 0;
        strip = S::STRIPS - 1;
    }

    // More rows, up to 32. Whether there are.
    __device__ __forceinline__ bool look_up(PARAMETERS) {
        int lane = lane_id();
        while (!__ballot_sync(ALL, closing != 0)) {
            if (next >= last) return false;
            base = next + S::LOOKED * lane;
#pragma unroll
            for (int i = 0; i < S::LOOKED; i++)
                if (base + i < last && ((u32)positions[base + i] & (RATIO - 1)) == RATIO - 1) closing |= 1u << i;
            next += 32 * S::LOOKED;
        }
        ready = __ballot_sync(ALL, closing != 0);
        if (closing) {
            int token = base + __ffs((int)closing) - 1, of = segment[token];
            int first = offsets[of], count = offsets[of + 1] - first;
            closing &= closing - 1;
            row.position = (int)positions[token];
            row.start = (int)starts[of];
            row.end = row.start + count;
            row.origin = first - row.start;
            row.item = page_table[(s64)of * pages + row.position / PAGE];
            if (RATIO == 4) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int at = row.position - 7 + 4 * half;
                    row.rings[half] = at < 0 ? 0 : ring_table[(s64)of * pages + at / PAGE] * C4_RING + at % C4_RING;
                }
            } else {
                row.rings[0] = row.rings[1] = ring_table[of] * C128_RING;
            }
        }
        return true;
    }

    // Whether the token's entry in the ring of its page is this kernel's to write: among the last of the page, which is
    // none that the segment begins in, and not of the step's last, whose next block may not be closed.
    __device__ __forceinline__ static bool remembered(int at, int start, int end) {
        return RATIO == 4 && at % PAGE >= PAGE - C4_RING && at / PAGE > start / PAGE && at < end - C4_RING;
    }

    // Sends for the next TAKEN tokens. Whether there are: if not, the group hears of that.
    __device__ __forceinline__ bool send(Record& record, u64* full, float (&stage)[TAKEN][2][D], PARAMETERS) {
        int lane = lane_id();
        if (!rest && ++strip == S::STRIPS) {
            strip = 0;
            chunk = 0;
            if (ready || look_up(PASSED)) {
#pragma unroll
                for (int i = 0; i < S::HELD; i++) {
                    chunk |= ready & (0u - ready);
                    ready &= ready - 1;  // of none, none
                }
            }
        }
        if (!rest) rest = chunk;
        if (!rest) {
            if (lane == 0) {
                record.rows = 0;
                expect(full, 0);
            }
            return false;
        }
        int from = __ffs((int)rest) - 1;
        rest &= rest - 1;
        int position = __shfl_sync(ALL, row.position, from), start = __shfl_sync(ALL, row.start, from);
        int end = __shfl_sync(ALL, row.end, from), origin = __shfl_sync(ALL, row.origin, from);
        int item = __shfl_sync(ALL, row.item, from);
        int first_ring = __shfl_sync(ALL, row.rings[0], from), second_ring = __shfl_sync(ALL, row.rings[1], from);
        // Two lanes for a token, one for its values and one for its gates.
        int k = lane / 2 % TAKEN, part = lane & 1, at = position - (RATIO == 4 ? 7 : RATIO - 1 - TAKEN * strip) + k;
        int half = RATIO == 4 ? k / 4 * D : 0;
        u32 here = __ballot_sync(ALL, lane % 2 == 0 && at >= start), there = __ballot_sync(ALL, lane % 2 == 0 && at >= 0);
        u32 keeps = __ballot_sync(ALL, lane % 2 == 0 && remembered(at, start, end));
        if (RATIO == 4 && position < 7) {
            // Nothing comes before block 0: it weighs nothing.
            for (int i = 4 * lane; i < 4 * D; i += 128) {
                write4(&stage[i / D][0][i % D], Four{});
                write4(&stage[i / D][1][i % D], Four{{-INFINITE, -INFINITE, -INFINITE, -INFINITE}});
            }
            publish();  // before copies come to the same place
            __syncwarp();
        }
        if (lane == 0) {
            u32 eight = 0, kept = 0;
#pragma unroll
            for (int i = 0; i < TAKEN; i++) {
                eight |= (here >> 2 * i & 1) << i;
                kept |= (keeps >> 2 * i & 1) << i;
            }
            record = Record{__popc(chunk), position, item, eight, kept, {first_ring, second_ring}};
            expect(full, __popc(there & 0xffffu) * 2 * D * 4);
        }
        __syncwarp();
        if (lane < 2 * TAKEN && at >= 0) {
            const float* source;
            if (at >= start)
                source = (part ? g + (s64)(origin + at) * g_row : u + (s64)(origin + at) * u_row) + half;
            else if (RATIO == 4)
                source = ring + (s64)((k < 4 ? first_ring : second_ring) + k % 4) * (2 * S::WIDTH) + part * S::WIDTH + half;
            else
                source = ring + (s64)(first_ring + at % C128_RING) * (2 * S::WIDTH) + part * S::WIDTH;
            bring(stage[k][part], source, D * 4, full);
        }
        __syncwarp();
        return true;
    }
};

// Four channels' softmax over tokens so far.
struct Sums {
    Four top, total, weighed;
};

// Adds the tokens of a stage, from the thread's channels on. MORE: there were some before.
template <int D, bool MORE>
__device__ __forceinline__ void add_tokens(
    Sums& sums, const float (&stage)[TAKEN][2][D], int channel, const Four (&ape)[TAKEN], u32 here) {
    Four gates[TAKEN], floor;
#pragma unroll
    for (int k = 0; k < TAKEN; k++) {
        gates[k] = read4(&stage[k][1][channel]);
        if (here >> k & 1)
#pragma unroll
            for (int c = 0; c < 4; c++) gates[k].f[c] += ape[k].f[c];
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
        float higher = MORE ? fmaxf(sums.top.f[c], gates[0].f[c]) : gates[0].f[c];
#pragma unroll
        for (int k = 1; k < TAKEN; k++) higher = fmaxf(higher, gates[k].f[c]);
        // Where all gates are -inf, so far, the power of -inf - -inf is kept from being NaN.
        floor.f[c] = higher == -INFINITE ? 0.0f : -higher * LOG2_E;
        if (MORE) {
            float shrink = power2(fmaf(sums.top.f[c], LOG2_E, floor.f[c]));
            sums.total.f[c] *= shrink;
            sums.weighed.f[c] *= shrink;
        } else {
            sums.total.f[c] = sums.weighed.f[c] = 0.0f;
        }
        sums.top.f[c] = higher;
    }
#pragma unroll
    for (int k = 0; k < TAKEN; k++) {
        Four values = read4(&stage[k][0][channel]);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float weight = power2(fmaf(gates[k].f[c], LOG2_E, floor.f[c]));
            sums.total.f[c] += weight;
            sums.weighed.f[c] = fmaf(weight, values.f[c], sums.weighed.f[c]);
        }
    }
}

// Into the ring, those tokens of a C4 row that are to be remembered: the half that the row has of them.
template <int D>
__device__ __forceinline__ void remember(
    float* ring, const Record& of, u32 which, const float (&stage)[TAKEN][2][D], int channel, const Four (&ape)[TAKEN]) {
#pragma unroll
    for (int k = 0; k < TAKEN; k++) {
        if (!(which >> k & 1)) continue;
        float* to = ring + (s64)(of.rings[k / 4] + k % 4) * (4 * D) + k / 4 * D + channel;
        Four gates = read4(&stage[k][1][channel]);
#pragma unroll
        for (int c = 0; c < 4; c++) gates.f[c] += ape[k].f[c];
        write4(to, read4(&stage[k][0][channel]));
        write4(to + 2 * D, gates);
    }
}

// The smallest power of two that brings what is at most `most` to at most 448; 128 if that is not finite.
__device__ __forceinline__ int scale_exponent(float most) {
    u32 bits = __float_as_uint(fmaxf(most, 1e-4f));
    // 448 is 1.75 * 2^8: a larger mantissa needs one power more.
    return most < INFINITE ? (int)(bits >> 23) - 127 - 8 + ((bits & 0x7fffffu) > 0x600000u) : 128;
}

// The Hadamard turn of a warp's 128 channels, whose sums are in the reference's order.
__device__ __forceinline__ void turn(Four& x) {
    x = Four{{x.f[0] + x.f[1], x.f[0] - x.f[1], x.f[2] + x.f[3], x.f[2] - x.f[3]}};
    x = Four{{x.f[0] + x.f[2], x.f[1] + x.f[3], x.f[0] - x.f[2], x.f[1] - x.f[3]}};
#pragma unroll
    for (int d = 1; d < 32; d *= 2)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float other = __shfl_xor_sync(ALL, x.f[c], d);
            x.f[c] = lane_id() & d ? other - x.f[c] : x.f[c] + other;
        }
}

// Encodes the thread's channels of row `place` of the item, whose rows are LATENT ones of 512 or INDEX ones of 128.
template <int D> __device__ __forceinline__ void store(u8* item, int place, int per_item, int channel, const Four& x) {
    float most = 0.0f;
#pragma unroll
    for (int c = 0; c < 4; c++) most = fmaxf(most, x.f[c] == x.f[c] ? fabsf(x.f[c]) : INFINITE);
#pragma unroll
    for (int d = 1; d < (D == 512 ? GROUP : D) / 4; d *= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, d));
    int exponent = scale_exponent(most);
    float inverse = __uint_as_float((u32)(127 - exponent) << 23);
    u32 codes = e4m3s(x.f[0] * inverse, x.f[1] * inverse) | e4m3s(x.f[2] * inverse, x.f[3] * inverse) << 16;
    if (exponent == 128) codes = 0x7f7f7f7fu;
    u8* row = item + place * (D == 512 ? LATENT_BYTES : D);
    if (D == 512 && channel >= LATENT_NOPE) {
        u32* to = reinterpret_cast<u32*>(row + LATENT_NOPE + 2 * (channel - LATENT_NOPE));
        to[0] = bf16s(x.f[0], x.f[1]);
        to[1] = bf16s(x.f[2], x.f[3]);
    } else {
        *reinterpret_cast<u32*>(row + channel) = codes;
    }
    if (D == 512 && channel % GROUP == 0)
        item[per_item * LATENT_BYTES + place * SCALE_BYTES + channel / GROUP] =
            (u8)(channel < LATENT_NOPE ? exponent + 127 : 0);
    if (D == 128 && channel == 0)
        *reinterpret_cast<float*>(item + per_item * D + place * 4) =
            __uint_as_float(exponent == 128 ? 0x7fc00000u : (u32)(exponent + 127) << 23);
}

// rotate_keys: rows are Hadamard-turned.
template <int D, int RATIO> __device__ __forceinline__ void compress(bool rotate_keys, PARAMETERS) {
    using S = Shape<D, RATIO>;
    Shared<D, RATIO>& s = *reinterpret_cast<Shared<D, RATIO>*>(memory);
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int i = 0; i < S::GROUPS * STAGES; i++) {
            make_barrier(&s.full[0][0] + i, 1);
            make_barrier(&s.empty[0][0] + i, S::MAKERS);
        }
        publish();
    }
    __syncthreads();
    int stage = 0;
    u32 parity = 0;
    auto go_on = [&] {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    };
    if (warp_id() >= WARPS) {
        await_previous();
        int group = warp_id() - WARPS;
        s64 part = (s64)blockIdx.x * S::GROUPS + group, parts = (s64)gridDim.x * S::GROUPS;
        Sender<D, RATIO> sender;
        sender.begin((int)(tokens * part / parts), (int)(tokens * (part + 1) / parts));
        bool sent = true;
#pragma unroll 1
        while (sent) {
            await(&s.empty[group][stage], parity ^ 1);
            sent = sender.send(s.records[group][stage], &s.full[group][stage], s.stages[group][stage], PASSED);
            go_on();
        }
        return;
    }

    int group = warp_id() / S::MAKERS, warp = warp_id() % S::MAKERS, turns = 0;
    int channel = 4 * (threadIdx.x % (32 * S::MAKERS));
    Four weights = read4(norm + channel), added[TAKEN];
    if (RATIO == 4)
#pragma unroll
        for (int k = 0; k < TAKEN; k++) added[k] = read4(ape + k % 4 * S::WIDTH + k / 4 * D + channel);
    await_previous();
#pragma unroll 1
    for (;;) {
        await(&s.full[group][stage], parity);
        int rows = s.records[group][stage].rows;
        if (rows == 0) return;
        Sums sums[S::HELD];
        int made[S::HELD], items[S::HELD];  // positions
#pragma unroll
        for (int r = 0; r < S::HELD; r++) sums[r] = Sums{{{-INFINITE, -INFINITE, -INFINITE, -INFINITE}}, {}, {}};
#pragma unroll 1
        for (int strip = 0; strip < S::STRIPS; strip++) {
            if (RATIO != 4)
#pragma unroll
                for (int k = 0; k < TAKEN; k++) added[k] = read4(ape + (strip * TAKEN + k) * S::WIDTH + channel);
#pragma unroll
            for (int r = 0; r < S::HELD; r++) {
                if (r >= rows) break;
                await(&s.full[group][stage], parity);
                const Record& of = s.records[group][stage];
                made[r] = of.position;
                items[r] = of.item;
                u32 remembered = of.remembered;
                add_tokens<D, (S::STRIPS > 1)>(sums[r], s.stages[group][stage], channel, added, of.here);
                if constexpr (RATIO == 4)
                    if (remembered) remember<D>(ring, of, remembered, s.stages[group][stage], channel, added);
                arrive(&s.empty[group][stage]);
                go_on();
            }
        }
#pragma unroll
        for (int r = 0; r < S::HELD; r++) {
            if (r >= rows) break;
            Four x;
#pragma unroll
            for (int c = 0; c < 4; c++) x.f[c] = sums[r].weighed.f[c] / sums[r].total.f[c];
            float square = (x.f[0] * x.f[0] + x.f[1] * x.f[1]) + (x.f[2] * x.f[2] + x.f[3] * x.f[3]);
#pragma unroll
            for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(ALL, square, d);
            if constexpr (S::MAKERS > 1) {
                float* squares = s.squares[group][turns++ & 1];
                squares[warp] = square;  // lanes write the same
                meet(1 + group, 32 * S::MAKERS);
                Four four = read4(squares);
                square = (four.f[0] + four.f[1]) + (four.f[2] + four.f[3]);
            }
            float scale = rsqrtf(square / D + eps);
#pragma unroll
            for (int c = 0; c < 4; c++) x.f[c] = weights.f[c] * (x.f[c] * scale);
            if (channel >= D - TURNED) {
#pragma unroll
                for (int c = 0; c < 4; c += 2) {
                    float sine, cosine, even = x.f[c], odd = x.f[c + 1];
                    sincosf((float)(made[r] - (RATIO - 1)) * freqs[(channel + c - (D - TURNED)) / 2], &sine, &cosine);
                    x.f[c] = even * cosine - odd * sine;
                    x.f[c + 1] = even * sine + odd * cosine;
                }
            }
            if (D == 128 && rotate_keys) {
                turn(x);
#pragma unroll
                for (int c = 0; c < 4; c++) x.f[c] *= 0.08838834764831845f;  // 128^-0.5
            }
            store<D>(pool + items[r] * item_stride, made[r] / RATIO % S::PER_ITEM, S::PER_ITEM, channel, x);
        }
    }
}

#define KERNEL(D, RATIO) extern "C" __global__ void __launch_bounds__((Shape<D, RATIO>::THREADS), 1)
KERNEL(512, 4) penumbra_compress_c4_latents(PARAMETERS) { compress<512, 4>(false, PASSED); }
KERNEL(128, 4) penumbra_compress_c4_keys(PARAMETERS) { compress<128, 4>(false, PASSED); }
KERNEL(128, 4) penumbra_compress_c4_keys_turned(PARAMETERS) { compress<128, 4>(true, PASSED); }
KERNEL(512, 128) penumbra_compress_c128_latents(PARAMETERS) { compress<512, 128>(false, PASSED); }
