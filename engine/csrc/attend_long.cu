// Attention of few tokens over many keys, keys split over blocks: each block's part of the softmax, and the
// merging of the parts. Where attend_few.cu is short, this is dense: a block takes 64 heads of a token, which are the rows
// of wgmma, so a key is decoded once for all of them.
//
// Decoded keys lie in shared memory as bf16, a slab for 64 channels (warpgroup.cuh): along their rows they are keys, across
// them values. Two tiles of keys take turns, and two warpgroups share the work, each with the sums of 256 channels:
//
//   first   queries times a tile's keys, the softmax's weights into shared memory; weights times values of its channels,
//           and behind them, before those are awaited, queries times the next tile's keys
//   second  decodes the tile after that while the first is at keys and weights; weights times values of its channels
//
// They meet twice a tile: when its weights and the next keys are there, and when it has been read and its place is free.
// A decoder's rows come from memory while it multiplies, straight into registers.
//
// Parts are halves of their own power of two for each row of 256, for what blocks write and read back is most of the
// traffic: 64 KB each. They are in the order in which lanes hold sums, so that a lane writes 16 bytes: value 2 j + c of
// lane q of a quad is channel 8 j + 2 q + c of 32. A block that has all of a token's keys writes what merging would make.
//
// Logits here are those times log2 e. Sums are added in a fixed order: the same bits every time, in any company.
// Written against little of CUDA, so that a test can run it on a CPU (tests/kernels/cuda_on_cpu.h), which brings its
// own of what stands between #ifndef ON_CPU and #endif.

#include "attend.cuh"
#include "warpgroup.cuh"

#define THREADS 256
#define HEADS 64                // of a block
#define SLABS (DIM / CHANNELS)  // of a key
#define HALF (DIM / 2)          // channels of a warpgroup
#define LOG2_E 1.4426950408889634f
#define BATCH 4   // heads whose queries are on their way at once
#define TURNED 64 // channels at most, the last ones

#ifndef ON_CPU
__device__ __forceinline__ float power2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ u32 halves(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ Floats<2> of_halves(u32 both) {
    Floats<2> two;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(two.f[0]), "=f"(two.f[1]) : "r"(both));
    return two;
}
#endif

extern __shared__ __align__(1024) unsigned char memory[];

template <int KEYS> struct Shared {
    u8 queries[SLABS][HEADS * SLAB_ROW];
    u8 keys[2][SLABS][KEYS * SLAB_ROW];
    u8 weights[HEADS * SLAB_ROW];  // of up to 64 keys
    float bias[2][KEYS];           // 0, or -inf where there is no key
    float shrink[HEADS];           // what earlier sums are multiplied by
};

__device__ __forceinline__ int group_warp() { return warp_id() & 3; }
__device__ __forceinline__ int quad() { return lane_id() & 3; }
// The first of the two heads of a lane, eight apart.
__device__ __forceinline__ int lane_head() { return 16 * group_warp() + lane_id() / 4; }

// Some of the queries of a warp's 16 heads; a lane has channels 128 i + 4 lane.
struct Queries {
    Floats<4> rows[BATCH][4];
};

__device__ __forceinline__ void send_for(Queries& to, const float* q, int batch) {
    q += (16 * group_warp() + batch * BATCH) * DIM + 4 * lane_id();
#pragma unroll
    for (int b = 0; b < BATCH; b++)
#pragma unroll
        for (int i = 0; i < 4; i++) to.rows[b][i] = *reinterpret_cast<const Floats<4>*>(q + b * DIM + 128 * i);
}

// Queries of the block's heads, into shared memory; the first batch has been sent for. For the first warpgroup.
template <int KEYS> __device__ __forceinline__ void read_queries(Shared<KEYS>& s, Queries& next, const float* q) {
    int lane = lane_id(), first = 16 * group_warp();
#pragma unroll
    for (int batch = 0; batch < 16 / BATCH; batch++) {
        Queries now = next;
        auto& rows = now.rows;
        if (batch + 1 < 16 / BATCH) send_for(next, q, batch + 1);
#pragma unroll
        for (int b = 0; b < BATCH; b++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u8* to = s.queries[2 * i + lane / 16] + place(first + batch * BATCH + b, lane % 16 / 2) + lane % 2 * 8;
                const Floats<4>& four = rows[b][i];
                *reinterpret_cast<unsigned long long*>(to) =
                    (unsigned long long)bf16s(four.f[2], four.f[3]) << 32 | bf16s(four.f[0], four.f[1]);
            }
    }
}

// A lane of the second warpgroup has keys KEYS / 4 * warp + 8 h + lane / 4 of a tile, a quarter of each group's codes.
template <int KEYS> struct Rows {
    Row rows[KEYS / 32];
};
template <int KEYS> struct Codes {
    Words nope[KEYS / 32][SLABS - 1], rope[KEYS / 32][2];
    u32 scales[KEYS / 32][2];
    bool there[KEYS / 32];
};
template <int KEYS> __device__ __forceinline__ int lane_key(int h) {
    return KEYS / 4 * group_warp() + 8 * h + lane_id() / 4;
}
// Sixteen t of those of the rope values that a lane has of a key: neighbours' are not in the same banks.
__device__ __forceinline__ int rope_sixteen(int key, int t) { return quad() + 4 * ((key + t) & 1); }

template <int KEYS> __device__ __forceinline__ void look_up(Rows<KEYS>& to, const Seen& seen, int tile) {
#pragma unroll
    for (int h = 0; h < KEYS / 32; h++) to.rows[h] = row_of_key(seen, tile * KEYS + lane_key<KEYS>(h));
}

template <int KEYS> __device__ __forceinline__ void send_for(Codes<KEYS>& to, const Rows<KEYS>& from) {
#pragma unroll
    for (int h = 0; h < KEYS / 32; h++) {
        Row row = from.rows[h];
        to.there[h] = row.codes != nullptr;
        to.scales[h][0] = to.scales[h][1] = 0;
#pragma unroll
        for (int g = 0; g < SLABS - 1; g++) to.nope[h][g] = Words{};
#pragma unroll
        for (int t = 0; t < 2; t++) to.rope[h][t] = Words{};
        if (row.codes) {
#pragma unroll
            for (int g = 0; g < SLABS - 1; g++) to.nope[h][g] = read16(row.codes + CHANNELS * g + 16 * quad());
#pragma unroll
            for (int t = 0; t < 2; t++)
                to.rope[h][t] = read16(row.codes + NOPE_BYTES + 16 * rope_sixteen(lane_key<KEYS>(h), t));
            read8(to.scales[h], row.scales);
        }
    }
}

template <int KEYS> __device__ __forceinline__ void decode(Shared<KEYS>& s, int stage, const Codes<KEYS>& codes) {
#pragma unroll
    for (int h = 0; h < KEYS / 32; h++) {
        int key = lane_key<KEYS>(h);
#pragma unroll
        for (int g = 0; g < SLABS - 1; g++) {
            u32 code = codes.scales[h][g / 4] >> 8 * (g % 4) & 255, power = power_of(code);
            Words pairs[2];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 four = codes.nope[h][g].w[i];
                pairs[i / 2].w[i % 2 * 2] = times(e4m3<0>(four), power);
                pairs[i / 2].w[i % 2 * 2 + 1] = times(e4m3<1>(four), power);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
                *reinterpret_cast<Words*>(s.keys[stage][g] + place(key, 2 * quad() + i)) = pairs[i];
        }
#pragma unroll
        for (int t = 0; t < 2; t++)
            *reinterpret_cast<Words*>(s.keys[stage][SLABS - 1] + place(key, rope_sixteen(key, t))) = codes.rope[h][t];
        if (quad() == 0) s.bias[stage][key] = codes.there[h] ? 0.0f : NOTHING;
        // Seldom: codes from 128 on, of which those above LARGEST are meant.
        if ((codes.scales[h][0] & 0x80808080u) | (codes.scales[h][1] & 0x00808080u))
#pragma unroll 1
            for (int g = 0; g < SLABS - 1; g++) {
                u32 code = (g < 4 ? codes.scales[h][0] : codes.scales[h][1]) >> 8 * (g & 3) & 255;
                if (code <= LARGEST) continue;
                for (int i = 0; i < 8; i++) {
                    u32* pair = reinterpret_cast<u32*>(s.keys[stage][g] + place(key, 2 * quad() + i / 4)) + i % 4;
                    *pair = times(*pair, second_power_of(code));
                }
            }
    }
}

// Queues queries times keys of a tile.
template <int KEYS>
__device__ __forceinline__ void score(float (&logits)[KEYS / 2], const Shared<KEYS>& s, int stage) {
    u32 queries = along(shared_address(s.queries)), keys = along(shared_address(s.keys[stage]));
    asm volatile("" : "+r"(queries));  // made anew for each tile, rather than 32 of them kept in registers
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            products_along(logits, factor(queries + (slab * HEADS * SLAB_ROW + k * 32) / 16),
                           factor(keys + (slab * KEYS * SLAB_ROW + k * 32) / 16), slab + k > 0);
}

// Queues weights times values of a tile, those of channels from HALF * half on.
template <int KEYS>
__device__ __forceinline__ void add_values(float (&sums)[HALF / 2], const Shared<KEYS>& s, int stage, int half) {
    u32 weights = along(shared_address(s.weights));
    u32 values = across(shared_address(s.keys[stage][half * SLABS / 2]), KEYS * SLAB_ROW);
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++)
        products_across(sums, factor(weights + k * 32 / 16), factor(values + k * 16 * SLAB_ROW / 16));
}

__device__ __forceinline__ void shrink_sums(float (&sums)[HALF / 2], float upper, float lower) {
    if (__ballot_sync(ALL, upper != 1.0f || lower != 1.0f))
#pragma unroll
        for (int i = 0; i < HALF / 2; i++) sums[i] *= i % 4 < 2 ? upper : lower;
}

// What a lane knows of the softmax of its two heads; a total of its own keys.
struct Softmax {
    float top[2], total[2];
};

// Weights of a tile's keys into shared memory. -> shrink
template <int KEYS>
__device__ __forceinline__ void weigh(
    Shared<KEYS>& s, int stage, float (&logits)[KEYS / 2], Softmax& of, float scale, float (&shrink)[2]) {
    float higher[2] = {of.top[0], of.top[1]};
    int pair = place(lane_head(), 0) + 4 * quad();  // of the first keys; place(., j) is place(., 0) ^ 16 j
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++) {
        Floats<2> bias = *reinterpret_cast<const Floats<2>*>(&s.bias[stage][8 * j + 2 * quad()]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            logits[4 * j + i] = logits[4 * j + i] * scale + bias.f[i % 2];
            higher[i / 2] = fmaxf(higher[i / 2], logits[4 * j + i]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int d = 1; d < 4; d *= 2) higher[r] = fmaxf(higher[r], __shfl_xor_sync(ALL, higher[r], d));
        // Before the first key nothing is known: the power of -inf - -inf is kept from being NaN.
        float floor = higher[r] == NOTHING ? 0.0f : higher[r], sum = 0.0f;
        shrink[r] = power2(of.top[r] - floor);
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
            float low = power2(logits[4 * j + 2 * r] - floor), high = power2(logits[4 * j + 2 * r + 1] - floor);
            sum += low + high;
            *reinterpret_cast<u32*>(s.weights + (pair ^ 16 * j) + 8 * r * SLAB_ROW) = bf16s(low, high);
        }
        of.total[r] = of.total[r] * shrink[r] + sum;
        of.top[r] = higher[r];
        if (quad() == 0) s.shrink[lane_head() + 8 * r] = shrink[r];
    }
}

// Sums of a half's channels -> halves, and their power of two into stats [head][4] from `half` on.
__device__ __forceinline__ void write_sums(const float (&sums)[HALF / 2], int half, unsigned short* parts, float* stats) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float most = 0.0f;
#pragma unroll
        for (int i = 0; i < HALF / 8; i++)
#pragma unroll
            for (int c = 0; c < 2; c++) most = fmaxf(most, fabsf(sums[4 * i + 2 * r + c]));
#pragma unroll
        for (int d = 1; d < 4; d *= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, d));
        int head = lane_head() + 8 * r, power = (int)(__float_as_uint(most) >> 23);
        power = power < 1 ? 1 : power > 253 ? 253 : power;
        float down = __uint_as_float((254u - power) << 23);
        Words* to = reinterpret_cast<Words*>(parts + (long long)head * DIM + half * HALF) + quad();
#pragma unroll
        for (int i = 0; i < HALF / 32; i++) {
            Words eight;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float* two = &sums[16 * i + 4 * j + 2 * r];
                eight.w[j] = halves(two[0] * down, two[1] * down);
            }
            to[4 * i] = eight;
        }
        if (quad() == 0) stats[4 * head + 2 + half] = __uint_as_float((u32)power << 23);
    }
}

// What blocks make of sums: parts and stats, or all of it, to which sinks [heads] belong, and frequencies [pairs] by which
// the last channels of out [tokens, heads, DIM] are turned back, if there are any.
struct Made {
    unsigned short* parts;
    float* stats;
    const float *sink, *freqs;
    int pairs;
    float* out;
};

// Of a lane's two heads, what their sums are multiplied by, into `shrink`; and how the last channels turn, into `bias`. For
// the first warpgroup, when nobody needs what lies there.
template <int KEYS>
__device__ __forceinline__ void conclude(Shared<KEYS>& s, const Softmax& of, const Made& made, int first_head, long long position) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float drain = made.sink[first_head + lane_head() + 8 * r] * LOG2_E, highest = fmaxf(of.top[r], drain);
        if (highest == NOTHING) highest = 0.0f;
        float weight = power2(of.top[r] - highest);
        if (quad() == 0)
            s.shrink[lane_head() + 8 * r] = weight / (of.total[r] * weight + power2(drain - highest));
    }
    if (threadIdx.x < TURNED / 2) {
        int pair = threadIdx.x - (TURNED / 2 - made.pairs);
        float sine = 0.0f, cosine = 1.0f;
        if (made.freqs && pair >= 0) sincosf((float)position * made.freqs[pair], &sine, &cosine);
        s.bias[0][threadIdx.x] = sine;
        s.bias[1][threadIdx.x] = cosine;
    }
}

// Sums of a half's channels -> out, from the block's first head on.
template <int KEYS>
__device__ __forceinline__ void write_all(const Shared<KEYS>& s, const float (&sums)[HALF / 2], int half, float* out) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int head = lane_head() + 8 * r;
        float by = s.shrink[head];
        float* to = out + head * DIM + half * HALF + 2 * quad();
#pragma unroll
        for (int n = 0; n < HALF / 8; n++) {
            float even = sums[4 * n + 2 * r] * by, odd = sums[4 * n + 2 * r + 1] * by;
            if (n >= (HALF - TURNED) / 8 && half) {
                int pair = (8 * n - (HALF - TURNED)) / 2 + quad();
                float sine = s.bias[0][pair], cosine = s.bias[1][pair], turned = even * cosine + odd * sine;
                odd = odd * cosine - even * sine;
                even = turned;
            }
            *reinterpret_cast<Floats<2>*>(to + 8 * n) = Floats<2>{{even, odd}};
        }
    }
}

// window: 256 rows an item; pool: null, or 2^pool_bits rows an item, each of 2^(8 - pool_bits) tokens.
// q [tokens, heads, DIM]; positions, segment [tokens]; tables [., pages]; oldest [.] or null; selected [tokens, picks],
// -1 for none -> parts [tokens, splits, heads, DIM], halves of sums not yet divided; stats [tokens, splits, heads, 4]: the
// highest logit, the sum of weights relative to it, the powers of two of the part's halves. A split without keys has a
// highest logit of -inf and a sum of 0; its part is not written. Or, of one split, out.
#define INPUTS                                                                                                       \
    const float *q, const long long *positions, const int *segment, const int *page_table, const int *swa_table,     \
        const long long *oldest, int pages, const u8 *window, long long window_stride, const u8 *pool,               \
        long long pool_stride, int pool_bits, const int *selected, int picks
#define PASSED                                                                                                       \
    q, positions, segment, page_table, swa_table, oldest, pages, window, window_stride, pool, pool_stride,           \
        pool_bits, selected, picks

template <int KEYS, bool WHOLE>
__device__ __forceinline__ void attend(INPUTS, Made made, int heads, int splits, float scale) {
    Shared<KEYS>& s = *reinterpret_cast<Shared<KEYS>*>(memory);
    int blocks = heads / HEADS, split = blockIdx.x / blocks % splits;
    long long token = blockIdx.x / (blocks * splits);
    int first_head = (int)blockIdx.x % blocks * HEADS;
    // The same for all lanes, which the compiler is told.
    bool weighs = __shfl_sync(ALL, threadIdx.x >> 7, 0) == 0;
    await_previous();
    long long position = positions[token], seg = segment[token];
    q += (token * heads + first_head) * DIM;
    Queries queries;
    if (weighs) send_for(queries, q, 0);
    int finished = 0;
    if (pool) finished = (int)((position + 1) >> (PAGE_BITS - pool_bits));
    if (selected && finished > picks) finished = picks;
    int tiles = WINDOW / KEYS + (finished + KEYS - 1) / KEYS, share = (tiles + splits - 1) / splits;
    int begin = split * share, end = begin + share < tiles ? begin + share : tiles;
    long long at = (long long)blockIdx.x * HEADS;  // of the block's first head in stats
    made.parts += at * DIM;
    made.stats += at * 4;
    made.out += at * DIM;
    if (!WHOLE && begin >= end) {
        if (threadIdx.x < HEADS)
            *reinterpret_cast<Floats<4>*>(made.stats + 4 * threadIdx.x) = Floats<4>{{NOTHING, 0.0f, 0.0f, 0.0f}};
        return;
    }
    float sums[HALF / 2] = {};
    if (weighs) {
        read_queries<KEYS>(s, queries, q);
        publish();
        meet(1, THREADS);
        float logits[KEYS / 2] = {}, shrink[2];
        Softmax softmax = {{NOTHING, NOTHING}, {}};
        begin_products();
        score<KEYS>(logits, s, 0);
        close_products();
        for (int tile = begin; tile < end; tile++) {
            int stage = (tile - begin) & 1;
            await_products<0>(logits);
            weigh<KEYS>(s, stage, logits, softmax, scale * LOG2_E, shrink);
            publish();
            shrink_sums(sums, shrink[0], shrink[1]);
            meet(1, THREADS);
            begin_products();
            add_values<KEYS>(sums, s, stage, 0);
            close_products();
            if (tile + 1 < end) {
                score<KEYS>(logits, s, stage ^ 1);
                close_products();
                await_products<1>(sums);
            } else {
                await_products<0>(sums);
            }
            meet(1, THREADS);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int d = 1; d < 4; d *= 2) softmax.total[r] += __shfl_xor_sync(ALL, softmax.total[r], d);
            if (!WHOLE && quad() == 0)
                *reinterpret_cast<Floats<2>*>(made.stats + 4 * (lane_head() + 8 * r)) =
                    Floats<2>{{softmax.top[r], softmax.total[r]}};
        }
        if constexpr (WHOLE) {
            conclude<KEYS>(s, softmax, made, first_head, position);
            meet(1, THREADS);
            write_all<KEYS>(s, sums, 0, made.out);
        } else {
            write_sums(sums, 0, made.parts, made.stats);
        }
    } else {
        Seen seen = {{window, window_stride, PAGE_BITS, swa_table + seg * pages},
                     {pool, pool_stride, pool_bits, page_table + seg * pages},
                     position, oldest ? oldest[seg] : 0, selected ? selected + token * picks : nullptr, finished};
        Rows<KEYS> rows;
        Codes<KEYS> codes;
        look_up<KEYS>(rows, seen, begin);
        send_for<KEYS>(codes, rows);
        if (begin + 1 < end) look_up<KEYS>(rows, seen, begin + 1);
        decode<KEYS>(s, 0, codes);
        publish();
        meet(1, THREADS);
        if (begin + 1 < end) send_for<KEYS>(codes, rows);
        if (begin + 2 < end) look_up<KEYS>(rows, seen, begin + 2);
        for (int tile = begin; tile < end; tile++) {
            int stage = (tile - begin) & 1;
            if (tile + 1 < end) decode<KEYS>(s, stage ^ 1, codes);
            publish();
            meet(1, THREADS);
            if (tile + 2 < end) send_for<KEYS>(codes, rows);
            shrink_sums(sums, s.shrink[lane_head()], s.shrink[lane_head() + 8]);
            begin_products();
            add_values<KEYS>(sums, s, stage, 1);
            close_products();
            if (tile + 3 < end) look_up<KEYS>(rows, seen, tile + 3);
            await_products<0>(sums);
            meet(1, THREADS);
        }
        if constexpr (WHOLE) {
            meet(1, THREADS);
            write_all<KEYS>(s, sums, 1, made.out);
        } else {
            write_sums(sums, 1, made.parts, made.stats);
        }
    }
}

// Blocks: [tokens][splits][heads / HEADS].
#define PARTIAL(KEYS)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) penumbra_attend_long_##KEYS(                            \
        INPUTS, unsigned short* parts, float* stats, int heads, int splits, float scale) {                           \
        attend<KEYS, false>(PASSED, Made{parts, stats, nullptr, nullptr, 0, nullptr}, heads, splits, scale);         \
    }
PARTIAL(32)
PARTIAL(64)

// Blocks: [tokens][heads / HEADS].
#define ALL_KEYS(KEYS)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) penumbra_attend_all_##KEYS(                             \
        INPUTS, const float* sink, const float* freqs, int pairs, float* out, int heads, float scale) {              \
        attend<KEYS, true>(PASSED, Made{nullptr, nullptr, sink, freqs, pairs, out}, heads, 1, scale);                \
    }
ALL_KEYS(32)
ALL_KEYS(64)

// What the blocks of a merge share: by warp, and by split.
struct Merging {
    float highest[THREADS / 32], total[THREADS / 32], weights[THREADS], sums[THREADS / 32][HALF];
};

// parts and stats of up to as many splits as there are threads -> out [tokens, heads, DIM]: their softmax, with sink
// [heads] in it, a logit that has no value. With freqs [pairs] the last channels, in pairs, are turned back by the token's
// position. A block takes half of a head's channels, a warp every WARPS-th split, AT_ONCE of them on their way at once.
// Blocks: [tokens][heads][2].
template <int WARPS, int AT_ONCE>
__device__ __forceinline__ void merge(
    const unsigned short* parts, const float* stats, const float* sink, const long long* positions,
    const float* freqs, int pairs, float* out, int heads, int splits) {
    let_next_begin();
    Merging& s = *reinterpret_cast<Merging*>(memory);
    int half = blockIdx.x & 1, head = (int)(blockIdx.x / 2) % heads, token = (int)(blockIdx.x / 2) / heads;
    int thread = threadIdx.x, warp = warp_id(), lane = lane_id();
    await_previous();
    long long first = (long long)token * splits * heads + head;  // of split 0 in stats
    Floats<4> own = {{NOTHING, 0.0f, 0.0f, 0.0f}};
    if (thread < splits) own = *reinterpret_cast<const Floats<4>*>(stats + (first + (long long)thread * heads) * 4);
    float drain = sink[head] * LOG2_E;
    // Two channels of a thread.
    int channel = half * HALF + thread / 16 * 32 + thread % 4 * 8 + thread / 4 % 4 * 2;
    int pair = channel / 2 - (DIM / 2 - pairs);
    float angle = 0.0f, sine = 0.0f, cosine = 1.0f;
    if (freqs && pair >= 0 && thread < HALF / 2) angle = (float)positions[token] * freqs[pair];
    float highest = own.f[0];
#pragma unroll
    for (int d = 1; d < 32; d *= 2) highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, d));
    if (lane == 0) s.highest[warp] = highest;
    __syncthreads();
    highest = drain;
#pragma unroll
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, s.highest[w]);
    if (highest == NOTHING) highest = 0.0f;
    float weight = power2(own.f[0] - highest), total = own.f[1] * weight;
    // A split without keys left its part unwritten.
    s.weights[thread] = own.f[1] != 0.0f ? weight * own.f[2 + half] : 0.0f;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) total += __shfl_xor_sync(ALL, total, d);
    if (lane == 0) s.total[warp] = total;
    __syncthreads();
    float sums[8] = {};
    int from = warp;
    do {
        Words some[AT_ONCE] = {};
        float by[AT_ONCE];
        const unsigned short* part = parts + (first + (long long)from * heads) * DIM + half * HALF + 8 * lane;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) by[i] = from + WARPS * i < splits ? s.weights[from + WARPS * i] : 0.0f;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (by[i] != 0.0f) some[i] = *reinterpret_cast<const Words*>(part + (long long)(WARPS * i * DIM) * heads);
        if (angle != 0.0f && from == warp) sincosf(angle, &sine, &cosine);  // while they are on their way
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                Floats<2> two = of_halves(some[i].w[j]);
                sums[2 * j] += by[i] * two.f[0];
                sums[2 * j + 1] += by[i] * two.f[1];
            }
        from += WARPS * AT_ONCE;
    } while (from < splits);
#pragma unroll
    for (int i = 0; i < 2; i++)
        *reinterpret_cast<Floats<4>*>(&s.sums[warp][8 * lane + 4 * i]) =
            Floats<4>{{sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]}};
    __syncthreads();
    if (thread >= HALF / 2) return;
    float even = 0.0f, odd = 0.0f;
    total = power2(drain - highest);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        Floats<2> two = *reinterpret_cast<const Floats<2>*>(&s.sums[w][2 * thread]);
        even += two.f[0];
        odd += two.f[1];
        total += s.total[w];
    }
    even *= 1.0f / total;
    odd *= 1.0f / total;
    *reinterpret_cast<Floats<2>*>(out + ((long long)token * heads + head) * DIM + channel) =
        Floats<2>{{even * cosine + odd * sine, odd * cosine - even * sine}};
}

// For up to SPLITS of them in one go; as many blocks at once as have room for what is on its way.
#define MERGE(SPLITS, WARPS, AT_ONCE, BLOCKS)                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) penumbra_attend_long_merge_##SPLITS(            \
        const unsigned short* parts, const float* stats, const float* sink, const long long* positions,              \
        const float* freqs, int pairs, float* out, int heads, int splits) {                                          \
        merge<WARPS, AT_ONCE>(parts, stats, sink, positions, freqs, pairs, out, heads, splits);                               \
    }
MERGE(4, 4, 1, 12)
MERGE(32, 8, 4, 5)
MERGE(64, 8, 8, 3)
